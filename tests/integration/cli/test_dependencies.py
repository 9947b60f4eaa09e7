"""`fleet submit --after`, and what other verbs say of jobs that wait for others."""

from __future__ import annotations

import json

import pytest


def test_waits_for_what_is_named(fleet, submit, redis_client):
    first = submit("true")
    second = submit("true", options=("--after", first))
    third = submit("true", options=("--after-any", second, "--after", first))
    told = json.loads(fleet("show", second, "--json").stdout)
    assert told["state"] == "deferred"
    assert told["dependencies"] == [{"id": first, "state": "queued"}]
    assert told["dependents"] == [{"id": third, "state": "deferred"}]
    shown = fleet("show", second).stdout
    assert f"After:     {first} (queued)\n" in shown
    assert f"Needed by: {third} (deferred)\n" in shown
    done = fleet("submit", "--json", "--after", second, "--", "true")
    assert json.loads(done.stdout)["state"] == "deferred"


def test_a_job_that_is_not_there_is_refused(fleet, redis_client):
    done = fleet("submit", "--after", "nobody", "--", "true", code=4)
    assert done.stderr.startswith("fleet: no job nobody to wait for\n")
    assert redis_client.keys("*") == []


def test_that_a_task_has_not_begun_is_told_with_what_to_do(fault, fleet):
    array = fleet("submit", "--array", "3-4", "--", "true").stdout.strip()
    error = fault("submit", "--after", f"{array}-4", "--", "true", code=4)
    assert f"task 4 of array {array} has not begun" in error["message"]
    assert f"--after-array {array}" in error["hint"]
    assert "has not begun" not in fault("submit", "--after", f"{array}-5", "--", "true", code=4)["message"]


def test_a_job_cannot_wait_for_itself(fleet, submit, redis_client):
    done = fleet("submit", "--id", "a", "--after", "a", "--", "true", code=1)
    assert "job a would wait for itself" in done.stderr


def test_both_at_once_is_refused(fleet, submit):
    first = submit("true")
    done = fleet("submit", "--after", first, "--after-any", first, "--", "true", code=2)
    assert f"job {first} is to finish, and to end in whatever way" in done.stderr


@pytest.mark.parametrize(
    ("setting", "options", "state"),
    [
        ("fail", (), "failed"),
        ("wait", (), "deferred"),
        ("wait", ("--on-failed-dependency", "fail"), "failed"),
        ("fail", ("--on-failed-dependency", "wait"), "deferred"),
    ],
)
def test_what_a_failure_means_is_a_setting_and_an_option(fleet, submit, setting, options, state):
    first = submit("true")
    env = {"FLEET_JOBS__ON_FAILED_DEPENDENCY": setting}
    job = fleet("submit", "--after", first, *options, "--", "true", env=env).stdout.strip()
    fleet("cancel", first)
    told = json.loads(fleet("show", job, "--json").stdout)
    assert told["state"] == state
    assert told["reason"] == (f"dependency {first} was canceled" if state == "failed" else None)


def test_one_that_fails_at_once_says_so(fleet, submit):
    first = submit("true")
    fleet("cancel", first)
    done = fleet("submit", "--after", first, "--", "true")
    job = done.stdout.strip()
    assert f"Job {job} failed at once" in done.stderr
    assert "what it waits for did not finish; retry that one" in fleet("retry", job, code=1).stdout
    fleet("retry", first)
    assert json.loads(fleet("show", job, "--json").stdout)["state"] == "deferred"
