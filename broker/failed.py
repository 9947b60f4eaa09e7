"""The last jobs that failed, as RQ's registries and the jobs themselves tell: nothing is written for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import redis

from broker import keys
from broker.chores import known_queues
from broker.clock import from_iso
from broker.connection import replies


@dataclass(frozen=True)
class Failure:
    """A job that failed, or was stopped."""

    job_id: str
    queue: str
    worker: str
    at: datetime | None
    reason: str


def last(client: redis.Redis, limit: int = 20) -> list[Failure]:
    """The last jobs that failed for good and are still kept, the newest first. Three round trips."""
    with client.pipeline(transaction=False) as pipe:
        for queue in known_queues(client):
            pipe.zrevrange(keys.of("failed", queue), 0, limit - 1, withscores=True)
        found = [entry for reply in replies(pipe) if isinstance(reply, list) for entry in reply]
    found.sort(key=lambda entry: -entry[1])  # until when they are kept: mostly as long after their end
    ids = [job_id.decode("utf-8", "replace") for job_id, _ in found[: 2 * limit]]
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hmget(keys.job(job_id), "origin", "worker_name", "ended_at", "fleet_reason")
        rows = replies(pipe)
    failures = [_failure(job_id, row) for job_id, row in zip(ids, rows, strict=True) if isinstance(row, list)]
    return sorted(failures, key=lambda one: one.at.timestamp() if one.at else 0.0, reverse=True)[:limit]


def _failure(job_id: str, row: Sequence[bytes | None]) -> Failure:
    queue, worker, ended_at, reason = ((part or b"").decode("utf-8", "replace") for part in row)
    return Failure(job_id, queue, worker, from_iso(ended_at), reason)
