"""Results: what is kept, for how long, and how it is read."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from rq import Retry
from rq.results import Result

from tests.integration.rq.conftest import Desk, lines

WEEK_SECONDS = 7 * 86400
YEAR_SECONDS = 365 * 86400


def ttls(desk: Desk, job: Any) -> tuple[int, int]:
    """Seconds that the job and its results are kept; -1 for ever, -2 not at all."""
    return desk.client.ttl(job.key), desk.client.ttl(Result.get_key(job.id))


def near(seconds: int) -> range:
    return range(seconds - 40, seconds + 1)


def test_each_run_leaves_a_result_the_newest_first(desk: Desk) -> None:
    job = desk.run("fail_until", str(desk.file()), 2)
    job.requeue()
    desk.until(lambda: desk.status(job) == "finished", "it ran again")
    newest, oldest = job.results()
    assert (newest.type, oldest.type) == (Result.Type.SUCCESSFUL, Result.Type.FAILED)
    assert newest.created_at >= oldest.created_at
    assert newest.execution_id != oldest.execution_id
    assert job.latest_result() == newest
    assert job.return_value(refresh=True) == "done"


def test_a_producer_may_wait_for_a_result(desk: Desk) -> None:
    gate = desk.file()
    job = desk.enqueue("wait_for", str(gate))
    timer = threading.Timer(0.2, gate.touch)
    timer.start()
    result = job.latest_result(timeout=60)
    timer.join()
    assert result is not None
    assert result.type == Result.Type.SUCCESSFUL


@pytest.mark.fleet_only
def test_a_producer_that_waits_for_each_of_its_jobs_waits_for_nothing_else(desk: Desk) -> None:
    took = []
    for number in range(40):
        began = time.monotonic()
        assert desk.enqueue("add", number, 1).latest_result(timeout=60).return_value == number + 1
        took.append(time.monotonic() - began)
    # far below any interval at which anybody looks at a queue, but where this machine is busy
    assert sorted(took)[5] < 0.08, took


def test_a_success_is_kept_as_long_as_its_producer_wants(desk: Desk) -> None:
    short, ever, never = (desk.enqueue("add", 1, 1, result_ttl=ttl) for ttl in (50, -1, 0))
    assert desk.wait(short, ever, never) == ["finished", "finished", None]
    assert all(ttl in near(50) for ttl in ttls(desk, short))
    assert ttls(desk, ever) == (-1, -1)
    assert ttls(desk, never) == (-2, -2)
    registry = desk.queue().finished_job_registry
    assert (short in registry, ever in registry, never in registry) == (True, True, False)
    kept = registry.get_expiration_time(short) - desk.fetch(short).ended_at
    assert 10 < kept.total_seconds() <= 51


def test_a_success_of_no_particular_ttl_is_kept_for_the_workers_default(desk: Desk) -> None:
    job = desk.run("add", 1, 1)
    default = 500 if desk.kind == "rq" else WEEK_SECONDS
    assert all(ttl in near(default) for ttl in ttls(desk, job))


def test_a_failure_is_kept_as_long_as_its_producer_wants(desk: Desk) -> None:
    short, ever, never, default = (desk.enqueue("fail", failure_ttl=ttl) for ttl in (50, -1, 0, None))
    assert desk.wait(short, ever, never, default) == ["failed", "failed", None, "failed"]
    assert all(ttl in near(50) for ttl in ttls(desk, short))
    assert ttls(desk, ever) == (-1, -1)
    assert ttls(desk, never)[0] == -2
    assert ttls(desk, default)[0] in near(YEAR_SECONDS)
    registry = desk.queue().failed_job_registry
    assert short in registry
    assert ever in registry
    assert ever.id in registry.get_job_ids()


def test_results_of_a_failure_do_not_outlive_their_job(desk: Desk) -> None:
    job = desk.run("fail")
    assert ttls(desk, job)[0] in near(YEAR_SECONDS)
    assert ttls(desk, job)[1] == -1 if desk.kind == "rq" else ttls(desk, job)[1] in near(YEAR_SECONDS)


def test_the_ttl_of_a_failure_does_not_bind_a_later_success(desk: Desk) -> None:
    job = desk.run("fail_until", str(desk.file()), 2, failure_ttl=50, result_ttl=-1)
    assert job.is_failed
    job.requeue()
    desk.until_status(job, "finished")
    assert ttls(desk, job) == (-1, -1)


def test_a_ttl_in_the_queue_says_nothing_of_the_result(desk: Desk) -> None:
    job = desk.run("add", 1, 1, ttl=20, result_ttl=90)
    assert all(ttl in near(90) for ttl in ttls(desk, job))


def test_a_job_that_waits_for_its_retry_expires_as_it_would_in_the_queue(desk: Desk) -> None:
    job = desk.enqueue("fail", retry=Retry(max=1, interval=100), ttl=70)
    desk.until_status(job, "scheduled")
    desk.until(lambda: ttls(desk, job)[0] in near(70), "it expires")
    job.delete()


@pytest.mark.parametrize("value", [0, "", [], False, {"a": None}])
def test_a_value_that_is_no_truth_is_a_value_all_the_same(desk: Desk, value: Any) -> None:
    assert desk.run("echo", value).return_value() == value


def test_a_job_deleted_after_its_end_leaves_nothing_in_registries(desk: Desk) -> None:
    good, bad = desk.enqueue("add", 1, 1), desk.enqueue("fail")
    desk.wait(good, bad)
    for job in (good, bad):
        desk.fetch(job).delete()
    queue = desk.queue()
    assert good not in queue.finished_job_registry
    assert bad not in queue.failed_job_registry
    assert ttls(desk, good)[0] == ttls(desk, bad)[0] == -2


def test_a_job_whose_time_to_live_ends_in_the_queue_is_not_run(desk: Desk) -> None:
    runs = desk.file()
    with desk.held():
        late = desk.enqueue("note", str(runs), "late", ttl=1)
        desk.until(lambda: desk.status(late) is None, "it expired")
        early = desk.enqueue("note", str(runs), "early", ttl=60)
    desk.wait(early)
    assert lines(runs) == ["early"]


def test_a_running_job_does_not_expire(desk: Desk) -> None:
    job = desk.run("nap", 1.3, ttl=1)
    assert job.is_finished
