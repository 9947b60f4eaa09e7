"""A cgroup of its own for each job that has a memory limit, where this process may make some.

Version 2 (Documentation/admin-guide/cgroup-v2.rst of Linux): below our own cgroup, if that is delegated
to us and holds nobody else's processes. A cgroup that limits its children may hold no processes
itself, so ours move one level down. Version 1 (cgroup-v1/memory.rst): below our own cgroup, too; there
nothing need be moved.

The folder that holds a worker's groups names its process: what a worker left that died is removed by
the next one that makes some.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from broker import clock
from fleet.process import began
from fleet.resources import cgroups

_PREFIX = "rq-fleet"
_ROOT = Path("/")
#: looks at our cgroup for processes that were started while others were moved
_MOVES = 10


class Group:
    """One job's cgroup."""

    def __init__(self, folder: Path, version: int) -> None:
        self._folder = folder
        #: of cgroups; in the first one the kernel kills one process alone, and not the whole job
        self.version = version

    @property
    def entrance(self) -> str:
        """The file to which a process writes 0 to enter, and all that it starts from then on."""
        return str(self._folder / "cgroup.procs")

    def limit(self, memory_bytes: int) -> None:
        """What all in it may have together; swap is none of it. Raises OSError."""
        if self.version == 1:
            (self._folder / "memory.limit_in_bytes").write_text(str(memory_bytes))
            self._write_if_there("memory.memsw.limit_in_bytes", str(memory_bytes))
        else:
            (self._folder / "memory.max").write_text(str(memory_bytes))
            self._write_if_there("memory.swap.max", "0")
            self._write_if_there("memory.oom.group", "1")

    def _write_if_there(self, name: str, text: str) -> None:
        file = self._folder / name
        if file.exists():
            file.write_text(text)

    def kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        rows = self._read("memory.oom_control" if self.version == 1 else "memory.events")
        return next((int(row.split()[1]) for row in rows.splitlines() if row.startswith("oom_kill ")), 0)

    def peak_bytes(self) -> int | None:
        """The most that all in it ever had together; None where the kernel does not tell."""
        text = self._read("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(text) if text.strip().isdigit() else None

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except OSError:
            return ""

    def remove(self) -> bool:
        """Kill what is left in it, and remove it; False: it is not gone yet, for the dead take a moment."""
        for word in self._read("cgroup.procs").split():
            with suppress(OSError):
                os.kill(int(word), signal.SIGKILL)
        return _removed(self._folder)


class Groups:
    """Makes them, and removes them. Made when the first is asked for."""

    def __init__(self, folder: Path, version: int) -> None:
        self._folder = folder
        self._version = version
        self._leaving: list[Group] = []

    def make(self, name: str, memory_bytes: int) -> Group:
        """One that holds no process yet. Raises OSError."""
        self.sweep()
        folder = self._folder / f"{_job_prefix(self._version)}{name}"
        folder.mkdir()
        group = Group(folder, self._version)
        try:
            group.limit(memory_bytes)
        except OSError:
            group.remove()
            raise
        return group

    def remove(self, group: Group) -> None:
        """Its job has ended."""
        if not group.remove():
            self._leaving.append(group)

    def sweep(self) -> None:
        """Remove those that could not be removed before."""
        self._leaving = [group for group in self._leaving if not group.remove()]

    def close(self, patience_seconds: float = 2.0) -> None:
        """Remove what is left, which the dead may be in for a moment; the next worker removes the rest."""
        deadline = clock.monotonic() + patience_seconds
        while not self._is_swept() and clock.monotonic() < deadline:
            time.sleep(0.02)

    def _is_swept(self) -> bool:
        self.sweep()
        return not self._leaving and (self._version != 1 or _removed(self._folder))


def prepared(root: Path = _ROOT) -> Groups | None:
    """Where groups can be made; None where they cannot."""
    for own, _, version in cgroups("memory", root):
        with suppress(OSError, ValueError):
            _prune(own)
            return _prepared_v1(own) if version == 1 else _prepared_v2(own)
    return None


def _prepared_v1(own: Path) -> Groups:
    """Raises OSError."""
    folder = own / _name(os.getpid())
    folder.mkdir(exist_ok=True)
    if not os.access(folder / "memory.limit_in_bytes", os.W_OK):
        folder.rmdir()
        raise PermissionError(folder)
    return Groups(folder, 1)


def _prepared_v2(own: Path) -> Groups:
    """Raises OSError, ValueError where the cgroup is not ours alone."""
    if "memory" not in (own / "cgroup.controllers").read_text().split():
        raise ValueError("no memory controller")
    if "memory" not in (own / "cgroup.subtree_control").read_text().split():
        leaf = own / _name(os.getpid())
        leaf.mkdir(exist_ok=True)
        try:
            _move_all(own, leaf)
            (own / "cgroup.subtree_control").write_text("+memory")
        except (OSError, ValueError):
            _move_back(leaf, own)
            raise
    return Groups(own, 2)


def _move_all(own: Path, leaf: Path) -> None:
    """Raises ValueError where others' processes are in it."""
    for _ in range(_MOVES):
        pids = [int(word) for word in (own / "cgroup.procs").read_text().split()]
        if not pids:
            return
        family = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        if strangers := set(pids) - family:
            raise ValueError(f"processes of others: {sorted(strangers)[:3]}")
        for pid in pids:
            (leaf / "cgroup.procs").write_text(str(pid))
    raise ValueError("its processes are never all moved")


def _move_back(leaf: Path, own: Path) -> None:
    for word in (leaf / "cgroup.procs").read_text().split():
        with suppress(OSError):
            (own / "cgroup.procs").write_text(word)
    _removed(leaf)


def _name(pid: int) -> str:
    """Of what belongs to a process; tells it from another of that number."""
    return f"{_PREFIX}.{pid}.{began(pid)}"


def _job_prefix(version: int) -> str:
    """In the first version jobs have a folder around them; in the second they lie beside the worker."""
    return "" if version == 1 else f"{_name(os.getpid())}."


def _prune(own: Path) -> None:
    """Remove what workers left that are gone."""
    for folder in _dead(own):
        with suppress(FileNotFoundError):  # another worker does the same
            for inner in folder.iterdir():
                if inner.is_dir():
                    _removed(inner)
        _removed(folder)


def _dead(own: Path) -> Iterator[Path]:
    for folder in own.glob(f"{_PREFIX}.*"):
        with suppress(ValueError):  # somebody else's
            _, pid, start, *_ = folder.name.split(".")
            if began(int(pid)) != int(start):
                yield folder


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # busy
        return False
    return True
