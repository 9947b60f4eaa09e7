"""`fleet status --probe` against real sshd and real workers: what Redis knows, and what the hosts say."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from broker import keys
from tests.integration.fleets import SHORT_LEASE, pids, rows
from tests.integration.sshd import PYTHON, SshdFarm

pytestmark = pytest.mark.needs("sshd")


@pytest.fixture
def up(fleet: Callable[..., Any]) -> Callable[..., dict[str, int]]:
    """`up("host1")`: starts a worker at each; their pids by name."""

    def run(*names: str) -> dict[str, int]:
        done = fleet("up", *names, options=("--json",), env=SHORT_LEASE)
        assert done.returncode == 0, done.stdout + done.stderr
        return pids(rows(done))

    return run


@pytest.fixture
def probe(run_fleet: Any, farm: SshdFarm, fleet_redis_url: str) -> Callable[..., Any]:
    """`probe()`: the document of `fleet status --probe --json`, workers and hosts by their names."""

    def run(*options: str) -> Any:
        done = run_fleet("status", "--probe", "--json", "--ssh-config", farm.config, *options)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        return {
            "workers": {row["name"]: (row["state"], row["probe"]) for row in document["workers"]},
            "hosts": {row["name"]: row for row in document["hosts"]},
        }

    return run


def test_each_thing_that_can_be_true_of_a_worker_has_its_own_word(
    farm, up, probe, run_fleet, redis_client, eventually
):
    names = ["busy", "draining", "idle", "stale", "stopped", "unreachable"]
    for name in names:
        farm.add(name)
    pids = up("busy queues=own", *names[1:])
    assert run_fleet("drain", "draining-0").returncode == 0
    os.kill(pids["stale-0"], signal.SIGSTOP)  # it hangs
    os.kill(pids["stopped-0"], signal.SIGKILL)
    farm.hosts["unreachable"].stop()
    assert run_fleet("submit", "--queue", "own", "--", "sleep", "1000").returncode == 0
    eventually(lambda: redis_client.hlen(keys.worker_leases("busy-0")))
    for name in ("stale-0", "stopped-0"):
        eventually(lambda name=name: not redis_client.exists(keys.worker_beat(name)))

    expected = {
        "busy-0": ("busy", "running"),
        "draining-0": ("draining", "running"),
        "idle-0": ("idle", "running"),
        "stale-0": ("offline", "stale"),
        "stopped-0": ("offline", "stopped"),
        "unreachable-0": ("idle", "unreachable"),
    }
    # on a busy machine a beat may come late, and its worker then is connecting for a moment
    found = eventually(lambda: (now := probe())["workers"] == expected and now, timeout_seconds=60)
    assert {name: host["probe"] for name, host in found["hosts"].items()} == {
        **dict.fromkeys(["busy", "draining", "idle"], "running"),
        **{name: name for name in ("stale", "stopped", "unreachable")},
    }
    assert found["hosts"]["unreachable"]["error"]["code"] == "refused"
    assert found["hosts"]["stopped"]["workers"] == []
    told = run_fleet("status", "--probe", "--ssh-config", farm.config).stdout
    assert re.search(r"stale-0 +stale +stale", told)
    assert re.search(r"stopped-0 +stopped +stopped", told)
    assert "! host unreachable is unreachable: " in told
    assert "host stopped: stopped, no worker runs there" in told


def test_a_worker_at_a_host_that_cannot_be_asked_is_not_called_stopped(
    farm, up, probe, eventually, redis_client
):
    """It may run on, cut off with its host: only somebody who looked there may say that it stopped."""
    farm.add("host1")
    (pid,) = up("host1").values()
    farm.hosts["host1"].stop()
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: not redis_client.exists(keys.worker_beat("host1-0")))
    assert probe()["workers"] == {"host1-0": ("offline", "unreachable")}
    with socket.create_server(("127.0.0.1", farm.hosts["host1"].port)):  # takes calls, says nothing
        assert probe("--connect-timeout", "0.5")["workers"] == {"host1-0": ("offline", "unreachable")}


def test_a_worker_of_another_folder_than_the_one_asked_for_is_not_called_stopped(
    farm, up, probe, run_fleet, eventually, redis_client
):
    """Nobody looked where it runs."""
    farm.add("host1")
    (pid,) = up("host1").values()
    assert run_fleet("hosts", "add", "host1 output_dir=~/other").returncode == 0
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: not redis_client.exists(keys.worker_beat("host1-0")))
    assert probe()["workers"] == {"host1-0": ("offline", None)}
    told = run_fleet("status", "--probe", "--ssh-config", farm.config).stdout
    assert re.search(r"host1-0 +host1 +offline", told)


def test_what_redis_no_longer_knows_shows_if_its_process_is_there(farm, up, probe, run_fleet, redis_client):
    farm.add("host1")
    (pid,) = up("host1").values()
    os.kill(pid, signal.SIGSTOP)
    redis_client.flushall()
    assert probe() == {"workers": {}, "hosts": {}}, "the hosts are gone from Redis too"
    assert run_fleet("hosts", "add", "host1").returncode == 0
    found = probe()
    assert found["workers"] == {"host1-0": ("offline", "stale")}
    assert found["hosts"]["host1"]["workers"] == ["host1-0"]


def test_a_kept_host_without_any_worker_shows(farm, probe, run_fleet, free_port):
    farm.add("host1")
    farm.alias("away", free_port())
    assert run_fleet("hosts", "add", "host1", "away").returncode == 0
    found = probe()
    assert found["workers"] == {}
    assert {name: host["probe"] for name, host in found["hosts"].items()} == {
        "host1": "stopped",
        "away": "unreachable",
    }


def test_a_recycled_pid_is_no_worker(farm, up, probe, spawn, redis_client, eventually):
    host = farm.add("host1")
    (pid,) = up("host1").values()
    os.kill(pid, signal.SIGKILL)
    innocent = spawn(["sleep", "100"])
    for note in (host.output_dir / "run").glob("host1-0*.json"):
        fields = json.loads(note.read_text())
        if "pid" in fields:
            started = psutil.Process(innocent.pid).create_time()
            note.write_text(json.dumps({**fields, "pid": innocent.pid, "start_time": started}))
    eventually(lambda: not redis_client.exists(keys.worker_beat("host1-0")))
    assert probe()["workers"] == {"host1-0": ("offline", "stopped")}
    assert innocent.poll() is None


def test_the_python_that_up_was_told_of_is_used_by_the_other_verbs_too(farm, fleet, probe, run_fleet):
    """It may be the only one there that is new enough."""
    farm.add("host1")
    used, python = farm.folder / "used", farm.folder / "python"
    python.write_text(f'#!/bin/sh\ntouch {used}\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    assert fleet("up", "host1", options=("--no-install", "--python", str(python))).returncode == 0
    (host,) = json.loads(run_fleet("hosts", "list", "--json").stdout)["hosts"]
    assert (host["found_python"], host["python"]) == (str(python), None)
    used.unlink()
    assert probe()["workers"]["host1-0"][1] in ("running", "stale")
    assert used.exists()
    python.unlink()
    assert fleet("down").returncode == 0, "where it has gone another is found"


def test_without_probe_nobody_is_asked(run_fleet, fleet_redis_url):
    assert run_fleet("hosts", "add", "no-such-host.invalid").returncode == 0
    document = json.loads(run_fleet("status", "--json").stdout)
    assert "hosts" not in document
    assert run_fleet("status", "--probe", "--watch").returncode == 2
