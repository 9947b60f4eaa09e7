"""What this machine has, as far as this process may use it: affinity and cgroups respected.

Imports nothing but Python's standard library, and NVML where that is installed: `fleet up` sends this file
to hosts where nothing of ours is yet. ASCII only, for the same reason.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path("/")
#: seconds that nvidia-smi gets
_SMI_SECONDS = 10.0
#: how the UUID of a GPU begins; one of a part of a GPU (MIG) begins otherwise
_UUID = "GPU-"


@dataclass(frozen=True)
class Gpu:
    """One GPU; its memory is 0 where it has none of its own, or that is not known.

    `index`: its number on this machine, as NVML, nvidia-smi and CUDA_DEVICE_ORDER=PCI_BUS_ID count.
    """

    name: str
    memory_bytes: int
    index: int = 0


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
    return so_many(find_gpus() if number else (), number)


def _each_once(*lists: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(itertools.chain(*lists)))


def so_many(found: tuple[Gpu, ...], number: int) -> tuple[Gpu, ...]:
    """The first `number` of them, and such as nothing is known of where there are not so many.

    These have the numbers that CUDA_VISIBLE_DEVICES leaves to this process first.
    """
    used = {gpu.index for gpu in found}
    granted = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    unused = (
        index for index in _each_once(granted, range(number + len(used) + len(granted))) if index not in used
    )
    return found[:number] + tuple(Gpu("unknown", 0, next(unused)) for _ in range(number - len(found)))


# --- CPUs ------------------------------------------------------------------------------------------


def find_cpus(root: Path = _ROOT) -> int:
    """CPUs that this process may run on, no more than its cgroups' quotas pay for; at least 1."""
    return max(1, int(min([_affinity(), *cpu_quotas(root).values()])))


def cpu_ids() -> tuple[int, ...]:
    """The numbers of the CPUs that this process may run on; none where the system does not tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def cpu_quotas(root: Path = _ROOT) -> dict[str, float]:
    """Cgroup, ours or one above it -> how many CPUs' time all that is in it may take."""
    rows = _with_parents("cpu", root)
    return {str(folder): quota for folder, version in rows for quota in _quota(folder, version)}


def _affinity() -> int:
    return len(cpu_ids()) or os.cpu_count() or 1


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
    return min(memory_limits(root).values())


def machine_memory() -> int:
    """All that the machine has, whoever may use it; bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limits(root: Path = _ROOT) -> dict[str, int]:
    """Cgroup, ours or one above it -> bytes that all in it may have together; '' is the machine."""
    rows = _with_parents("memory", root)
    return {"": machine_memory()} | {
        str(folder): limit for folder, version in rows for limit in _limit(folder, version)
    }


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
    """NVIDIA's GPUs: by NVML where the package nvidia-ml-py is installed and works, else by nvidia-smi.

    Those alone that CUDA_VISIBLE_DEVICES leaves to this process, as Slurm sets it for a job.
    """
    found = _gpus_by_nvml()
    found = _gpus_by_smi() if found is None else found
    left = os.environ.get("CUDA_VISIBLE_DEVICES")
    if left is None:
        return found
    ours = visible_gpus(left)
    return tuple(gpu for gpu in found if gpu.index in ours)


def visible_gpus(text: str) -> list[int]:
    """The numbers of the GPUs that CUDA_VISIBLE_DEVICES names: `0,2`, or `GPU-8932f937,GPU-4ac1`.

    CUDA reads it up to the first word that names none; of a UUID the beginning will do that only one has.
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars
    """
    words = [word.strip() for word in text.split(",")]
    uuids = _uuids() if any(word.startswith(_UUID) for word in words) else ()
    found: list[int] = []
    for word in words:
        number = _number_of(word, uuids)
        if number is None:
            break
        found.append(number)
    return found


def _number_of(word: str, uuids: Sequence[str]) -> int | None:
    if word.isascii() and word.isdigit():
        return int(word)
    meant = [number for number, uuid in enumerate(uuids) if word.startswith(_UUID) and uuid.startswith(word)]
    return meant[0] if len(meant) == 1 else None


def _uuids() -> Sequence[str]:
    """Of all GPUs, by their numbers."""
    nvml = _nvml()
    if nvml is not None:
        with suppress(nvml.NVMLError, OSError), _initialised(nvml):
            handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
            return [str(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    return [line.strip() for line in _smi_lines("uuid")]


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


@dataclass(frozen=True)
class GpuUse:
    """How busy a GPU is, from 0 to 1 (None: it does not tell), and how much of its memory is taken."""

    index: int
    busy: float | None
    memory_bytes: int


def gpu_uses(indices: Iterable[int] | None = None) -> tuple[GpuUse, ...]:
    """Of GPUs of these numbers, or of all, by NVML; of none where that is not there, or does not tell."""
    nvml = _nvml()
    if nvml is None:
        return ()
    try:
        if indices is None:
            indices = range(_count(nvml))
        return tuple(_use(nvml, index) for index in indices)
    except (nvml.NVMLError, OSError):
        return ()


@functools.cache
def _nvml() -> Any:
    """The package, for one that goes on asking; None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _use(nvml: Any, index: int) -> GpuUse:
    handle, busy = _handle(nvml, index), None
    with suppress(nvml.NVMLError):
        busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    return GpuUse(index, busy, int(nvml.nvmlDeviceGetMemoryInfo(handle).used))


@functools.cache
def _count(nvml: Any) -> int:
    nvml.nvmlInit()
    return int(nvml.nvmlDeviceGetCount())


@functools.cache
def _handle(nvml: Any, index: int) -> Any:
    """For one that goes on asking: NVML stays initialised, for that may take a second."""
    nvml.nvmlInit()
    return nvml.nvmlDeviceGetHandleByIndex(index)


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
    return Gpu(str(nvml.nvmlDeviceGetName(handle)), memory_bytes, index)


def _mebibytes(size: str) -> int:
    """Bytes; 0 for `[N/A]`."""
    return int(size) * 2**20 if size.strip().isdigit() else 0


def _gpus_by_smi() -> tuple[Gpu, ...]:
    rows = [line.rsplit(",", 1) for line in _smi_lines("name,memory.total")]
    try:
        return tuple(Gpu(name.strip(), _mebibytes(size), i) for i, (name, size) in enumerate(rows))
    except ValueError:  # it says something else
        return ()


def _smi_lines(fields: str) -> list[str]:
    """What nvidia-smi says of each GPU; nothing where there is none, or it fails."""
    if not shutil.which("nvidia-smi"):
        return []
    argv = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
