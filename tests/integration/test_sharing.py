"""Workers of one host divide what it has; a worker with a time limit ends in time."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from broker import status
from fleet import resources


@pytest.fixture
def seen(workers):
    """`seen("w0")`: what `fleet status` shows of a worker."""

    def look(name: str) -> status.WorkerStatus:
        return next(worker for worker in status.read(workers.client).workers if worker.name == name)

    return look


def test_what_one_worker_has_the_next_has_not(workers, seen):
    cpus, memory = resources.find_cpus(), resources.find_memory()
    workers.start("w0", resources={"cpus": cpus, "memory_bytes": memory - 2**30})
    second = workers.start("w1")
    assert (seen("w0").cpus, seen("w1").cpus) == (cpus, 0)
    assert seen("w1").memory_bytes == 2**30
    job = workers.submit("true")  # which asks for nothing
    assert workers.wait([job])[0].state == "finished"
    workers.kill(second)
    workers.start("w2")
    assert seen("w2").memory_bytes == 2**30


def test_siblings_have_equal_parts(workers, seen):
    for number in range(2):
        workers.start(f"w{number}", sibling=number, siblings=2)
    halves = [seen(name) for name in ("w0", "w1")]
    assert sum(worker.cpus for worker in halves) == resources.find_cpus()
    assert [worker.memory_bytes for worker in halves] == [
        resources.find_memory() - resources.find_memory() // 2,
        resources.find_memory() // 2,
    ]


def test_too_much_is_had_and_warned_of(workers, seen):
    workers.start("w0")
    workers.start("w1", resources={"cpus": 64})
    assert seen("w1").cpus == 64
    assert "said to have 64 CPUs, of which 0 are left" in workers.log("w1")


def _ended(process: Any) -> bool:
    return process.poll() is not None


def test_a_worker_with_a_time_limit_ends_in_time_and_hands_back(workers, tmp_path):
    mark = tmp_path / "started"
    job = workers.submit("sh", "-c", f"touch {mark}; sleep 600")
    began = time.monotonic()
    worker = workers.start("w0", time_limit_seconds=10.0, settings={"stop_grace_seconds": 3.0})
    workers.until(mark.exists, "it runs")

    def drains() -> bool:
        (row,) = status.read(workers.client).workers
        return row.state == "draining"

    workers.until(drains, "it takes no more jobs")
    late = workers.submit("true")
    workers.until(lambda: _ended(worker), "it has ended")
    assert worker.returncode == 0
    assert time.monotonic() - began >= 9, "its job has until a second (kill_grace_seconds) before the end"
    assert [workers.state(one) for one in (job, late)] == ["queued", "queued"]
    workers.assert_clean()


def test_the_end_is_in_its_record(workers, seen):
    workers.start("w0", time_limit_seconds=3600.0)
    ends_at = seen("w0").ends_at
    assert isinstance(ends_at, datetime)
    assert 3000 < ends_at.timestamp() - time.time() < 3600
    workers.start("w1")
    assert seen("w1").ends_at is None
