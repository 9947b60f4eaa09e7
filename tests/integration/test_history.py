"""The totals of queues and their course, as a real Redis has them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import redis

from broker import chores, failed, history, keys
from broker.command import Command
from broker.history import BOUNDS_SECONDS, OTHER, Times, Totals
from broker.requirements import Requirements
from broker.submit import Options, submit_commands
from broker.work import End
from tests.integration.test_claims import claim, report, send, session, submit

WORDS = {
    "exit code 3": "exit_code",
    "killed by SIGSEGV": "signal",
    "Killed: rq's kill-horse command": "signal",
    "Timeout: ran longer than 5 s": "timeout",
    "rq.timeouts.JobTimeoutException: Task exceeded maximum timeout value (1 seconds)": "timeout",
    "OutOfMemory: killed by SIGKILL, by the kernel for want of memory on this host": "out_of_memory",
    "ValueError: exit code 3": "exception",
    "TimeoutError: no answer": "exception",
    "ResultTooLarge: 5 bytes, more than worker.max_result_bytes": "other",
}


def of(client: redis.Redis, queue: str = "default") -> Totals:
    return history.read(client)[queue]


def times(seconds: float) -> Times:
    """One that took so long."""
    index = sum(seconds > bound for bound in BOUNDS_SECONDS)
    counts = [0] * (len(BOUNDS_SECONDS) + 1)
    counts[index] = 1
    return Times(tuple(counts), seconds)


@pytest.mark.parametrize("bound", BOUNDS_SECONDS)
def test_what_takes_as_long_as_a_bound_is_below_it_and_what_takes_longer_is_above(
    redis_client: redis.Redis, bound: float
) -> None:
    submit(redis_client, 2)
    who = session(redis_client, "w0")
    first, second = claim(redis_client, who, 2)
    report(redis_client, who, End(first, "finished", duration_seconds=bound))
    assert of(redis_client).ran == times(bound)
    longer = bound + 0.002
    report(redis_client, who, End(second, "failed", "exit code 1", longer))
    found = of(redis_client).ran_in_vain
    assert found.counts == times(longer).counts
    assert found.total_seconds == pytest.approx(longer)
    assert of(redis_client).finished == 1


@pytest.mark.parametrize(("reason", "kind"), WORDS.items())
def test_failures_are_told_apart_by_what_is_said_of_them(
    redis_client: redis.Redis, reason: str, kind: str
) -> None:
    submit(redis_client, 1, retries=1, retry_delay_seconds=0)
    who = session(redis_client, "w0")
    for _ in range(2):
        report(redis_client, who, End(claim(redis_client, who)[0], "failed", reason, 0.1))
    counts = of(redis_client)
    assert counts.retried == {kind: 1}
    assert counts.failed == {kind: 1}
    assert counts.claims == 2


def test_what_never_started_is_stopped_or_waited_in_vain_has_a_kind_of_its_own(
    redis_client: redis.Redis,
) -> None:
    (first,) = submit(redis_client, 1)
    submit_commands(redis_client, "default", [(None, Command(("true",)))], Options(after=(first,)))
    submit(redis_client, 1)
    who = session(redis_client, "w0")
    one, other = claim(redis_client, who, 2)
    report(redis_client, who, End(one, "failed", "there is no program /x"))
    report(redis_client, who, End(other, "stopped", "Job stopped by user, work-horse terminated.", 2.0))
    assert of(redis_client).failed == {"other": 1, "dependency": 1, "stopped": 1}
    assert of(redis_client).ran_in_vain == times(2.0)


def test_losses_late_reports_and_what_is_handed_back_are_counted(redis_client: redis.Redis) -> None:
    submit(redis_client, 1)
    dead, alive = session(redis_client, "dead"), session(redis_client, "alive")
    for lost in range(1, 5):
        held = claim(redis_client, dead)[0]
        assert dead.lose_foreign(redis_client, [(held.job_id, held.lease)]) == 1
        assert of(redis_client).lost == lost
    assert not report(redis_client, dead, End(held, "finished", duration_seconds=1.0))
    submit(redis_client, 1)
    report(redis_client, alive, End(claim(redis_client, alive)[0], "handed-back", "it stops"))
    counts = of(redis_client)
    assert (counts.recovered.count, counts.failed) == (3, {"worker_lost": 1}), "the fourth loss fails it"
    assert (counts.stale, counts.handed_back, counts.claims, counts.finished) == (1, 1, 5, 0)


def test_time_to_recover_runs_from_the_end_of_the_lease(redis_client: redis.Redis) -> None:
    submit(redis_client, 1)
    held = claim(redis_client, session(redis_client, "dead"))[0]
    seconds, micros = redis_client.time()
    redis_client.zadd(keys.LEASES, {held.job_id: seconds * 1000 + micros // 1000 - 20_000})
    session(redis_client, "other").lose_foreign(redis_client, [(held.job_id, held.lease)])
    recovered = of(redis_client).recovered
    assert recovered.count == 1
    assert 20 <= recovered.total_seconds < 40


def test_waiting_runs_from_when_a_job_was_queued_to_its_claim(redis_client: redis.Redis) -> None:
    (job,) = submit(redis_client, 1)
    redis_client.hset(keys.job(job), "enqueued_at", "2026-01-01T00:00:00.000000Z")
    claim(redis_client, session(redis_client, "w0"))
    assert of(redis_client).waited.counts[-1] == 1, "longer than all bounds"
    assert of(redis_client).claims == 1


def test_sublists_count_with_their_queue(redis_client: redis.Redis) -> None:
    asks = Options(requirements=Requirements(cpus=1))
    submit_commands(redis_client, "default", [(None, Command(("true",)))] * 3, asks)
    submit(redis_client, 2)
    names = [queue for queue in chores.known_queues(redis_client) if "@" in queue]
    who = session(redis_client, "w0", "default", *names)
    ends = [End(one, "finished", duration_seconds=0.1) for one in claim(redis_client, who, 5)]
    assert all(send(redis_client, who, ends, 0).accepted)
    assert list(history.read(redis_client)) == ["default"]
    assert of(redis_client).claims == of(redis_client).finished == 5


def test_queues_beyond_the_first_hundred_share_a_record(redis_client: redis.Redis) -> None:
    queues = [f"q{number}" for number in range(103)]
    for queue in queues:
        submit(redis_client, 2, queue)
    who = session(redis_client, "w0", *queues)
    for _ in range(2):
        assert len(claim(redis_client, who, 103)) == 103
    found = history.read(redis_client)
    assert set(found) == {*queues[:100], OTHER}
    assert {found[queue].claims for queue in queues[:100]} == {2}
    assert found[OTHER].claims == 6
    assert len(list(redis_client.scan_iter("fleet:history:*"))) == 101


@pytest.mark.parametrize("damage", ["string", "field", "list"])
def test_a_damaged_record_stops_nobody(redis_client: redis.Redis, damage: str) -> None:
    submit(redis_client, 2)
    who = session(redis_client, "w0")
    first, second = claim(redis_client, who, 2)
    record = keys.history("default")
    if damage == "field":
        redis_client.hset(record, "ran:1000", "many")
    else:
        redis_client.delete(record)
        redis_client.set(record, "x") if damage == "string" else redis_client.rpush(record, "x")
    for one in (first, second):
        assert report(redis_client, who, End(one, "finished", duration_seconds=0.7))
    assert of(redis_client).finished == 2


def at(client: redis.Redis, seconds_ago: float, *counts: int) -> None:
    """A sample, as the chore wrote it then."""
    words: Sequence[float] = (client.time()[0] - seconds_ago, *counts)
    client.rpush(keys.series("default"), " ".join(f"{n:.0f}" for n in words))


def test_a_queues_course_is_what_its_totals_grew_by(redis_client: redis.Redis) -> None:
    submit(redis_client, 40)
    who = session(redis_client, "w0")
    ends = [End(one, "finished", duration_seconds=0.1) for one in claim(redis_client, who, 40)]
    assert all(send(redis_client, who, ends, 0).accepted)
    redis_client.zadd(keys.HISTORIES, {"default": (redis_client.time()[0] - 600) * 1000})
    at(redis_client, 300, 0, 0, 0, 0, 0)
    at(redis_client, 180, 20, 10, 1, 0, 0)
    at(redis_client, 60, 30, 30, 1, 0, 2)
    minutes = history.courses(redis_client, step_seconds=60, steps=10)["default"]
    assert [round(step.finished) for step in minutes] == [0, 0, 0, 0, 0, 5, 5, 10, 10, 10]
    assert sum(step.claims for step in minutes) == pytest.approx(40)


def test_where_a_queues_totals_began_anew_nothing_counts_down(redis_client: redis.Redis) -> None:
    submit(redis_client, 5)
    claim(redis_client, session(redis_client, "w0"), 5)
    at(redis_client, 300, 70, 0, 0, 0, 0)
    at(redis_client, 120, 100, 0, 0, 0, 0)
    minutes = history.courses(redis_client, step_seconds=60, steps=6)["default"]
    assert [round(step.claims) for step in minutes[:4]] == [0, 10, 10, 10], minutes
    assert minutes[4].claims == minutes[5].claims == 0


def test_samples_are_written_and_what_stays_the_same_takes_no_room(redis_client: redis.Redis) -> None:
    chore, series = chores.Sample(), keys.series("default")
    submit(redis_client, 3)
    who = session(redis_client, "w0")
    for count in (1, 2, 2, 2, 2, 3):
        if count > of_or_none(redis_client):
            claim(redis_client, who)
        chore.run(redis_client)
    claims = [line.split()[1] for line in redis_client.lrange(series, 0, -1)]
    assert claims == [b"1", b"2", b"2", b"3"]
    assert 0 < redis_client.ttl(series) <= history.SERIES_SECONDS
    assert redis_client.ttl(keys.history("default")) > 29 * 86400


def of_or_none(client: redis.Redis) -> int:
    return history.read(client).get("default", Totals()).claims


def test_a_queue_whose_record_is_gone_makes_room_for_another(redis_client: redis.Redis) -> None:
    submit(redis_client, 1)
    claim(redis_client, session(redis_client, "w0"))
    redis_client.delete(keys.history("default"))
    chores.Sample().run(redis_client)
    assert not redis_client.exists(keys.HISTORIES)


def test_the_last_failures_are_told_the_newest_first_whatever_their_queue(redis_client: redis.Redis) -> None:
    jobs = []
    for number in range(5):
        queue = f"q{number % 2}"
        jobs += submit(redis_client, 1, queue)
        who = session(redis_client, f"w{number}", queue)
        report(redis_client, who, End(claim(redis_client, who)[0], "failed", f"exit code {number + 1}", 0.1))
    last = failed.last(redis_client, 3)
    assert [one.job_id for one in last] == jobs[:1:-1]
    assert last[0].reason == "exit code 5"
    assert (last[0].queue, last[0].worker) == ("q0", "w4")
    assert last[0].at is not None
