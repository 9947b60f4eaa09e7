"""What this machine has, as far as this process may use it: affinity and cgroups respected.

Imports nothing but Python's standard library, and NVML where that is installed: `fleet up` sends this file
to hosts where nothing of ours is yet. ASCII only, for the same reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path("/")
#: seconds that nvidia-smi gets
_SMI_SECONDS = 10.0


@dataclass(frozen=True)
class Gpu:
    """One GPU; its memory is 0 where it has none of its own, or that is not known."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Resources:
    """CPUs by number, memory in bytes."""

    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()


def detect(
    *, cpus: int | None = None, memory_bytes: int | None = None, num_gpus: int | None = None
) -> Resources:
    """Ask the machine for what is not given. GPUs said to be there that are not found are `unknown`."""
    return Resources(
        find_cpus() if cpus is None else cpus,
        find_memory() if memory_bytes is None else memory_bytes,
        find_gpus() if num_gpus is None else _so_many_gpus(num_gpus),
    )


def _so_many_gpus(number: int) -> tuple[Gpu, ...]:
    found = find_gpus() if number else ()
    return (found + (Gpu("unknown", 0),) * number)[:number]


# --- CPUs ------------------------------------------------------------------------------------------


def find_cpus(root: Path = _ROOT) -> int:
    """CPUs that this process may run on, no more than its cgroups' quotas pay for; at least 1."""
    quotas = [quota for folder, version in _with_parents("cpu", root) for quota in _quota(folder, version)]
    return max(1, int(min([_affinity(), *quotas])))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(folder: Path, version: int) -> Iterator[float]:
    """How many CPUs' time a cgroup may take, if that is limited."""
    if version == 2:
        words = " ".join(_lines(folder / "cpu.max")).split()
    else:
        words = _lines(folder / "cpu.cfs_quota_us") + _lines(folder / "cpu.cfs_period_us")
    with suppress(ValueError, ZeroDivisionError):  # "max": there is no limit
        quota, period = map(int, words)
        if quota > 0:
            yield quota / period


# --- memory ----------------------------------------------------------------------------------------


def find_memory(root: Path = _ROOT) -> int:
    """The machine's memory, no more than the limits of our cgroups leave of it; bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [limit for folder, version in _with_parents("memory", root) for limit in _limit(folder, version)]
    return min([total, *limits])


def _limit(folder: Path, version: int) -> Iterator[int]:
    """What a cgroup may have, if that is limited; version 1 has a number beyond any machine where not."""
    for line in _lines(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")):
        with suppress(ValueError):
            yield int(line)


# --- cgroups ---------------------------------------------------------------------------------------


def cgroups(controller: str, root: Path = _ROOT) -> Iterator[tuple[Path, Path, int]]:
    """(our cgroup's folder, the hierarchy's mount, its version) of those that may have that controller."""
    ours = _own_cgroups(root)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        path = ours.get("" if version == 2 else controller)
        if path is None or (version == 1 and controller not in kind[2].split(",")):
            continue
        mount = root / fields[4].lstrip("/")
        yield mount / _below(path, fields[3]), mount, version


def _with_parents(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of our cgroup and all above it: the limits of each hold."""
    for folder, mount, version in cgroups(controller, root):
        yield folder, version
        while folder != mount:
            folder = folder.parent
            yield folder, version


def _own_cgroups(root: Path) -> dict[str, str]:
    """Controller -> path of our cgroup; version 2 has no name for its controllers."""
    found: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _below(path: str, mount_root: str) -> str:
    """`path` as seen below a mount of `mount_root`; a container may be shown its own cgroup alone."""
    prefix = mount_root.rstrip("/")
    inside = path == prefix or path.startswith(f"{prefix}/")
    return path.removeprefix(prefix).strip("/") if inside and ".." not in path else ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


# --- GPUs ------------------------------------------------------------------------------------------


def find_gpus() -> tuple[Gpu, ...]:
    """NVIDIA's GPUs: by NVML where the package nvidia-ml-py is installed and works, else by nvidia-smi."""
    found = _gpus_by_nvml()
    return _gpus_by_smi() if found is None else found


def _gpus_by_nvml() -> tuple[Gpu, ...] | None:
    """None where NVML, or its driver, is not there."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        with _initialised(pynvml):
            return tuple(_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except (pynvml.NVMLError, OSError):
        return None


@contextmanager
def _initialised(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    handle, memory_bytes = nvml.nvmlDeviceGetHandleByIndex(index), 0
    with suppress(nvml.NVMLError_NotSupported):  # one that shares the machine's memory
        memory_bytes = nvml.nvmlDeviceGetMemoryInfo(handle).total
    return Gpu(str(nvml.nvmlDeviceGetName(handle)), memory_bytes)


def _mebibytes(size: str) -> int:
    """Bytes; 0 for `[N/A]`."""
    return int(size) * 2**20 if size.strip().isdigit() else 0


def _gpus_by_smi() -> tuple[Gpu, ...]:
    """None found where there is no nvidia-smi, or it fails."""
    if not shutil.which("nvidia-smi"):
        return ()
    argv = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        rows = [line.rsplit(",", 1) for line in done.stdout.splitlines()]
        return tuple(Gpu(name.strip(), _mebibytes(size)) for name, size in rows)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
