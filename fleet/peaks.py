"""The most memory that running commands have had.

For what the kernel tells in the end holds for large ones alone: `fleet.process.peak_bytes`. Each process
remembers its own most (VmHWM, proc_pid_status(5)), so that few looks will do; without /proc nothing is seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from broker import clock
from fleet.attempt import Attempt

#: seconds between two looks; more where looking would take a larger part of a CPU than one in so many
_SHORTEST, _SHARE = 1.0, 500
_KIB = 1024


class Peaks:
    """Looks at attempts now and then. For one thread."""

    def __init__(self) -> None:
        self._next_time = 0.0

    def look(self, attempts: Iterable[Attempt]) -> None:
        """Have each note what it had, if it is time to."""
        now, began = clock.monotonic(), time.thread_time()
        if now < self._next_time:
            return
        for attempt in attempts:
            if attempt.is_unmetered:
                attempt.seen_bytes = max(attempt.seen_bytes, peak_bytes(attempt.pgid))
        self._next_time = now + max(_SHORTEST, _SHARE * (time.thread_time() - began))


def peak_bytes(pid: int) -> int:
    """The most that this process, or one that descends from it and lives, has had; 0: none is there."""
    most, new = 0, [pid]
    while new:
        each = new.pop()
        most = max(most, _own_peak_bytes(each))
        new += _children(each)
    return most


def _own_peak_bytes(pid: int) -> int:
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * _KIB
    return 0


def _children(pid: int) -> list[int]:
    """Of all of its threads; none where the kernel does not list them."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - for each job, each second
    except OSError:
        return []
    return [
        int(child) for thread in threads for child in _read(f"/proc/{pid}/task/{thread}/children").split()
    ]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", 0) as file:
            return file.read()
    except OSError:
        return b""
