"""What operators change: one function each, so that it can be recorded in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import redis

from broker import clock, jobs, keys, scripts
from broker.errors import WaitTimeout

#: hears (done, total) of each look
Progress = Callable[[int, int], None]
#: seconds a canceled job is kept
CANCELED_TTL = 7 * 86400
#: seconds between looks while waiting: short at first, for jobs that take milliseconds
_FIRST_LOOK, _SLOWEST_LOOK = 0.02, 0.5


def cancel(client: redis.Redis, job_id: str) -> str:
    """Cancel a job, wherever it is. Returns 'canceled', 'stopping' where it runs (a worker ends its
    whole process group within two seconds), or the state in which it had ended already.

    Raises NotFound.
    """
    reply: bytes = scripts.CANCEL(client, [keys.job(job_id)], [job_id, CANCELED_TTL])
    if not reply:
        raise jobs.not_found(job_id)
    return reply.decode("utf-8", "replace")


def wait(
    client: redis.Redis,
    ids: Sequence[str],
    *,
    timeout_seconds: float | None = None,
    progress: Progress | None = None,
) -> dict[str, str | None]:
    """Block until all jobs have ended; returns the state of each, None for one that is gone.

    `progress(done, total)` hears of each look. Raises WaitTimeout.
    """
    ended: dict[str, str | None] = {}
    patience = _Patience(timeout_seconds)
    left = list(ids)
    while left:
        found = jobs.states(client, left)
        ended |= {job: state for job, state in found.items() if state is None or state in jobs.ENDED}
        left = [job for job in left if job not in ended]
        if progress:
            progress(len(ended), len(ids))
        patience.pause(len(left))
    return ended


def wait_all(
    client: redis.Redis, *, timeout_seconds: float | None = None, progress: Progress | None = None
) -> None:
    """Block until no queue has a job left. Raises WaitTimeout."""
    most = left = jobs.unfinished(client)
    patience = _Patience(timeout_seconds)
    while left:
        if progress:
            progress(most - left, most)
        patience.pause(left)
        left = jobs.unfinished(client)
        most = max(most, left)


class _Patience:
    """Pauses between looks, short ones first, until time runs out."""

    def __init__(self, timeout_seconds: float | None) -> None:
        self._timeout_seconds = timeout_seconds
        self._deadline = None if timeout_seconds is None else clock.monotonic() + timeout_seconds
        self._pause = _FIRST_LOOK

    def pause(self, left: int) -> None:
        """Rest before the next look, unless nothing is left. Raises WaitTimeout."""
        if not left:
            return
        rest = self._pause
        if self._deadline is not None:
            rest = min(rest, self._deadline - clock.monotonic())
            if rest <= 0:
                raise WaitTimeout(
                    f"{left} jobs had not ended after {self._timeout_seconds:g} s",
                    "They go on; 'fleet jobs' shows them.",
                )
        time.sleep(rest)
        self._pause = min(self._pause * 1.5, _SLOWEST_LOOK)
