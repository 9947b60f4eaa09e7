"""What is made of what processes and hosts have used so far."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from broker.usage import Usage, from_json
from fleet import meters
from fleet.meters import HostMeter, JobMeter
from fleet.processes import Process, Table
from fleet.resources import GpuUse

_MIB = 2**20


@pytest.fixture
def disk(monkeypatch):
    """Number of a process -> bytes that it read and wrote."""
    counts: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(meters.processes, "disk_bytes", lambda pid: counts.get(pid, (0, 0)))
    return counts


def _process(mib: int, cpu_seconds: float) -> Process:
    return Process(1, 2, 3.0, mib * _MIB, cpu_seconds)


def test_a_job_is_measured_from_its_beginning(disk):
    meter = JobMeter(began=100.0)
    disk[10] = (1000, 0)
    first = meter.read(104.0, {10: _process(3, 2.0)}, [])
    assert first == (0.5, 3 * _MIB, 1, 250.0, 0.0, None, None)
    disk[10] = (1000, 500)
    second = meter.read(109.0, {10: _process(5, 7.0)}, [GpuUse(0, 0.5, 7), GpuUse(3, None, 8)])
    assert second == (1.0, 5 * _MIB, 1, 0.0, 100.0, 0.5, 15)
    used = meter.added(Usage(7.5, 6 * _MIB))
    assert used == Usage(7.5, 6 * _MIB, None, 4 * _MIB, 1, 1000, 500, 0.5)
    assert from_json(used.to_json()) == used
    assert meter.added(Usage(7.5)).memory_bytes == 5 * _MIB


def test_a_process_that_has_gone_takes_nothing_back(disk):
    meter = JobMeter(began=0.0)
    disk |= {10: (100, 100), 11: (700, 0)}
    meter.read(1.0, {10: _process(1, 1.0), 11: _process(1, 4.0)}, [])
    disk[10] = (150, 100)
    assert meter.read(2.0, {10: _process(1, 2.0)}, [])[0] == 0.0
    assert meter.added(Usage())[4:7] == (2, 800, 100)


def test_what_a_process_used_before_its_job_is_not_the_jobs(disk):
    meter = JobMeter(began=None)
    disk[10] = (100, 100)
    assert meter.read(1.0, {10: _process(64, 30.0)}, [])[:4] == (None, 64 * _MIB, 1, None)
    assert meter.read(3.0, {10: _process(64, 31.0)}, [])[:4] == (0.5, 64 * _MIB, 1, 0.0)
    assert meter.added(Usage(0.7)) == Usage(0.7, None, None, 64 * _MIB, 1, 0, 0, None)


def test_who_was_never_sampled_has_no_more_than_before():
    assert JobMeter(0.0).added(Usage(1.0, 2)) == Usage(1.0, 2)


def test_of_several_processes_what_they_share_counts_once():
    script = "import os; x = b'x' * (64 * 2**20); os.fork(); print(flush=True); input()"
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as child:
        assert child.stdout
        child.stdout.readline()
        child.stdout.readline()
        sample = JobMeter(0.0).read(1.0, Table().family(child.pid, {}), [])
        os.killpg(child.pid, 9)
    assert sample.processes == 2
    assert 64 * _MIB < sample.memory_bytes < 110 * _MIB


def test_a_host_is_read_by_one_of_its_workers_until_that_has_gone(tmp_path):
    first, second = HostMeter(tmp_path / "lock"), HostMeter(tmp_path / "lock")
    assert first.read(1.0) is None, "nothing is known of the time before"
    assert second.read(1.0) is None
    sample = first.read(2.0)
    assert sample is not None
    assert sample.cpus >= 0
    assert 0 < sample.memory_bytes < psutil.virtual_memory().total
    assert second.read(2.0) is None
    first.close()
    assert second.read(3.0) is None
    assert second.read(4.0) is not None
    second.close()
