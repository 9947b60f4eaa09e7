"""Claims, leases and fences, spoken straight to a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis
import rq

from broker import Queue, chores, control, history, jobs, keys, sets
from broker.command import Command
from broker.connection import connect
from broker.line import Line
from broker.requirements import NOTHING, Offer, parse
from broker.session import Identity, Session
from broker.submit import Options, submit_commands
from broker.work import NO_PLACES, Claim, End, Places, Round
from broker.worker_settings import WorkerSettings
from fleet.placement import Placement
from fleet.resources import Resources
from fleet.room import Room

SETTINGS = WorkerSettings(heartbeat_seconds=1, lease_seconds=30)


def session(client: redis.Redis, name: str, *queues: str, settings: WorkerSettings = SETTINGS) -> Session:
    made = Session(Identity(name, "here", queues or ("default",), 1, "3"), settings)
    assert made.register(client, "{}") == ""
    return made


def submit(client: redis.Redis, count: int = 1, queue: str = "default", **options: Any) -> list[str]:
    return submit_commands(client, queue, [(None, Command(("true",)))] * count, Options(**options))


def told(client: redis.Redis) -> Places:
    """What a worker says with a claim that has room for jobs of all sets that there are."""
    offer = Offer({"gpu": "yes"}, 4, 1 << 30, (), 4)
    placement = Placement(["default"], offer, Room(Resources(4, 1 << 30), 4), SETTINGS)
    placement.learn(sets.known(client, ["default"]))
    placement.count(0)
    return placement.places(set())


def send(
    client: redis.Redis,
    who: Session,
    ends: Sequence[End],
    wanted: int,
    ahead: int = 0,
    places: Places = NO_PLACES,
) -> Round:
    """One round, of which the worker never learns that it was settled."""
    line = Line(client)
    line.connect()
    exchange = who.begin(ends, wanted, ahead, places=places)
    who.send(line, exchange)
    done = who.complete(exchange, line.receive())
    line.close()
    return done


def claim(client: redis.Redis, who: Session, wanted: int = 1) -> list[Claim]:
    done = send(client, who, [], wanted)
    who.claims_settled = who.claims_sent
    return list(done.claims)


def report(client: redis.Redis, who: Session, end: End) -> bool:
    return send(client, who, [end], 0).accepted[0]


@pytest.mark.parametrize("wanted", [1, 3])
def test_fifty_jobs_raced_by_eight_workers_are_given_out_once_each(
    redis_url: str, redis_client: redis.Redis, wanted: int
) -> None:
    for _ in range(25):
        redis_client.flushall()
        expected = submit(redis_client, 50)
        given: list[str] = []
        start = threading.Barrier(8)

        def race(number: int, given: list[str] = given, start: threading.Barrier = start) -> None:
            client = connect(redis_url)
            who = session(client, f"w{number}")
            start.wait()
            while claims := claim(client, who, wanted):
                given.extend(one.job_id for one in claims)
            client.close()

        threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(given) == sorted(expected)


def test_every_claim_has_a_higher_fence_and_an_execution_id_of_its_own(redis_client: redis.Redis) -> None:
    submit(redis_client, 20)
    claims = claim(redis_client, session(redis_client, "w0"), 20)
    fences = [int(one.fence) for one in claims]
    assert fences == sorted(set(fences))
    assert len({one.execution_id for one in claims}) == 20


def test_queues_are_emptied_in_the_order_given(redis_client: redis.Redis) -> None:
    low = submit(redis_client, 2, "low")
    high = submit(redis_client, 2, "high")
    who = session(redis_client, "w0", "high", "low")
    assert [one.job_id for one in claim(redis_client, who, 4)] == high + low


def test_a_second_report_of_the_same_end_changes_nothing(redis_client: redis.Redis) -> None:
    submit(redis_client)
    who = session(redis_client, "w0")
    end = End(claim(redis_client, who)[0], "finished", exit_code=0)
    assert report(redis_client, who, end)
    before = redis_client.hgetall(keys.job(end.claim.job_id))
    assert report(redis_client, who, end), "the reply was lost, and the worker asks again"
    assert redis_client.hgetall(keys.job(end.claim.job_id)) == before
    assert redis_client.xlen(keys.of("results", end.claim.job_id)) == 1
    assert history.read(redis_client)["default"].stale == 0


def test_an_end_that_comes_again_when_others_have_been_reported_is_stale(redis_client: redis.Redis) -> None:
    submit(redis_client, 2)
    who = session(redis_client, "w0")
    first, second = (End(one, "finished", exit_code=0) for one in claim(redis_client, who, 2))
    assert report(redis_client, who, first)
    assert report(redis_client, who, second)
    before = redis_client.hgetall(keys.job(first.claim.job_id))
    assert not report(redis_client, who, first)
    assert redis_client.hgetall(keys.job(first.claim.job_id)) == before
    assert history.read(redis_client)["default"].stale == 1


def expire_lease(client: redis.Redis, job_id: str) -> None:
    client.zadd(keys.LEASES, {job_id: 1})


def recover(client: redis.Redis) -> int:
    """One round of recovery, as if somebody had asked for the chores all along."""
    client.delete(keys.RECOVERY_NOT_BEFORE)
    seconds, micros = client.time()
    client.set(keys.CHORES_SEEN, seconds * 1000 + micros // 1000)
    return chores.Recovery(SETTINGS).run(client)


def test_a_dead_workers_job_goes_to_the_front_and_its_late_result_is_refused(
    redis_client: redis.Redis,
) -> None:
    job, other = submit(redis_client, 2)
    dead, alive = session(redis_client, "dead"), session(redis_client, "alive")
    old = claim(redis_client, dead)[0]
    expire_lease(redis_client, job)
    assert recover(redis_client) == 0, "its heartbeat is still there"
    redis_client.delete(keys.worker_beat("dead"))
    assert recover(redis_client) == 1
    new, behind = claim(redis_client, alive, 2)
    assert (new.job_id, behind.job_id) == (job, other)
    assert int(new.fence) > int(old.fence)
    assert not report(redis_client, dead, End(old, "finished"))
    assert report(redis_client, alive, End(new, "finished"))
    assert [attempt.outcome for attempt in jobs.show(redis_client, job).attempts] == ["lost", "finished"]


def test_a_finish_before_recovery_is_accepted(redis_client: redis.Redis) -> None:
    submit(redis_client)
    who = session(redis_client, "w0")
    mine = claim(redis_client, who)[0]
    expire_lease(redis_client, mine.job_id)
    redis_client.delete(keys.worker_beat("w0"))
    assert report(redis_client, who, End(mine, "finished"))
    assert recover(redis_client) == 0


def test_the_fourth_loss_fails_the_job_by_name(redis_client: redis.Redis) -> None:
    [job] = submit(redis_client, retries=5)
    for number in range(4):
        who = session(redis_client, f"w{number}")
        assert [one.job_id for one in claim(redis_client, who)] == [job]
        redis_client.delete(keys.worker_beat(who.identity.name))
        expire_lease(redis_client, job)
        assert recover(redis_client) == 1
    shown = jobs.show(redis_client, job)
    assert shown.state == "failed"
    assert shown.reason.startswith("WorkerLost: worker w3 (host ")
    assert [attempt.outcome for attempt in shown.attempts] == ["lost"] * 4


def test_what_the_server_holds_and_the_worker_does_not_know_goes_back(redis_client: redis.Redis) -> None:
    [job] = submit(redis_client)
    who = session(redis_client, "w0")
    send(redis_client, who, [], 1)  # as if this reply had been lost
    assert who.beat(redis_client, "{}", {}, who.claims_settled).state == "ok"
    assert redis_client.hget(keys.job(job), "status") == b"started", "the claim is under way: left alone"
    who.claims_settled = who.claims_sent
    who.beat(redis_client, "{}", {}, who.claims_settled)
    shown = jobs.show(redis_client, job)
    assert (shown.state, shown.attempts[0].outcome) == ("queued", "handed-back")
    assert redis_client.hget(keys.job(job), "fleet_losses") is None


def test_a_beat_renews_what_it_names_and_tells_what_is_lost(redis_client: redis.Redis) -> None:
    kept, taken = submit(redis_client, 2)
    who = session(redis_client, "w0")
    leases = {one.lease: one.job_id for one in claim(redis_client, who, 2)}
    redis_client.zadd(keys.LEASES, {kept: 1})
    redis_client.delete(keys.job(taken))
    beat = who.beat(redis_client, "{}", leases, who.claims_settled)
    assert {leases[lease] for lease in beat.lost} == {taken}
    assert redis_client.zscore(keys.LEASES, kept) > 1
    assert not redis_client.exists(keys.job(taken)), "a deleted job is not brought back to life"


def test_leases_of_an_earlier_life_are_told_apart(redis_client: redis.Redis) -> None:
    [job] = submit(redis_client)
    first = session(redis_client, "w0")
    lease = claim(redis_client, first)[0].lease
    second = Session(Identity("w0", "here", ("default",), 2, "3"), SETTINGS)
    assert second.register(redis_client, "{}") == "{}", "the first still beats"
    assert second.register(redis_client, "{}", replaces=first.identity.incarnation) == ""
    assert second.beat(redis_client, "{}", {}, 0).foreign == ((job, lease),)
    assert second.lose_foreign(redis_client, [(job, lease)]) == 1
    assert jobs.show(redis_client, job).state == "queued"
    assert first.beat(redis_client, "{}", {}, 0).state == "taken"
    assert claim(redis_client, first) == [], "whose name was taken claims nothing"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            '{"incarnation": "0", "host": "rack7", "at": "2026-11-22T03:24:07Z"}',
            "(host rack7, last beat 2026-11-22T03:24:07Z) ",
        ),
        ("damage", ""),
    ],
)
@pytest.mark.parametrize("beats", [True, False])
def test_a_job_lost_with_an_earlier_life_tells_its_host_and_last_beat(
    redis_client: redis.Redis, record: str, said: str, beats: bool
) -> None:
    [job] = submit(redis_client)
    first = session(redis_client, "w0")
    claim(redis_client, first)
    first.beat(redis_client, record, {}, 0)
    if not beats:
        redis_client.delete(keys.worker_beat("w0"))
    second = Session(Identity("w0", "elsewhere", ("default",), 2, "3"), SETTINGS)
    assert second.register(redis_client, "{}", replaces=first.identity.incarnation) == ""
    own = f'{{"incarnation": "{second.identity.incarnation}"}}'
    foreign = second.beat(redis_client, own, {}, 0).foreign
    assert second.register(redis_client, own) == "", "its keys may lapse, and it comes back"
    second.lose_foreign(redis_client, foreign)
    [attempt] = jobs.show(redis_client, job).attempts
    assert attempt.reason == f"WorkerLost: worker w0 {said}was restarted while it ran the job"


def test_what_an_earlier_life_held_is_back_in_its_old_order(redis_client: redis.Redis) -> None:
    ids = submit(redis_client, 200)
    first = session(redis_client, "w0")
    assert len(claim(redis_client, first, 150)) == 150
    second = Session(Identity("w0", "here", ("default",), 2, "3"), SETTINGS)
    second.register(redis_client, "{}", replaces=first.identity.incarnation)
    second.lose_foreign(redis_client, second.beat(redis_client, "{}", {}, 0).foreign)
    assert [job.decode() for job in redis_client.lrange(keys.queue("default"), 0, -1)] == ids


def test_a_claim_that_empties_a_queue_takes_its_tokens_and_one_that_does_not_rings(
    redis_client: redis.Redis,
) -> None:
    submit(redis_client, 2)
    who = session(redis_client, "w0")
    redis_client.delete(keys.wake("default"))
    claim(redis_client, who)
    assert redis_client.llen(keys.wake("default")) == 1
    claim(redis_client, who)
    assert redis_client.llen(keys.wake("default")) == 0


@pytest.mark.parametrize("key", [keys.SUSPENDED, keys.worker_drain("w0")])
def test_suspended_and_draining_workers_are_given_nothing(redis_client: redis.Redis, key: str) -> None:
    submit(redis_client)
    who = session(redis_client, "w0")
    redis_client.set(key, 1)
    assert claim(redis_client, who) == []
    redis_client.delete(key)
    assert len(claim(redis_client, who)) == 1


def test_a_paused_queue_gives_out_nothing(redis_client: redis.Redis) -> None:
    submit(redis_client, 1, "a")
    submit(redis_client, 1, "b")
    redis_client.sadd(keys.PAUSED, "a")
    assert [one.queue for one in claim(redis_client, session(redis_client, "w0", "a", "b"), 2)] == ["b"]


def deleted(client: redis.Redis, job: str) -> None:
    client.delete(keys.job(job))


def overwritten(client: redis.Redis, job: str) -> None:
    client.delete(keys.job(job))
    client.set(keys.job(job), "no hash at all")


def ended(client: redis.Redis, job: str) -> None:
    client.hset(keys.job(job), "status", "finished")


@pytest.mark.parametrize("damage", [deleted, overwritten, ended])
def test_an_id_in_a_queue_that_is_no_waiting_job_is_passed_over(
    redis_client: redis.Redis, damage: Callable[[redis.Redis, str], None]
) -> None:
    bad, good = submit(redis_client, 2)
    damage(redis_client, bad)
    assert [one.job_id for one in claim(redis_client, session(redis_client, "w0"), 2)] == [good]


def test_a_job_painted_started_by_a_late_save_is_still_run(redis_client: redis.Redis) -> None:
    [job] = submit(redis_client)
    redis_client.hset(keys.job(job), "status", "started")
    assert [one.job_id for one in claim(redis_client, session(redis_client, "w0"))] == [job]


def test_an_id_queued_twice_is_run_once(redis_client: redis.Redis) -> None:
    [job] = submit(redis_client)
    redis_client.rpush(keys.queue("default"), job)
    assert [one.job_id for one in claim(redis_client, session(redis_client, "w0"), 2)] == [job]


@pytest.mark.parametrize(
    "field", ["retries_left", "retry_intervals", "result_ttl", "failure_ttl", "fleet_losses"]
)
@pytest.mark.parametrize("outcome", ["finished", "failed", "lost"])
def test_garbage_in_a_field_stops_neither_the_job_nor_its_neighbours(
    redis_client: redis.Redis, field: str, outcome: str
) -> None:
    bad, good = submit(redis_client, 2)
    redis_client.hset(keys.job(bad), field, "garbage")
    who = session(redis_client, "w0")
    ends = [End(one, outcome) for one in claim(redis_client, who, 2)]  # type: ignore[arg-type]
    assert send(redis_client, who, ends, 0).accepted == (True, True)
    assert {jobs.show(redis_client, job).state for job in (bad, good)} <= {"finished", "failed", "queued"}
    assert redis_client.zcard(keys.LEASES) == 0


def test_a_submission_is_all_or_nothing(redis_client: redis.Redis) -> None:
    from broker.errors import Conflict

    submit_commands(redis_client, "default", [("taken", Command(("true",)))], Options())
    with pytest.raises(Conflict, match="taken"):
        submit_commands(
            redis_client, "default", [("new", Command(("true",))), ("taken", Command(("true",)))], Options()
        )
    assert not redis_client.exists(keys.job("new"))
    assert redis_client.llen(keys.queue("default")) == 1


@pytest.mark.parametrize(("place", "expected"), [("queue", "canceled"), ("worker", "stopping")])
def test_cancel_takes_a_job_from_the_queue_or_asks_its_worker(
    redis_client: redis.Redis, place: str, expected: str
) -> None:
    [job] = submit(redis_client)
    who = session(redis_client, "w0")
    claims = claim(redis_client, who) if place == "worker" else []
    assert control.cancel(redis_client, job) == expected
    if claims:
        beat = who.beat(redis_client, "{}", {claims[0].lease: job}, who.claims_settled)
        assert beat.stop == {claims[0].lease}
        assert redis_client.llen(keys.worker_signals("w0")) == 1
    else:
        assert claim(redis_client, who) == []
        assert redis_client.zscore(keys.of("canceled", "default"), job)


@pytest.mark.parametrize("text", ['["soon"]', "[null]", '{"a": 1}', "[1e300]", "[[1]]"])
@pytest.mark.parametrize("outcome", ["finished", "failed"])
def test_garbage_in_a_list_of_intervals_does_not_keep_an_end_from_being_told(
    redis_client: redis.Redis, text: str, outcome: str
) -> None:
    [bad] = submit(redis_client)
    fields = {"retries_left": "2", "retry_intervals": text, "repeats_left": "1", "repeat_intervals": text}
    redis_client.hset(keys.job(bad), mapping=fields | {"ttl": "1.5", "result_ttl": "2.5"})
    who = session(redis_client, "w0")
    assert report(redis_client, who, End(claim(redis_client, who)[0], outcome))  # type: ignore[arg-type]
    assert jobs.show(redis_client, bad).state == "queued"
    assert redis_client.lrange(keys.queue("default"), 0, -1) == [bad.encode()]


def test_a_job_painted_by_a_late_save_is_still_its_workers(redis_client: redis.Redis) -> None:
    [job] = submit(redis_client)
    who = session(redis_client, "w0")
    mine = claim(redis_client, who)[0]
    redis_client.hset(keys.job(job), mapping={"status": "queued", "worker_name": ""})
    assert who.beat(redis_client, "{}", {mine.lease: job}, who.claims_settled).lost == frozenset()
    redis_client.hset(keys.job(job), "status", "finished")
    assert report(redis_client, who, End(mine, "finished"))
    assert [(one.worker, one.outcome) for one in jobs.show(redis_client, job).attempts] == [
        ("w0", "finished")
    ]
    assert who.retire(redis_client), "nothing of it is left"


def test_a_job_that_finished_and_is_queued_again_keeps_the_record_of_both_attempts(
    redis_client: redis.Redis,
) -> None:
    queue = rq.Queue(connection=redis_client)
    job = queue.enqueue("os.getpid", result_ttl=60)
    first, second = session(redis_client, "w0"), session(redis_client, "w1")
    [mine] = claim(redis_client, first)
    assert report(redis_client, first, End(mine, "finished", duration_seconds=0.5))
    once = jobs.show(redis_client, job.id)
    [attempt] = once.attempts
    assert (attempt.fence, attempt.worker, attempt.outcome) == (int(mine.fence), "w0", "finished")
    assert (attempt.started_at, attempt.ended_at) == (once.started_at, once.ended_at)
    assert redis_client.object("encoding", keys.job(job.id)) in (b"listpack", b"ziplist"), "small"

    queue.enqueue_job(job)  # it knows nothing of its first attempt, and empties what tells of it
    [again] = claim(redis_client, second)
    assert jobs.show(redis_client, job.id).attempts[0] == attempt
    assert redis_client.ttl(keys.job(job.id)) == -1, "while it runs it stays"
    assert report(redis_client, second, End(again, "failed", "exit code 1", 0.1, 1))
    told = jobs.show(redis_client, job.id).attempts
    assert told[0] == attempt
    assert [(one.worker, one.outcome, one.fence) for one in told[1:]] == [("w1", "failed", int(again.fence))]


@pytest.mark.parametrize("queue", [Queue, rq.Queue])
def test_a_job_that_would_expire_in_its_queue_does_not_once_it_is_claimed(
    redis_client: redis.Redis, queue: type[rq.Queue]
) -> None:
    job = queue(connection=redis_client).enqueue("os.getpid", ttl=60)
    assert redis_client.ttl(keys.job(job.id)) == 60
    claim(redis_client, session(redis_client, "w0"))
    assert redis_client.ttl(keys.job(job.id)) == -1


def test_a_running_job_that_a_client_enqueued_again_is_no_longer_its_workers(
    redis_client: redis.Redis,
) -> None:
    [job] = submit(redis_client)
    who = session(redis_client, "w0")
    mine = claim(redis_client, who)[0]
    redis_client.hset(keys.job(job), "status", "queued")
    redis_client.rpush(keys.queue("default"), job)
    assert who.beat(redis_client, "{}", {mine.lease: job}, who.claims_settled).lost == {mine.lease}
    assert not report(redis_client, who, End(mine, "finished"))


def test_what_is_claimed_by_an_id_with_a_colon_keeps_its_mirror(redis_client: redis.Redis) -> None:
    [job] = submit(redis_client)
    redis_client.rename(keys.job(job), keys.job("user:1"))
    redis_client.lset(keys.queue("default"), 0, "user:1")
    assert claim(redis_client, session(redis_client, "w0"))[0].job_id == "user:1"
    assert chores.Sweep().run(redis_client) == 0


def test_retire_leaves_no_key_of_the_worker(redis_client: redis.Redis) -> None:
    who = session(redis_client, "w0")
    assert who.retire(redis_client)
    assert [key for key in redis_client.scan_iter("*") if b"w0" in key] == []
    assert redis_client.smembers(keys.WORKERS) == set()


def test_jobs_are_claimed_ahead_only_as_asked_and_never_one_that_was_lost(redis_client: redis.Redis) -> None:
    ids = submit(redis_client, 5)
    redis_client.hset(keys.job(ids[3]), "fleet_losses", 1)
    who = session(redis_client, "w0")
    assert [one.job_id for one in send(redis_client, who, [], 1, 4).claims] == ids[:3]
    assert [one.job_id for one in send(redis_client, who, [], 0, 4).claims] == []
    assert [one.job_id for one in send(redis_client, who, [], 1, 1).claims] == ids[3:]


@pytest.mark.parametrize("asked", ["", "labels"])
def test_of_jobs_that_may_be_lost_no_more_a_worker_has_one_at_a_time(
    redis_client: redis.Redis, asked: str
) -> None:
    fits = parse({"labels": {"gpu": "yes"}}) if asked else NOTHING
    ids = submit(redis_client, 4, requirements=fits)
    for job in ids[:2]:
        redis_client.hset(keys.job(job), "fleet_losses", SETTINGS.losses_limit)
    bell, waiting = keys.wake(fits.queue_of("default")), keys.queue(fits.queue_of("default"))
    redis_client.delete(bell)
    first, second = session(redis_client, "w0"), session(redis_client, "w1")
    places = told(redis_client) if asked else NO_PLACES

    done = send(redis_client, first, [], 2, places=places)
    assert [one.job_id for one in done.claims] == [ids[0], ids[2]], "past the other, which stays the first"
    assert redis_client.lrange(waiting, 0, -1) == [ids[1].encode(), ids[3].encode()]
    assert redis_client.lpop(bell) == b"1", "somebody else may take it"
    assert [one.job_id for one in send(redis_client, first, [], 1, places=places).claims] == [ids[3]]
    assert send(redis_client, first, [], 1, places=places).claims == ()
    redis_client.delete(bell)
    assert send(redis_client, first, [], 1, places=places).claims == ()
    assert redis_client.llen(bell) == 0, "it would wake itself again and again"
    [theirs] = send(redis_client, second, [], 1, places=places).claims
    assert theirs.job_id == ids[1]
    assert report(redis_client, second, End(theirs, "handed-back"))

    ended = End(done.claims[0], "finished", duration_seconds=0.1)
    assert [one.job_id for one in send(redis_client, first, [ended], 1, places=places).claims] == [ids[1]]


@pytest.mark.parametrize("way", ["lost", "failed", "handed-back", "retry"])
def test_a_job_that_somebody_stops_is_not_run_again(redis_client: redis.Redis, way: str) -> None:
    [job] = submit(redis_client, retries=3)
    who = session(redis_client, "w0")
    [mine] = claim(redis_client, who)
    assert control.cancel(redis_client, job) == "stopping"
    if way == "lost":
        redis_client.delete(keys.worker_beat("w0"))
        expire_lease(redis_client, job)
        assert recover(redis_client) == 1
    else:
        end = End(mine, way, "exit code 1", 0.1, retry=(3, [0]) if way == "retry" else None)  # type: ignore[arg-type]
        assert report(redis_client, who, end)
    shown = jobs.show(redis_client, job)
    assert shown.state == "stopped"
    assert len(shown.attempts) == 1
    assert redis_client.lrange(keys.queue("default"), 0, -1) == []
    assert not redis_client.exists(keys.LEASES)
