"""The jobs that run now, with what people know them by: of very many a part is read with each look."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import redis

from broker import keys
from broker.clock import from_iso
from broker.connection import replies
from broker.requirements import apart
from broker.status import WorkerStatus

#: jobs asked about in one look: some 50 ms of this process
_AT_ONCE = 2000


class Details(NamedTuple):
    """What the hash of a job says; all empty where it is gone."""

    name: str = ""
    queue: str = ""
    started_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that a worker holds; `details` is None until they were read."""

    id: str
    worker: str
    host: str
    details: Details | None


class RunningJobs:
    """Remembers what it has read of jobs that still run. For one thread."""

    def __init__(self) -> None:
        self._known: dict[str, Details] = {}

    def look(
        self, client: redis.Redis, workers: Iterable[WorkerStatus], shown: Collection[str] = ()
    ) -> list[RunningJob]:
        """All that the workers run, in one round trip. Of those `shown` somewhere the details are read anew,
        of others once, at most some thousands in one look. Raises what redis-py raises."""
        held = [(job, worker) for worker in workers for job in worker.running]
        running = {job for job, _ in held}
        unknown = [job for job in running if job not in self._known and job not in shown]
        asked = [*(job for job in shown if job in running), *unknown[:_AT_ONCE]]
        found = self._known | dict(zip(asked, _details(client, asked), strict=True))
        self._known = {job: details for job, details in found.items() if job in running}
        return [RunningJob(job, worker.name, worker.host, self._known.get(job)) for job, worker in held]


def _details(client: redis.Redis, job_ids: Sequence[str]) -> Iterable[Details]:
    if not job_ids:
        return
    with client.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            pipe.hmget(keys.job(job_id), "description", "origin", "started_at")
        for reply in replies(pipe):
            description, origin, started = reply if isinstance(reply, list) else [None] * 3
            name, _ = apart(_text(description), _text(origin))
            yield Details(name, _text(origin), from_iso(started))


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
