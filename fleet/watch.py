"""Looks, now and then, at what jobs with limits use, where nothing else tells or stops them.

A job's processes are those of its group, all that descend from them, and whatever was one of these
when it was last seen: so one that leaves its group, or loses its parent, stays in view.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from broker import clock
from fleet.limits import Limit

#: seconds between two looks: so many, but for looking takes no more than a twentieth of the time, and at most
_SHORTEST, _SHARE, _LONGEST = 0.2, 20, 1.0
#: bytes; and seconds, to which the kernel tells when a process began
_PAGE, _TICK = os.sysconf("SC_PAGE_SIZE"), 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """What is known of one: who it is, since when (seconds on the boot clock, which tells two of one number
    apart), and its resident memory."""

    parent: int
    group: int
    started: float
    resident_bytes: int


@dataclass
class Watched:
    """One attempt: its group (0: none yet); for a function that of its executor, which does not count, nor
    does what was there before."""

    limit: Limit
    group: Callable[[], int]
    is_function: bool = False
    known: dict[int, float] = field(default_factory=dict)

    def counts(self, pid: int, process: Process) -> bool:
        """Whether that process of its group, or of what descends from it, is the job's."""
        return not self.is_function or (pid != self.group() and process.started >= self.limit.made_at - _TICK)


class Watch:
    """Watches attempts by their leases. For one thread."""

    def __init__(self, gpu_memory: Callable[[Iterable[int]], int | None]) -> None:
        """`gpu_memory`: bytes in use on GPUs of these numbers."""
        self._gpu_memory = gpu_memory
        self._watched: dict[str, Watched] = {}
        #: when to look again, monotonic seconds
        self.next_time = float("inf")
        self._gpus_at = 0.0

    def add(self, lease: str, watched: Watched) -> None:
        """From now on, if there is anything to look at."""
        limit = watched.limit
        if limit.memory_bytes is not None or limit.has_gpus:
            self._watched[lease] = watched
            self.next_time = min(self.next_time, clock.monotonic() + _SHORTEST)

    def remove(self, lease: str) -> None:
        """It has ended."""
        if self._watched.pop(lease, None) and not self._watched:
            self.next_time = float("inf")

    def look(self) -> list[str]:
        """The leases of those that have too much memory, if it is time to look."""
        began = clock.monotonic()
        if began < self.next_time:
            return []
        found = processes() if any(one.limit.is_watched for one in self._watched.values()) else {}
        for one in self._watched.values():
            self._look_at(one, found)
        self._look_at_gpus(began)
        took = clock.monotonic() - began
        self.next_time = clock.monotonic() + min(_LONGEST, max(_SHORTEST, _SHARE * took))
        return [lease for lease, one in self._watched.items() if one.limit.ran_out]

    def _look_at(self, one: Watched, found: Mapping[int, Process]) -> None:
        group = one.group()
        if group and one.limit.is_watched:
            size = self._size(one, family(found, group, one.known))
            one.limit.seen_bytes = max(one.limit.seen_bytes, size)

    def _size(self, one: Watched, members: Mapping[int, Process]) -> int:
        """Bytes that all have; what several share counts once, where that makes the difference."""
        one.known = {pid: process.started for pid, process in members.items()}
        counted = [pid for pid, process in members.items() if one.counts(pid, process)]
        size = sum(members[pid].resident_bytes for pid in counted)
        if size > (one.limit.memory_bytes or 0):
            size = sum(proportional_bytes(pid, members[pid].resident_bytes) for pid in counted)
        return size

    def _look_at_gpus(self, now: float) -> None:
        """Once a second at most: the driver may take its time."""
        if now < self._gpus_at:
            return
        self._gpus_at = now + _LONGEST
        for limit in (one.limit for one in self._watched.values() if one.limit.has_gpus):
            used = self._gpu_memory(limit.grant.gpu_ids)
            if used is not None:
                limit.seen_gpu_bytes = max(limit.seen_gpu_bytes or 0, used)


def family(found: Mapping[int, Process], group: int, known: Mapping[int, float]) -> dict[int, Process]:
    """The processes of a job among `found`; `known`: number -> start of those it had before."""
    children = defaultdict(list)
    for pid, process in found.items():
        children[process.parent].append(pid)
    new = [pid for pid, it in found.items() if it.group == group or known.get(pid) == it.started]
    members: dict[int, Process] = {}
    while new:
        members |= {pid: found[pid] for pid in new}
        new = [child for pid in new for child in children[pid] if child not in members]
    return members


def processes() -> dict[int, Process]:
    """All there are, by number."""
    if not Path("/proc/self/stat").exists():
        return _processes_without_proc()
    found: dict[int, Process] = {}
    with os.scandir("/proc") as entries:
        for name in (entry.name for entry in entries if entry.name.isdigit()):
            with suppress(OSError, LookupError), open(f"/proc/{name}/stat", "rb", 0) as file:
                # the name, in parentheses, may hold anything
                fields = file.read().rpartition(b")")[2].split()
                rest = int(fields[19]) * _TICK, int(fields[21]) * _PAGE
                found[int(name)] = Process(int(fields[1]), int(fields[2]), *rest)
    return found


def _processes_without_proc() -> dict[int, Process]:
    found: dict[int, Process] = {}
    for process in psutil.process_iter(["ppid", "create_time", "memory_info"]):
        known, memory = process.info, process.info["memory_info"]
        with suppress(OSError):
            group = os.getpgid(process.pid)
            started = known["create_time"] - clock.wall().timestamp() + clock.boottime()
            found[process.pid] = Process(known["ppid"] or 0, group, started, memory.rss if memory else 0)
    return found


def proportional_bytes(pid: int, resident_bytes: int) -> int:
    """Its memory, of what it shares with others its part alone; where nobody tells, its resident memory."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(b"Pss:"))
    except (OSError, ValueError, StopIteration):
        return resident_bytes
