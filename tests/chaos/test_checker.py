"""The checker itself: silent about a good history, it objects to each kind of bad one by its property."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import figures, journal
from tests.chaos.checker import PROPERTIES, check
from tests.chaos.evidence import Dump, Evidence
from tests.chaos.history import Event
from tests.chaos.journal import Transaction
from tests.chaos.story import execution_of, replay

#: seconds of Redis's clock at which these stories begin, and the length of their leases
BEGIN, LEASE = 1_000_000.0, 10.0


def step(*commands: str) -> Transaction:
    """One atomic step, in the words of Redis; `~` stands for a blank."""
    return [tuple(word.replace("~", " ").encode() for word in command.split()) for command in commands]


def iso(at: float) -> str:
    minutes, seconds = divmod(BEGIN + at - 950_400, 60)
    hours, minutes = divmod(minutes, 60)
    return f"1970-01-12T{int(hours):02}:{int(minutes):02}:{seconds:09.6f}Z"


def submitted(job: str, at: float = 0.0) -> Transaction:
    hash_ = f"HSET rq:job:{job} status queued origin default enqueued_at {iso(at)}"
    return step(hash_, f"RPUSH rq:queue:default {job}")


def deferred(job: str) -> Transaction:
    return step(f"HSET rq:job:{job} status deferred origin default", f"ZADD rq:deferred:default 1 {job}")


def lease(fence: int) -> str:
    return f"{fence}:e{fence}"


def claimed(job: str, fence: int, at: float = 1.0, worker: str = "w1") -> Transaction:
    score = int((BEGIN + at + LEASE) * 1000)
    return step(
        "LPOP rq:queue:default",
        f"HSET rq:job:{job} status started worker_name {worker} started_at {iso(at)}",
        f"HSET rq:job:{job} worker_name {worker} fleet_lease {lease(fence)}",
        f"ZADD fleet:leases {score} {job}",
    )


def over(job: str, fence: int, outcome: str, status: str, at: float, worker: str = "w1") -> list[str]:
    """The attempt ends: the lease goes, and its record is written."""
    row = {"fence": str(fence), "worker": worker, "outcome": outcome, "ended_at": iso(at)}
    attempts = (
        f"{fence}~{BEGIN + at}~{BEGIN + at}~{worker}"
        if outcome == "finished"
        else json.dumps(row).replace(" ", "~")
    )
    return [
        f"ZREM fleet:leases {job}",
        f"HDEL rq:job:{job} fleet_lease",
        f"HSET rq:job:{job} status {status} ended_at {iso(at)} fleet_attempts {attempts}",
    ]


def finished(job: str, fence: int, at: float = 2.0, worker: str = "w1") -> Transaction:
    result = f"XADD rq:results:{job} * type 1 execution_id e{fence}"
    listed = f"ZADD rq:finished:default 1 {job}"
    return step(*over(job, fence, "finished", "finished", at, worker), result, listed)


def failed(job: str, fence: int, at: float = 2.0) -> Transaction:
    return step(*over(job, fence, "failed", "failed", at), f"ZADD rq:failed:default 1 {job}")


def again(job: str, fence: int, outcome: str, at: float) -> Transaction:
    """Back to the front of its queue: lost, handed back, or to be retried."""
    losses = [f"HSET rq:job:{job} fleet_losses 1"] if outcome == "lost" else []
    return step(*losses, *over(job, fence, outcome, "queued", at), f"LPUSH rq:queue:default {job}")


def whole(job: str, fence: int) -> list[Transaction]:
    """From its submission to its end."""
    return [submitted(job), claimed(job, fence), finished(job, fence)]


def lost(job: str, fence: int, at: float) -> list[Transaction]:
    """From its submission to the loss of its first attempt."""
    return [submitted(job), claimed(job, fence), again(job, fence, "lost", at)]


def intent(job: str, **more: Any) -> Event:
    own = {"at": 0, "event": "intent", "who": "s", "job": job}
    return own | {"retries": 0, "queue": "default", "after": []} | more


def ack(*jobs: str) -> Event:
    return {"at": 0, "event": "ack", "who": "s", "jobs": list(jobs)}


def ran(job: str, fence: int, start: float, end: float, worker: str = "w1") -> list[Event]:
    own = {"who": "job", "job": job, "execution": f"e{fence}", "worker": worker, "pid": fence}
    return [{"at": start, "event": "start"} | own, {"at": end, "event": "end"} | own]


def reported(job: str, fence: int, accepted: bool = True, worker: str = "w1") -> Event:
    own = {"job": job, "lease": lease(fence), "outcome": "finished", "accepted": accepted}
    return {"at": 3, "event": "reported", "who": worker} | own


def died(worker: str, at: float) -> Event:
    return {"at": at, "event": "died", "who": "harness", "worker": worker, "wall": BEGIN + at, "status": -9}


def happened(name: str, **fields: Any) -> Event:
    return {"at": 0, "event": name, "who": "harness"} | fields


def evidence(events: Iterable[Event], steps: Iterable[Transaction], dump: Dump | None = None) -> Evidence:
    return Evidence(list(events), replay(steps), dump or Dump())


def good() -> Evidence:
    """A job, one lost with its worker and run again, one retried, and one that waited for the first."""
    steps = [
        submitted("a"),
        submitted("b"),
        submitted("c"),
        deferred("d"),
        claimed("a", 1),
        claimed("b", 2),
        [*finished("a", 1), *step("ZREM rq:deferred:default d"), *submitted("d")],
        again("b", 2, "lost", 12.0),
        claimed("b", 3, 13.0, "w2"),
        finished("b", 3, 14.0, "w2"),
        claimed("c", 4, 15.0),
        again("c", 4, "failed", 16.0),
        claimed("c", 5, 17.0),
        finished("c", 5, 18.0),
        claimed("d", 6, 19.0),
        finished("d", 6, 20.0),
    ]
    events = [
        *(intent("a"), intent("b"), intent("c", retries=1), intent("d", after=["a"]), ack(*"abcd")),
        happened("registered", who="w1", incarnation="i", queues=["default"], labels={}),
        happened("claimed", who="w1", job="a", lease=lease(1), queue="default"),
        *ran("a", 1, 1.1, 1.9),
        *ran("b", 2, 1.1, 1.5),
        *(reported("a", 1), died("w1", 1.6)),
        *ran("b", 3, 13.1, 13.5, "w2"),
        *(reported("b", 3, worker="w2"), reported("b", 2, accepted=False)),
        *ran("c", 4, 15.1, 15.2),
        *ran("c", 5, 17.1, 17.2),
        *ran("d", 6, 19.1, 19.2),
        *(happened("drained"), happened("counted", rq={}, ours={}), happened("rq-info", before={}, after={})),
    ]
    return evidence(events, steps, Dump(dict.fromkeys("abcd", ("finished", None)), {"default": []}, []))


def objections(found: Evidence) -> set[int]:
    """The properties that are contradicted."""
    return {violation.number for violation in check(found)}


def test_it_says_nothing_of_a_good_history() -> None:
    assert [str(violation) for violation in check(good())] == []


def test_there_are_ten_properties_each_with_its_sentence() -> None:
    assert list(PROPERTIES) == list(range(1, 11))
    for number, judge in PROPERTIES.items():
        assert (judge.__doc__ or "").startswith(f"{number}. ")


# -- 1: every acknowledged submission ends ---------------------------------------------------


def test_1_a_job_that_is_acknowledged_and_never_seen() -> None:
    assert objections(evidence([intent("a"), ack("a")], [])) == {1}


def test_1_a_job_that_stays_in_its_queue() -> None:
    assert objections(evidence([intent("a"), ack("a")], [submitted("a")])) == {1}


def test_1_a_job_that_vanishes() -> None:
    gone = step("LREM rq:queue:default 0 a", "DEL rq:job:a")
    assert objections(evidence([intent("a"), ack("a")], [submitted("a"), gone])) == {1}
    deleted = [intent("a"), ack("a"), happened("deleted", job="a")]
    assert not objections(evidence(deleted, [submitted("a"), gone]))


def test_1_a_job_that_was_not_acknowledged_need_not_be_there() -> None:
    assert not objections(evidence([intent("a")], []))


# -- 2: one accepted completion --------------------------------------------------------------


def test_2_a_job_that_is_finished_twice() -> None:
    steps = [*whole("a", 1), *whole("a", 2)]
    assert 2 in objections(evidence([intent("a"), ack("a")], steps))
    requeued = [intent("a"), ack("a"), happened("requeued", job="a")]
    assert not {1, 2, 3} & objections(evidence(requeued, steps))


def test_2_a_second_result_without_the_end_of_an_attempt() -> None:
    steps = [*whole("a", 1), step("XADD rq:results:a * type 1 execution_id e1")]
    assert objections(evidence([intent("a"), ack("a")], steps)) == {2}


def test_2_two_workers_that_are_both_told_that_theirs_is_accepted() -> None:
    found = good()
    assert 2 in objections(replace(found, events=[*found.events, reported("b", 2)]))


# -- 3: executions ---------------------------------------------------------------------------


def test_3_an_execution_that_no_loss_and_no_retry_explains() -> None:
    steps = [submitted("a"), claimed("a", 1), again("a", 1, "handed-back", 2.0), claimed("a", 2, 3.0)]
    steps += [again("a", 2, "handed-back", 4.0), claimed("a", 3, 5.0), finished("a", 3, 6.0)]
    base = [intent("a"), ack("a")]
    assert not objections(evidence([*base, *ran("a", 3, 5.1, 5.2)], steps))
    handed_back = [*base, *ran("a", 2, 3.1, 3.2), *ran("a", 3, 5.1, 5.2)]
    assert not objections(evidence(handed_back, steps)), "it is recorded that it was handed back"
    unexplained = [submitted("a"), claimed("a", 1), step("HDEL rq:job:a fleet_lease", "ZREM fleet:leases a")]
    unexplained += [submitted("a"), claimed("a", 2, 3.0), finished("a", 2, 4.0)]
    assert 3 in objections(evidence([*base, *ran("a", 1, 1.1, 1.2), *ran("a", 2, 3.1, 3.2)], unexplained))


def test_3_a_lease_that_runs_twice() -> None:
    found = good()
    assert objections(replace(found, events=[*found.events, *ran("a", 1, 1.91, 1.95)])) == {3}


def test_3_a_run_under_a_lease_that_redis_never_gave() -> None:
    found = good()
    assert 3 in objections(replace(found, events=[*found.events, *ran("a", 99, 5.0, 5.1)]))


def test_3_more_retries_than_were_asked_for() -> None:
    found = good()
    events = [event | {"retries": 0} if event["event"] == "intent" else event for event in found.events]
    assert objections(replace(found, events=events)) == {3}


def test_3_more_losses_than_the_limit() -> None:
    assert objections(replace(good(), losses_limit=0)) == {3}


# -- 4: fences -------------------------------------------------------------------------------


def test_4_the_end_of_an_older_attempt_that_is_accepted() -> None:
    steps = [*lost("a", 1, 12.0), claimed("a", 2, 13.0), finished("a", 1, 14.0)]
    assert objections(evidence([intent("a"), ack("a")], steps)) == {4}


def test_4_the_output_of_an_older_attempt_that_is_accepted() -> None:
    late = step(f"HSET fleet:output:a lease {lease(1)} stdout x")
    steps = [*lost("a", 1, 12.0), claimed("a", 2, 13.0), late]
    assert objections(evidence([intent("a"), ack("a")], [*steps, finished("a", 2, 14.0)])) == {4}


def test_4_a_fence_that_is_given_again() -> None:
    steps = [*whole("a", 5), *whole("b", 5)]
    assert objections(evidence([intent("a"), intent("b"), ack("a", "b")], steps)) == {4}


def test_4_an_end_that_its_worker_believes_in_and_redis_has_not() -> None:
    found = good()
    assert 4 in objections(replace(found, events=[*found.events, reported("c", 99)]))


# -- 5: one place ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("RPUSH rq:queue:default a", "queued and leased"),
        ("ZADD rq:scheduled:default 1 a", "scheduled and leased"),
        ("ZADD rq:deferred:default 1 a", "deferred and leased"),
        ("HSET rq:job:a status finished", "leased and terminal"),
        ("ZREM fleet:leases a", "a lease that never runs out"),
    ],
)
def test_5_a_job_in_two_places_for_a_moment(fault: str, where: str) -> None:
    undone = {
        "RPUSH rq:queue:default a": "LREM rq:queue:default 0 a",
        "ZADD rq:scheduled:default 1 a": "ZREM rq:scheduled:default a",
        "ZADD rq:deferred:default 1 a": "ZREM rq:deferred:default a",
        "HSET rq:job:a status finished": "HSET rq:job:a status started",
        "ZREM fleet:leases a": f"ZADD fleet:leases {int((BEGIN + 11) * 1000)} a",
    }[fault]
    steps = [submitted("a"), claimed("a", 1), step(fault), step(undone), finished("a", 1)]
    assert 5 in objections(evidence([intent("a"), ack("a")], steps)), where


def test_5_a_job_in_no_place_for_a_moment() -> None:
    steps = [submitted("a"), step("LPOP rq:queue:default"), step("RPUSH rq:queue:default a"), claimed("a", 1)]
    assert objections(evidence([intent("a"), ack("a")], [*steps, finished("a", 1)])) == {5}


def test_5_a_job_that_is_queued_twice() -> None:
    steps = [submitted("a"), step("RPUSH rq:queue:default a"), step("RPOP rq:queue:default"), claimed("a", 1)]
    assert objections(evidence([intent("a"), ack("a")], [*steps, finished("a", 1)])) == {5}


def test_5_a_redis_that_holds_something_else_than_its_journal_says() -> None:
    found = good()
    other = replace(found.dump, jobs=found.dump.jobs | {"a": ("queued", None)})
    assert objections(replace(found, dump=other)) == {5}
    listed = replace(found.dump, queued={"default": ["a"]})
    assert objections(replace(found, dump=listed)) == {5}


# -- 6: leases -------------------------------------------------------------------------------


def test_6_a_lease_that_is_given_while_another_is_held() -> None:
    steps = [submitted("a"), claimed("a", 1), claimed("a", 2), finished("a", 2)]
    assert objections(evidence([intent("a"), ack("a")], steps)) == {6}


def test_6_a_valid_lease_that_is_taken_away() -> None:
    steps = [*lost("a", 1, 5.0), claimed("a", 2, 6.0), finished("a", 2, 7.0)]
    base = [intent("a"), ack("a")]
    assert objections(evidence(base, steps)) == {6}
    assert not objections(evidence([*base, died("w1", 4.0)], steps)), "its worker was dead"
    gave_up = happened("giving-up", who="w1", job="a", lease=lease(1))
    assert not objections(evidence([*base, gave_up], steps)), "its worker said so itself"
    assert objections(evidence([*base, died("w2", 4.0)], steps)) == {6}, "it was another that died"


def test_6_more_tasks_of_an_array_at_once_than_may_be() -> None:
    ids = ("a-1", "a-2", "a-3")
    base = [*(intent(job, array="a", max_parallel=2) for job in ids), ack(*ids)]
    steps = [*map(submitted, ids), claimed("a-1", 1), claimed("a-2", 2, 1.5)]
    good = [finished("a-1", 1, 2.0), claimed("a-3", 3, 2.5), finished("a-2", 2, 3.0), finished("a-3", 3, 4.0)]
    assert not objections(evidence(base, steps + good))
    bad = [claimed("a-3", 3, 1.7), finished("a-1", 1, 2.0), finished("a-2", 2, 3.0), finished("a-3", 3, 4.0)]
    assert objections(evidence(base, steps + bad)) == {6}


def test_6_two_runs_of_a_job_at_once() -> None:
    steps = [*lost("a", 1, 12.0), claimed("a", 2, 13.0), finished("a", 2, 20.0)]
    runs = [*ran("a", 1, 1.1, 15.0), *ran("a", 2, 13.1, 19.0)]
    assert objections(evidence([intent("a"), ack("a"), *runs], steps)) == {6}
    stopped = {"at": 5.0, "event": "stopped", "who": "harness", "worker": "w1", "seconds": 9.0}
    alone = evidence([intent("a"), ack("a"), *runs, stopped | {"frozen": False}], steps)
    assert objections(alone) == {6}, "a worker that is stopped by itself has a sidecar"
    assert not objections(evidence([intent("a"), ack("a"), *runs, stopped | {"frozen": True}], steps))


@pytest.mark.parametrize(
    "asked", [{"cpus": 2}, {"memory": "600M"}, {"gpus": 1}, {"gpus": 0.75}, {"exclusive": True}]
)
def test_6_what_a_worker_has_promised_to_two_jobs_at_once(asked: dict[str, Any]) -> None:
    steps = [*whole("a", 1), *whole("b", 2)]
    has = {"labels": {}, "cpus": 3, "memory_bytes": 2**30, "gpus": 1, "queues": ["default"]}
    base = [intent("a", asked=asked), intent("b", asked=asked), ack("a", "b")]
    base.append(happened("registered", incarnation="i", **has) | {"who": "w1"})
    after = [*ran("a", 1, 1.1, 2.0), *ran("b", 2, 2.1, 3.0)]
    beside = [*ran("a", 1, 1.1, 2.0), *ran("b", 2, 1.5, 3.0)]
    elsewhere = [*ran("a", 1, 1.1, 2.0), *ran("b", 2, 1.5, 3.0, "w2")]
    assert not objections(evidence([*base, *after], steps))
    assert objections(evidence([*base, *beside], steps)) == {6}
    assert not objections(evidence([*base, *elsewhere], steps))
    tick = [*ran("a", 1, 1.1, 2.0), *ran("b", 2, 1.103, 1.107)]
    assert not objections(evidence([*base, *tick], steps)), (
        "a began at 1.1 by a clock of hundredths: after 1.107 as well"
    )
    short = [*ran("a", 1, 1.1, 2.0), *ran("b", 2, 1.5, 1.507)]
    assert objections(evidence([*base, *short], steps)) == {6}


# -- 7 to 10 ---------------------------------------------------------------------------------


def test_7_a_dependent_that_starts_before_its_condition_is_met() -> None:
    wants = [intent("a"), intent("d", after=["a"]), ack("a", "d")]
    early = [submitted("a"), claimed("a", 1), *whole("d", 2), finished("a", 1)]
    assert objections(evidence(wants, early)) == {7}


def test_7_a_dependent_that_starts_though_its_parent_failed() -> None:
    steps = [submitted("a"), claimed("a", 1), failed("a", 1), *whole("d", 2)]
    assert objections(evidence([intent("a"), intent("d", after=["a"]), ack("a", "d")], steps)) == {7}
    allowed = intent("d", after=["a"], allow_failure=True)
    assert not objections(evidence([intent("a"), allowed, ack("a", "d")], steps))


def test_7_what_may_wait_for_any_end_waits_for_it() -> None:
    wants = [intent("a"), intent("d", after_any=["a"]), ack("a", "d")]
    early = [submitted("a"), claimed("a", 1), *whole("d", 2), failed("a", 1)]
    assert objections(evidence(wants, early)) == {7}
    assert not objections(evidence(wants, [submitted("a"), claimed("a", 1), failed("a", 1), *whole("d", 2)]))


def test_7_a_job_fails_only_for_one_that_failed() -> None:
    wants = [intent("a"), intent("d", after=["a"]), ack("a", "d")]
    gone = step("ZREM rq:deferred:default d", "HSET rq:job:d status failed", "ZADD rq:failed:default 1 d")
    begun = [submitted("a"), deferred("d"), claimed("a", 1)]
    assert objections(evidence(wants, [*begun, gone, failed("a", 1)])) == {7}
    assert not objections(evidence(wants, [*begun, failed("a", 1) + gone]))


@pytest.mark.parametrize(
    "asked",
    [
        {"queue": "gpu"},
        {"asked": {"labels": ["gpu=a*"]}},
        {"asked": {"labels": ["zone!=b"]}},
        {"asked": {"cpus": 4}},
        {"asked": {"memory": "600M"}},
        {"asked": {"gpus": 0.5}},
    ],
)
def test_8_a_job_at_a_worker_that_is_not_fit_for_it(asked: dict[str, Any]) -> None:
    found = good()
    events = [event | asked if event["event"] == "intent" else event for event in found.events]
    poor = {"labels": {"zone": "b"}, "cpus": 3, "memory_bytes": 2**29, "gpus": 0}
    rich = {"labels": {"gpu": "a100"}, "cpus": 4, "memory_bytes": 2**30, "gpus": 1}

    def at(worker: dict[str, Any]) -> set[int]:
        told = [event | worker if event["event"] == "registered" else event for event in events]
        return objections(replace(found, events=told))

    assert 8 in at(poor)
    assert (8 in at(rich)) == ("queue" in asked)


def test_8_a_job_at_a_worker_that_nobody_knows() -> None:
    found = good()
    assert objections(replace(found, events=[e for e in found.events if e["event"] != "registered"])) == {8}


@pytest.mark.parametrize("key", ["fleet:leases", "fleet:wake:default", "rq:wip:default", "rq:execution:a:e1"])
def test_9_what_a_drain_leaves_behind(key: str) -> None:
    found = good()
    assert objections(replace(found, dump=replace(found.dump, left=[key]))) == {9}


def test_9_a_job_that_a_drain_leaves_running() -> None:
    running = Dump({"a": ("started", lease(1))})
    assert objections(evidence([happened("drained")], [submitted("a"), claimed("a", 1)], running)) == {9}


def test_10_counts_that_differ() -> None:
    found = good()
    differs = happened("counted", rq={"default": [1]}, ours={"default": [2]})
    assert objections(replace(found, events=[*found.events, differs])) == {10}


def test_10_an_rq_info_that_changes_something() -> None:
    found = good()
    changed = happened("rq-info", before={"a": "1"}, after={"a": "2"})
    assert objections(replace(found, events=[*found.events, changed])) == {10}


def test_10_a_running_job_that_somebody_moves_without_its_lease() -> None:
    abandoned = step("HSET rq:job:a status failed", "ZADD rq:failed:default 1 a")
    assert 10 in objections(evidence([intent("a"), ack("a")], [submitted("a"), claimed("a", 1), abandoned]))


# -- what it reads, and what it counts -------------------------------------------------------


def test_it_reads_what_redis_writes(tmp_path: Path) -> None:
    file = tmp_path / "appendonly.aof"
    words = [b"SELECT 3", b"MULTI", b"SET a x", b"SET b y", b"EXEC", b"SELECT 0", b"SET c z"]
    packed = [b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in line.split()) for line in words]
    text = b"".join(b"*%d\r\n%s" % (len(line.split()), p) for line, p in zip(words, packed, strict=True))
    file.write_bytes(b"#TS:1\r\n" + text + b"*3\r\n$3\r\nSET\r\n$1\r\nd\r\n$5\r\nto")
    assert list(journal.transactions(journal.files(tmp_path))) == [
        (3, [(b"SET", b"a", b"x"), (b"SET", b"b", b"y")]),
        (0, [(b"SET", b"c", b"z")]),
    ]


def test_it_refuses_a_journal_that_was_rewritten(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.2.base.rdb").touch()
    with pytest.raises(ValueError, match="rewritten"):
        journal.files(tmp_path)


def test_the_figures_of_a_good_history() -> None:
    found = figures.of(good(), [])
    assert (found.submitted, found.acknowledged, found.ended) == (4, 4, {"finished": 4})
    assert (found.executions, found.extra_executions, found.worker_deaths) == (6, 1, 1)
    assert found.extra_after_deaths == 1
    assert found.recoveries == 1
    assert found.recovery_max_seconds == pytest.approx(12.0 - 1.6)


def test_a_lease_tells_its_execution() -> None:
    assert execution_of(lease(7)) == "e7"
