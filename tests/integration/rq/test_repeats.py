"""Jobs that repeat."""

from __future__ import annotations

from typing import Any

import pytest
from rq import Repeat

from tests.integration.rq.conftest import Desk, lines


def test_a_job_is_run_once_and_repeated_so_many_times(desk: Desk) -> None:
    runs = desk.file()
    job = desk.enqueue("note", str(runs), "ran", repeat=Repeat(times=2))
    desk.until(lambda: len(lines(runs)) == 3, "three runs")
    assert desk.wait(job) == ["finished"]
    desk.settled()
    job = desk.fetch(job)
    assert (lines(runs), job.repeats_left) == (["ran"] * 3, 0)
    assert [result.type.name for result in job.results()] == ["SUCCESSFUL"] * 3
    assert job in desk.queue().finished_job_registry


@pytest.mark.parametrize(
    ("intervals", "delays"), [(100, [100]), ([100, 200], [200, 100]), ([100], [100, 100])]
)
def test_it_waits_between_two_runs(desk: Desk, intervals: Any, delays: list[int]) -> None:
    """RQ counts intervals from the last one back."""
    job = desk.enqueue("add", 1, 1, repeat=Repeat(times=len(delays), interval=intervals))
    for left, delay in zip(reversed(range(len(delays))), delays, strict=True):
        desk.until(lambda left=left: desk.fetch(job).repeats_left == left, "it ran")
        desk.until_status(job, "scheduled")
        assert delay - 60 < desk.delay(job) <= delay
        assert job.return_value(refresh=True) == 2
        # RQ lists it among the finished, too
        assert (job in desk.queue().finished_job_registry) == (desk.kind == "rq")
        desk.make_due(job)
    desk.until_status(job, "finished")
    assert len(job.results()) == len(delays) + 1


def test_a_failure_ends_the_repeats(desk: Desk) -> None:
    job = desk.run("fail", repeat=Repeat(times=3))
    assert (job.get_status(), job.repeats_left) == ("failed", 3)


def test_a_job_that_keeps_no_result_is_gone_after_its_last_run(desk: Desk) -> None:
    runs = desk.file()
    job = desk.enqueue("note", str(runs), "ran", repeat=Repeat(times=2), result_ttl=0)
    desk.until(lambda: len(lines(runs)) == 3, "three runs")
    desk.until(lambda: desk.status(job) is None, "it is gone")
    assert not desk.client.exists(f"rq:results:{job.id}")


def test_results_of_a_repeated_job_do_not_stay_for_ever(desk: Desk) -> None:
    job = desk.enqueue("add", 1, 1, repeat=Repeat(times=1, interval=100), result_ttl=50)
    desk.until_status(job, "scheduled")
    assert 0 < desk.client.ttl(f"rq:results:{job.id}") <= 50
    job.delete()


def test_dependents_start_after_the_first_run(desk: Desk) -> None:
    runs = desk.file()
    with desk.busy():
        parent = desk.enqueue("note", str(runs), "parent", repeat=Repeat(times=1, interval=100))
        child = desk.enqueue("note", str(runs), "child", depends_on=parent)
    assert desk.wait(child) == ["finished"]
    assert lines(runs) == ["parent", "child"]
    parent.delete()
