"""A worker's start: told to stop in the middle of it, and under a name that was another's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker import keys
from fleet import jitter
from tests.integration.conftest import Workers
from tests.integration.test_worker import appending, lines, runs, waiting_for

__all__ = ["runs"]


@pytest.mark.parametrize("part", range(3))
def test_sigterm_at_any_moment_of_the_start_leaves_no_key_and_no_process(workers: Workers, part: int) -> None:
    dice = random.Random(part)
    for number in range(10):
        name = f"w{part}-{number}"
        worker = workers.start(name, wait=False)
        time.sleep(0.08 * number + dice.uniform(0, 0.08))  # the moment is what is tested
        worker.terminate()
        try:
            worker.wait(60)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it goes on: {workers.log(name)}")
        assert worker.returncode == 0 or nothing_had_begun(worker, workers.log(name)), workers.log(name)
        assert [key for key in workers.client.scan_iter("*") if name.encode() in key] == []
        assert workers.client.smembers(keys.WORKERS) == set()
        assert "Traceback" not in workers.log(name)
        workers.until(lambda worker=worker: not sidecars_of(worker), "its sidecar is gone")


def sidecars_of(worker: subprocess.Popen[Any]) -> list[psutil.Process]:
    """Those whose command line names the worker."""
    commands = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [
        process
        for process, words in commands
        if "sidecar_main.py" in " ".join(words) and str(worker.pid) in words
    ]


def nothing_had_begun(worker: subprocess.Popen[Any], log: str) -> bool:
    """Whether Python itself was still starting: nobody can hear a signal then."""
    return worker.returncode == -signal.SIGTERM and log == ""


def test_sigterm_while_it_waits_for_its_name_ends_it(workers: Workers, tmp_path: Path) -> None:
    slow = {"heartbeat_seconds": 50, "lease_seconds": 100}
    workers.start("w0", settings=slow)
    here = workers.start("w0", wait=False, settings=slow, output_dir=str(tmp_path / "elsewhere"))
    workers.until(lambda: "waiting whether it still beats" in workers.log("w0"), "it waits")
    here.terminate()
    assert here.wait(60) == 0
    assert workers.is_beating("w0"), "the name is left to whom it belongs"


def test_sigterm_while_redis_does_not_answer_ends_a_start(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any]
) -> None:
    server = own_redis()
    workers = workers_of(server.url)
    psutil.Process(server.pid).suspend()
    worker = workers.start("w0", wait=False)
    workers.until(lambda: psutil.Process(worker.pid).net_connections("tcp"), "it has connected")
    worker.terminate()
    assert worker.wait(60) == 0
    psutil.Process(server.pid).resume()
    assert not workers.is_beating("w0")


def test_a_burst_worker_first_hands_on_what_an_earlier_life_of_its_name_held(
    workers: Workers, tmp_path: Path, runs: Path
) -> None:
    gate = tmp_path / "gate"
    job = workers.submit(*appending(runs, "x", f"[ $(wc -l < {runs}) -gt 1 ] || {waiting_for(gate)}"))
    first = workers.start("w0", settings={"heartbeat_seconds": 100, "lease_seconds": 1000})
    workers.until(lambda: lines(runs), "it runs")
    workers.kill(first)
    burst = workers.start("w0", burst=True, wait=False)
    assert burst.wait(60) == 0
    assert workers.state(job) == "finished"
    workers.assert_clean()


def test_an_executors_interpreter_is_tried_once_and_again_when_it_is_another(
    workers: Workers, tmp_path: Path
) -> None:
    tried, python = tmp_path / "tried", tmp_path / "python"

    def make(then: str) -> None:
        python.write_text(f"#!/bin/sh\necho x >> {tried}\n{then}\n")
        python.chmod(0o755)

    def start() -> int | None:
        worker = workers.start("w0", wait=False, burst=True, executor_python=str(python))
        return worker.wait(60)

    make("exit 0")
    assert [start(), start()] == [0, 0]
    assert lines(tried) == ["x"]
    make("echo 'no module named rq' >&2; exit 1")
    os.utime(python, (1, 1))  # however fast the disk's clock ticks
    assert [start(), start()] == [2, 2], "what was found bad is not remembered"
    assert lines(tried) == ["x"] * 3
    assert "cannot import rq: no module named rq" in workers.log("w0")


def test_a_worker_begins_at_its_own_moment_of_the_window(workers: Workers) -> None:
    workers.start("w4", startup_delay_seconds=2.0)
    assert "starting in 0.766 s" in workers.log("w4"), "2 s x the hash of here, w4: tests/unit/test_jitter.py"


def test_in_a_job_of_slurm_its_moment_is_that_of_its_place_there(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "4711", "NODEID": "2", "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    workers.start("w4", startup_delay_seconds=1.0)
    expected = jitter.delay_seconds(1.0, "here", "w4", "4711", "2", "1")
    assert f"starting in {expected:.3f} s" in workers.log("w4")


def test_sigterm_ends_the_wait_for_its_moment_at_once(workers: Workers) -> None:
    worker = workers.start("w4", startup_delay_seconds=1000.0, wait=False)
    workers.until(lambda: "starting in 383.021 s" in workers.log("w4"), "it waits")
    worker.terminate()
    assert worker.wait(60) == 0
    assert not list(workers.client.scan_iter("*w4*"))


def test_a_signal_that_python_drops_leaves_no_traceback() -> None:
    script = """
import os, signal, weakref
from fleet.signals import StopSignals
signals = StopSignals().install()
class Thing: pass
thing = Thing()
told = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM) or [None for _ in range(1000)])
del thing
signals.hold()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_removes_what_long_forgotten_jobs_left_where_its_fleet_works_alone(workers: Workers) -> None:
    worker, work = workers.start("w0"), workers.folder / "work"
    workers.until(lambda: workers.client.exists(keys.FLEET_ID), "the fleet has a name")
    fleet = workers.client.get(keys.FLEET_ID).decode()
    workers.until(lambda: fleet in (work / "jobs/.rq-fleet").read_text(), "the fleet is noted")
    workers.kill(worker, signal.SIGTERM)
    assert worker.wait(60) == 0
    old, mine = work / "jobs/old", work / "jobs/my letters"
    for path in (old, mine):
        path.mkdir()
        os.utime(path, (0, 0))
    workers.start("w1")
    workers.until(lambda: not old.exists(), "it was pruned")
    assert mine.exists()
