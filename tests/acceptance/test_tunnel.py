"""Hosts that are machines of their own and cannot reach Redis: `fleet up --tunnel` brings it to them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_network import Fleet, pids, rows
from tests.integration.network import OUR_ADDRESS, Host, Network, ip
from tests.integration.sshd import tunnel_processes

pytestmark = [pytest.mark.root, pytest.mark.needs("sshd", "ip")]
#: an address of ours to which the hosts know no way
_UNKNOWN_ADDRESS = "10.99.0.1"


@pytest.fixture
def network() -> Iterator[Network]:
    """In a folder whose name is short, for hosts' homes hold unix sockets."""
    with tempfile.TemporaryDirectory(prefix="net-") as folder, Network(Path(folder) / "n") as network:
        yield network


@pytest.fixture
def fleet(network: Network, tmp_path: Path, eventually: Callable[..., Any]) -> Fleet:
    return Fleet(network, tmp_path, eventually)


def tunnels(fleet: Fleet) -> dict[str, str | None]:
    return {host: worker["tunnel"] for host, worker in fleet.workers().items()}


def end(fleet: Fleet, hosts: list[Host], folder: Path) -> None:
    """`fleet down` leaves no process anywhere, and no socket."""
    done = fleet("down", "--ssh-config", str(fleet.network.ssh_config))
    assert done.returncode == 0, done.stdout + done.stderr
    fleet.eventually(lambda: not any(host.processes() for host in hosts))
    assert not [path for host in hosts for path in host.home.rglob("redis-*")]
    fleet.eventually(lambda: tunnel_processes(folder) == [], timeout_seconds=60)


def test_hosts_behind_a_tunnel_that_is_cut_and_mended(fleet: Fleet, network: Network, tmp_path: Path) -> None:
    hosts = [network.add("fh1"), network.add("fh2")]
    refused = fleet.up(fleet.hosts_file())
    assert refused.returncode == 1
    for way_out in ("--tunnel", f"fleet broker start --host {OUR_ADDRESS}\n"):
        assert refused.stdout.count(way_out) == 2, refused.stdout

    done = fleet.up(fleet.hosts_file(), "--tunnel", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    workers = pids(rows(done))
    assert json.loads(fleet("broker", "status", "--json").stdout)["hosts"] == ["127.0.0.1"]
    assert tunnels(fleet) == {"fh1": "up", "fh2": "up"}

    jobs = [fleet.submit() for _ in range(4)]
    assert sorted(fleet.started(job, 1)[0] for job in jobs) == ["fh1", "fh1", "fh2", "fh2"]
    cut = hosts[0]
    cut.cut_off()
    fleet.eventually(lambda: tunnels(fleet)["fh1"] == "down", timeout_seconds=60)
    assert "! fh1: its tunnel to Redis is down: " in fleet("status").stdout
    cut.join()
    fleet.eventually(lambda: tunnels(fleet) == {"fh1": "up", "fh2": "up"}, timeout_seconds=60)
    fleet.let_go(*jobs)
    waited = fleet("wait", "--timeout", "90", *jobs)
    assert waited.returncode == 0, waited.stderr
    assert {fleet.show(job)["state"] for job in jobs} == {"finished"}
    assert not (fleet.board / "overlaps").exists()

    # it came back by itself, and is there for what comes next
    fleet.eventually(lambda: fleet.workers()["fh1"]["state"] == "idle", timeout_seconds=60)
    assert {host: worker["pid"] for host, worker in fleet.workers().items()} == workers
    more = [fleet.submit() for _ in range(4)]
    assert sorted(fleet.started(job, 1)[0] for job in more) == ["fh1", "fh1", "fh2", "fh2"]
    fleet.let_go(*more)
    assert fleet("wait", "--timeout", "60", *more).returncode == 0
    end(fleet, hosts, tmp_path)
    assert fleet("broker", "stop").returncode == 0


def test_a_worker_that_cannot_reach_redis_is_told_with_the_address_and_the_mend(
    fleet: Fleet, network: Network, tmp_path: Path
) -> None:
    near, far = network.add("fh1"), network.add("fh2")
    with network.ssh_config.open("a") as config:
        config.write("  ProxyJump fh1\n")  # of the last one, fh2
    ip("-n", network.namespace, "addr", "add", f"{_UNKNOWN_ADDRESS}/32", "dev", "lo")
    assert fleet("broker", "start", "--host", _UNKNOWN_ADDRESS).returncode == 0
    port = json.loads(fleet("broker", "status", "--json").stdout)["port"]
    failed = fleet.up(fleet.hosts_file(), "--json")
    assert failed.returncode == 1, failed.stdout
    for row in rows(failed).values():
        assert (row["step"], row["error"]["code"]) == ("confirm", "redis_not_reached")
        assert f"{_UNKNOWN_ADDRESS}:{port}" in row["error"]["message"]
        assert "died. Last log:" in row["error"]["message"]
        assert "--tunnel" in row["error"]["hint"]
    done = fleet.up("--tunnel")
    assert done.returncode == 0, done.stdout + done.stderr
    assert tunnels(fleet) == {"fh1": "up", "fh2": "up"}
    end(fleet, [near, far], tmp_path)
    assert fleet("broker", "stop").returncode == 0
