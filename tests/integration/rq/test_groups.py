"""Groups of jobs."""

from __future__ import annotations

from typing import Any

from rq import Queue
from rq.group import Group

from tests.integration.rq.conftest import Desk


def enqueued(desk: Desk, *rows: dict[str, Any]) -> tuple[Group, list[Any]]:
    group = Group.create(connection=desk.client)
    datas = [Queue.prepare_data(**({"func": "functions.add", "args": (1, 1)} | row)) for row in rows]
    return group, group.enqueue_many(desk.queue(), datas)


def test_a_group_holds_its_jobs_whatever_becomes_of_them(desk: Desk) -> None:
    group, jobs = enqueued(desk, {}, {"func": "functions.fail", "args": ()}, {})
    assert desk.wait(*jobs) == ["finished", "failed", "finished"]
    found = Group.fetch(group.name, desk.client).get_jobs()
    assert {job.id for job in found} == {job.id for job in jobs}
    assert {job.group_id for job in found} == {group.name}
    assert sorted(job.return_value() or 0 for job in found) == [0, 2, 2]


def test_a_job_that_is_not_kept_leaves_its_group(desk: Desk) -> None:
    group, jobs = enqueued(
        desk, {"result_ttl": 0}, {"failure_ttl": 0, "func": "functions.fail", "args": ()}, {}
    )
    assert desk.wait(*jobs) == [None, None, "finished"]
    assert desk.client.smembers(Group.get_key(group.name)) == {jobs[2].id.encode()}


def test_a_group_whose_jobs_are_all_gone_is_gone(desk: Desk) -> None:
    group, jobs = enqueued(desk, {"result_ttl": 0}, {"result_ttl": 0})
    desk.wait(*jobs)
    assert group.name not in [one.name for one in Group.all(desk.client)]
