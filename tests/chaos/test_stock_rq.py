"""RQ's own worker in the same harness, judged by the same checker: what it breaks, and how."""

from __future__ import annotations

import signal
from typing import Any

import redis
import rq

from tests.chaos.checker import check
from tests.chaos.harness import Child, Harness, digest, rq_counts
from tests.chaos.history import read


def broken(harness: Harness) -> set[int]:
    """The properties that this run contradicts."""
    return {violation.number for violation in check(harness.evidence())}


def start(harness: Harness, who: str, *queues: str, **order: Any) -> Child:
    return harness.fork("rq-worker", who, url=harness.redis.url, queues=queues, **order)


def submit(
    harness: Harness, client: redis.Redis, *args: str, function: str = "work", retries: int = 0
) -> str:
    """A function by RQ's own client, in the queue `low`."""
    harness.history.note("intent", job="victim", queue="low", retries=retries)
    retry = rq.Retry(max=retries) if retries else None
    rq.Queue("low", connection=client).enqueue(f"chaos_jobs.{function}", *args, job_id="victim", retry=retry)
    harness.history.note("ack", jobs=["victim"])
    return "victim"


def status(client: Any) -> str:
    return (client.hget("rq:job:victim", "status") or b"").decode()


def test_an_undisturbed_rq_worker_breaks_nothing(harness: Harness) -> None:
    with harness.client() as client:
        submit(harness, client)
        assert harness.wait(start(harness, "stock", "low", burst=True)) == 0, harness.log("stock")
        assert status(client) == "finished"
    assert broken(harness) == set()


def test_an_rq_worker_that_dies_at_its_blpop_loses_the_job_for_ever(harness: Harness) -> None:
    with harness.client() as client:
        submit(harness, client)
        dead = start(harness, "stock", "high", "low", failpoint=["BLPOP#1", "die-sent"])
        assert harness.wait(dead) == -signal.SIGKILL
        again = start(harness, "other", "high", "low", burst=True)
        assert harness.wait(again) == 0, harness.log("other")
        assert status(client) == "queued"
        assert client.lrange("rq:queue:low", 0, -1) == []
    assert broken(harness) == {1, 5}


def test_a_job_of_an_rq_worker_that_is_stopped_runs_twice_and_both_results_count(harness: Harness) -> None:
    with harness.client() as client:
        gate = harness.folder / "gate"
        submit(harness, client, str(gate), function="work_until", retries=1)
        first = start(harness, "stock", "low")
        harness.until(lambda: runs(harness) == 1, "it runs")
        harness.kill(first, signal.SIGSTOP)
        key = "rq:wip:low"
        harness.until(lambda: client.zcount(key, "-inf", client.time()[0] - 1), "its heartbeat has run out")
        before = digest(client)
        rq_counts(harness.redis.url)  # it only reads, one would think
        harness.history.note("rq-info", before=before, after=digest(client))
        second = start(harness, "other", "low", burst=True)
        harness.until(lambda: runs(harness) == 2 and both_live(harness), "it runs twice at once")
        gate.with_name("gate.0").touch()
        harness.until(lambda: client.xlen("rq:results:victim") == 1, "the first has written its result")
        gate.with_name("gate.1").touch()
        assert harness.wait(second) == 0, harness.log("other")
        harness.until(lambda: client.xlen("rq:results:victim") == 2, "both have written results")
        harness.kill(first, signal.SIGCONT)
        harness.kill(first, signal.SIGTERM)
        harness.wait(first)
    assert runs(harness) == 2
    assert broken(harness) == {2, 3, 6, 10}


def both_live(harness: Harness) -> bool:
    """Whether both runs have given a sign of life since the second began."""
    events = [event for event in read(harness.path) if event["who"] == "job"]
    second = max(index for index, event in enumerate(events) if event["event"] == "start")
    return len({event["pid"] for event in events[second + 1 :] if event["event"] == "tick"}) == 2


def runs(harness: Harness) -> int:
    return sum(event["event"] == "start" for event in read(harness.path))
