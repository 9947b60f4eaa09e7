"""RQ's commands to workers, `rq suspend`, and what the registry of workers tells."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rq import Callback, Retry, Worker
from rq.command import send_kill_horse_command, send_stop_job_command
from rq.exceptions import InvalidJobOperation
from rq.results import Result
from rq.suspension import is_suspended, resume, suspend

from tests.integration.rq.conftest import QUEUES, Desk, lines


def the_worker(desk: Desk) -> Worker:
    found = Worker.find_by_key(f"rq:worker:{desk.worker}", connection=desk.client)
    assert isinstance(found, Worker)
    return found


# --- stop-job, kill-horse --------------------------------------------------------------------------


def test_a_job_that_is_stopped_is_not_run_again(desk: Desk) -> None:
    with desk.busy(retry=Retry(max=3), on_stopped=Callback("functions.tell_stopped")) as job:
        send_stop_job_command(desk.client, job.id)
        assert desk.wait(job) == ["stopped"]
    desk.until(lambda: desk.told(job, "stopped"), "the callback ran")
    desk.settled()
    job = desk.fetch(job)
    assert (job.is_stopped, job.retries_left) == (True, 3)
    assert job in desk.queue().failed_job_registry
    assert job not in desk.queue().started_job_registry
    result = job.latest_result()
    assert (result.type, result.worker_name) == (Result.Type.FAILED, desk.worker)
    assert result.exc_string == "Job stopped by user, work-horse terminated."


def test_stopping_kills_what_the_job_started(desk: Desk) -> None:
    pids = desk.file()
    with desk.busy():
        pass
    job = desk.enqueue("start_a_child", str(pids))
    child = int(desk.until(lambda: pids.exists() and pids.read_text(), "its child runs"))
    send_stop_job_command(desk.client, job.id)
    assert desk.wait(job) == ["stopped"]
    desk.until(lambda: is_gone(child), "the child is gone")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_stopped_job_may_be_requeued(desk: Desk) -> None:
    begun, gate = desk.file(), desk.file()
    job = desk.enqueue("begin_and_wait_for", str(begun), str(gate))
    desk.until(begun.exists, "it runs")
    send_stop_job_command(desk.client, job.id)
    desk.until_status(job, "stopped")
    gate.touch()
    desk.fetch(job).requeue()
    assert desk.wait(job) == ["finished"]


def test_only_the_job_that_is_meant_is_stopped(desk: Desk) -> None:
    ended = desk.run("add", 1, 1)
    with desk.busy() as job:
        queued = desk.enqueue("add", 1, 1, queue="served-by-nobody")
        with pytest.raises(InvalidJobOperation):
            send_stop_job_command(desk.client, queued.id)
        send_stop_job_command(desk.client, ended.id)
        assert desk.status(job) == "started"
    assert desk.wait(job) == ["finished"]
    assert desk.status(ended) == "finished"


@pytest.mark.parametrize("retries", [0, 1])
def test_a_killed_horse_is_a_failure_of_its_job(desk: Desk, retries: int) -> None:
    with desk.busy(retry=Retry(max=retries) if retries else None) as job:
        send_kill_horse_command(desk.client, desk.worker)
        if retries:
            desk.until(lambda: desk.fetch(job).retries_left == 0, "it was killed")
        else:
            assert desk.wait(job) == ["failed"]
    assert desk.wait(job) == ["finished" if retries else "failed"]


def test_a_horse_is_not_killed_where_there_is_none(desk: Desk) -> None:
    desk.settled()
    send_kill_horse_command(desk.client, desk.worker)
    desk.settled()


@pytest.mark.parametrize("payload", ["{}", '{"command": "stop-job"}', '{"command": "no such thing"}'])
@pytest.mark.fleet_only
def test_commands_that_make_no_sense_are_passed_over(desk: Desk, payload: str) -> None:
    desk.client.publish(f"rq:pubsub:{desk.worker}", payload)
    desk.settled()


# --- suspend, cancel, delete -----------------------------------------------------------------------


def test_suspended_workers_finish_what_runs_and_take_nothing(desk: Desk) -> None:
    with desk.busy() as running:
        suspend(desk.client)
        waiting = desk.enqueue("add", 1, 1)
    assert desk.wait(running) == ["finished"]
    assert is_suspended(desk.client)
    desk.until(lambda: the_worker(desk).get_state() != "busy", "it is idle")
    assert desk.status(waiting) == "queued"
    resume(desk.client)
    assert desk.wait(waiting) == ["finished"]


def test_a_suspension_may_end_by_itself(desk: Desk) -> None:
    suspend(desk.client, ttl=1)
    job = desk.enqueue("add", 1, 1)
    assert desk.wait(job) == ["finished"]


@pytest.mark.fleet_only
@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_running_job_that_is_canceled_or_deleted_is_ended(desk: Desk, how: str) -> None:
    pids = desk.file()
    job = desk.enqueue("start_a_child", str(pids))
    desk.until(lambda: pids.exists() and pids.read_text(), "it runs")
    child = desk.enqueue("add", 1, 1, depends_on=job)
    getattr(desk.fetch(job), how)()
    desk.until(lambda: is_gone(int(pids.read_text())), "it was ended")
    desk.settled()
    assert desk.status(job) == ("canceled" if how == "cancel" else None)
    assert desk.status(child) == "deferred"
    assert job.get_executions() == []


def test_a_canceled_job_that_would_end_well_is_stored_as_finished_by_rq_alone(desk: Desk) -> None:
    with desk.busy() as job:
        desk.fetch(job).cancel()
        if desk.kind != "rq":
            desk.settled()
    desk.settled()
    assert desk.status(job) == ("finished" if desk.kind == "rq" else "canceled")
    assert (job in desk.queue().finished_job_registry) == (desk.kind == "rq")


def test_rqs_command_line_requeues_and_empties(desk: Desk) -> None:
    runs = desk.file()
    job = desk.run("fail_until", str(runs), 2)
    rq_command(desk, "requeue", "--queue", "default", job.id)
    assert desk.wait(job) == ["finished"]
    with desk.held():
        dropped = desk.enqueue("note", str(runs), "dropped", queue="low")
        rq_command(desk, "empty", "low")
    desk.settled()
    assert desk.status(dropped) is None
    assert lines(runs) == ["tried", "tried"]


def rq_command(desk: Desk, verb: str, *arguments: str) -> None:
    script = str(Path(sys.executable).parent / "rq")
    subprocess.run([script, verb, "--url", desk.url, *arguments], check=True, capture_output=True)


# --- the registry of workers -----------------------------------------------------------------------


def test_a_worker_is_in_rqs_registry(desk: Desk) -> None:
    worker = the_worker(desk)
    assert worker.name in [one.name for one in Worker.all(connection=desk.client)]
    assert worker.name in [one.name for one in Worker.all(queue=desk.queue("low"))]
    assert Worker.count(queue=desk.queue("low")) == 1
    assert Worker.count(queue=desk.queue("elsewhere")) == 0
    assert tuple(worker.queue_names())[:3] == QUEUES
    assert worker.hostname
    assert worker.ip_address
    assert worker.pid
    assert worker.version
    assert worker.python_version.startswith("3.")
    assert worker.birth_date
    assert worker.birth_date <= worker.last_heartbeat
    assert desk.client.ttl(worker.key) > 0


def test_a_worker_counts_what_it_did(desk: Desk) -> None:
    def counts() -> tuple[int, int, float]:
        worker = the_worker(desk)
        return worker.successful_job_count, worker.failed_job_count, worker.total_working_time

    desk.settled()
    good, bad, seconds = counts()
    desk.wait(
        desk.enqueue("nap", 0.2),
        desk.enqueue("fail"),
        desk.enqueue("fail_until", str(desk.file()), 2, retry=Retry(max=3)),
        desk.enqueue("again", 1),
        desk.enqueue("die"),
        desk.enqueue("add", 1, 1, result_ttl=0),
    )
    desk.settled()
    after = counts()
    # a failure that is tried again counts, and so does each Retry that a function returned
    assert (after[0] - good, after[1] - bad) == (2 + 1 + 1, 1 + 1 + 2 + 1)
    assert 0.2 <= after[2] - seconds < 60


def test_a_worker_with_nothing_to_do_says_so(desk: Desk) -> None:
    desk.settled()
    desk.until(lambda: the_worker(desk).get_state() == "idle", "idle")
    assert the_worker(desk).get_current_job_id() is None


def test_a_worker_shut_down_by_a_signal_leaves_the_registry(desk: Desk) -> None:
    name, process = desk.start_another("low")
    desk.until(lambda: Worker.count(queue=desk.queue("low")) == 2, "registered")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert name not in [one.name for one in Worker.all(connection=desk.client)]
    assert Worker.count(queue=desk.queue("low")) == 1
    # RQ shows for a minute when it died
    assert bool(desk.client.hget(f"rq:worker:{name}", "death")) == (desk.kind == "rq")
