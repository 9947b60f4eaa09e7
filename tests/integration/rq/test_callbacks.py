"""Callbacks of success, failure and stop: when they run, what they are given, and what if they fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rq import Callback, Retry
from rq.command import send_stop_job_command

from tests.integration.rq.conftest import Desk, lines

pytestmark = pytest.mark.forks

TELL_ALL: dict[str, Any] = {
    "on_success": Callback("functions.tell_success"),
    "on_failure": Callback("functions.tell_failure"),
    "on_stopped": Callback("functions.tell_stopped"),
}


def heard(desk: Desk, job: Any) -> dict[str, dict[str, Any]]:
    """What each callback of the job told of itself."""
    told = {what: desk.told(job, what) for what in ("success", "failure", "stopped")}
    return {what: json.loads(text) for what, text in told.items() if text}


def test_success_calls_the_success_callback_alone(desk: Desk) -> None:
    job = desk.run("add", 1, 2, meta={"key": "value"}, **TELL_ALL)
    assert heard(desk, job) == {
        "success": {
            "id": job.id,
            "status": "finished",
            "stored": "started",
            "ended": True,
            "meta": {"key": "value"},
            "current": False,
            "result": 3,
        }
    }


def test_failure_calls_the_failure_callback_alone(desk: Desk) -> None:
    job = desk.run("fail_with", "broken", **TELL_ALL)
    assert heard(desk, job) == {
        "failure": {
            "id": job.id,
            "status": "failed",
            "stored": "started",
            "ended": True,
            "meta": {},
            "current": False,
            "kind": "ValueError",
            "value": "broken",
            "traceback": True,
        }
    }


def test_a_timeout_calls_the_failure_callback(desk: Desk) -> None:
    job = desk.run("nap", 10, job_timeout=1, **TELL_ALL)
    assert heard(desk, job)["failure"]["kind"] == "JobTimeoutException"


def test_stop_calls_the_stopped_callback_alone(desk: Desk) -> None:
    with desk.busy(**TELL_ALL) as job:
        send_stop_job_command(desk.client, job.id)
        assert desk.wait(job) == ["stopped"]
    desk.until(lambda: desk.told(job, "stopped"), "the callback ran")
    assert list(heard(desk, job)) == ["stopped"]
    # RQ stores the end after the callback, and a fleet worker before it
    assert heard(desk, job)["stopped"]["stored"] == ("started" if desk.kind == "rq" else "stopped")


def test_a_job_that_died_has_nobody_to_call_back(desk: Desk) -> None:
    job = desk.run("die", **TELL_ALL)
    assert job.is_failed
    assert heard(desk, job) == {}


def test_each_failed_attempt_calls_the_failure_callback(desk: Desk) -> None:
    job = desk.run("fail", retry=Retry(max=2), **TELL_ALL)
    assert job.is_failed
    assert desk.client.get(f"test:failures:{job.id}") == b"3"


def test_a_returned_retry_calls_nobody(desk: Desk) -> None:
    job = desk.run("again", 1, **TELL_ALL)
    assert job.is_failed
    assert heard(desk, job) == {}


@pytest.mark.parametrize(
    "callback", ["functions.broken_callback", "functions.not_there", "no_such_module.callback"]
)
def test_a_success_callback_that_fails_makes_the_job_fail(desk: Desk, callback: str) -> None:
    job = desk.run("add", 1, 2, on_success=Callback(callback), on_failure=Callback("functions.tell_failure"))
    assert job.is_failed
    assert heard(desk, job)["failure"]["status"] == "failed"
    assert job.return_value() is None


def test_a_failure_callback_that_fails_tells_its_own_failure(desk: Desk) -> None:
    job = desk.run("fail_with", "first", on_failure=Callback("functions.broken_callback"))
    assert job.is_failed
    assert "LookupError: broken callback" in job.latest_result().exc_string


@pytest.mark.fleet_only
def test_a_stopped_callback_that_fails_leaves_the_job_stopped(desk: Desk) -> None:
    """It ends a stock worker of RQ 2.12."""
    with desk.busy(on_stopped=Callback("functions.broken_callback")) as job:
        send_stop_job_command(desk.client, job.id)
        assert desk.wait(job) == ["stopped"]
    desk.settled()
    assert desk.status(job) == "stopped"


@pytest.mark.parametrize("function", ["add", "fail_with"])
def test_a_callback_has_a_time_limit_of_its_own(desk: Desk, function: str) -> None:
    callback = {"add": "on_success", "fail_with": "on_failure"}[function]
    arguments = (1, 1) if function == "add" else ("broken",)
    job = desk.run(function, *arguments, **{callback: Callback("functions.slow_callback", timeout=1)})
    assert job.is_failed
    assert (
        "JobTimeoutException: Task exceeded maximum timeout value (1 seconds)"
        in job.latest_result().exc_string
    )


@pytest.mark.parametrize("function", ["add", "fail_with"])
def test_a_job_has_ended_when_its_callback_begins(desk: Desk, function: str) -> None:
    slow = Callback("functions.note_time_and_nap")
    arguments = (1, 1) if function == "add" else ("broken",)
    job = desk.run(function, *arguments, on_success=slow, on_failure=slow)
    began = float(desk.told(job, "time") or 0)
    # the callback took 2 s; the report of the end may be late on a busy machine
    assert job.started_at.timestamp() <= job.ended_at.timestamp() < began + 1.5
    result = job.latest_result()
    assert result.execution_started_at <= result.execution_ended_at
    assert result.execution_ended_at.timestamp() < began + 1.5


@pytest.mark.parametrize(
    ("function", "arguments", "state"), [("update_meta", [{"job": 1}], "finished"), ("fail", [], "failed")]
)
def test_a_callback_may_save_meta(desk: Desk, function: str, arguments: list[Any], state: str) -> None:
    mark = Callback("functions.mark_in_callback")
    job = desk.run(function, *arguments, on_success=mark, on_failure=mark)
    assert job.get_status() == state
    assert job.get_meta() == ({"job": 1} if arguments else {}) | {"callback": True}


@pytest.mark.fleet_only
@pytest.mark.parametrize(("function", "state"), [("environment", "finished"), ("fail", "failed")])
def test_a_callback_may_refresh_its_job(desk: Desk, function: str, state: str) -> None:
    refresh = Callback("functions.refresh_in_callback")
    job = desk.run(function, on_success=refresh, on_failure=refresh)
    assert job.get_status() == state
    assert job.get_meta() == {"callback": True}


def test_a_failure_callback_may_forbid_further_retries(desk: Desk) -> None:
    runs = desk.file()
    callback = Callback("functions.no_more_retries")
    job = desk.run("fail_until", str(runs), 9, retry=Retry(max=3), on_failure=callback)
    assert job.is_failed
    assert lines(runs) == ["tried"]
