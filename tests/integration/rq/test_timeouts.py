"""Jobs that run too long."""

from __future__ import annotations

import pytest
from rq import Retry

from tests.integration.rq.conftest import Desk, lines

pytestmark = pytest.mark.forks


def test_a_job_that_runs_too_long_is_failed_by_an_exception_it_can_clean_up_after(desk: Desk) -> None:
    cleaned = desk.file()
    job = desk.run("clean_up_on_timeout", str(cleaned), job_timeout=1)
    assert job.is_failed
    assert job in desk.queue().failed_job_registry
    words = "rq.timeouts.JobTimeoutException: Task exceeded maximum timeout value (1 seconds)"
    assert words in job.latest_result().exc_string
    assert lines(cleaned) == ["cleaned up"]
    assert 0.9 < (job.ended_at - job.started_at).total_seconds() < 9


def test_a_job_may_outwit_its_timeout(desk: Desk) -> None:
    job = desk.run("swallow_timeout", job_timeout=1)
    assert (job.is_finished, job.return_value()) == (True, "swallowed")


def test_a_job_that_ran_too_long_is_tried_again(desk: Desk) -> None:
    runs = desk.file()
    job = desk.run("nap_and_note", 10, str(runs), job_timeout=3, retry=Retry(max=1))
    assert (job.is_finished, job.retries_left, lines(runs)) == (True, 0, ["tried", "tried"])


@pytest.mark.parametrize(("timeout", "stored"), [(None, 180), (-1, -1), ("2m", 120), (33, 33)])
def test_timeouts_are_what_the_producer_said_or_three_minutes(
    desk: Desk, timeout: int | str | None, stored: int
) -> None:
    job = desk.run("know_thyself", job_timeout=timeout)
    assert job.is_finished
    assert job.return_value()["timeout"] == stored
