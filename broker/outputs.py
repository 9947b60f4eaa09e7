"""What is kept in Redis of the output of jobs, as their workers wrote it last."""

from __future__ import annotations

from dataclasses import dataclass

import redis

from broker import keys
from broker.connection import replies
from broker.work import Tails


@dataclass(frozen=True)
class View:
    """What is kept of a job's output. `lease` tells attempts apart; `state` None: no such job."""

    state: str | None
    lease: str
    tails: Tails


def look(client: redis.Redis, job_id: str) -> View:
    """The tails, and the state the job is in, read in one step: where it has ended, no more comes."""
    with client.pipeline(transaction=True) as pipe:
        pipe.hget(keys.job(job_id), "status")
        pipe.hmget(keys.output(job_id), "lease", "stdout", "stderr", "stdout_end", "stderr_end")
        status, fields = replies(pipe)
    lease, out, err, out_end, err_end = fields if isinstance(fields, list) else [None] * 5
    tails = Tails(out or b"", err or b"", _count(out_end), _count(err_end))
    return View(
        status.decode("utf-8", "replace") if isinstance(status, bytes) else None,
        (lease or b"").decode("utf-8", "replace"),
        tails,
    )


@dataclass(frozen=True)
class Mark:
    """What changes with the output of a job, or with its state."""

    state: bytes | None
    lease: bytes | None
    ends: tuple[bytes | None, bytes | None]


def mark(client: redis.Redis, job_id: str) -> Mark:
    """A cheap look: as long as it returns the same there is nothing new to see."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hget(keys.job(job_id), "status")
        pipe.hmget(keys.output(job_id), "lease", "stdout_end", "stderr_end")
        state, fields = replies(pipe)
    lease, out_end, err_end = fields if isinstance(fields, list) else [None] * 3
    return Mark(state if isinstance(state, bytes) else None, lease, (out_end, err_end))


def _count(value: bytes | None) -> int:
    """A number of bytes; 0 for nothing, and for somebody's damage."""
    try:
        return int(value or 0)
    except ValueError:
        return 0
