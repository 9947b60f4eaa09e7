"""What becomes of a function: its value, its failure, its death; and what is never run."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest
from rq.job import JobStatus
from rq.results import Result

from tests.integration.rq import functions
from tests.integration.rq.conftest import Desk, lines

pytestmark = pytest.mark.forks


@pytest.fixture
def jobs_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """functions under the name by which workers import it, for what is pickled by reference."""
    spec = importlib.util.spec_from_file_location("functions", functions.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "functions", module)
    spec.loader.exec_module(module)
    return module


# --- success ---------------------------------------------------------------------------------------


def test_a_job_that_returns_is_finished_and_keeps_its_value(desk: Desk) -> None:
    job = desk.run("add", 2, 3)
    assert (job.get_status(), job.is_finished) == (JobStatus.FINISHED, True)
    assert job.return_value() == 5
    queue = desk.queue()
    assert job in queue.finished_job_registry
    assert job not in queue.started_job_registry
    assert job not in queue.failed_job_registry
    assert job.get_executions() == []
    assert (job.origin, job.worker_name) == ("default", desk.worker)


def test_its_times_follow_each_other(desk: Desk) -> None:
    job = desk.run("nap", 0.1)
    assert job.created_at <= job.enqueued_at <= job.started_at
    assert 0.09 <= (job.ended_at - job.started_at).total_seconds() < 30
    assert job.last_heartbeat >= job.enqueued_at


def test_its_result_tells_who_ran_it_and_when(desk: Desk) -> None:
    job = desk.run("nap", 0.1)
    result = job.latest_result()
    assert (result.type, result.worker_name) == (Result.Type.SUCCESSFUL, desk.worker)
    assert result.execution_id
    took = result.execution_ended_at - result.execution_started_at
    assert 0.09 <= took.total_seconds() < 30


def test_arguments_arrive_as_they_were_given(desk: Desk) -> None:
    job = desk.queue().enqueue("functions.greet", "Grüß Gott", name="Zoë")
    desk.wait(job)
    assert job.return_value() == "Grüß Gott, Zoë!"
    assert desk.fetch(job).description == job.description
    assert job.func_name == "functions.greet"
    value = {"list": [1, 2.5, None], "set": {1, 2}, "bytes": b"\x00\xff", "text": "\U0001f40e"}
    assert desk.run("echo", value).return_value() == value


def test_what_can_be_called_is_called(desk: Desk, jobs_module: ModuleType) -> None:
    counter = jobs_module.Counter(40)
    calls = [
        (desk.enqueue("builtins.len", "four"), 4),
        (desk.enqueue(jobs_module.add, 1, 2), 3),
        (desk.enqueue(counter.up, 2), 42),
        (desk.enqueue(counter, 3), 43),
        (desk.enqueue("functions.Counter.double", 4), 8),
        (desk.enqueue(jobs_module.Counter.double, 5), 10),
        (desk.enqueue("functions.Counter.named", "x"), "Counter x"),
        (desk.enqueue("functions.add_later", 1, 2), 3),
    ]
    desk.wait(*(job for job, _ in calls))
    assert [job.return_value() for job, _ in calls] == [value for _, value in calls]


def test_a_value_that_cannot_be_stored_is_said_to_be_so(desk: Desk) -> None:
    job = desk.run("picky")
    assert job.is_finished
    assert job.return_value() == "Unserializable return value"


def test_no_value_is_none(desk: Desk) -> None:
    job = desk.run("nap", 0)
    assert job.return_value() is None
    assert job.latest_result().type == Result.Type.SUCCESSFUL


# --- failure ---------------------------------------------------------------------------------------


def test_a_job_that_raises_is_failed_and_keeps_the_traceback(desk: Desk) -> None:
    job = desk.run("fail_with", "broken")
    assert (job.get_status(), job.is_failed) == (JobStatus.FAILED, True)
    queue = desk.queue()
    assert job in queue.failed_job_registry
    assert job not in queue.started_job_registry
    assert job not in queue.finished_job_registry
    result = job.latest_result()
    assert (result.type, result.worker_name, result.return_value) == (Result.Type.FAILED, desk.worker, None)
    assert result.exc_string.startswith("Traceback (most recent call last):")
    assert "in fail_with" in result.exc_string
    assert result.exc_string.rstrip().endswith("ValueError: broken")
    assert job.return_value() is None
    assert job.started_at <= job.ended_at


def test_a_failure_does_not_change_when_it_was_enqueued(desk: Desk) -> None:
    enqueued = desk.enqueue("fail")
    desk.wait(enqueued)
    assert desk.fetch(enqueued).enqueued_at == enqueued.enqueued_at


def test_a_message_may_be_in_any_script(desk: Desk) -> None:
    job = desk.run("fail_with", "💪 вечер")
    assert "ValueError: 💪 вечер" in job.latest_result().exc_string


@pytest.mark.parametrize(
    ("function", "arguments", "last"),
    [("leave", ["bye"], "SystemExit: bye"), ("interrupt", [], "KeyboardInterrupt")],
)
def test_leaving_is_a_failure(desk: Desk, function: str, arguments: list[str], last: str) -> None:
    job = desk.run(function, *arguments)
    assert job.is_failed
    assert job.latest_result().exc_string.strip().splitlines()[-1] == last


@pytest.mark.parametrize(("function", "arguments"), [("die", []), ("exit_at_once", [3])])
def test_a_job_that_kills_its_process_is_failed_and_the_next_runs(
    desk: Desk, function: str, arguments: list[int]
) -> None:
    dead = desk.enqueue(function, *arguments)
    alive = desk.enqueue("add", 1, 1)
    assert desk.wait(dead, alive) == ["failed", "finished"]
    result = dead.latest_result()
    assert (result.type, result.worker_name) == (Result.Type.FAILED, desk.worker)
    assert result.exc_string
    assert dead in desk.queue().failed_job_registry


@pytest.mark.fleet_only
def test_a_job_that_ends_its_process_in_peace_is_failed_too(desk: Desk) -> None:
    job = desk.run("exit_at_once", 0)
    assert job.is_failed
    assert "status 0" in job.latest_result().exc_string


@pytest.mark.parametrize(
    "function", ["functions.nowhere", "no_such_module.function", "functions.Counter.nothing"]
)
def test_a_function_that_is_not_there_is_a_failure_of_the_job(desk: Desk, function: str) -> None:
    job = desk.run(function)
    assert job.is_failed
    assert function.rpartition(".")[2] in job.latest_result().exc_string


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x80\x05garbage"])
def test_data_that_cannot_be_read_is_a_failure_of_the_job(desk: Desk, damage: bytes) -> None:
    with desk.held():
        job = desk.enqueue("add", 1, 1)
        desk.client.hset(job.key, "data", zlib.compress(damage))
    desk.wait(job)
    assert job in desk.queue().failed_job_registry
    desk.settled()


def test_meta_that_cannot_be_read_does_not_keep_the_job_from_running(desk: Desk) -> None:
    with desk.held():
        job = desk.enqueue("add", 1, 1, meta={"key": "value"})
        desk.client.hset(job.key, "meta", "{{{{ no meta")
    assert desk.wait(job) == ["finished"]


# --- what runs, and when ---------------------------------------------------------------------------


def test_queues_are_served_in_the_workers_order_and_each_from_its_front(desk: Desk) -> None:
    runs = desk.file()
    with desk.held():
        jobs = [
            desk.enqueue("note", str(runs), "low", queue="low"),
            desk.enqueue("note", str(runs), "default 1"),
            desk.enqueue("note", str(runs), "default 2"),
            desk.enqueue("note", str(runs), "high", queue="high"),
            desk.enqueue("note", str(runs), "in front", at_front=True),
        ]
    desk.wait(*jobs)
    assert lines(runs) == ["high", "in front", "default 1", "default 2", "low"]


def test_jobs_enqueued_together_all_run(desk: Desk) -> None:
    queue = desk.queue()
    jobs = queue.enqueue_many([queue.prepare_data("functions.add", (number, 1)) for number in range(8)])
    assert desk.wait(*jobs) == ["finished"] * 8
    assert [job.return_value() for job in jobs] == [number + 1 for number in range(8)]


def test_what_was_deleted_or_canceled_in_its_queue_is_not_run(desk: Desk) -> None:
    runs = desk.file()
    with desk.held():
        gone, deleted, canceled, kept = (desk.enqueue("note", str(runs), word) for word in "gdck")
        desk.client.delete(gone.key)
        deleted.delete()
        canceled.cancel()
    desk.wait(kept)
    desk.settled()
    assert lines(runs) == ["k"]
    assert canceled in desk.queue().canceled_job_registry
    assert [desk.status(job) for job in (gone, deleted, canceled)] == [None, None, "canceled"]
    assert desk.queue().count == 0


def test_a_job_finds_itself_in_its_environment(desk: Desk) -> None:
    job = desk.run("environment")
    found = job.return_value()
    assert (found["RQ_JOB_ID"], found["RQ_WORKER_ID"]) == (job.id, desk.worker)


def test_a_job_may_enqueue_another(desk: Desk) -> None:
    runs = desk.file()
    first = desk.run("enqueue_another", "functions.note", str(runs), "second")
    second = desk.queue("low").fetch_job(first.return_value())
    assert second is not None
    assert desk.wait(second) == ["finished"]
    assert lines(runs) == ["second"]


def test_what_a_job_leaves_in_memory_is_there_for_the_next_in_a_warm_executor_alone(desk: Desk) -> None:
    desk.run("die")
    runs = [desk.run("count_runs").return_value() for _ in range(2)]
    assert runs == ([1, 2] if desk.kind == "fleet" else [1, 1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_job_may_have_processes_of_its_own(desk: Desk, method: str) -> None:
    assert desk.run("add_elsewhere", method, 40, 2).return_value() == 42


def test_a_canceled_job_may_be_enqueued_again(desk: Desk) -> None:
    with desk.held():
        job = desk.enqueue("add", 1, 1)
        job.cancel()
    desk.settled()
    desk.queue().enqueue_job(desk.fetch(job))
    assert desk.wait(job) == ["finished"]


def test_an_id_of_the_producers_own_may_be_used_again(desk: Desk, tmp_path: Path) -> None:
    job_id = f"own-{desk.file().name}"
    first = desk.run("echo", 1, job_id=job_id)
    second = desk.run("echo", 2, job_id=job_id)
    assert (first.id, second.id, second.return_value()) == (job_id, job_id, 2)
