"""What a job used: measured, kept on its hash, and shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
import rq

from broker import keys
from broker.usage import Usage, from_json
from broker.work import Claim, End

_MIB = 2**20
#: takes memory, and a second or so of CPU time
_HUNGRY = "x = bytearray(200 * 2**20)\nimport time\nwhile time.process_time() < 0.5: pass"


@pytest.fixture
def queue(workers):
    return rq.Queue("default", connection=workers.client)


def _usage(workers: Any, job_id: str) -> Usage:
    (job,) = workers.wait([job_id])
    assert job.usage is not None, job
    return job.usage


def test_of_a_command_and_of_what_it_waits_for(workers):
    workers.start("w0")
    job = workers.submit("sh", "-c", f"python3 -c '{_HUNGRY}'; true")
    usage = _usage(workers, job)
    assert 0.5 <= (usage.cpu_seconds or 0) < 30
    assert 200 * _MIB <= (usage.memory_bytes or 0) < 400 * _MIB


def test_what_the_worker_has_is_not_put_down_to_a_small_command(workers):
    """Until a child becomes another program it runs in the worker's memory."""
    workers.start("w0", slots=2)
    small = workers.submit("true")
    long = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    within = "import time; x = bytearray(20 * 2**20); time.sleep(5)"
    seen = workers.submit("python3", "-c", long, within)
    assert _usage(workers, small).memory_bytes is None
    assert (_usage(workers, small).cpu_seconds or 0) > 0
    assert 20 * _MIB <= (_usage(workers, seen).memory_bytes or 0) < 45 * _MIB


def test_of_one_that_fails_and_of_the_last_attempt_alone(workers, tmp_path):
    workers.start("w0")
    script = f"test -e {tmp_path}/mark && exit 0; touch {tmp_path}/mark; python3 -c '{_HUNGRY}'; exit 3"
    failed = workers.submit("sh", "-c", script.replace("mark", "other"))
    again = workers.submit("sh", "-c", script, retries=1, retry_delay_seconds=0)
    assert (_usage(workers, failed).memory_bytes or 0) >= 200 * _MIB
    assert (_usage(workers, again).memory_bytes or 0) < 200 * _MIB


@pytest.mark.parametrize("executor", ["warm", "fork"])
def test_of_a_function(workers, queue, executor):
    workers.start("w0", executor=executor)
    hungry, idle = (queue.enqueue("rq_jobs.use", size * _MIB, 0.3) for size in (200, 1))
    assert 0.3 <= (_usage(workers, hungry.id).cpu_seconds or 0) < 30
    assert 200 * _MIB <= (_usage(workers, hungry.id).memory_bytes or 0) < 400 * _MIB
    least = _usage(workers, idle.id).memory_bytes
    # a process that had more before tells nothing of this one
    assert least is None if executor == "warm" else 0 < (least or 0) < 200 * _MIB


def test_of_a_function_that_kills_its_process(workers, queue):
    workers.start("w0", executor="fork")
    job = queue.enqueue("rq_jobs.use", 200 * _MIB, 0.3, 9)
    assert (_usage(workers, job.id).memory_bytes or 0) >= 200 * _MIB


def test_it_is_shown(workers, run_fleet, fleet_redis_url):
    job = workers.submit("true")
    assert json.loads(run_fleet("show", "--json", job).stdout)["usage"] is None
    workers.start("w0")
    workers.wait([job])
    found = json.loads(run_fleet("show", "--json", job).stdout)["usage"]
    assert found.keys() == set(Usage._fields)
    assert 0 <= found["cpu_seconds"] < 10
    workers.client.hset(keys.job(job), "fleet_usage", Usage(1.5, 300 * _MIB, 2**31).to_json())
    text = run_fleet("show", job).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("Used:")]
    assert line.split(":")[1].strip() == "1.5s of CPU, 300 MiB of memory, 2.0 GiB of GPU memory"


_ALL = Usage(1.5, 2**30, 7, 2**20, 3, 0, 2**40, 0.123)


@pytest.mark.parametrize(
    "usage", [Usage(), Usage(0.25), Usage(1e-7, 1), Usage(3, 2**40, 7), Usage(None, 5), _ALL]
)
def test_it_is_read_as_it_was_written(usage):
    rounded = None if usage.cpu_seconds is None else round(usage.cpu_seconds, 6)
    assert from_json(usage.to_json()) == usage._replace(cpu_seconds=rounded)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x":1}', '{"cpu_seconds":"1"}', '{"memory_bytes":-1}'])
def test_damage_is_none(text):
    assert from_json(text) is None


def test_an_end_without_it_says_nothing():
    end = End(Claim("j", "q", "1:x", {}), "lost")
    assert end.arguments()[-1] == ""
