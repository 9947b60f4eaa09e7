"""Jobs that wait for a time. A fleet has no scheduler to start: its workers see to it."""

from __future__ import annotations

import operator
from datetime import UTC, datetime, timedelta

from rq import Repeat, Retry
from rq.cron import CronScheduler

from tests.integration.rq.conftest import Desk, lines


def test_a_job_runs_at_its_time_and_not_before(desk: Desk) -> None:
    job = desk.queue().enqueue_in(timedelta(seconds=2), "functions.add", 1, 1)
    assert desk.status(job) == "scheduled"
    assert job in desk.queue().scheduled_job_registry
    scheduled = desk.queue().scheduled_job_registry.get_scheduled_time(job)
    desk.until(lambda: desk.tick() or desk.status(job) == "finished", "it ran")
    # RQ truncates due times to whole seconds
    assert desk.fetch(job).started_at >= scheduled
    assert job not in desk.queue().scheduled_job_registry


def test_a_time_that_has_passed_is_due(desk: Desk) -> None:
    past = desk.queue().enqueue_at(datetime(2020, 1, 1, tzinfo=UTC), "functions.add", 1, 1)
    future = desk.queue().enqueue_at(datetime.now(UTC) + timedelta(hours=1), "functions.add", 1, 1)
    desk.tick()
    assert desk.wait(past) == ["finished"]
    desk.settled()
    assert desk.status(future) == "scheduled"
    future.cancel()
    assert future not in desk.queue().scheduled_job_registry


def test_due_jobs_go_where_they_were_meant_to(desk: Desk) -> None:
    runs = desk.file()
    with desk.held():
        jobs = [
            desk.enqueue("note", str(runs), "queued"),
            desk.queue().enqueue_in(timedelta(hours=1), "functions.note", str(runs), "front", at_front=True),
            desk.queue("low").enqueue_in(timedelta(hours=1), "functions.note", str(runs), "low"),
        ]
        for job in jobs[1:]:
            desk.make_due(job)
            desk.until_status(job, "queued")
    desk.wait(*jobs)
    assert lines(runs) == ["front", "queued", "low"]


def test_scheduled_jobs_keep_their_options(desk: Desk) -> None:
    runs = desk.file()
    later = timedelta(hours=1)
    queue = desk.queue()
    retried = queue.enqueue_in(later, "functions.fail_until", str(runs), 2, retry=Retry(max=1), result_ttl=60)
    repeated = queue.enqueue_in(later, "functions.know_thyself", repeat=Repeat(times=1), meta={"a": 1})
    for job in (retried, repeated):
        desk.make_due(job)
    desk.until(lambda: len(repeated.results()) == 2, "it was repeated")
    assert desk.wait(retried, repeated) == ["finished", "finished"]
    assert 0 < desk.client.ttl(retried.key) <= 60
    value = repeated.return_value()
    assert (value["meta"], value["timeout"]) == ({"a": 1}, 180)


def test_what_was_canceled_or_deleted_before_its_time_does_not_run(desk: Desk) -> None:
    runs = desk.file()
    canceled, deleted = (
        desk.queue().enqueue_in(timedelta(hours=1), "functions.note", str(runs), word) for word in "cd"
    )
    canceled.cancel()
    desk.client.delete(deleted.key)
    desk.make_due(deleted)
    desk.until(lambda: deleted not in desk.queue().scheduled_job_registry, "it was dropped")
    desk.settled()
    assert lines(runs) == []
    assert desk.status(canceled) == "canceled"


def test_jobs_of_rqs_cron_are_run(desk: Desk) -> None:
    cron = CronScheduler(connection=desk.client, logging_level="WARNING")
    cron.register(operator.add, queue_name="default", args=(20, 22), interval=3600)
    jobs = [row.enqueue(desk.client) for row in cron.get_jobs()]
    assert desk.wait(*jobs) == ["finished"]
    assert jobs[0].return_value() == 42
