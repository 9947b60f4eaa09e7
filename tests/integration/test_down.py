"""`fleet down` amid running jobs: what it waits for, what it kills, and what an interrupt leaves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker import keys
from tests.conftest import fleet_script
from tests.integration.fleets import FAST, pids, rows, submit
from tests.integration.sshd import PYTHON, SshdFarm, fleet_processes

pytestmark = pytest.mark.needs("sshd")


@pytest.fixture
def words(farm: SshdFarm, fleet_redis_url: str, tmp_path: Path) -> Callable[..., list[Any]]:
    """The words of `fleet up`, of `fleet down`."""

    def words(verb: str, *names: str) -> list[Any]:
        file = tmp_path / "hosts.txt"
        file.write_text("".join(f"{name}\n" for name in names))
        more = [file, "--no-install", "--python", PYTHON] if verb == "up" else []
        return [verb, "--ssh-config", farm.config, *more]

    return words


@pytest.fixture
def worker(farm: SshdFarm, run_fleet: Any, words: Callable[..., list[Any]]) -> psutil.Process:
    """The worker of host1."""
    farm.add("host1")
    patient = {**FAST, "FLEET_WORKER__STOP_GRACE_SECONDS": "100"}
    up = run_fleet(*words("up", "host1"), "--json", env=patient)
    assert up.returncode == 0, up.stderr
    return psutil.Process(pids(rows(up))["host1-0"])


@pytest.fixture
def job(worker: psutil.Process, farm: SshdFarm, redis_client: Any, eventually: Any) -> Iterator[str]:
    """A job that runs until `farm.folder/go` is there."""
    go, up = farm.folder / "go", farm.folder / "job"
    job = submit(redis_client, f"touch {up}; until [ -e {go} ]; do sleep 0.05; done")
    eventually(up.exists)
    return job


class Down:
    """`fleet down` under way."""

    def __init__(self, spawn: Any, folder: Path, *words: Any) -> None:
        self.out, self.err = folder / "down.out", folder / "down.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            argv = [fleet_script(), *words]
            self.process = spawn(argv, stdout=out, stderr=err, env={**os.environ, **FAST})

    def said(self, code: int) -> list[str]:
        """Its lines, once it has ended with that code."""
        assert self.process.wait(timeout=60) == code, self.err.read_text()
        assert "Traceback" not in self.err.read_text(), self.err.read_text()
        return self.out.read_text().splitlines()


def state(run_fleet: Any) -> str:
    (worker,) = json.loads(run_fleet("status", "--json").stdout)["workers"]
    return str(worker["state"])


def test_within_the_grace_running_jobs_end_and_the_worker_is_seen_draining(
    job, worker, farm, words, spawn, tmp_path, run_fleet, redis_client, eventually
):
    down = Down(spawn, tmp_path, *words("down"), "--grace", "100")
    eventually(lambda: state(run_fleet) == "draining")
    waiting = submit(redis_client, "true")
    (farm.folder / "go").touch()
    assert down.said(0) == [f"host1  stopped: host1-0 (pid {worker.pid})"]
    assert redis_client.hget(keys.job(job), "status") == b"finished"
    assert redis_client.hget(keys.job(waiting), "status") == b"queued", "it took nothing new"
    eventually(lambda: fleet_processes(farm.folder) == [])


def test_a_worker_that_is_frozen_is_killed_with_all_that_it_started(job, worker, farm, words, run_fleet):
    worker.suspend()
    done = run_fleet(*words("down"), "--grace", "0.5", env=FAST)
    assert (done.returncode, done.stdout) == (0, f"host1  stopped: host1-0 (killed, pid {worker.pid})\n")
    assert fleet_processes(farm.folder) == []


def test_an_interrupt_tells_who_was_being_stopped_and_that_goes_on_by_itself(
    job, worker, farm, words, spawn, tmp_path, eventually, run_fleet, is_alive
):
    farm.add("host2").freeze()
    assert run_fleet("hosts", "add", "host2").returncode == 0
    down = Down(spawn, tmp_path, *words("down"), "--grace", "100")
    eventually(lambda: state(run_fleet) == "draining")
    down.process.send_signal(signal.SIGINT)
    assert down.said(130) == ["host1  unconfirmed (was being stopped)", "host2  untouched (interrupted)"]
    (farm.folder / "go").touch()
    eventually(lambda: not is_alive(worker.pid))
    farm.hosts["host2"].thaw()
    again = run_fleet(*words("down"), "--json", env=FAST)
    assert [row["outcome"] for row in rows(again).values()] == ["not running", "not running"]


def test_a_host_that_is_away_is_said_to_be_and_what_runs_there_not_to_have_ended(
    worker, farm, words, run_fleet
):
    farm.hosts["host1"].stop()
    done = run_fleet(*words("down"), env=FAST)
    assert done.returncode == 1
    assert "refused the connection" in done.stdout
    assert "What runs on host1 runs on." in done.stdout
    assert worker.is_running()
    farm.hosts["host1"].start()
    assert run_fleet(*words("down"), "--force", env=FAST).returncode == 0
