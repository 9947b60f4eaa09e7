"""What this machine has, as far as this process may use it: affinity and cgroups respected."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

#: a cgroup without a limit says so in words (v2) or with a number beyond any machine (v1)
_UNLIMITED = 1 << 60
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Resources:
    """CPUs by number, memory in bytes."""

    cpus: int
    memory_bytes: int


def detect() -> Resources:
    """Ask the machine."""
    return Resources(cpus(), min(psutil.virtual_memory().total, _cgroup_memory()))


def cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cgroup_memory() -> int:
    for path in _MEMORY_LIMITS:
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):
            continue
    return _UNLIMITED
