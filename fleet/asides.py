"""Executions beside the jobs: stopped callbacks and webhooks, once an end is stored."""

from __future__ import annotations

from typing import Literal

from broker import clock, failures
from broker.work import End
from fleet.executors import Execution, ExecutorPool


class Asides:
    """Runs them in the pool's executors; nobody waits for what they say."""

    def __init__(self, pool: ExecutorPool) -> None:
        self._pool = pool
        #: execution -> when it has run for too long, monotonic seconds
        self._running: dict[Execution, float] = {}

    def __len__(self) -> int:
        """How many run."""
        return len(self._running)

    def follow(self, end: End) -> None:
        """What RQ does after this end: the stopped callback, or the webhooks, of a function."""
        job_id, fields = end.claim.job_id, end.claim.fields
        if end.outcome == "stopped":
            self._run(self._pool.stopped_callback(job_id, fields))
        elif fields.get(b"webhooks") and (status := final_status(end)):
            ended_at = clock.wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
            text = failures.decoded(end.exc_string or "")
            self._run(self._pool.webhooks(job_id, {**fields, b"ended_at": ended_at}, status, text))

    def collect(self) -> None:
        """Let go of those that ended, and kill those that do not."""
        now = clock.monotonic()
        for execution, limit in list(self._running.items()):
            if now >= limit:
                execution.kill()
            if execution.outcome:
                del self._running[execution]
                self._pool.release(execution)

    def kill_all(self) -> None:
        """End them now: the worker's grace is over."""
        for execution in self._running:
            execution.kill()

    def _run(self, execution: Execution | None) -> None:
        if execution is not None:
            self._running[execution] = clock.monotonic() + (execution.kill_after_seconds or 600)


def final_status(end: End) -> Literal["finished", "failed"] | None:
    """How the job ended with this attempt; None if it is to run again, or was stopped."""
    if end.outcome == "finished":
        return "finished"
    if end.outcome == "failed":
        return None if _count(end, b"retries_left") > 0 else "failed"
    if end.outcome == "retry" and end.retry:
        done = _count(end, b"number_of_retries")
        return "failed" if 0 < done >= end.retry[0] else None
    return None


def _count(end: End, field: bytes) -> int:
    try:
        return int(end.claim.fields.get(field, b"0"))
    except ValueError:  # somebody's damage, which counts as nothing where the end is stored, too
        return 0
