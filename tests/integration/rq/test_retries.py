"""Retries: asked for by the producer, or by the function; and jobs that somebody enqueues again."""

from __future__ import annotations

from typing import Any

import pytest
from rq import Retry
from rq.results import Result

from tests.integration.rq.conftest import Desk, lines


def kinds(job: Any) -> list[str]:
    """The types of the job's results, the oldest first."""
    return [result.type.name for result in reversed(job.results())]


# --- retry=Retry(...) ------------------------------------------------------------------------------


def test_a_job_is_tried_until_it_succeeds(desk: Desk) -> None:
    runs = desk.file()
    job = desk.run("fail_until", str(runs), 3, retry=Retry(max=5))
    assert (job.get_status(), job.return_value(), job.retries_left) == ("finished", "done", 3)
    assert lines(runs) == ["tried"] * 3
    assert kinds(job) == ["SUCCESSFUL"]
    assert job not in desk.queue().failed_job_registry


def test_a_job_fails_for_good_when_no_retry_is_left(desk: Desk) -> None:
    runs = desk.file()
    job = desk.run("fail_until", str(runs), 99, retry=Retry(max=2))
    assert (job.get_status(), job.retries_left) == ("failed", 0)
    assert lines(runs) == ["tried"] * 3
    assert kinds(job) == ["FAILED"]
    assert job in desk.queue().failed_job_registry


def test_a_job_that_dies_is_tried_again_too(desk: Desk) -> None:
    runs = desk.file()
    job = desk.run("die_until", str(runs), 2, retry=Retry(max=3))
    assert (job.return_value(), job.retries_left) == ("done", 2)
    assert lines(runs) == ["tried"] * 2


@pytest.mark.parametrize(
    ("intervals", "delays"),
    [(100, [100]), ([100, 200], [100, 100, 200])],
)
def test_a_retry_waits_for_its_interval(desk: Desk, intervals: Any, delays: list[int]) -> None:
    job = desk.enqueue("fail", retry=Retry(max=len(delays), interval=intervals))
    for left, delay in zip(reversed(range(len(delays))), delays, strict=True):
        desk.until(lambda left=left: desk.fetch(job).retries_left == left, "the attempt failed")
        assert desk.status(job) == "scheduled"
        assert job in desk.queue().scheduled_job_registry
        assert job not in desk.queue().failed_job_registry
        assert delay - 60 < desk.delay(job) <= delay
        desk.make_due(job)
    assert desk.wait(job) == ["failed"]
    assert job not in desk.queue().scheduled_job_registry


@pytest.mark.parametrize("front", [True, False])
def test_a_retry_goes_to_the_front_of_the_queue_if_asked_for(desk: Desk, front: bool) -> None:
    runs = desk.file()
    with desk.held():
        first = desk.enqueue("fail_until", str(runs), 2, retry=Retry(max=1, enqueue_at_front=front))
        second = desk.enqueue("note", str(runs), "second")
    assert desk.wait(first, second)[1] == "finished"
    # fail_until counts the words of its file, "second" among them
    assert lines(runs) == (["tried", "tried", "second"] if front else ["tried", "second", "tried"])


@pytest.mark.parametrize("front", [True, False])
def test_so_it_does_after_its_interval(desk: Desk, front: bool) -> None:
    runs = desk.file()
    retry = Retry(max=1, interval=100, enqueue_at_front=front)
    first = desk.enqueue("fail_until", str(runs), 2, retry=retry)
    desk.until_status(first, "scheduled")
    with desk.held():
        second = desk.enqueue("note", str(runs), "second")
        desk.make_due(first)
        desk.until_status(first, "queued")
    assert desk.wait(first, second) == ["finished", "finished"]
    assert lines(runs) == ["tried", *(["tried", "second"] if front else ["second", "tried"])]


def test_a_job_between_two_attempts_is_enqueued_anew_and_keeps_its_meta(desk: Desk) -> None:
    job = desk.enqueue("update_meta_and_fail", {"tried": 1}, retry=Retry(max=1, interval=100))
    desk.until_status(job, "scheduled")
    again = desk.fetch(job)
    assert again.get_meta() == {"tried": 1}
    assert again.started_at is not None
    assert again.get_executions() == []
    desk.make_due(job)
    desk.wait(job)
    assert desk.fetch(job).enqueued_at > job.enqueued_at


# --- return Retry(...) -----------------------------------------------------------------------------


def test_a_function_may_ask_to_be_run_again(desk: Desk) -> None:
    gate = desk.file()
    job = desk.enqueue("again_unless", str(gate))
    desk.until(lambda: (desk.fetch(job).number_of_retries or 0) >= 2, "it was run again")
    gate.touch()
    assert desk.wait(job) == ["finished"]
    assert job.return_value() == "done"
    assert kinds(job)[-1] == "SUCCESSFUL"
    assert set(kinds(job)[:-1]) == {"RETRIED"}


def test_it_fails_when_it_asked_too_often(desk: Desk) -> None:
    job = desk.run("again", 2)
    assert (job.get_status(), job.number_of_retries) == ("failed", 2)
    assert kinds(job) == ["RETRIED", "RETRIED", "MAX_RETRIES_EXCEEDED"]
    assert job in desk.queue().failed_job_registry
    result = job.latest_result()
    assert (result.worker_name, result.exc_string) == (desk.worker, None)
    assert isinstance(result.return_value, Retry)


@pytest.mark.parametrize(("intervals", "delays"), [(100, [100]), ([100, 200], [100, 200])])
def test_it_waits_as_long_as_it_asked_for(desk: Desk, intervals: Any, delays: list[int]) -> None:
    job = desk.enqueue("again", len(delays), intervals)
    for count, delay in enumerate(delays, 1):
        desk.until(lambda count=count: desk.fetch(job).number_of_retries == count, "it asked")
        desk.until_status(job, "scheduled")
        assert delay - 60 < desk.delay(job) <= delay
        desk.make_due(job)
    assert desk.wait(job) == ["failed"]


# --- enqueued again --------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [True, False])
def test_a_failed_job_can_be_requeued(desk: Desk, front: bool) -> None:
    runs = desk.file()
    job = desk.run("fail_until", str(runs), 2)
    assert job.is_failed
    with desk.held():
        other = desk.enqueue("note", str(runs), "other")
        job.requeue(at_front=front)
        assert job not in desk.queue().failed_job_registry
    assert desk.wait(job, other) == ["finished", "finished"]
    assert lines(runs)[1:] == (["tried", "other"] if front else ["other", "tried"])
    assert kinds(job) == ["FAILED", "SUCCESSFUL"]
    assert job.latest_result().type == Result.Type.SUCCESSFUL


def test_a_requeued_job_has_the_retries_that_were_left(desk: Desk) -> None:
    runs = desk.file()
    job = desk.run("fail_until", str(runs), 99, retry=Retry(max=1))
    desk.queue().failed_job_registry.requeue(job.id)
    desk.wait(job)
    assert lines(runs) == ["tried"] * 3
