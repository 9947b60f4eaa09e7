"""What a process may use of a machine: what its cgroups, and those above, leave of it; and GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleet import resources
from fleet.resources import Gpu

_V2 = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
_V1_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
_V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
_HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
_DOCKER = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
_MIB = 2**20


@pytest.fixture
def machine(tmp_path):
    """`machine("0::/a", [mountinfo...], {"memory.max": "1"})`: a root; the files lie below /sys/fs/cgroup."""

    def make(own: str, mounts: list[str], files: dict[str, str]) -> Path:
        placed = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
        placed |= {"proc/self/cgroup": own, "proc/self/mountinfo": "\n".join(mounts)}
        for name, text in placed.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return make


@pytest.fixture
def sixteen_cpus(monkeypatch):
    monkeypatch.setattr(resources, "_affinity", lambda: 16)


# --- CPUs ------------------------------------------------------------------------------------------


def _quota_v1(group: str, quota: int, period: int) -> dict[str, str]:
    return {f"cpu/{group}/cpu.cfs_quota_us": str(quota), f"cpu/{group}/cpu.cfs_period_us": str(period)}


_OWN_V1 = "2:cpu,cpuacct:/jobs/7\n4:memory:/jobs/7\n0::/"
_QUOTAS = {
    "no cgroups": ("", [], {}, 16),
    "no limit, version 2": ("0::/a", [_V2], {"a/cpu.max": "max 100000"}, 16),
    "version 2": ("0::/a", [_V2], {"a/cpu.max": "400000 100000"}, 4),
    "a part of a CPU counts for none": ("0::/a", [_V2], {"a/cpu.max": "390000 100000"}, 3),
    "but one is always there": ("0::/a", [_V2], {"a/cpu.max": "20000 100000"}, 1),
    "more than there is": ("0::/a", [_V2], {"a/cpu.max": "6400000 100000"}, 16),
    "the parent's is lower": (
        "0::/a/b",
        [_V2],
        {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"},
        2,
    ),
    "the mount's own": ("0::/", [_V2], {"cpu.max": "300000 100000"}, 3),
    "version 1": (_OWN_V1, [_V1_CPU, _HYBRID], _quota_v1("jobs/7", 500000, 100000), 5),
    "version 1, the parent's": (
        _OWN_V1,
        [_V1_CPU],
        _quota_v1("jobs/7", -1, 100000) | _quota_v1("jobs", 250000, 50000),
        5,
    ),
    "nonsense": ("0::/a", [_V2], {"a/cpu.max": "some 0"}, 16),
    "a period of nothing": ("0::/a", [_V2], {"a/cpu.max": "100 0"}, 16),
}


@pytest.mark.parametrize(("own", "mounts", "files", "expected"), _QUOTAS.values(), ids=_QUOTAS.keys())
def test_cpus_are_those_that_quotas_pay_for(machine, sixteen_cpus, own, mounts, files, expected):
    assert resources.find_cpus(machine(own, mounts, files)) == expected


def test_cpus_are_those_we_may_run_on():
    one = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, [{one}])\nfrom fleet import resources\n"
    script += "print(resources.find_cpus())"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "1\n"


# --- memory ----------------------------------------------------------------------------------------

_TOTAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
_LIMITS = {
    "no cgroups": ("", [], {}, _TOTAL),
    "no limit, version 2": ("0::/a", [_V2], {"a/memory.max": "max"}, _TOTAL),
    "no limit, version 1": (
        _OWN_V1,
        [_V1_MEMORY],
        {"memory/jobs/7/memory.limit_in_bytes": "9223372036854771712"},
        _TOTAL,
    ),
    "version 2": ("0::/a", [_V2], {"a/memory.max": f"{64 * _MIB}"}, 64 * _MIB),
    "the parent's is lower": (
        "0::/a/b",
        [_V2],
        {"a/memory.max": f"{32 * _MIB}", "a/b/memory.max": f"{64 * _MIB}"},
        32 * _MIB,
    ),
    "the parent's alone": ("0::/a/b/c", [_V2], {"a/memory.max": f"{32 * _MIB}"}, 32 * _MIB),
    "version 1": (
        _OWN_V1,
        [_HYBRID, _V1_MEMORY],
        {"memory/jobs/7/memory.limit_in_bytes": f"{8 * _MIB}"},
        8 * _MIB,
    ),
    "version 1, the parent's": (
        _OWN_V1,
        [_V1_MEMORY],
        {"memory/jobs/memory.limit_in_bytes": f"{8 * _MIB}"},
        8 * _MIB,
    ),
    "a container": (
        "4:memory:/docker/abc",
        [_DOCKER],
        {"memory/memory.limit_in_bytes": f"{8 * _MIB}"},
        8 * _MIB,
    ),
}


@pytest.mark.parametrize(("own", "mounts", "files", "expected"), _LIMITS.values(), ids=_LIMITS.keys())
def test_memory_is_what_limits_leave(machine, own, mounts, files, expected):
    assert resources.find_memory(machine(own, mounts, files)) == expected


# --- GPUs ------------------------------------------------------------------------------------------

#: NVML of a machine with two GPUs
_NVML = r"""
#include <stdio.h>
struct memory { unsigned long long total, free, used; };
int nvmlInitWithFlags(unsigned flags) { return STATUS; }
int nvmlInit_v2(void) { return STATUS; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) { *gpu = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetName(void *gpu, char *name, unsigned size) {
    return snprintf(name, size, "GPU %ld", (long)gpu) < 0;
}
int nvmlDeviceGetUUID(void *gpu, char *uuid, unsigned size) {
    return snprintf(uuid, size, "GPU-%ldf-4ac1", (long)gpu) < 0;
}
int nvmlDeviceGetMemoryInfo(void *gpu, struct memory *found) {
    found->total = (long)gpu << 30;
    found->used = (long)gpu * 100 << 20;
    return MEMORY;
}
struct rates { unsigned gpu, memory; };
int nvmlDeviceGetUtilizationRates(void *gpu, struct rates *found) {
    found->gpu = (long)gpu * 25;
    return 0;
}
"""
_SMI = "#!/bin/sh\nprintf 'NVIDIA A100, 40960\\n'\n"
_BY_NVML = [
    {"name": "GPU 1", "memory_bytes": 2**30, "index": 0},
    {"name": "GPU 2", "memory_bytes": 2**31, "index": 1},
]
_BY_SMI = [{"name": "NVIDIA A100", "memory_bytes": 40960 * _MIB, "index": 0}]


@pytest.fixture
def gpus(tmp_path):
    """`gpus(nvml=0, smi=_SMI)`: what is found where NVML starts with that status, and nvidia-smi is that."""

    def find(nvml: int | None, smi: str | None, **more: str) -> list[dict[str, object]]:
        if nvml is not None:
            build_nvml(tmp_path, nvml)
        if smi is not None:
            (tmp_path / "nvidia-smi").write_text(smi)
            (tmp_path / "nvidia-smi").chmod(0o755)
        script = "import dataclasses, json; from fleet import resources\n"
        script += "print(json.dumps([dataclasses.asdict(gpu) for gpu in resources.find_gpus()]))"
        environ = {"LD_LIBRARY_PATH": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", **more}
        found: list[dict[str, object]] = json.loads(
            subprocess.check_output([sys.executable, "-c", script], env=environ)
        )
        return found

    return find


def build_nvml(folder: Path, status: int = 0, memory: int = 0) -> None:
    """A libnvidia-ml.so.1 in `folder`, for LD_LIBRARY_PATH, and what it answers to a start and for memory."""
    argv = [
        "cc",
        "-shared",
        "-fPIC",
        f"-DSTATUS={status}",
        f"-DMEMORY={memory}",
        "-x",
        "c",
        "-",
        "-o",
        str(folder / "libnvidia-ml.so.1"),
    ]
    subprocess.run(argv, input=_NVML, text=True, check=True)


@pytest.mark.needs("cc")
@pytest.mark.parametrize(
    ("nvml", "smi", "expected"),
    [
        (0, _SMI, _BY_NVML),
        (9, _SMI, _BY_SMI),  # NVML_ERROR_DRIVER_NOT_LOADED
        (None, _SMI, _BY_SMI),
        (9, "#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n", []),
        (None, "#!/bin/sh\necho No devices were found\n", []),
        (None, None, []),
    ],
    ids=["NVML", "NVML without driver", "nvidia-smi", "both fail", "no devices", "neither"],
)
def test_gpus_are_found_by_nvml_else_by_nvidia_smi(gpus, nvml, smi, expected):
    assert gpus(nvml, smi) == expected


@pytest.mark.needs("cc")
def test_a_gpu_without_memory_of_its_own_is_one(gpus, tmp_path):
    build_nvml(tmp_path, memory=3)  # NVML_ERROR_NOT_SUPPORTED
    assert gpus(None, None) == [
        {"name": f"GPU {index + 1}", "memory_bytes": 0, "index": index} for index in (0, 1)
    ]
    build_nvml(tmp_path, status=9)
    found = gpus(None, "#!/bin/sh\nprintf 'NVIDIA GB10, [N/A]\\n'\n")
    assert found == [{"name": "NVIDIA GB10", "memory_bytes": 0, "index": 0}]


_THREE = "#!/bin/sh\nprintf 'A100, 40960\\nL4, 23034\\nL4, 23034\\n'\n"


@pytest.mark.parametrize(
    ("variable", "left"),
    [("0,2", [0, 2]), (" 1 , 0", [0, 1]), ("", []), ("-1", []), ("1,-1,0", [1]), ("7", []), ("GPU-abc", [])],
)
def test_gpus_that_are_hidden_from_us_are_not_ours(gpus, variable, left):
    found = gpus(None, _THREE, CUDA_VISIBLE_DEVICES=variable)
    assert [gpu["index"] for gpu in found] == left


_WITH_UUIDS = """#!/bin/sh
case "$*" in
*uuid*) printf 'GPU-8932f937\\nGPU-8ac10b2e\\nGPU-fef8089b\\n' ;;
*) printf 'A100, 40960\\nL4, 23034\\nL4, 23034\\n' ;;
esac
"""


@pytest.mark.parametrize(
    ("variable", "left"),
    [
        ("GPU-fef8089b,GPU-8932f937", [0, 2]),
        ("GPU-8a , 2", [1, 2]),
        ("GPU-8", []),  # two begin so
        ("0,GPU-x,1", [0]),
        ("MIG-8932f937,1", []),
    ],
)
def test_gpus_may_be_named_by_their_uuids(gpus, variable, left):
    found = gpus(None, _WITH_UUIDS, CUDA_VISIBLE_DEVICES=variable)
    assert [gpu["index"] for gpu in found] == left


@pytest.mark.needs("cc")
def test_nvml_tells_uuids_too(gpus):
    assert [gpu["index"] for gpu in gpus(0, None, CUDA_VISIBLE_DEVICES="GPU-2f")] == [1]


def test_what_is_said_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(resources, "find_gpus", lambda: (Gpu("A100", 7),))
    found = resources.detect(cpus=3, memory_bytes=5, num_gpus=2)
    assert found == resources.Resources(3, 5, (Gpu("A100", 7), Gpu("unknown", 0, 1)))
    assert resources.detect(num_gpus=1).gpus == (Gpu("A100", 7),)
    monkeypatch.setattr(resources, "find_gpus", lambda: pytest.fail("asked for"))
    assert resources.detect(num_gpus=0).gpus == ()
