"""The periodic chores, spoken straight to a real Redis: outages, jumps of its clock, many queues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
import rq
from rq.group import Group

from broker import chores, jobs, keys
from broker.session import RECORD_TTL
from tests.integration.test_claims import SETTINGS, claim, expire_lease, session, submit

LEASE_MS = int(SETTINGS.lease_seconds * 1000)


def now_ms(client: redis.Redis) -> int:
    seconds, micros = client.time()
    return int(seconds * 1000 + micros // 1000)


def ask(client: redis.Redis, who: str = "0", *, troubled: bool = False) -> bool:
    return chores.elect(client, who, SETTINGS, troubled=troubled).elected


def recover(client: redis.Redis) -> int:
    return chores.Recovery(SETTINGS).run(client)


def is_paused(client: redis.Redis) -> bool:
    return int(client.get(keys.RECOVERY_NOT_BEFORE) or 0) > now_ms(client)


def end_of_pause(client: redis.Redis) -> None:
    """As if the pause had ended a moment ago."""
    for key in (keys.RECOVERY_NOT_BEFORE, keys.LOSSES_NOT_BEFORE):
        if client.exists(key):
            client.set(key, now_ms(client) - 1)


@pytest.fixture
def watched(redis_client: redis.Redis) -> redis.Redis:
    """A Redis at which somebody asked for the chores a moment ago, and no pause is left."""
    ask(redis_client)
    end_of_pause(redis_client)
    redis_client.delete(keys.LOSSES_NOT_BEFORE)
    return redis_client


def shift_seen(client: redis.Redis, ms: int, server: str | None = None) -> None:
    """As if somebody had last asked so many ms ago; a negative number: the clock was set back since."""
    at, here = client.get(keys.CHORES_SEEN).decode().split()
    client.set(keys.CHORES_SEEN, f"{int(at) - ms} {server or here}")


def lost_job(client: redis.Redis) -> str:
    """A job whose worker is dead and whose lease has run out."""
    [job] = submit(client)
    assert claim(client, session(client, "dead"))
    client.delete(keys.worker_beat("dead"))
    expire_lease(client, job)
    return job


def losses(client: redis.Redis, job: str) -> int:
    return int(client.hget(keys.job(job), "fleet_losses"))


# -- who does them -----------------------------------------------------------------------------


def test_one_at_a_time_is_elected_and_another_after_its_time(redis_client: redis.Redis) -> None:
    assert [ask(redis_client, who) for who in "abab"] == [True, False, True, False]
    assert 0 < redis_client.pttl(keys.CHORES) <= 3000
    redis_client.delete(keys.CHORES)
    assert [ask(redis_client, who) for who in "ba"] == [True, False]


def test_an_election_from_before_the_clock_was_set_back_ends_in_time(redis_client: redis.Redis) -> None:
    ask(redis_client, "a")
    redis_client.pexpire(keys.CHORES, 3_600_000)
    assert not ask(redis_client, "b")
    assert redis_client.pttl(keys.CHORES) <= 3000


# -- outages -----------------------------------------------------------------------------------


def known_restart(client: redis.Redis) -> None:
    shift_seen(client, 100, server="0" * 40)
    ask(client)


def told_outage(client: redis.Redis) -> None:
    shift_seen(client, 11_000)
    ask(client, "stranger")
    ask(client, "witness", troubled=True)


def clock_set_back(client: redis.Redis) -> None:
    shift_seen(client, -60_000)
    ask(client)


@pytest.mark.parametrize("outage", [known_restart, told_outage, clock_set_back])
def test_recovery_pauses_for_a_lease_after_an_outage_and_counts_no_loss(
    watched: redis.Redis, outage: Callable[[redis.Redis], None]
) -> None:
    job = lost_job(watched)
    outage(watched)
    assert recover(watched) == 0
    left = int(watched.get(keys.RECOVERY_NOT_BEFORE)) - now_ms(watched)
    assert LEASE_MS - 20_000 < left <= LEASE_MS
    end_of_pause(watched)
    assert recover(watched) == 1
    assert losses(watched, job) == 0


def test_when_nobody_was_there_to_ask_recovery_pauses_too_and_the_losses_count(watched: redis.Redis) -> None:
    job = lost_job(watched)  # the last of the fleet: the job may be what killed it
    shift_seen(watched, 11_000)
    ask(watched, "new")
    assert recover(watched) == 0
    end_of_pause(watched)
    assert recover(watched) == 1
    assert losses(watched, job) == 1


def test_the_death_of_the_elected_worker_is_no_outage(watched: redis.Redis) -> None:
    job = lost_job(watched)
    ask(watched, "elected")
    for _ in range(3):  # it is dead; the others go on asking, until its time is over
        shift_seen(watched, 1100)
        ask(watched, "other")
    assert not is_paused(watched)
    assert recover(watched) == 1
    assert losses(watched, job) == 1


def test_trouble_of_one_worker_alone_is_no_outage(watched: redis.Redis) -> None:
    job = lost_job(watched)
    ask(watched, troubled=True)
    assert recover(watched) == 1
    assert losses(watched, job) == 1


def test_nothing_is_lost_before_somebody_has_asked_after_an_outage(watched: redis.Redis) -> None:
    lost_job(watched)
    shift_seen(watched, 11_000)
    assert recover(watched) == 0
    shift_seen(watched, -22_000)
    assert recover(watched) == 0


def test_a_redis_that_never_saw_us_is_taken_for_one_that_was_away(redis_client: redis.Redis) -> None:
    lost_job(redis_client)
    ask(redis_client)
    assert is_paused(redis_client)
    assert recover(redis_client) == 0


@pytest.mark.parametrize("allowed", [True, False])
def test_a_restart_is_known_by_the_run_id_where_the_user_may_ask_for_it(
    own_redis: Callable[..., Any], allowed: bool
) -> None:
    server = own_redis()
    with server.client() as client:
        rules = ["on", "nopass", "~*", "&*", "+@all", *([] if allowed else ["-info"])]
        client.execute_command("ACL", "SETUSER", "worker", *rules)
        client.config_set("appendfsync", "always")
    with server.client(username="worker", password="x") as client:
        ask(client)
        end_of_pause(client)
        client.delete(keys.LOSSES_NOT_BEFORE)
        ask(client)
        assert not is_paused(client)
    server.stop()
    server.start()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", *rules)
    with server.client(username="worker", password="x") as client:
        ask(client)
        assert is_paused(client) == allowed
        if not allowed:  # then by the silence
            shift_seen_without_server(client, 11_000)
            ask(client, troubled=True)
            assert is_paused(client)
            assert client.exists(keys.LOSSES_NOT_BEFORE)


def shift_seen_without_server(client: redis.Redis, ms: int) -> None:
    client.set(keys.CHORES_SEEN, int(client.get(keys.CHORES_SEEN).split()[0]) - ms)


# -- many losses at once -----------------------------------------------------------------------


def test_two_thousand_jobs_of_dead_workers_are_back_in_their_old_order_within_few_runs(
    watched: redis.Redis,
) -> None:
    lost = {queue: submit(watched, 1000, queue) for queue in ("a", "b")}
    running = submit(watched, 600, "else")
    for number in range(10):
        for queue in lost:
            assert len(claim(watched, session(watched, f"dead-{queue}{number}", queue), 100)) == 100
            watched.delete(keys.worker_beat(f"dead-{queue}{number}"))
    assert len(claim(watched, session(watched, "alive", "else"), 600)) == 600
    behind = {queue: submit(watched, 1, queue) for queue in lost}
    # leases of a worker that beats, and may renew them yet, come first
    watched.zadd(keys.LEASES, dict.fromkeys(running, 1) | {job: 2 for ids in lost.values() for job in ids})
    runs = list(iter(lambda: recover(watched), 0))
    assert sum(runs) == 2000
    assert len(runs) <= 6, "one or two, where nobody else needs the processors"
    for queue, ids in lost.items():
        waiting = [job.decode() for job in watched.lrange(keys.queue(queue), 0, -1)]
        assert waiting == ids + behind[queue]
        assert {losses(watched, job) for job in ids} == {1}
    assert recover(watched) == 0


def test_a_run_of_recovery_ends_in_time_and_the_next_goes_on(
    watched: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = submit(watched, 250)
    claim(watched, session(watched, "dead"), 250)
    watched.delete(keys.worker_beat("dead"))
    watched.zadd(keys.LEASES, dict.fromkeys(ids, 1))
    monkeypatch.setattr(chores, "_RECOVERY_SECONDS", 0.0)
    assert [recover(watched) for _ in range(4)] == [100, 100, 50, 0]
    assert [job.decode() for job in watched.lrange(keys.queue("default"), 0, -1)] == ids


# -- jumps of Redis's clock --------------------------------------------------------------------


def test_a_clock_set_back_keeps_neither_leases_nor_a_dead_workers_heartbeat_for_long(
    watched: redis.Redis,
) -> None:
    dead, alive = submit(watched, 2)
    claim(watched, session(watched, "dead"))
    claim(watched, session(watched, "alive"))
    hour = 3_600_000
    for job in (dead, alive):
        watched.zincrby(keys.LEASES, hour, job)
    for worker in ("dead", "alive"):
        watched.pexpire(keys.worker_beat(worker), hour)
    shift_seen(watched, -hour)
    ask(watched)
    assert recover(watched) == 0
    assert max(watched.zscore(keys.LEASES, job) for job in (dead, alive)) <= now_ms(watched) + LEASE_MS
    for job in (dead, alive):  # a lease later
        expire_lease(watched, job)
    end_of_pause(watched)
    recover(watched)
    assert watched.pttl(keys.worker_beat("dead")) <= LEASE_MS
    watched.delete(keys.worker_beat("dead"))
    assert recover(watched) == 1
    assert jobs.show(watched, dead).state == "queued"
    assert jobs.show(watched, alive).state == "started"


def test_a_clock_set_forward_loses_nothing_that_is_renewed_within_a_lease(watched: redis.Redis) -> None:
    kept, lost = submit(watched, 2)
    who = session(watched, "alive")
    leases = {one.lease: one.job_id for one in claim(watched, who)}
    claim(watched, session(watched, "dead"))
    for job in (kept, lost):
        expire_lease(watched, job)
    watched.delete(keys.worker_beat("alive"), keys.worker_beat("dead"))
    shift_seen(watched, 3_600_000)
    ask(watched)
    assert recover(watched) == 0
    assert who.beat(watched, "{}", leases, who.claims_settled).state == "gone"
    assert who.register(watched, "{}") == ""
    assert who.beat(watched, "{}", leases, who.claims_settled).lost == frozenset()
    end_of_pause(watched)
    assert recover(watched) == 1
    assert jobs.show(watched, kept).state == "started"


# -- many queues, much to do -------------------------------------------------------------------


@pytest.mark.parametrize("chore", [chores.Due(), chores.Ring(), chores.Sweep()])
def test_thousands_of_queues_take_few_short_calls(
    redis_client: redis.Redis, chore: chores.Chore, eventually: Callable[..., Any]
) -> None:
    redis_client.sadd(keys.QUEUES, *(keys.queue(f"q@{number:05}") for number in range(5000)))
    chore.run(redis_client)

    def is_quick() -> bool:
        """Ten calls took 50 ms of a processor; others may hold it up in between, but not always."""
        redis_client.config_resetstat()
        before = seconds_of_redis(redis_client)
        chore.run(redis_client)
        took = seconds_of_redis(redis_client) - before
        assert 5 <= redis_client.info("commandstats")["cmdstat_evalsha"]["calls"] <= 10
        return took <= 0.05

    eventually(is_quick)


def seconds_of_redis(client: redis.Redis) -> float:
    """Of a processor, that it has used so far."""
    used = client.info("cpu")
    return float(used["used_cpu_user_main_thread"] + used["used_cpu_sys_main_thread"])


def schedule(client: redis.Redis, ids: list[str], queue: str) -> None:
    for job in ids:
        client.hset(keys.job(job), "status", "scheduled")
    client.delete(keys.queue(queue))
    client.zadd(keys.of("scheduled", queue), dict.fromkeys(ids, 1))


def test_a_thousand_jobs_due_at_once_are_moved_at_once(redis_client: redis.Redis) -> None:
    schedule(redis_client, submit(redis_client, 1000), "default")
    assert chores.Due().run(redis_client) == 1000
    assert redis_client.llen(keys.queue("default")) == 1000


def test_a_queue_with_more_than_one_turn_moves_does_not_keep_the_others_waiting(
    redis_client: redis.Redis,
) -> None:
    full = keys.of("scheduled", "a")
    redis_client.zadd(full, {f"gone{number}": 1 for number in range(20_000)})
    redis_client.sadd(keys.QUEUES, keys.queue("a"))
    last = submit(redis_client, 1, "z")
    schedule(redis_client, last, "z")
    chores.Due().run(redis_client)
    assert redis_client.lrange(keys.queue("z"), 0, -1) == [last[0].encode()]
    assert redis_client.zcard(full) > 0, "the rest is for the next turn"


def test_a_mirror_without_a_lease_is_swept_and_one_with_a_lease_is_not(redis_client: redis.Redis) -> None:
    submit(redis_client)
    mine = claim(redis_client, session(redis_client, "w0"))[0]
    redis_client.zadd(keys.of("wip", "default"), {"ghost:execution": 2e12})
    assert chores.Sweep().run(redis_client) == 1
    members = redis_client.zrange(keys.of("wip", "default"), 0, -1)
    assert members == [f"{mine.job_id}:{mine.execution_id}".encode()]


def test_all_is_swept_however_much_there_is(redis_client: redis.Redis) -> None:
    for queue in ("a", "b", "c"):
        kept = submit(redis_client, 700, queue)
        assert len(claim(redis_client, session(redis_client, f"w-{queue}", queue), 700)) == 700
        redis_client.zadd(keys.of("wip", queue), {f"ghost{number}:x": number for number in range(1200)})
        redis_client.zadd(keys.of("wip", queue), {f"late{number}:x": 2e12 for number in range(300)})
        redis_client.zadd(keys.of("finished", queue), {f"f{number}": 1 for number in range(900)})
        redis_client.zadd(keys.of("failed", queue), {f"f{number}": 1 for number in range(900)})
        redis_client.zadd(keys.of("finished", queue), {"kept": 4e9})
    assert chores.Sweep().run(redis_client) == 3 * 1500
    for queue in ("a", "b", "c"):
        assert redis_client.zcard(keys.of("wip", queue)) == len(kept)
        assert redis_client.zrange(keys.of("finished", queue), 0, -1) == [b"kept"]
        assert redis_client.zcard(keys.of("failed", queue)) == 0


def test_workers_are_counted_and_names_without_a_record_leave(redis_client: redis.Redis) -> None:
    for name in ("beats", "offline"):
        session(redis_client, name)
    redis_client.delete(keys.worker_beat("offline"))
    redis_client.sadd(keys.FLEET_WORKERS, "gone", b"\xff")
    assert 0 < redis_client.ttl(keys.worker_record("offline")) <= RECORD_TTL
    assert chores.Tidy().run(redis_client) == 2
    assert redis_client.smembers(keys.FLEET_WORKERS) == {b"beats", b"offline"}
    assert chores.elect(redis_client, "0", SETTINGS, troubled=False).alive == 1


@pytest.mark.parametrize("chore", chores.table(SETTINGS), ids=lambda chore: type(chore).__name__)
def test_keys_of_the_wrong_type_stop_no_chore(redis_client: redis.Redis, chore: chores.Chore) -> None:
    redis_client.sadd(keys.QUEUES, keys.queue("bad"), keys.queue("worse"))
    for kind in ("queue", "wip", "finished", "failed", "scheduled"):
        redis_client.set(keys.of(kind, "bad"), "x")
        redis_client.hset(keys.of(kind, "worse"), "a", "b")
    redis_client.hset(keys.worker_record("odd"), "a", "b")
    redis_client.sadd(keys.FLEET_WORKERS, "odd")
    chore.run(redis_client)


# --- groups ----------------------------------------------------------------------------------------


def test_jobs_that_ran_out_leave_their_group_and_a_group_without_jobs_is_gone(
    redis_client: redis.Redis,
) -> None:
    group = Group.create(redis_client, name="Gruppe 1")
    queue = rq.Queue("default", connection=redis_client)
    members = group.enqueue_many(queue, [queue.prepare_data("builtins.int") for _ in range(300)])
    assert chores.PruneGroups().run(redis_client) == 0
    redis_client.delete(*(job.key for job in members[10:]))
    while chores.PruneGroups().run(redis_client):
        pass
    assert redis_client.smembers("rq:group:Gruppe 1") == {job.id.encode() for job in members[:10]}
    redis_client.delete(*(job.key for job in members))
    chores.PruneGroups().run(redis_client)
    assert not redis_client.exists("rq:group:Gruppe 1", "rq:groups")


def test_damage_among_groups_harms_no_other(redis_client: redis.Redis) -> None:
    redis_client.sadd("rq:groups", "a string", b"\xff", "empty", "good")
    redis_client.set("rq:group:a string", "?")
    redis_client.sadd("rq:group:good", "no job")
    assert chores.PruneGroups().run(redis_client) == 1
    assert redis_client.smembers("rq:groups") == {b"a string", b"\xff"}
