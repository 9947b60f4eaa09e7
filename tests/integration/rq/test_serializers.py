"""Jobs of producers that use RQ's JSON serializer; a fleet worker takes both kinds from one queue."""

from __future__ import annotations

import pytest
from rq import Callback, Queue, Retry
from rq.job import Job
from rq.serializers import JSONSerializer

from tests.integration.rq.conftest import Desk, lines

pytestmark = pytest.mark.forks


def test_arguments_values_and_meta_go_through_json(desk: Desk) -> None:
    value = {"list": [1, 2.5, None, True], "text": "Grüße 🐎"}
    job = desk.run("echo", value, json=True)
    assert (job.is_finished, job.return_value()) == (True, value)
    marked = desk.run("update_meta", {"new": [1]}, json=True, meta={"old": "Zoë"})
    assert marked.get_meta() == {"old": "Zoë", "new": [1]}


def test_a_value_that_json_does_not_know_is_said_to_be_so(desk: Desk) -> None:
    job = desk.run("picky", json=True)
    assert (job.is_finished, job.return_value()) == (True, "Unserializable return value")


def test_failures_retries_and_callbacks_work_as_with_pickle(desk: Desk) -> None:
    runs = desk.file()
    tell = Callback("functions.tell_success"), Callback("functions.tell_failure")
    tried = desk.enqueue("fail_until", str(runs), 2, json=True, retry=Retry(max=2), on_success=tell[0])
    failed = desk.enqueue("fail_with", "broken", json=True, on_failure=tell[1])
    exhausted = desk.enqueue("again", 1, json=True)
    assert desk.wait(tried, failed, exhausted) == ["finished", "failed", "failed"]
    assert (tried.return_value(), lines(runs)) == ("done", ["tried", "tried"])
    assert desk.told(tried, "success")
    assert desk.told(failed, "failure")
    assert "ValueError: broken" in failed.latest_result().exc_string
    assert exhausted.latest_result().type.name == "MAX_RETRIES_EXCEEDED"


def test_dependents_and_requeues_work_as_with_pickle(desk: Desk) -> None:
    first = desk.enqueue("fail_until", str(desk.file()), 2, json=True)
    second = desk.enqueue("add", 1, 1, json=True, depends_on=first)
    assert desk.wait(first) == ["failed"]
    desk.fetch(first).requeue()
    assert desk.wait(second) == ["finished"]
    assert second.return_value() == 2


@pytest.mark.fleet_only
def test_both_kinds_may_share_a_queue_and_depend_on_each_other(desk: Desk) -> None:
    plain = desk.queue()
    json = Queue("default", connection=desk.client, serializer=JSONSerializer)
    with desk.busy():
        jobs: list[Job] = []
        for number, queue in enumerate([plain, json] * 3):
            parent = jobs[-1].id if jobs else None
            jobs.append(queue.enqueue("functions.add", number, 1, depends_on=parent))
    assert desk.wait(*jobs) == ["finished"] * 6
    assert [job.return_value() for job in jobs] == [1, 2, 3, 4, 5, 6]
