"""Executions beside the jobs: stopped callbacks and webhooks, once an end is stored."""

from __future__ import annotations

import selectors
from functools import partial

from broker import clock, failures
from broker.work import End
from fleet.executors import Execution, ExecutorPool


class Asides:
    """Runs them in the pool's executors; nobody waits for what they say."""

    def __init__(self, pool: ExecutorPool, selector: selectors.BaseSelector) -> None:
        self._pool = pool
        self._selector = selector
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
        elif end.outcome in ("finished", "failed") and fields.get(b"webhooks"):
            ended_at = clock.wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
            text = failures.decoded(end.exc_string or "")
            self._run(self._pool.webhooks(job_id, {**fields, b"ended_at": ended_at}, end.outcome, text))

    def enforce_times(self) -> None:
        """Kill what does not end."""
        now = clock.monotonic()
        for execution, limit in list(self._running.items()):
            if now >= limit:
                self._kill(execution)

    def kill_all(self) -> None:
        """End them now: the worker's grace is over."""
        for execution in list(self._running):
            self._kill(execution)

    def _kill(self, execution: Execution) -> None:
        execution.kill()
        self._look(execution)

    def _run(self, execution: Execution | None) -> None:
        if execution is None:
            return
        self._running[execution] = clock.monotonic() + (execution.kill_after_seconds or 600)
        self._selector.register(execution, _events(execution), partial(self._look, execution))

    def _look(self, execution: Execution) -> None:
        execution.flush()
        if execution.receive() is None:
            self._selector.modify(execution, _events(execution), partial(self._look, execution))
            return
        self._selector.unregister(execution)
        del self._running[execution]
        self._pool.release(execution)


def _events(execution: Execution) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if execution.wants_write() else 0)
