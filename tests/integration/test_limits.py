"""What a job was given is what it is held to: CPUs, memory, GPUs; commands and functions."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import rq

from broker import Queue, jobs, keys
from broker.command import Command
from broker.requirements import parse
from broker.submit import Options, submit_commands
from fleet import cgroup
from fleet.resources import cgroups, cpu_ids
from tests.unit.test_resources import build_nvml

_MIB = 2**20
_CPUS = cpu_ids()
#: takes 300 MiB, a little at a time, and would live on
_HOG = """
import time
held = []
for _ in range(60):
    held.append(b"x" * (5 * 2**20))
    time.sleep(0.02)
time.sleep(60)
"""
#: a worker that sees no cgroups, and must watch; who is not root sees none that are theirs to make
_HIDING = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
_NO_CGROUPS: dict[str, Any] = (
    {"prefix": ("unshare", "-m", "sh", "-c", _HIDING, "sh")} if os.geteuid() == 0 else {}
)


@pytest.fixture
def ask(workers) -> Callable[..., str]:
    """`ask(["true"], cpus=1)`: a command that asks for something; its job's id."""

    def submit(argv: list[str], env: dict[str, str] | None = None, **said: Any) -> str:
        command = Command(tuple(argv), env or {})
        options = Options(requirements=parse(said))
        return submit_commands(workers.client, "default", [(None, command)], options)[0]

    return submit


def _can_make_cgroups() -> bool:
    groups = cgroup.prepared()
    if groups:
        groups.close()
    return groups is not None


@pytest.fixture
def call(workers) -> Callable[..., str]:
    """`call("rq_jobs.add", 1, 2, cpus=1)`: a function that asks for something; its job's id."""

    def submit(name: str, *args: Any, **said: Any) -> str:
        job: rq.job.Job = Queue("default", connection=workers.client, **said).enqueue(name, *args)
        return str(job.id)

    return submit


@pytest.fixture(params=["watched", "cgroup"])
def kept(request) -> dict[str, Any]:
    """How limits of memory are kept, as what to start a worker with."""
    if request.param == "watched":
        return _NO_CGROUPS
    return {} if _can_make_cgroups() else _without_cgroups()


def _without_cgroups() -> dict[str, Any]:
    """Root has them, but for a container that shows none: there limits are watched."""
    if os.geteuid() != 0:
        pytest.skip("may not make a cgroup with a limit of memory")
    return _NO_CGROUPS


def _output(workers: Any, job_id: str) -> str:
    (job,) = workers.wait([job_id])
    assert job.state == "finished", (job.reason, job.result)
    text: str = jobs.output(workers.client, job_id).stdout.decode()
    return text


# --- CPUs ------------------------------------------------------------------------------------------

_AFFINITY = [sys.executable, "-c", "import os; print(*sorted(os.sched_getaffinity(0)))"]


def test_jobs_are_bound_to_cpus_of_their_own(workers, ask, tmp_path):
    """Each of several that run at once has one that no other has."""
    workers.start("w0", slots=len(_CPUS), labels={"a": "b"})
    gate = tmp_path / "gate"
    script = f"taskset -cp $$ | sed 's/.*: //'; until test -e {gate}; do sleep 0.05; done"
    bound = [ask(["sh", "-c", script], cpus=1) for _ in _CPUS]
    workers.until(lambda: all(workers.state(job) == "started" for job in bound), "all run")
    gate.touch()
    found = [_output(workers, job).split() for job in bound]
    assert sorted(found) == [[str(cpu)] for cpu in sorted(_CPUS)]
    plain = workers.submit(*_AFFINITY)
    assert _output(workers, plain).split() == [str(cpu) for cpu in _CPUS]


def test_a_function_is_bound_too_and_its_process_is_not_used_again(workers, call, ask):
    workers.start("w0")
    first, second = (call("rq_jobs.where_am_i", cpus=1) for _ in range(2))
    workers.wait([first, second])
    plain = rq.Queue("default", connection=workers.client).enqueue("rq_jobs.where_am_i")
    workers.wait([plain.id])
    found = [jobs.show(workers.client, job).result for job in (first, second, plain.id)]
    assert [len(one["cpus"]) for one in found] == [1, 1, len(_CPUS)]
    assert len({one["pid"] for one in found}) == 3
    assert found[0]["FLEET_CPUS"] == "1"
    assert found[2]["FLEET_CPUS"] is None


@pytest.mark.parametrize(("cpus", "nicer"), [(0.5, 3), (0.1, 10), (1, 0)])
def test_a_part_of_a_cpu_yields_in_proportion(workers, ask, call, cpus, nicer):
    nice = os.nice(0) + nicer
    workers.start("w0", resources={"cpus": 2})
    assert _output(workers, ask(["nice"], cpus=cpus)).strip() == str(nice)
    both = ask(["nice"], cpus=cpus, memory="50M")
    assert _output(workers, both).strip() == str(nice)
    function = call("rq_jobs.where_am_i", cpus=cpus)
    workers.wait([function])
    assert jobs.show(workers.client, function).result["nice"] == nice


def test_what_it_was_given_is_in_its_environment(workers, ask):
    workers.start("w0", resources={"cpus": 1, "memory_bytes": 2**30, "num_gpus": 2})
    said = {"cpus": 1, "memory": "200M", "gpus": 1}
    env = {"FLEET_CPUS": "9", "CUDA_VISIBLE_DEVICES": "7"}
    found = dict(line.split("=", 1) for line in _output(workers, ask(["env"], env, **said)).splitlines())
    assert (found["FLEET_CPUS"], found["FLEET_MEMORY_BYTES"]) == ("1", str(200 * _MIB))
    assert (found["FLEET_GPUS"], found["CUDA_VISIBLE_DEVICES"], found["ROCR_VISIBLE_DEVICES"]) == (
        "1",
        "0",
        "0",
    )
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    plain = _output(workers, workers.submit("env"))
    assert not [line for line in plain.splitlines() if "VISIBLE_DEVICES" in line or "FLEET_MEMORY" in line]


# --- memory ----------------------------------------------------------------------------------------


def _assert_out_of_memory(workers: Any, job_id: str, limit_mib: int) -> jobs.JobView:
    (job,) = workers.wait([job_id])
    found = jobs.show(workers.client, job.id)
    assert (found.state, (found.reason or "").split(":")[0]) == ("failed", "OutOfMemory"), found
    assert f"its limit is {limit_mib} MiB" in (found.reason or "")
    assert found.usage is not None
    assert (found.usage.memory_bytes or 0) >= limit_mib * _MIB * 0.9
    return found


def test_a_command_with_more_memory_than_it_asked_for_is_killed(workers, ask, kept):
    workers.start("w0", **kept)
    hog = ask([sys.executable, "-c", _HOG], memory="100M")
    _assert_out_of_memory(workers, hog, 100)
    modest = ask([sys.executable, "-c", "x = b'x' * (60 * 2**20); print(len(x))"], memory="100M")
    assert _output(workers, modest).strip() == str(60 * _MIB)


def test_so_is_one_whose_children_have_it_together(workers, ask, kept):
    workers.start("w0", **kept)
    half = _HOG.replace("range(60)", "range(16)")  # 80 MiB, and there are two
    script = f"""
import subprocess, sys, time
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", {half!r}], start_new_session=True)
time.sleep(60)
"""
    _assert_out_of_memory(workers, ask([sys.executable, "-c", script], memory="120M"), 120)


def test_a_function_with_more_memory_than_it_asked_for_is_killed(workers, call, kept):
    workers.start("w0", **kept)
    hog = call("rq_jobs.hoard", 300, memory="150M")
    again = call("rq_jobs.add", 1, 2, memory="150M")
    _assert_out_of_memory(workers, hog, 150)
    (job,) = workers.wait([again])
    assert jobs.show(workers.client, job.id).result == 3


def test_a_leap_beyond_all_bounds_is_refused_where_there_are_no_cgroups(workers, ask, call):
    workers.start("w0", **_NO_CGROUPS)
    leap = ask([sys.executable, "-c", "x = bytearray(4 * 2**30)"], memory="100M")
    found = _assert_reason(workers, leap)
    assert "its last words: MemoryError" in found
    assert "its limit is 100 MiB" in _assert_reason(workers, call("rq_jobs.use", 4 * 2**30, 0, memory="100M"))


def _assert_reason(workers: Any, job_id: str) -> str:
    (job,) = workers.wait([job_id])
    reason = job.reason or ""
    assert (job.state, reason.split(":")[0]) == ("failed", "OutOfMemory"), job
    return reason


def test_cgroups_are_removed_also_those_of_a_worker_that_died(workers, ask):
    if not _can_make_cgroups():
        _without_cgroups()
        return
    first = workers.start("w0")
    job = ask(["sleep", "600"], memory="100M")
    workers.until(lambda: workers.state(job) == "started", "it runs")
    workers.until(lambda: list(_groups(first.pid)), "it has a cgroup")
    workers.kill(first)
    workers.until(lambda: not _members(first.pid), "its job has ended, too")
    second = workers.start("w1")
    quick = ask(["true"], memory="100M")
    workers.wait([quick])
    assert not list(_groups(first.pid))
    second.terminate()
    second.wait(60)
    workers.until(lambda: not list(_groups(second.pid)), "none is left")


def _members(pid: int) -> list[str]:
    """The processes in the cgroups of that worker's jobs."""
    found = []
    for group in _groups(pid):
        for file in group.rglob("cgroup.procs"):
            with suppress(OSError):
                found += file.read_text().split()
    return found


def _groups(pid: int) -> Iterator[Path]:
    for own, _, _ in cgroups("memory"):
        yield from own.glob(f"rq-fleet.{pid}.*")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("nowhere-to-be-found", "command not found: nowhere-to-be-found"),
        ("/etc/nowhere", "command not found: /etc/nowhere"),
        ("/etc/passwd", "not executable: /etc/passwd"),
    ],
)
def test_what_is_no_program_is_told_as_ever(workers, ask, kept, program, reason):
    workers.start("w0", **kept)
    (job,) = workers.wait([ask([program], memory="100M")])
    assert (job.state, job.reason) == ("failed", reason)


# --- GPUs ------------------------------------------------------------------------------------------


@pytest.mark.needs("cc")
def test_gpus_are_the_jobs_alone_by_index_and_their_memory_is_told(workers, ask, tmp_path, monkeypatch):
    build_nvml(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    workers.start("w0", slots=4)
    gate = tmp_path / "gate"
    script = f"echo $CUDA_VISIBLE_DEVICES $FLEET_GPUS; until test -e {gate}; do sleep 0.05; done"
    two = [ask(["sh", "-c", script], gpus=1) for _ in range(2)]
    workers.until(lambda: all(workers.state(job) == "started" for job in two), "both run")
    workers.until(lambda: all(jobs.output(workers.client, job).stdout for job in two), "both have told")
    third = ask(["sh", "-c", script], gpus=1)
    gate.touch()
    assert sorted(_output(workers, job).split() for job in two) == [["0", "1"], ["1", "1"]]
    assert _output(workers, third).split()[1] == "1"
    halves = [ask(["sh", "-c", script], gpus=0.5) for _ in range(2)]
    assert {_output(workers, job).split()[1] for job in halves} == {"0.5"}


@pytest.mark.needs("cc")
def test_the_memory_taken_on_its_gpus_is_recorded(workers, ask, tmp_path, monkeypatch):
    build_nvml(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    workers.start("w0")
    job = ask(["sleep", "4"], gpus=2)
    workers.wait([job])
    usage = jobs.show(workers.client, job).usage
    assert usage is not None
    assert usage.gpu_memory_bytes == 300 * _MIB  # 100 on the first, 200 on the second


def test_gpus_known_by_nvidia_smi_alone_are_given_too(workers, ask, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'L4, 23034\\nL4, 23034\\nL4, 23034\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    workers.start("w0")
    found = _output(workers, ask(["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"], gpus=2))
    assert found.strip() == "1,2"
    record = json.loads(workers.client.get(keys.worker_record("w0")))
    assert [gpu["index"] for gpu in record["gpus"]] == [1, 2]
    assert record["labels"]["gpu_name"] == "L4"


def test_of_unlike_gpus_a_job_gets_such_as_it_asked_for(workers, ask, tmp_path, monkeypatch):
    """The T4 comes first where any will do: it has least memory."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'A100, 40960\\nT4, 15360\\nA100, 40960\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    workers.start("w0", slots=1)
    tell = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    asked = [[], ["gpu_name=A1*"], ["gpu_name!=T4"], ["gpu_name=T4"]]
    given = [_output(workers, ask(tell, gpus=1, labels=labels)).strip() for labels in asked]
    assert given == ["1", "0", "0", "1"]
    assert _output(workers, ask(tell, gpus=2, labels=["gpu_name=A100"])).strip() == "0,2"


# --- fleet status ----------------------------------------------------------------------------------


def test_what_is_promised_and_what_there_is_are_shown(workers, ask, run_fleet, fleet_redis_url):
    said = {"cpus": 4, "memory_bytes": 8 << 30, "num_gpus": 2}
    workers.start("w0", slots=4, resources=said, labels={"zone": "a"})
    job = ask(["sleep", "600"], cpus=1.5, memory="2G", gpus=0.5)
    workers.until(lambda: workers.state(job) == "started", "it runs")

    def shown() -> list[str]:
        return [line for line in run_fleet("status").stdout.splitlines() if line.startswith("w0")]

    workers.until(lambda: "1.5/4  2.0/8.0 GiB  0.5/2x unknown " in shown()[0], "it is told")
    (worker,) = json.loads(run_fleet("status", "--json").stdout)["workers"]
    assert worker["free"]["slots"] == 3
    assert (worker["free"]["cpus"], worker["free"]["memory_bytes"]) == (2.5, 6 << 30)
    assert sorted(worker["free"]["gpus"]) == [0.5, 1]
