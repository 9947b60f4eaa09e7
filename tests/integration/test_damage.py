"""One damaged job never stops others: garbage in its hash, its keys of another type, its queue too.

What is damaged, and how, is drawn by a seed; a seed that fails is shown and can be run alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from broker import chores, connection, control, explain, history, jobs, keys, metrics, past, sets, status
from broker.connection import connect
from broker.requirements import parse
from broker.session import Session
from broker.work import Claim, End
from tests.integration.test_claims import SETTINGS, claim, expire_lease, send, session, submit

SEEDS = range(60)
#: fields of a job's hash that scripts read
FIELDS = (
    "status", "origin", "worker_name", "started_at", "ttl", "result_ttl", "failure_ttl", "retries_left",
    "retry_intervals", "number_of_retries", "enqueue_at_front_on_retry", "repeats_left",
    "repeat_intervals", "fleet_losses", "fleet_attempts", "fleet_stop", "fleet_retries", "group_id",
    "dependency_ids", "timeout", "enqueue_at_front", "allow_dependency_failures",
)  # fmt: skip
GARBAGE = (
    b"", b"garbage", b"-1", b"0", b"1e300", b"nan", b"inf", b"[", b"{}", b"[[]]", b'["x", null, 1e99]',
    b"99999999999999999999", b"0x10", b"1.5", b"a\0b", b"%s%n%d", b"\n\n\n", b"x" * 70_000, b"rq:job:x",
    b"\xff\xfe",
)  # fmt: skip
#: keys of a job's own, and of its queue
OF_A_JOB = ("job", "dependents", "dependencies", "results", "executions", "output")
OF_A_QUEUE = ("queue", "wip", "finished", "failed", "scheduled", "canceled", "wake")
IDS = (b"\xff\xfe", b"a/b", b"..", b"%d%s", b"a:b:c", b"x" * 5000, b" ", b"a\0b", b"", b"'\"\\", b"{}")


def garble_a_field(client: redis.Redis, dice: random.Random, job: str, queue: str) -> None:
    for _ in range(dice.randint(1, 5)):
        client.hset(keys.job(job), dice.choice(FIELDS), dice.choice(GARBAGE))


def replace_a_key(client: redis.Redis, dice: random.Random, job: str, queue: str) -> None:
    overwrite(client, dice, keys.of(dice.choice(OF_A_JOB), job))


def replace_a_key_of_its_queue(client: redis.Redis, dice: random.Random, job: str, queue: str) -> None:
    overwrite(client, dice, keys.of(dice.choice(OF_A_QUEUE), queue))


def add_an_odd_id(client: redis.Redis, dice: random.Random, job: str, queue: str) -> None:
    odd = dice.choice(IDS)
    client.hset(b"rq:job:" + odd, mapping={b"status": b"queued", **client.hgetall(keys.job(job))})
    client.lpush(keys.queue(queue), odd)


def delete_it(client: redis.Redis, dice: random.Random, job: str, queue: str) -> None:
    client.delete(keys.job(job))


DAMAGES = (
    garble_a_field,
    garble_a_field,
    replace_a_key,
    replace_a_key_of_its_queue,
    add_an_odd_id,
    delete_it,
)


def overwrite(client: redis.Redis, dice: random.Random, key: str) -> None:
    client.delete(key)
    kind = dice.randrange(4)
    if kind == 0:
        client.set(key, dice.choice(GARBAGE))
    elif kind == 1:
        client.hset(key, "a", "b")
    elif kind == 2:
        client.rpush(key, "a")
    else:
        client.zadd(key, {"a": 1})


def damage(client: redis.Redis, dice: random.Random, job: str, queue: str = "odd") -> None:
    for _ in range(dice.randint(1, 3)):
        try:
            dice.choice(DAMAGES)(client, dice, job, queue)
        except redis.ResponseError:
            continue  # damaged already


def trials(url: str) -> Iterator[tuple[str, random.Random, redis.Redis]]:
    """For each seed: how it is called where it fails, its dice, and an empty Redis."""
    for seed in SEEDS:
        with connect(url) as client:
            client.flushall()
            yield f"seed {seed}", random.Random(seed), client


def test_the_claims_of_others_and_their_ends_are_not_stopped(redis_url: str) -> None:
    for seed, dice, client in trials(redis_url):
        [bad], good = submit(client, 1, "odd"), submit(client, 3)
        damage(client, dice, bad)
        who = session(client, "w0", "odd", "default")
        claims = claim(client, who, 10)
        assert set(good) <= {one.job_id for one in claims}, seed
        damage(client, dice, bad)
        assert tell_all(client, dice, who, claims) >= set(good), seed
        states = {jobs.states(client, good)[job] for job in good}
        assert states <= {"finished", "failed", "stopped", "queued"}, seed
        assert not client.hgetall(keys.worker_leases("w0")).keys() & {job.encode() for job in good}


def tell_all(client: redis.Redis, dice: random.Random, who: Session, claims: list[Claim]) -> set[str]:
    """Report an end of each, in one round trip; the jobs whose ends were accepted."""
    outcomes = ("finished", "failed", "stopped", "lost", "handed-back")
    ends = [End(one, dice.choice(outcomes), "why", 1.0) for one in claims]  # type: ignore[arg-type]
    accepted = send(client, who, ends, 0).accepted
    return {end.claim.job_id for end, was in zip(ends, accepted, strict=True) if was}


def test_the_recovery_of_others_is_not_stopped(redis_url: str) -> None:
    for seed, dice, client in trials(redis_url):
        [bad], good = submit(client, 1, "odd"), submit(client, 3)
        claim(client, session(client, "dead", "odd", "default"), 4)
        client.delete(keys.worker_beat("dead"))
        for job in (bad, *good):
            expire_lease(client, job)
        damage(client, dice, bad)
        chores.elect(client, "0", SETTINGS, troubled=False)
        client.delete(keys.RECOVERY_NOT_BEFORE)
        chores.Recovery(SETTINGS).run(client)
        assert set(jobs.states(client, good).values()) == {"queued"}, seed


def test_a_beat_renews_the_others(redis_url: str) -> None:
    for seed, dice, client in trials(redis_url):
        [bad], good = submit(client, 1, "odd"), submit(client, 3)
        who = session(client, "w0", "odd", "default")
        claims = claim(client, who, 4)
        leases = {one.lease: one.job_id for one in claims}
        named = {lease: job for lease, job in leases.items() if job != bad or dice.random() < 0.5}
        damage(client, dice, bad)
        for job in good:
            expire_lease(client, job)
        beat = who.beat(client, "{}", named, who.claims_settled)
        assert beat.state == "ok"
        assert {leases[lease] for lease in beat.lost} <= {bad}, seed
        assert min(client.zscore(keys.LEASES, job) for job in good) > 1, seed


def test_the_chores_go_on_for_the_others(redis_url: str) -> None:
    for seed, dice, client in trials(redis_url):
        for queue in ("odd", "default"):
            [job] = submit(client, 1, queue)
            client.hset(keys.job(job), "status", "scheduled")
            client.delete(keys.queue(queue))
            client.zadd(keys.of("scheduled", queue), {job: 1})
            client.zadd(keys.of("wip", queue), {"ghost:x": 1, "odd": 2})
            if queue == "odd":
                damage(client, dice, job)
        for chore in chores.table(SETTINGS):
            chore.run(client)
        assert jobs.states(client, [job]) == {job: "queued"}, seed
        assert client.zcard(keys.of("wip", "default")) == 0


def test_a_damaged_job_can_be_canceled_or_refuses_by_name(redis_url: str) -> None:
    for _, dice, client in trials(redis_url):
        [bad] = submit(client, 1, "odd")
        if dice.random() < 0.5:
            claim(client, session(client, "w0", "odd"))
        garble_a_field(client, dice, bad, "odd")
        assert control.cancel(client, bad)


def told(client: redis.Redis, who: Session, job: str) -> None:
    [one] = claim(client, who)
    no_list(client, "odd")
    assert send(client, who, [End(one, "lost")], 0).accepted == (True,)


def recovered(client: redis.Redis, who: Session, job: str) -> None:
    claim(client, who)
    no_list(client, "odd")
    client.delete(keys.worker_beat(who.identity.name))
    expire_lease(client, job)
    chores.elect(client, "0", SETTINGS, troubled=False)
    client.delete(keys.RECOVERY_NOT_BEFORE)
    assert chores.Recovery(SETTINGS).run(client) == 1


def due(client: redis.Redis, who: Session, job: str) -> None:
    client.hset(keys.job(job), "status", "scheduled")
    client.zadd(keys.of("scheduled", "odd"), {job: 1})
    no_list(client, "odd")
    chores.Due().run(client)


def no_list(client: redis.Redis, queue: str) -> None:
    client.delete(keys.queue(queue))
    client.set(keys.queue(queue), "no list")


@pytest.mark.parametrize("way", [told, recovered, due])
def test_a_job_whose_queue_is_no_list_waits_until_somebody_mends_it(
    redis_client: redis.Redis, way: Callable[[redis.Redis, Session, str], None]
) -> None:
    [job] = submit(redis_client, 1, "odd")
    way(redis_client, session(redis_client, "w0", "odd"), job)
    assert jobs.states(redis_client, [job]) == {job: "scheduled"}
    redis_client.delete(keys.queue("odd"))
    assert redis_client.zincrby(keys.of("scheduled", "odd"), -61, job) < redis_client.time()[0] + 1
    chores.Due().run(redis_client)
    assert redis_client.lrange(keys.queue("odd"), 0, -1) == [job.encode()]


@pytest.mark.parametrize("damaged", [keys.LEASES, keys.worker_leases("w0"), keys.FENCE])
def test_no_job_leaves_its_queue_where_its_lease_cannot_be_written(
    redis_client: redis.Redis, damaged: str
) -> None:
    [job] = submit(redis_client)
    who = session(redis_client, "w0")
    redis_client.set(damaged, "nothing of ours")
    with pytest.raises(redis.ResponseError):
        claim(redis_client, who)
    assert redis_client.lrange(keys.queue("default"), 0, -1) == [job.encode()]
    redis_client.delete(damaged)
    assert [one.job_id for one in claim(redis_client, who)] == [job]


@pytest.mark.parametrize(
    "damaged", [keys.HISTORIES, keys.SETS_VERSION, keys.of("reserved", "default"), keys.history("default")]
)
def test_what_only_adds_to_a_view_does_not_stop_it(redis_client: redis.Redis, damaged: str) -> None:
    [job] = submit(redis_client)
    submit(redis_client, requirements=parse({"cpus": "2"}))
    redis_client.delete(damaged)
    redis_client.set(damaged, "nothing of ours")
    assert sum(queue.queued for queue in metrics.read(redis_client).fleet.queues) == 2
    assert history.sample(redis_client)
    assert explain.explain(redis_client, job).reasons
    assert past.read(redis_client, 10).kept["queued"] == 2


@pytest.mark.parametrize("damage", [b"garbage", b"9223372036854775807", None])
def test_the_version_of_sets_is_begun_anew_where_somebody_wrote_over_it(
    redis_client: redis.Redis, damage: bytes | None
) -> None:
    if damage is None:
        redis_client.rpush(keys.SETS_VERSION, "another type")
    else:
        redis_client.set(keys.SETS_VERSION, damage)
    assert session(redis_client, "w0").beat(redis_client, "{}", {}, 0).state == "ok"
    need = parse({"cpus": "2"})
    submit(redis_client, requirements=need)
    known = sets.known(redis_client, ["default"])
    assert known.sets == {"default": {need.digest(): need}}
    assert 10**12 < known.version < 10**13


@pytest.mark.parametrize(
    ("field", "damage"),
    [
        ("labels", "x"),
        ("labels", ["x"]),
        ("gpus", [1]),
        ("gpus", 5),
        ("queues", 5),
        ("slots", "many"),
        ("elsewhere", "x"),
    ],
)
def test_a_worker_whose_record_is_none_of_ours_is_left_out(
    redis_client: redis.Redis, field: str, damage: Any
) -> None:
    for name in ("good", "odd"):
        session(redis_client, name)
        record = {"host": "here", "queues": ["default"], **({field: damage} if name == "odd" else {})}
        redis_client.set(keys.worker_record(name), json.dumps(record))
    assert [worker.name for worker in status.read(redis_client).workers] == ["good"]


def test_of_many_commands_one_that_meets_damage_is_answered_by_its_error(redis_client: redis.Redis) -> None:
    redis_client.set("text", "1")
    found = connection.ask(redis_client, [("HKEYS", "text"), ("GET", "text")])
    assert isinstance(found[0], redis.ResponseError)
    assert found[1] == b"1"


def test_after_any_other_error_the_next_answer_is_none_of_the_many(redis_client: redis.Redis) -> None:
    redis_client.set("text", "1")
    with pytest.raises(redis.ResponseError):
        connection.ask(redis_client, [("GET", "text", "and", "more"), ("GET", "text")])
    assert redis_client.get("other") is None
