"""What operators change: one function each, so that it can be recorded in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import redis

from broker import clock, jobs, keys, scripts
from broker.errors import WaitTimeout

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
    return reply.decode()


def wait(
    client: redis.Redis,
    ids: Sequence[str],
    *,
    timeout_seconds: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str | None]:
    """Block until all jobs have ended; returns the state of each, None for one that is gone.

    `progress(done, total)` hears of each look. Raises WaitTimeout.
    """
    ended: dict[str, str | None] = {}
    for open_ids in _looks(timeout_seconds, lambda: [job for job in ids if job not in ended]):
        found = jobs.states(client, open_ids)
        ended |= {job: state for job, state in found.items() if state is None or state in jobs.ENDED}
        progress(len(ended), len(ids))
    return ended


def wait_all(
    client: redis.Redis,
    *,
    timeout_seconds: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Block until no queue has a job left. Raises WaitTimeout."""
    left = most = jobs.unfinished(client)
    for _ in _looks(timeout_seconds, lambda: range(left)):
        left = jobs.unfinished(client)
        most = max(most, left)
        progress(most - left, most)


def _looks(timeout_seconds: float | None, rest: Callable[[], Sequence[str] | range]) -> Iterable[list[str]]:
    """What is left, look after look, until nothing is. Raises WaitTimeout."""
    deadline = None if timeout_seconds is None else clock.monotonic() + timeout_seconds
    pause = _FIRST_LOOK
    while left := rest():
        yield [str(item) for item in left]
        if not rest():
            return
        if deadline is not None and clock.monotonic() >= deadline:
            raise WaitTimeout(
                f"{len(rest())} jobs had not ended after {timeout_seconds:g} s",
                "They go on; 'fleet jobs' shows them.",
            )
        time.sleep(pause)
        pause = min(pause * 1.5, _SLOWEST_LOOK)
