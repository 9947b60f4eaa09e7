"""The jobs that run: what is known of them is not read twice, and not all at once."""

from __future__ import annotations

import pytest

from broker import keys, running
from broker.running import RunningJobs
from broker.status import WorkerStatus


def worker(name: str, *jobs: str) -> WorkerStatus:
    return WorkerStatus(
        name=name,
        host="h",
        pid=1,
        state="busy",
        queues=(),
        slots=1,
        running=jobs,
        labels={},
        version="",
        cpus=1,
        memory_bytes=0,
        gpus=(),
        started_at=None,
        last_heartbeat=None,
        heartbeat_age_seconds=0.0,
        finished=0,
        failed=0,
    )


def write(client, job: str, name: str, queue: str = "default") -> None:
    fields = {"description": name, "origin": queue, "started_at": "2026-01-02T03:04:05Z"}
    client.hset(keys.job(job), mapping=fields)


def names(found) -> list[str | None]:
    return [job.details and job.details.name for job in found]


def test_details_are_read_once_but_for_those_that_are_shown(redis_client):
    reader = RunningJobs()
    for job in ("a", "b"):
        write(redis_client, job, f"old {job}")
    workers = [worker("w0", "a"), worker("w1", "b", "gone")]
    found = reader.look(redis_client, workers)
    assert [(job.id, job.worker) for job in found] == [("a", "w0"), ("b", "w1"), ("gone", "w1")]
    assert names(found) == ["old a", "old b", ""]
    for job in ("a", "b"):
        write(redis_client, job, f"new {job} [cpus=2]", "default@x")
    assert names(reader.look(redis_client, workers, shown=["b", "ended"])) == ["old a", "new b", ""]
    assert names(reader.look(redis_client, [])) == []
    assert names(reader.look(redis_client, workers)) == ["new a", "new b", ""]


def test_of_very_many_a_part_is_read_with_each_look(redis_client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "_AT_ONCE", 2)
    jobs = [f"j{number}" for number in range(5)]
    for job in jobs:
        write(redis_client, job, job)
    reader, workers = RunningJobs(), [worker("w0", *jobs)]
    unread = [names(reader.look(redis_client, workers)).count(None) for _ in range(4)]
    assert unread == [3, 1, 0, 0]
