"""Workers that leave by themselves: after one job, or when no work remains; and what they leave behind."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import rq

from broker import chores, control, hosts, keys
from broker.session import EPHEMERAL_RECORD_TTL, RECORD_TTL
from tests.integration.conftest import Workers

#: nobody is taken for dead, however busy the machine
_PATIENT = {"heartbeat_seconds": 0.5, "lease_seconds": 60.0}
_ONE = {"ephemeral": True, "max_jobs": 1}


def blocker(workers: Workers, gate: Path, queue: str = "default") -> str:
    """A job that runs until `gate` is there."""
    script = f"touch {gate}.begun; until [ -e {gate} ]; do sleep 0.05; done"
    return workers.submit_many([("sh", "-c", script)], queue)[0]


def running(workers: Workers, gate: Path, queue: str = "default") -> str:
    """The same, once a worker runs it."""
    job = blocker(workers, gate, queue)
    workers.until(gate.with_name(f"{gate.name}.begun").exists, "it runs")
    return job


def looks_and_stays(workers: Workers, worker: subprocess.Popen[Any]) -> None:
    """It asks twice whether work remains, and is still there: nobody else here sends EXEC."""

    def looks() -> int:
        return int(workers.client.info("commandstats").get("cmdstat_exec", {}).get("calls", 0))

    before = looks()
    workers.until(lambda: looks() >= before + 3, "it looks for work")
    assert worker.poll() is None, "it stays"


def rq_queue(workers: Workers, name: str = "default") -> rq.Queue:
    return rq.Queue(name, connection=workers.client)


# --- until done ------------------------------------------------------------------------------------


def test_it_leaves_when_all_is_done_and_not_before(workers, tmp_path):
    first = workers.submit_many([("true",)] * 20)
    worker = workers.start("w0", until_done=True, wait=False)
    assert worker.wait(60) == 0
    assert {job.state for job in workers.wait(first)} == {"finished"}
    workers.assert_clean()
    assert hosts.signs(workers.client, ["w0"])["w0"].has_left


def test_it_leaves_at_once_where_there_is_nothing_to_do(workers):
    assert workers.start("w0", until_done=True, wait=False).wait(60) == 0


def test_work_that_comes_later_still_counts(workers):
    queue = rq_queue(workers)
    job = queue.enqueue_in(timedelta(hours=1), print, "late")
    worker = workers.start("w0", until_done=True)
    looks_and_stays(workers, worker)
    queue.scheduled_job_registry.schedule(job, datetime.now(UTC))
    assert worker.wait(60) == 0
    assert workers.state(job.id) == "finished"


def test_a_retry_that_waits_its_turn_still_counts(workers, tmp_path):
    script = f"[ -e {tmp_path}/again ] || {{ touch {tmp_path}/again; exit 1; }}"
    job = workers.submit("sh", "-c", script, retries=1, retry_delay_seconds=2)
    worker = workers.start("w0", until_done=True, wait=False)
    assert worker.wait(60) == 0
    assert workers.state(job) == "finished"


def test_a_job_that_waits_for_one_of_another_queue_still_counts(workers, tmp_path):
    workers.start("other", queues=("else",))
    parent = running(workers, tmp_path / "gate", "else")
    child = rq_queue(workers).enqueue(print, depends_on=parent)
    worker = workers.start("w0", until_done=True)
    looks_and_stays(workers, worker)
    (tmp_path / "gate").touch()
    assert worker.wait(60) == 0
    assert workers.state(child.id) == "finished"


def test_a_job_of_another_worker_may_come_back(workers, tmp_path):
    other = workers.start("other", settings={**_PATIENT, "stop_grace_seconds": 0.0})
    job = running(workers, tmp_path / "gate")
    worker = workers.start("w0", until_done=True, settings=_PATIENT)
    looks_and_stays(workers, worker)
    other.terminate()
    assert other.wait(60) == 0
    (tmp_path / "gate").touch()
    assert worker.wait(60) == 0
    (shown,) = workers.wait([job])
    ends = [(one.worker, one.outcome) for one in shown.attempts]  # a busy machine may hand it back twice
    assert ends[-1] == ("w0", "finished")
    assert ("other", "handed-back") in ends


def test_jobs_of_queues_that_are_not_its_own_do_not_count(workers):
    workers.submit_many([("true",)], "else")
    assert workers.start("w0", until_done=True, wait=False).wait(60) == 0


def test_drained_it_stays_while_work_remains_and_leaves_with_the_last_of_it(workers):
    control.drain(workers.client, {"w0": "here"})
    job = workers.submit("true")
    worker = workers.start("w0", until_done=True)
    looks_and_stays(workers, worker)
    assert workers.state(job) == "queued"
    workers.start("other", burst=True, wait=False)
    assert worker.wait(60) == 0
    assert workers.state(job) == "finished"


# --- one job alone ---------------------------------------------------------------------------------


def test_the_record_of_an_ephemeral_worker_that_died_goes_after_an_hour(workers):
    for name, ttl, fields in (("one", EPHEMERAL_RECORD_TTL, _ONE), ("many", RECORD_TTL, {})):
        workers.kill(workers.start(name, **fields))
        assert ttl - 60 < workers.client.ttl(keys.worker_record(name)) <= ttl
    workers.client.delete(keys.worker_record("one"))
    chores.Tidy().run(workers.client)
    assert workers.client.smembers(keys.FLEET_WORKERS) == {b"many"}


def test_a_wish_to_drain_an_ephemeral_worker_goes_with_its_record(workers, tmp_path):
    worker = workers.start("one", settings=_PATIENT, **_ONE)
    workers.start("many", queues=("else",))
    running(workers, tmp_path / "gate")
    control.drain(workers.client, {"one": "here", "many": "here"})
    assert workers.client.ttl(keys.worker_drain("many")) == -1
    workers.client.expire(keys.worker_drain("one"), 100)
    workers.until(lambda: workers.client.ttl(keys.worker_drain("one")) > 100, "each beat renews it")
    (tmp_path / "gate").touch()
    assert worker.wait(60) == 0
    assert not workers.client.exists(keys.worker_record("one"))
    assert 0 < workers.client.ttl(keys.worker_drain("one")) <= EPHEMERAL_RECORD_TTL
    assert workers.start("one", wait=False, **_ONE).wait(60) == 0, "who comes back within the hour is drained"
    workers.client.delete(keys.worker_drain("one"))
    workers.until(
        lambda: workers.client.smembers(keys.DRAINED) == {b"many"}, "its name is forgotten", seconds=60
    )


@pytest.mark.parametrize("fields", [{"ephemeral": True}, {**_ONE, "slots": 2}, {**_ONE, "max_jobs": 2}])
def test_an_ephemeral_worker_has_one_slot_for_one_job(workers, fields):
    worker = workers.start("w0", wait=False, **fields)
    assert worker.wait(60) == 2
    assert "an --ephemeral worker has one slot and leaves after one job" in workers.log("w0")
