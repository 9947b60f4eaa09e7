"""Jobs that wait for other jobs."""

from __future__ import annotations

import pytest
from rq import Retry
from rq.command import send_stop_job_command
from rq.job import Dependency

from tests.integration.rq.conftest import Desk, lines


def anyway(*parents: object) -> Dependency:
    return Dependency(list(parents), allow_failure=True)


def test_a_job_waits_for_the_job_it_depends_on(desk: Desk) -> None:
    runs = desk.file()
    with desk.busy() as first:
        second = desk.enqueue("note", str(runs), "second", depends_on=first)
        third = desk.enqueue("note", str(runs), "third", depends_on=second)
        other = desk.enqueue("note", str(runs), "other queue", queue="low", depends_on=first)
        assert [desk.status(job) for job in (second, third, other)] == ["deferred"] * 3
        assert second in desk.queue().deferred_job_registry
    assert desk.wait(first, second, third, other) == ["finished"] * 4
    ran = lines(
        runs
    )  # a fleet worker may have claimed the short job of the other queue before the third was due
    assert (sorted(ran), ran.index("second") < ran.index("third")) == (
        ["other queue", "second", "third"],
        True,
    )
    assert second not in desk.queue().deferred_job_registry
    assert other not in desk.queue("low").deferred_job_registry
    assert other.origin == "low"


def test_a_job_waits_for_all_it_depends_on(desk: Desk) -> None:
    with desk.busy():
        parents = [
            desk.enqueue("add", number, 0, queue=queue) for number, queue in enumerate(("high", "low"))
        ]
        child = desk.enqueue("add", 1, 1, depends_on=parents)
    desk.wait(child)
    child = desk.fetch(child)
    assert all(desk.fetch(parent).ended_at <= child.started_at for parent in parents)


def test_a_job_whose_dependency_has_finished_runs_at_once(desk: Desk) -> None:
    parent = desk.run("add", 1, 1)
    assert desk.run("add", 1, 1, depends_on=parent).is_finished


def test_a_job_whose_dependency_was_deleted_before_runs_at_once(desk: Desk) -> None:
    parent = desk.run("add", 1, 1)
    parent.delete()
    assert desk.run("add", 1, 1, depends_on=parent.id).is_finished


def test_a_dependency_that_is_deleted_meanwhile_is_not_waited_for(desk: Desk) -> None:
    with desk.busy():
        kept, deleted = desk.enqueue("add", 1, 1), desk.enqueue("add", 1, 1)
        child = desk.enqueue("add", 1, 1, depends_on=[kept, deleted])
        orphan = desk.enqueue("add", 1, 1, depends_on=deleted)
        deleted.delete()
    assert desk.wait(child) == ["finished"]
    desk.settled()
    assert desk.status(orphan) == "deferred"


def test_no_dependent_is_forgotten_that_arrives_as_its_parent_ends(desk: Desk) -> None:
    children = []
    for number in range(20):
        parent = desk.enqueue("add", 1, 1, result_ttl=number % 2)
        children += [desk.enqueue("add", 1, 1, depends_on=parent) for _ in range(2)]
    assert desk.wait(*children) == ["finished"] * 40
    assert [len(child.results()) for child in children] == [1] * 40


def test_dependents_may_be_enqueued_together(desk: Desk) -> None:
    queue = desk.queue()
    done = desk.run("add", 1, 1)
    with desk.busy() as parent:
        datas = [queue.prepare_data("functions.add", (1, 1), depends_on=on) for on in (parent, done, None)]
        jobs = queue.enqueue_many(datas)
        assert sorted(desk.status(job) or "" for job in jobs) == ["deferred", "queued", "queued"]
    assert desk.wait(*jobs) == ["finished"] * 3


@pytest.mark.parametrize("function", ["fail", "die"])
def test_a_failure_starts_only_those_that_allow_it(desk: Desk, function: str) -> None:
    with desk.busy():
        parent = desk.enqueue(function)
        strict = desk.enqueue("add", 1, 1, depends_on=parent)
        lenient = desk.enqueue("add", 1, 1, depends_on=anyway(parent))
    assert desk.wait(parent, lenient) == ["failed", "finished"]
    desk.settled()
    assert desk.status(strict) == "deferred"
    assert strict in desk.queue().deferred_job_registry


def test_failures_among_several_are_allowed_or_not(desk: Desk) -> None:
    with desk.busy():
        good, bad = desk.enqueue("add", 1, 1), desk.enqueue("fail")
        strict = desk.enqueue("add", 1, 1, depends_on=[good, bad])
        lenient = desk.enqueue("add", 1, 1, depends_on=anyway(good, bad))
        late = desk.enqueue("add", 1, 1, queue="low")
        waiting = desk.enqueue("add", 1, 1, depends_on=anyway(bad, late))
    assert desk.wait(lenient, waiting) == ["finished", "finished"]
    assert desk.fetch(late).ended_at <= desk.fetch(waiting).started_at
    assert desk.status(strict) == "deferred"


def test_a_failed_job_that_succeeds_later_starts_its_dependents(desk: Desk) -> None:
    with desk.busy():
        parent = desk.enqueue("fail_until", str(desk.file()), 2)
        child = desk.enqueue("add", 1, 1, depends_on=parent)
    assert desk.wait(parent) == ["failed"]
    parent.requeue()
    assert desk.wait(child) == ["finished"]


def test_a_job_to_be_tried_again_has_not_ended_for_its_dependents(desk: Desk) -> None:
    with desk.busy():
        parent = desk.enqueue("fail", retry=Retry(max=1, interval=100))
        child = desk.enqueue("add", 1, 1, depends_on=anyway(parent))
    desk.until_status(parent, "scheduled")
    desk.settled()
    assert desk.status(child) == "deferred"
    desk.make_due(parent)
    assert desk.wait(parent, child) == ["failed", "finished"]


def test_asking_too_often_to_be_run_again_is_a_failure_for_dependents(desk: Desk) -> None:
    with desk.busy():
        parent = desk.enqueue("again", 1)
        strict = desk.enqueue("add", 1, 1, depends_on=parent)
        lenient = desk.enqueue("add", 1, 1, depends_on=anyway(parent))
    assert desk.wait(parent, lenient) == ["failed", "finished"]
    assert desk.status(strict) == "deferred"


def test_a_stopped_job_starts_none_of_its_dependents(desk: Desk) -> None:
    with desk.busy() as parent:
        strict = desk.enqueue("add", 1, 1, depends_on=parent)
        lenient = desk.enqueue("add", 1, 1, depends_on=anyway(parent))
        send_stop_job_command(desk.client, parent.id)
        assert desk.wait(parent) == ["stopped"]
    desk.settled()
    assert [desk.status(strict), desk.status(lenient)] == ["deferred", "deferred"]


def test_a_canceled_job_starts_its_dependents_only_if_told_to(desk: Desk) -> None:
    with desk.held():
        parent = desk.enqueue("add", 1, 1)
        child = desk.enqueue("add", 1, 1, depends_on=parent)
        grandchild = desk.enqueue("add", 1, 1, depends_on=child)
        parent.cancel()
    desk.settled()
    assert [desk.status(child), desk.status(grandchild)] == ["deferred", "deferred"]
    child.cancel(enqueue_dependents=True)
    assert desk.wait(grandchild) == ["finished"]
    assert desk.status(child) == "canceled"


def test_a_canceled_dependent_is_not_started(desk: Desk) -> None:
    with desk.busy() as parent:
        child = desk.enqueue("add", 1, 1, depends_on=parent)
        grandchild = desk.enqueue("add", 1, 1, depends_on=child)
        child.cancel()
    desk.wait(parent)
    desk.settled()
    assert [desk.status(child), desk.status(grandchild)] == ["canceled", "deferred"]


def test_a_dependent_that_was_deleted_stays_deleted(desk: Desk) -> None:
    with desk.busy() as parent:
        child = desk.enqueue("add", 1, 1, depends_on=parent)
        child.delete()
    desk.wait(parent)
    desk.settled()
    assert desk.status(child) is None


def test_a_job_that_keeps_no_result_starts_its_dependents(desk: Desk) -> None:
    with desk.busy():
        parent = desk.enqueue("add", 1, 1, result_ttl=0)
        other = desk.enqueue("add", 1, 1, queue="low")
        child = desk.enqueue("add", 1, 1, depends_on=parent)
        late = desk.enqueue("add", 1, 1, depends_on=[parent, other])
    assert desk.wait(child, late) == ["finished", "finished"]
    assert desk.status(parent) is None
    assert not desk.client.exists(parent.dependents_key)


def test_a_dependent_may_go_to_the_front_of_its_queue(desk: Desk) -> None:
    runs = desk.file()
    with desk.busy(queue="high") as parent:
        jobs = [
            desk.enqueue("note", str(runs), "back", depends_on=parent),
            desk.enqueue("note", str(runs), "front", depends_on=Dependency([parent], enqueue_at_front=True)),
        ]
    desk.wait(*jobs)
    assert lines(runs) == ["front", "back"]


def test_dependents_keep_their_own_options(desk: Desk) -> None:
    with desk.busy() as parent:
        child = desk.enqueue(
            "know_thyself", depends_on=parent, job_timeout=55, meta={"own": 1}, result_ttl=66
        )
        plain = desk.enqueue("know_thyself", depends_on=parent)
    desk.wait(child, plain)
    value = child.return_value()
    assert (value["timeout"], value["meta"]) == (55, {"own": 1})
    assert 0 < desk.client.ttl(child.key) <= 66
    assert plain.return_value()["timeout"] == 180


def test_many_jobs_may_depend_on_one(desk: Desk) -> None:
    with desk.busy() as parent:
        children = [desk.enqueue("add", number, 1, depends_on=parent) for number in range(30)]
    assert desk.wait(*children) == ["finished"] * 30
