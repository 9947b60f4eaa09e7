"""What a host, and a job's processes, have used since they were looked at last."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from broker.usage import Usage
from fleet import processes
from fleet.processes import Process
from fleet.resources import GpuUse
from fleet.series import HostSample, JobSample

#: a network between programs of one machine
_LOOPBACK = "lo"
#: CPU seconds that telling apart what the processes of one job share may take
_LONGEST_LOOK_SECONDS = 0.01


class HostMeter:
    """The host, for one of the workers there that write into the same folder: it has the lock."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock
        self._fd: int | None = None
        self._before: tuple[float, tuple[float, ...]] | None = None

    def read(self, now: float) -> HostSample | None:
        """What it used since the last time; None the first time, and where another worker reads it.

        `now`: monotonic seconds.
        """
        if not self._is_ours():
            return None
        before, self._before = self._before, (now, _counts())
        if before is None:
            return None
        passed = max(1e-3, now - before[0])
        rates = [
            max(0.0, after - was) / passed for was, after in zip(before[1], self._before[1], strict=True)
        ]
        memory = psutil.virtual_memory()
        return HostSample(rates[0], memory.total - memory.available, *rates[1:])

    def _is_ours(self) -> bool:
        """The lock goes with its process: when that has gone, another worker gets it."""
        if self._fd is None:
            self._fd = _locked(self._lock)
        return self._fd is not None

    def close(self) -> None:
        """Let another read it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _locked(path: Path) -> int | None:
    """Its descriptor; None: another has the lock, or there can be none."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _counts() -> tuple[float, ...]:
    """CPU seconds, bytes read, written, received and sent since the machine was started."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
    # Linux counts what guests use as the host's own, too
    busy -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    disks, networks = psutil.disk_io_counters(), psutil.net_io_counters(pernic=True)
    outside = [one for name, one in networks.items() if name != _LOOPBACK]
    return (
        busy,
        float(disks.read_bytes if disks else 0),
        float(disks.write_bytes if disks else 0),
        float(sum(one.bytes_recv for one in outside)),
        float(sum(one.bytes_sent for one in outside)),
    )


@dataclass
class JobMeter:
    """One attempt. `began`: when its processes had used nothing, monotonic seconds; None: they are older."""

    began: float | None
    _before: tuple[float, tuple[float, int, int]] | None = None
    _samples: int = 0
    _memory_sum: int = 0
    _most_bytes: int = 0
    _most_processes: int = 0
    _read_bytes: int = 0
    _written_bytes: int = 0
    _gpu_samples: int = 0
    _gpu_sum: float = 0.0
    #: whether what processes share is told apart: not where that takes long
    _tells_shared: bool = True

    def __post_init__(self) -> None:
        if self.began is not None:
            self._before = (self.began, (0.0, 0, 0))

    def read(self, now: float, members: Mapping[int, Process], gpus: Sequence[GpuUse]) -> JobSample:
        """What its processes have, and used since the last time; `gpus` are those that it has to itself."""
        counts = _counts_of(members)
        rates = self._rates(now, counts)
        memory = self._memory(members)
        self._samples += 1
        self._memory_sum += memory
        self._most_bytes = max(self._most_bytes, memory)
        self._most_processes = max(self._most_processes, len(members))
        busy = _mean([gpu.busy for gpu in gpus if gpu.busy is not None])
        if busy is not None:
            self._gpu_samples += 1
            self._gpu_sum += busy
        taken = sum(gpu.memory_bytes for gpu in gpus) if gpus else None
        return JobSample(rates[0], memory, len(members), rates[1], rates[2], busy, taken)

    def _rates(self, now: float, counts: tuple[float, int, int]) -> Sequence[float | None]:
        before, self._before = self._before, (now, counts)
        if before is None:
            return (None, None, None)
        # less than before: some of its processes have gone, and nobody waited for them
        cpu, read, written = (max(0, after - was) for was, after in zip(before[1], counts, strict=True))
        self._read_bytes += int(read)
        self._written_bytes += int(written)
        passed = max(1e-3, now - before[0])
        return (cpu / passed, read / passed, written / passed)

    def _memory(self, members: Mapping[int, Process]) -> int:
        """What all have; what several share counts once."""
        if len(members) < 2 or not self._tells_shared:
            return sum(process.resident_bytes for process in members.values())
        began = time.thread_time()
        size = sum(
            processes.proportional_bytes(pid, process.resident_bytes) for pid, process in members.items()
        )
        self._tells_shared = time.thread_time() - began < _LONGEST_LOOK_SECONDS
        return size

    def added(self, usage: Usage) -> Usage:
        """`usage`, and what was seen beyond that."""
        if not self._samples:
            return usage
        most = self._most_bytes if self.began is not None else 0  # else it may be an earlier job's
        return usage._replace(
            memory_bytes=max(usage.memory_bytes or 0, most) or None,
            mean_memory_bytes=self._memory_sum // self._samples,
            processes=self._most_processes,
            read_bytes=self._read_bytes,
            written_bytes=self._written_bytes,
            gpu_use=self._gpu_sum / self._gpu_samples if self._gpu_samples else None,
        )


def _counts_of(members: Mapping[int, Process]) -> tuple[float, int, int]:
    """CPU seconds, bytes read and written of processes, and of those that they waited for."""
    read = written = 0
    for pid in members:
        one_read, one_written = processes.disk_bytes(pid)
        read, written = read + one_read, written + one_written
    return sum(process.cpu_seconds for process in members.values()), read, written


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
