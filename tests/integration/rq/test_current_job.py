"""What a job sees of itself while it runs, and what it changes about itself."""

from __future__ import annotations

import pytest
from rq.executions import Execution
from rq.worker import Worker

from tests.integration.rq.conftest import Desk, lines

pytestmark = pytest.mark.forks


def test_a_job_knows_itself(desk: Desk) -> None:
    job = desk.enqueue("know_thyself", meta={"key": "value"}, job_timeout=77)
    desk.wait(job)
    assert job.return_value() == {
        "id": job.id,
        "status": "started",
        "origin": "default",
        "worker": desk.worker,
        "started": True,
        "ended": False,
        "meta": {"key": "value"},
        "timeout": 77,
        "execution_worker": desk.worker,
        "in_registry": True,
        "enqueued": 0,
    }


def test_no_job_is_current_outside_one(desk: Desk) -> None:
    from rq import get_current_job

    assert get_current_job() is None
    assert desk.run("is_a_job_current").return_value() is True


def test_a_running_job_is_seen_by_others(desk: Desk) -> None:
    with desk.busy() as job:
        assert desk.queue().started_job_registry.get_job_ids() == [job.id]
        (execution,) = job.get_executions()
        assert (execution.job_id, execution.worker_name) == (job.id, desk.worker)
        again = Execution.fetch(execution.id, job.id, desk.client)
        assert again.created_at <= again.last_heartbeat
        worker = Worker.find_by_key(f"rq:worker:{desk.worker}", connection=desk.client)
        assert worker is not None
        assert (worker.get_state(), worker.get_current_job_id()) == ("busy", job.id)
        assert worker.get_current_job() == job
        job.refresh()
        assert (job.is_started, job.worker_name, job.ended_at) == (True, desk.worker, None)
        assert job.started_at <= job.last_heartbeat
    desk.wait(job)
    assert job.get_executions() == []
    assert desk.queue().started_job_registry.get_job_ids() == []


@pytest.mark.parametrize(
    ("function", "state"), [("update_meta", "finished"), ("update_meta_and_fail", "failed")]
)
def test_meta_saved_in_a_job_stays_however_it_ends(desk: Desk, function: str, state: str) -> None:
    job = desk.run(function, {"baz": 10, "new": "waka"}, meta={"foo": "bar", "baz": 42})
    assert job.get_status() == state
    assert job.get_meta() == {"foo": "bar", "baz": 10, "new": "waka"}


def test_meta_that_is_not_saved_is_not_kept(desk: Desk) -> None:
    assert desk.run("meta_unsaved", meta={"foo": "bar"}).get_meta() == {"foo": "bar"}


def test_a_producer_may_write_meta_while_the_job_runs(desk: Desk) -> None:
    with desk.busy() as job:
        job.meta["producer"] = True
        job.save_meta()
    desk.wait(job)
    assert desk.fetch(job).get_meta() == {"producer": True}


def test_a_job_may_refresh_and_save_itself(desk: Desk) -> None:
    job = desk.run("refresh_and_save")
    assert job.is_finished
    assert job.meta == {"refreshed": "started"}
    assert job in desk.queue().finished_job_registry


@pytest.mark.parametrize("save", [True, False])
def test_what_a_job_changes_about_its_own_end_counts(desk: Desk, save: bool) -> None:
    changed = desk.enqueue("change_job", {"result_ttl": 50, "description": "renamed"}, save)
    dropped = desk.enqueue("change_job", {"result_ttl": 0}, save)
    failed = desk.enqueue("change_job_and_fail", {"failure_ttl": 70}, save)
    assert desk.wait(changed, dropped, failed) == ["finished", None, "failed"]
    assert 0 < desk.client.ttl(changed.key) <= 50
    assert 50 < desk.client.ttl(failed.key) <= 70
    assert desk.fetch(changed).description == "renamed"


@pytest.mark.parametrize("save", [True, False])
def test_a_job_may_decide_not_to_be_tried_again(desk: Desk, save: bool) -> None:
    from rq import Retry

    runs = desk.file()
    job = desk.run("change_job_and_fail", {"retries_left": 0}, save, str(runs), retry=Retry(max=3))
    assert job.is_failed
    assert lines(runs) == ["tried"]
