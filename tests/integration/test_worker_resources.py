"""What a worker tells of its host: what the kernel leaves it, its GPUs, or what it was told."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fleet.resources import cgroups, find_cpus, find_memory
from tests.conftest import fleet_script, wait_until
from tests.unit.test_resources import build_nvml

_LIMIT = 1 << 30
#: what limits a cgroup of each version: one CPU, and _LIMIT of memory
_LIMITS = {
    ("cpu", 1): {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"},
    ("cpu", 2): {"cpu.max": "100000 100000"},
    ("memory", 1): {"memory.limit_in_bytes": str(_LIMIT)},
    ("memory", 2): {"memory.max": str(_LIMIT)},
}


@pytest.fixture
def confined() -> Iterator[Callable[[str], Path | None]]:
    """`confined("cpu")`: a cgroup whose parent is limited; None where this machine limits nothing."""
    made: list[Path] = []

    def make(controller: str) -> Path | None:
        for own, mount, version in cgroups(controller):
            for parent in (own, mount):
                with suppress(OSError):
                    folder = parent / f"fleet-test-{secrets.token_hex(4)}"
                    (folder / "inner").mkdir(parents=True)
                    made.extend((folder, folder / "inner"))
                    for name, text in _LIMITS[controller, version].items():
                        (folder / name).write_text(text)
                    return folder / "inner"
        return None

    yield make
    for folder in reversed(made):
        wait_until(lambda folder=folder: not (folder / "cgroup.procs").read_text(), message="it is empty")
        folder.rmdir()


@pytest.fixture
def worker(
    spawn: Any, run_fleet: Any, fleet_redis_url: str, eventually: Any, confined: object
) -> Iterator[Callable[..., dict[str, Any]]]:
    """`worker("--slots", "2", groups=(...,))`: its row of `fleet status --json`, once it is there.

    It ends before the groups that it may be in are removed.
    """
    started = []

    def start(*options: str, groups: tuple[Path, ...] = ()) -> dict[str, Any]:
        enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in groups)
        argv = [fleet_script(), "worker", "--name", "w0", *options]
        started.append(spawn(["/bin/sh", "-c", f'{enter}exec "$@"', "sh", *argv]))
        rows = eventually(lambda: json.loads(run_fleet("status", "--json").stdout)["workers"])
        found: dict[str, Any] = rows[0]
        return found

    yield start
    for process in started:
        process.terminate()
        process.wait(60)


def test_limits_of_the_cgroup_above_are_the_workers(worker, confined):
    groups = {controller: confined(controller) for controller in ("cpu", "memory")}
    found = worker(groups=tuple(group for group in groups.values() if group))
    assert found["cpus"] == (1 if groups["cpu"] else find_cpus())
    assert found["memory_bytes"] == (_LIMIT if groups["memory"] else find_memory())
    assert (found["gpus"], found["slots"]) == ([], 1)


@pytest.mark.needs("cc")
def test_gpus_are_found_by_nvml(worker, tmp_path, monkeypatch):
    build_nvml(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert worker()["gpus"] == [
        {"name": "GPU 1", "memory_bytes": 2**30, "index": 0},
        {"name": "GPU 2", "memory_bytes": 2**31, "index": 1},
    ]


def test_what_it_is_told_outranks_what_it_finds(worker):
    found = worker("--num-cpus", "64", "--memory-gb", "0.5", "--num-gpus", "1")
    assert (found["cpus"], found["memory_bytes"]) == (64, 2**29)
    assert found["gpus"] == [{"name": "unknown", "memory_bytes": 0, "index": 0}]
