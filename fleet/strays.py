"""What an interrupted command has left outside its process group: a daemon, or what it started by setsid.

No signal to the group reaches that. It is known as the sidecar knows what a dead worker left: by the
environment that it was started with (proc_pid_environ(5)), here of that one attempt. What was started on a
job's behalf by others, as by Slurm or at, may have got the same environment, but not the worker's cgroup:
that is left alone. Where there is no /proc, nobody is found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

#: variables of one attempt, each NAME=VALUE
Marks = frozenset[bytes]
#: looks for what was started while others were killed
_MOST_LOOKS = 10


def kill(attempts: Collection[Marks]) -> None:
    """SIGKILL all that carries the marks of one of these; takes some 30 us for each process of this host."""
    killed: set[psutil.Process] = set()
    for _ in range(_MOST_LOOKS if attempts else 0):
        found = set(_carriers(attempts)) - killed
        if not found:
            return
        for stray in found:
            with suppress(psutil.Error):
                stray.kill()  # psutil looks that its number is not another's by now
        killed |= found


def _carriers(attempts: Collection[Marks]) -> Iterator[psutil.Process]:
    own_cgroup = _read("self/cgroup")
    for pid in psutil.pids():
        if _is_marked(pid, attempts) and _read(f"{pid}/cgroup") == own_cgroup:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if _is_marked(pid, attempts):  # its number was not another's before
                    yield process


def _is_marked(pid: int, attempts: Collection[Marks]) -> bool:
    variables = frozenset(_read(f"{pid}/environ").split(b"\0"))
    return any(marks <= variables for marks in attempts)


def _read(path: str) -> bytes:
    try:
        return Path("/proc", path).read_bytes()
    except OSError:
        return b""
