"""What real workers keep of what their jobs and their host use."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import rq

from broker.command import Command
from broker.requirements import parse
from broker.submit import Options, submit_commands
from fleet import series
from tests.unit.test_resources import build_nvml

_MIB = 2**20
_OFTEN = {"sample_seconds": 0.2}
#: takes memory, writes and then waits for a file, with another process beside
_BUSY = """
import os, subprocess, sys, time
other = subprocess.Popen(["sleep", "600"])
x = bytearray(80 * 2**20)
file = open("data", "wb")
file.write(os.urandom(4 << 20))
file.flush()
os.fsync(file.fileno())
while not os.path.exists(sys.argv[1]):
    until = time.monotonic() + 0.02
    while time.monotonic() < until: pass
    time.sleep(0.02)
other.kill()
"""


def read(folder: Path, query: str, worker: str = "") -> list[Any]:
    """The rows of all series below a folder, or of one worker's."""
    found: list[Any] = []
    for path in series.files(folder):
        if path.name.startswith(worker):
            with series.opened(path) as database:
                found += database.execute(query).fetchall()
    return found


_SAMPLES = (
    "SELECT job, fence, cpus, memory_bytes, processes, write_rate FROM jobs JOIN attempts ON attempt = id"
)


def test_a_command_has_samples_and_a_summary(workers, tmp_path, run_fleet, fleet_redis_url):
    workers.start("w0", settings=_OFTEN, slots=2)
    job = workers.submit("python3", "-c", _BUSY, str(tmp_path / "go"))
    rows = workers.until(lambda: len(found := read(workers.folder, _SAMPLES)) > 5 and found)
    (tmp_path / "go").touch()
    (view,) = workers.wait([job])
    assert {(row[0], row[1]) for row in rows} == {(job, view.attempts[-1].fence)}
    assert max(row[3] for row in rows) > 80 * _MIB
    assert {row[4] for row in rows} >= {2}
    assert 0.05 < max(row[2] for row in rows) < 4
    assert max(row[5] for row in rows) > 0
    usage = view.usage
    assert usage is not None
    assert 20 * _MIB < usage.mean_memory_bytes <= usage.memory_bytes < 200 * _MIB
    assert usage.processes == 2
    assert usage.written_bytes >= 4 * _MIB
    shown = run_fleet("show", job).stdout
    assert "2 processes" in shown
    assert "MiB of memory (mean " in shown
    assert "MiB written" in shown
    document = json.loads(run_fleet("show", "--json", job).stdout)["usage"]
    assert document["mean_memory_bytes"] == usage.mean_memory_bytes


@pytest.mark.parametrize("executor", ["warm", "fork"])
def test_a_function_has_samples(workers, executor):
    workers.start("w0", settings=_OFTEN, executor=executor)
    job = rq.Queue("default", connection=workers.client).enqueue("rq_jobs.use", 60 * _MIB, 1.2)
    (view,) = workers.wait([job.id])
    assert view.usage is not None
    assert view.usage.processes == 1
    assert view.usage.mean_memory_bytes > 20 * _MIB
    workers.until(lambda: read(workers.folder, _SAMPLES) or None, "it is written")


def test_of_two_workers_on_a_host_one_notes_the_host_and_the_other_goes_on_with_it(workers):
    first = workers.start("w0", settings=_OFTEN)
    workers.until(lambda: read(workers.folder, "SELECT * FROM hosts", "w0"))
    workers.start("w1", settings=_OFTEN)
    ((cpus, memory, at),) = read(
        workers.folder, "SELECT cpus, memory_bytes, at FROM hosts ORDER BY at LIMIT 1", "w0"
    )
    assert 0 <= cpus <= os.cpu_count() + 1
    assert 0 < memory < psutil.virtual_memory().total
    assert abs(at - time.time()) < 120
    assert read(workers.folder, "SELECT * FROM hosts", "w1") == []
    workers.kill(first)
    workers.until(lambda: read(workers.folder, "SELECT * FROM hosts", "w1"))


def test_where_it_is_off_nothing_is_kept(workers, tmp_path):
    workers.start("w0", settings={"sample_seconds": 0})
    job = workers.submit("sleep", "1.2")
    (view,) = workers.wait([job])
    assert view.usage is not None
    assert view.usage.mean_memory_bytes is None
    assert list(series.files(workers.folder)) == []


@pytest.mark.needs("cc")
def test_what_the_gpus_of_a_job_did_is_noted(workers, tmp_path, monkeypatch):
    build_nvml(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    workers.start("w0", settings=_OFTEN)
    asked = Options(requirements=parse({"gpus": 1}))
    (job,) = submit_commands(workers.client, "default", [(None, Command(("sleep", "2")))], asked)
    (view,) = workers.wait([job])
    assert view.usage is not None
    assert (view.usage.gpu_use, view.usage.gpu_memory_bytes) == (0.25, 100 * _MIB)
    found = workers.until(lambda: read(workers.folder, "SELECT DISTINCT gpu, use, memory_bytes FROM gpus"))
    assert sorted(found) == [(0, 0.25, 100 * _MIB), (1, 0.5, 200 * _MIB)]


def _cpu_of_threads(process: subprocess.Popen[Any]) -> float:
    """CPU seconds of a worker itself, not of what it started."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def test_looking_costs_next_to_nothing(workers, tmp_path):
    """Of eight jobs, each with two processes; a generous bound, for the machine may be busy."""
    worker = workers.start("w0", slots=8, settings=_OFTEN)
    script = f"while [ ! -e {tmp_path}/go ]; do sleep 0.5; done"
    ids = workers.submit_many([("sh", "-c", script)] * 8)
    workers.until(lambda: len(set(read(workers.folder, "SELECT job FROM attempts"))) == 8)
    before, began = _cpu_of_threads(worker), time.monotonic()
    count = len(read(workers.folder, _SAMPLES))
    workers.until(lambda: len(read(workers.folder, _SAMPLES)) > count)
    share = (_cpu_of_threads(worker) - before) / (time.monotonic() - began)
    # many times as often as by default, and what else the worker does
    assert share < 0.2, f"{share:.1%} of a CPU"
    (tmp_path / "go").touch()
    workers.wait(ids)
