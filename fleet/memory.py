"""Whether a job was killed because memory ran out: the kernel counts such kills, and does not tell of them.

A process that the kernel's OOM killer ends dies of SIGKILL, as one that an operator kills does. What
tells them apart is a counter that went up: of the worker's cgroup, which its jobs share (cgroup v2's
memory.events, v1's memory.oom_control: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst
of Linux), or of the whole host (/proc/vmstat, since Linux 4.13).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from broker import clock
from broker.work import Tails
from fleet.process import Exit
from fleet.resources import cgroups

_SIGKILL = 9
#: what a shell returns whose command was killed so
_KILLED_CODE = 128 + _SIGKILL
#: seconds between two readings of the counters; a kill is looked for in the time since the last but one
_READ_SECONDS = 1.0
#: share of all memory that a job must have had to be suspected where there is no counter
_LARGE_SHARE = 0.5
#: last words of programs that were refused memory, and ended by themselves
_LAST_WORDS = re.compile(r"\w*MemoryError\b|\bbad_alloc\b|\b[Oo]ut of memory\b|\b[Cc]annot allocate memory\b")
_LINES, _LONGEST_LINE = 3, 200


@dataclass(frozen=True)
class Counter:
    """A file that counts OOM kills in its line `oom_kill N`. `where` is for people."""

    path: Path
    where: str

    def read(self) -> int | None:
        """The count, or None where it cannot be read."""
        try:
            lines = self.path.read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        except (OSError, ValueError, LookupError, StopIteration):
            return None


def counters(root: Path = Path("/")) -> tuple[Counter, ...]:
    """The counters that concern this process, those that tell most first."""
    found = [Counter(path, "in the worker's cgroup") for path in _cgroup_files(root)]
    found.append(Counter(root / "proc/vmstat", "on this host"))
    return tuple(counter for counter in found if counter.read() is not None)


def _cgroup_files(root: Path) -> Iterator[Path]:
    for folder, mount, version in cgroups("memory", root):
        if version == 1:
            yield folder / "memory.oom_control"
            continue
        # where the memory controller is not handed down so far, an ancestor counts for us
        while folder != mount and not (folder / "memory.events").exists():
            folder = folder.parent
        yield folder / "memory.events"


class Memory:
    """Remembers what the counters said lately, and judges a job that was killed. For one thread."""

    def __init__(self, found: tuple[Counter, ...] | None = None, total_bytes: int | None = None) -> None:
        self._counters = counters() if found is None else found
        self._total_bytes = total_bytes or psutil.virtual_memory().total
        self._newer = self._older = self._read()
        self._read_at = clock.monotonic()
        #: kills since `_older` that were put down to a job, for each counter
        self._blamed = [0] * len(self._counters)

    def _read(self) -> list[int]:
        return [counter.read() or 0 for counter in self._counters]

    def look(self) -> None:
        """Read the counters, at most once a second; call it once the jobs that ended have been judged."""
        now = clock.monotonic()
        if now - self._read_at >= _READ_SECONDS:
            self._older, self._newer, self._read_at = self._newer, self._read(), now
            self._blamed = [0] * len(self._counters)

    def verdict(self, ended: Exit, tails: Tails | None = None) -> str | None:
        """Why a job failed that nobody here ended, if memory was the reason."""
        if ended.signal == _SIGKILL or ended.code == _KILLED_CODE:
            return self._killed(ended)
        said = _last_words(tails) if tails else None
        how = f"exit code {ended.code}" if ended.signal is None else f"killed by signal {ended.signal}"
        return f"OutOfMemory: {how}, its last words: {said}" if said else None

    def _killed(self, ended: Exit) -> str | None:
        for index, count in enumerate(self._read()):
            if count - self._older[index] > self._blamed[index]:
                self._blamed[index] += 1
                where = self._counters[index].where
                return f"OutOfMemory: killed by SIGKILL, by the kernel for want of memory {where}"
        if not self._counters and ended.max_rss_bytes >= _LARGE_SHARE * self._total_bytes:
            return f"OutOfMemory: killed by SIGKILL (out of memory? it had {ended.max_rss_bytes >> 20} MiB)"
        return None


def _last_words(tails: Tails) -> str | None:
    """The line among a job's last ones that says that it was refused memory."""
    text = (tails.stderr or tails.stdout)[-2000:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line[:_LONGEST_LINE] for line in lines[-_LINES:] if _LAST_WORDS.search(line)), None)
