"""The version gate, and `fleet up --upgrade`, with real workers of other versions."""

from __future__ import annotations

import json
import os
import threading
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker import __version__, jobs, keys
from tests.conftest import fleet_script
from tests.integration.fleets import FAST, beating, pids, python_with, rows, submit
from tests.integration.sshd import PYTHON, agents, fleet_processes

# installs and starts of workers take their time where others work beside
pytestmark = [pytest.mark.needs("sshd"), pytest.mark.timeout(300)]
TWO_SLOTS = ("--slots", "2")


def version_of(client: Any, name: str) -> str:
    record: dict[str, str] = json.loads(client.get(keys.worker_record(name)))
    return record["version"]


def start_old(fleet: Any, folder: Path, **how: Any) -> dict[str, dict[str, Any]]:
    """A worker of version 0.0.9 with two slots at host1."""
    python = python_with("0.0.9", folder / "old")
    done = fleet("up", "host1", options=("--skip-version-check", *TWO_SLOTS, *use_as_it_is(python)), **how)
    assert done.returncode == 0, done.stderr
    return rows(done)


def use_as_it_is(python: str) -> tuple[str, ...]:
    return ("--no-install", "--python", python, "--json")


def test_hosts_of_another_version_are_refused_while_the_others_start(farm, fleet, redis_client, tmp_path):
    old, new = python_with("0.0.9", tmp_path / "old"), python_with("99.1", tmp_path / "new")
    for name in ("host1", "host2", "host3"):
        farm.add(name)
    hosts = (f"host1 python={old}", "host2", f"host3 python={new}")

    done = fleet("up", *hosts)
    assert done.returncode == 3, done.stdout + done.stderr
    told = (
        "\nVersion check failed on 2 worker(s):\n"
        f"  Version mismatch: local={__version__}, host1=0.0.9\n"
        f"  Version mismatch: local={__version__}, host3=99.1\n"
    )
    assert told in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"host1  [FAILED] version: Version mismatch: local={__version__}, host1=0.0.9")
    assert "--skip-version-check" in lines[1]
    assert lines[2].startswith("host2  started: ")
    assert beating(redis_client) == ["host2-0"]
    assert not list(farm.hosts["host1"].home.iterdir()), "nothing was touched there"

    again = rows(fleet("up", *hosts, options=("--dry-run", *use_as_it_is(PYTHON))))
    assert (again["host3"]["step"], again["host3"]["error"]["code"]) == ("version", "version_mismatch")
    assert (again["host2"]["outcome"], again["host2"]["workers"][0]["state"]) == ("planned", "running")

    skipped = fleet("up", *hosts, options=("--skip-version-check", "--json"))
    assert skipped.returncode == 0, skipped.stderr
    assert beating(redis_client) == ["host1-0", "host2-0", "host3-0"]
    assert version_of(redis_client, "host1-0") == "0.0.9"
    assert fleet("down").returncode == 0


def test_a_python_without_rq_fleet_is_refused_before_anything_starts(farm, fleet, tmp_path):
    host = farm.add("host1")
    python = tmp_path / "bare/bin/python"
    venv.create(tmp_path / "bare", symlinks=True)
    done = fleet("up", "host1", options=use_as_it_is(str(python)))
    row = rows(done)["host1"]
    assert (row["step"], row["error"]["code"]) == ("version", "install_failed")
    assert row["error"]["message"] == f"rq-fleet is not installed for {python}"
    assert not list(host.home.iterdir())


def test_an_upgrade_waits_for_running_jobs_and_replaces_the_worker(
    farm, fleet, redis_client, tmp_path, eventually
):
    host = farm.add("host1")
    patient = {"FLEET_WORKER__STOP_GRACE_SECONDS": "100"}
    first = start_old(fleet, tmp_path, env=patient)
    job = submit(redis_client, f"echo >> {tmp_path}/job; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done")
    eventually((tmp_path / "job").exists)

    left = rows(fleet("up", "host1", options=(*TWO_SLOTS, *use_as_it_is(PYTHON)), env=patient))
    assert (left["host1"]["outcome"], pids(left)) == ("running", pids(first))
    note = f"runs version 0.0.9, here it is {__version__}: 'fleet up --upgrade' replaces it"
    assert left["host1"]["note"] == note
    planned = rows(fleet("up", options=("--upgrade", "--dry-run", *use_as_it_is(PYTHON))))
    assert [worker["state"] for worker in planned["host1"]["workers"]] == ["would be replaced"]

    log = host.output_dir / "log/host1-0.log"
    with Later(lambda: "stopping" in log.read_text(), (tmp_path / "go").touch):
        done = fleet("up", options=("--upgrade", *TWO_SLOTS, *use_as_it_is(PYTHON)), env=patient)
    upgraded = rows(done)
    assert done.returncode == 0, done.stderr
    assert (upgraded["host1"]["outcome"], upgraded["host1"]["note"]) == ("started", "replaced version 0.0.9")
    assert version_of(redis_client, "host1-0") == __version__
    assert jobs.states(redis_client, [job])[job] == "finished"
    assert (tmp_path / "job").read_text().count("\n") == 1, "what ends within the grace is not run again"
    again = rows(fleet("up", options=("--upgrade", *TWO_SLOTS, *use_as_it_is(PYTHON)), env=patient))
    assert (again["host1"]["outcome"], again["host1"]["note"]) == ("running", "")
    assert pids(again) == pids(upgraded)
    assert fleet("down").returncode == 0


def test_an_upgrade_hands_back_what_does_not_end_within_the_grace(
    farm, fleet, redis_client, tmp_path, eventually
):
    farm.add("host1")
    hasty = {"FLEET_WORKER__STOP_GRACE_SECONDS": "0.5"}
    start_old(fleet, tmp_path, env=hasty)
    job = submit(redis_client, f"echo >> {tmp_path}/job; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done")
    eventually((tmp_path / "job").exists)
    done = fleet("up", options=("--upgrade", *TWO_SLOTS, *use_as_it_is(PYTHON)), env=hasty)
    assert done.returncode == 0, done.stderr
    assert rows(done)["host1"]["note"] == "replaced version 0.0.9"
    (tmp_path / "go").touch()
    eventually(lambda: jobs.states(redis_client, [job])[job] == "finished")
    assert (tmp_path / "job").read_text().count("\n") == 2
    assert fleet("down").returncode == 0


class Later:
    """Does `act` from a thread once `condition` holds, while the body goes on."""

    def __init__(self, condition: Callable[[], bool], act: Callable[[], None]) -> None:
        self._condition, self._act = condition, act
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._condition() and not self._over.wait(0.05):
            pass
        self._act()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_an_upgrade_leaves_newer_workers_alone_and_tells_of_other_options(
    farm, fleet, redis_client, tmp_path
):
    farm.add("host1")
    farm.add("host2")
    start_old(fleet, tmp_path)
    new = python_with("99.1", tmp_path / "new")
    assert fleet("up", f"host2 python={new}", options=("--skip-version-check",)).returncode == 0
    done = rows(fleet("up", "host1", "host2", options=("--upgrade", *use_as_it_is(PYTHON), "--slots", "3")))
    assert done["host1"]["note"] == "replaced version 0.0.9; has other options than before"
    assert done["host2"]["outcome"] == "running"
    assert done["host2"]["note"].startswith(f"runs version 99.1, newer than {__version__} here; ")
    assert version_of(redis_client, "host2-0") == "99.1"
    assert fleet("down").returncode == 0


def test_an_upgrade_that_dies_midway_is_mended_by_the_next(
    farm, fleet, redis_client, tmp_path, spawn, eventually
):
    host = farm.add("host1")
    start_old(fleet, tmp_path)
    job = submit(redis_client, f"echo >> {tmp_path}/job; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done")
    eventually((tmp_path / "job").exists)
    words = ["up", tmp_path / "hosts.txt", "--ssh-config", farm.config, "--upgrade", *use_as_it_is(PYTHON)]
    operator = spawn(
        [fleet_script(), *words], env={**os.environ, **FAST, "FLEET_WORKER__STOP_GRACE_SECONDS": "60"}
    )
    log = host.output_dir / "log/host1-0.log"
    eventually(lambda: "stop" in log.read_text())
    operator.kill()
    operator.wait()
    (agent,) = agents(host)
    agent.kill()

    done = fleet("up", options=("--upgrade", *TWO_SLOTS, *use_as_it_is(PYTHON)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(done)["host1"]["outcome"] == "started"
    assert version_of(redis_client, "host1-0") == __version__
    (tmp_path / "go").touch()
    eventually(lambda: jobs.states(redis_client, [job])[job] == "finished")
    assert len([p for p in fleet_processes(farm.folder) if "fleet.worker" in p.cmdline()]) == 1
    assert fleet("down").returncode == 0
