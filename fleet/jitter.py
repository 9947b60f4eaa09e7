"""Delays that keep many workers from arriving at Redis at once: when they start, and after an outage.

Pure. A delay follows from who one is, by SHA-256: the same worker waits as long in every Python, on every
machine and at every start, and different ones spread evenly over the window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from broker.session import Identity
from broker.worker_settings import WorkerSettings

#: seconds over which workers spread, growing with their number up to here
_FEW, _MANY = 10, 100
_FEW_SECONDS, _MANY_SECONDS = 10.0, 60.0
#: seconds between two attempts to reach Redis again, at least
_RETRY_SECONDS = 1.0
#: bytes of the hash that are used; a double holds them all, so that no delay is rounded up to the window
_BYTES = 4


def window_seconds(workers: int, registrations_per_second: float) -> float:
    """Over how many seconds so many workers should start, all of one `up` or of one submission.

    Up to 10: as many seconds; up to 100: from 10 s to 60 s, linear; beyond: 60 s, and more where Redis,
    which may be asked for so many registrations a second, needs it.
    """
    if workers <= 1:
        return 0.0
    if workers <= _FEW:
        return float(workers)
    if workers <= _MANY:
        return _FEW_SECONDS + (workers - _FEW) * (_MANY_SECONDS - _FEW_SECONDS) / (_MANY - _FEW)
    return max(_MANY_SECONDS, workers / registrations_per_second)


def identity_of(host: str, name: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """What tells a worker from all others: its host and its name; in a job of Slurm also the id of that, the
    number of the node in it, and of the task on the node (where Slurm says none, the task's PID)."""
    task = environ.get("SLURM_LOCALID") or environ.get("SLURM_TASK_PID")
    of_slurm = (environ.get("SLURM_JOB_ID"), environ.get("SLURM_NODEID"), task)
    return host, name, *(part for part in of_slurm if part)


def delay_seconds(window_seconds: float, *identity: str) -> float:
    """How long the one of that identity (see `identity_of`) waits: from 0 to less than the window.

    The delay is window x SHA-256(parts joined by NUL, as UTF-8)[first 4 bytes, big-endian] / 2^32.
    """
    digest = hashlib.sha256("\0".join(identity).encode()).digest()
    return window_seconds * (int.from_bytes(digest[:_BYTES], "big") / float(1 << 8 * _BYTES))


def returns_seconds(workers: int, settings: WorkerSettings, who: Identity) -> Iterator[float]:
    """How long one of so many workers waits before each attempt to come back after an outage, without end.

    The first comes after its delay, the others a window later each: whenever the outage ends, workers come
    back spread over one window, of a quarter of the lease at most. Those of a small fleet try once a second.
    """
    window = min(settings.lease_seconds / 4, workers / settings.registrations_per_second)
    yield delay_seconds(window, who.host, who.name)
    while True:
        yield max(_RETRY_SECONDS, window)
