"""The processes of this host: which are a job's, and what they have had.

A job's processes are those of its group, all that descend from them, and whatever was one of these
when it was last seen: so one that leaves its group, or loses its parent, stays in view.

On Linux this reads /proc (proc_pid_stat(5)); elsewhere psutil tells, and nothing of peaks.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from broker import clock

#: bytes; and seconds, to which the kernel tells when a process began
_PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), 1 / os.sysconf("SC_CLK_TCK")
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Process:
    """What is known of one: who it is, since when (seconds on the boot clock, which tells two of one number
    apart), its resident memory, and the CPU time of it and of those that it waited for."""

    parent: int
    group: int
    started: float
    resident_bytes: int
    cpu_seconds: float = 0.0


class Table:
    """The processes as one look finds them: each is read once, however many jobs are looked at."""

    def __init__(self) -> None:
        self._found: dict[int, Process] = {}
        self._children: dict[int, list[int]] | None = None

    def family(self, group: int, known: Mapping[int, float]) -> dict[int, Process]:
        """The processes of a job: `group`, and number -> start of those it had before.

        One that left its parent and was never seen before is found only if the table `read_all`.
        """
        if self._children is None and not _LISTS_CHILDREN:
            self.read_all()
        if self._children is None:
            return self._walked([group, *known], group, known)
        return family(self._found, group, known, self._children)

    def read_all(self) -> None:
        """Read all there are, which finds a group's processes wherever they hang; once."""
        if self._children is None:
            self._found = processes()
            self._children = children_of(self._found)

    def _walked(self, new: list[int], group: int, known: Mapping[int, float]) -> dict[int, Process]:
        """From parents to children alone: a host may have thousands that are none of ours."""
        members: dict[int, Process] = {}
        while new:
            pid = new.pop()
            one = self._found.get(pid) or _read_one(pid)
            if one is None or pid in members or (pid != group and known.get(pid, one.started) != one.started):
                continue
            members[pid] = self._found[pid] = one
            new += _children(pid)
        return members


def family(
    found: Mapping[int, Process],
    group: int,
    known: Mapping[int, float],
    children: Mapping[int, list[int]] | None = None,
) -> dict[int, Process]:
    """The processes of a job among `found`; `known`: number -> start of those it had before."""
    below = children_of(found) if children is None else children
    new = [pid for pid, it in found.items() if it.group == group or known.get(pid) == it.started]
    members: dict[int, Process] = {}
    while new:
        members |= {pid: found[pid] for pid in new}
        new = [child for pid in new for child in below.get(pid, ()) if child not in members]
    return members


def children_of(found: Mapping[int, Process]) -> dict[int, list[int]]:
    """The children of each of them."""
    children = defaultdict(list)
    for pid, process in found.items():
        children[process.parent].append(pid)
    return children


def processes() -> dict[int, Process]:
    """All there are, by number."""
    if not Path("/proc/self/stat").exists():
        return _processes_without_proc()
    with os.scandir("/proc") as entries:
        read = ((int(entry.name), _read_one(int(entry.name))) for entry in entries if entry.name.isdigit())
        return {pid: process for pid, process in read if process}


def _read_one(pid: int) -> Process | None:
    with suppress(OSError, LookupError), open(f"/proc/{pid}/stat", "rb", 0) as file:
        # the name, in parentheses, may hold anything
        fields = file.read().rpartition(b")")[2].split()
        began, size, cpu = (
            int(fields[19]) * TICK,
            int(fields[21]) * _PAGE,
            sum(map(int, fields[11:15])) * TICK,
        )
        return Process(int(fields[1]), int(fields[2]), began, size, cpu)
    return None


def _processes_without_proc() -> dict[int, Process]:
    found: dict[int, Process] = {}
    for process in psutil.process_iter(["ppid", "create_time", "memory_info", "cpu_times"]):
        known, memory, times = process.info, process.info["memory_info"], process.info["cpu_times"]
        with suppress(OSError):
            group = os.getpgid(process.pid)
            started = known["create_time"] - clock.wall().timestamp() + clock.boottime()
            size, cpu = memory.rss if memory else 0, sum(times[:4]) if times else 0.0
            found[process.pid] = Process(known["ppid"] or 0, group, started, size, cpu)
    return found


def _children(pid: int) -> list[int]:
    """Of all of its threads."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - for each process, each second
    except OSError:
        return []
    return [
        int(child) for thread in threads for child in _read(f"/proc/{pid}/task/{thread}/children").split()
    ]


#: some kernels are built without
_LISTS_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()


def peak_bytes(pids: Iterable[int]) -> int:
    """The most that one of these processes, of those that live, has ever had (VmHWM); 0: none tells.

    Each remembers its own most, so that few looks will do.
    """
    return max(map(_own_peak_bytes, pids), default=0)


def _own_peak_bytes(pid: int) -> int:
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * _KIB
    return 0


def disk_bytes(pid: int) -> tuple[int, int]:
    """What it, and those that it waited for, read from disks and wrote to them; 0 where nobody tells."""
    found = dict(line.split(b": ") for line in _read(f"/proc/{pid}/io").splitlines())
    return int(found.get(b"read_bytes", 0)), int(found.get(b"write_bytes", 0))


def proportional_bytes(pid: int, resident_bytes: int) -> int:
    """Its memory, of what it shares with others its part alone; where nobody tells, its resident memory."""
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * _KIB
    return resident_bytes


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", 0) as file:
            return file.read()
    except OSError:
        return b""
