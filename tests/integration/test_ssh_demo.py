"""The program's own SSH server: real enough for `ssh`, and gone when it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import threading
from pathlib import Path

import psutil
import pytest

from fleet.demo_sshd import DemoHosts
from fleet.launchers import base
from fleet.launchers.ssh import Address, SshOptions, open_launcher
from tests.integration.sshd import PYTHON, fleet_processes, listens, write_key


def probe(hosts: DemoHosts, name: str) -> base.Probe:
    async def run() -> base.Probe:
        launcher = await open_launcher(Address(name), SshOptions(config=hosts.ssh_config))
        try:
            return await launcher.probe()
        finally:
            await launcher.close()

    return asyncio.run(run())


def ssh(hosts: DemoHosts, *words: str, **how: object) -> subprocess.CompletedProcess[str]:
    options = ["-F", str(hosts.ssh_config), "-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes"]
    return subprocess.run(
        ["ssh", *options, *words], capture_output=True, text=True, timeout=60, check=False, **how
    )  # type: ignore[call-overload,no-any-return]


def test_each_host_has_a_home_a_port_and_a_key_of_its_own(tmp_path):
    with DemoHosts(tmp_path / "demo", ["demo1", "demo2"]) as hosts:
        found = {name: probe(hosts, name).home for name in hosts.names}
        assert found == {name: str(tmp_path / "demo" / name) for name in hosts.names}
        assert len({host.port for host in hosts.hosts}) == 2
        lines = (tmp_path / "demo/known_hosts").read_text().splitlines()
        assert len({line.split()[2] for line in lines}) == 2
        assert hosts.hosts_file.read_text() == "demo1\ndemo2\n"


@pytest.mark.needs("sshd")
def test_the_real_ssh_client_gets_streams_and_exit_status(tmp_path):
    with DemoHosts(tmp_path / "demo", ["demo1"]) as hosts:
        done = ssh(hosts, "demo1", "cat; echo bad >&2; pwd; exit 7", input="hello\n")
        assert (done.returncode, done.stdout) == (7, f"hello\n{tmp_path}/demo/demo1\n")
        assert "bad" in done.stderr
        assert ssh(hosts, "demo1", "kill -9 $$").returncode == 137
        assert ssh(hosts, "demo1").returncode == 1, "no login"
        assert len(ssh(hosts, "demo1", "head -c 3000000 /dev/zero | tr '\\0' x").stdout) == 3_000_000


def test_the_environment_is_clean(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "x")
    with DemoHosts(tmp_path / "demo", ["demo1"], environ={"EXTRA": "y"}) as hosts:
        printed = ssh(hosts, "demo1", "env").stdout
    assert "SOME_SECRET" not in printed
    assert "EXTRA=y" in printed


def test_only_the_key_made_for_the_occasion_opens_it(tmp_path):
    with DemoHosts(tmp_path / "demo", ["demo1"]) as hosts:
        write_key(hosts.folder / "id")
        with pytest.raises(base.KeyDenied):
            probe(hosts, "demo1")


def test_it_listens_on_loopback_alone_and_no_more_when_it_ended(tmp_path):
    with DemoHosts(tmp_path / "demo", ["demo1"]) as hosts:
        (host,) = hosts.hosts
        here = [
            c.laddr.ip
            for c in psutil.net_connections("tcp")
            if c.laddr.port == host.port and c.status == "LISTEN"
        ]
        assert here == ["127.0.0.1"]
    assert not listens(host.port)
    assert not [thread for thread in threading.enumerate() if thread.name == "demo-sshd"]


def test_what_runs_in_a_session_ends_with_it(tmp_path, eventually):
    with DemoHosts(tmp_path / "demo", ["demo1"]) as hosts:
        client = threading.Thread(target=ssh, args=(hosts, "demo1", "touch running; sleep 1000"))
        client.start()
        eventually((tmp_path / "demo/demo1/running").exists)
    client.join(timeout=60)
    eventually(lambda: fleet_processes(tmp_path) == [])


def test_as_a_process_of_its_own_it_ends_by_sigterm(tmp_path, spawn):
    argv = [PYTHON, "-I", "-m", "fleet.demo_sshd", tmp_path / "demo", "demo1", "demo2"]
    server = spawn(argv, stdout=subprocess.PIPE, text=True)
    config = Path(server.stdout.readline().strip())
    assert config == tmp_path / "demo/ssh_config"
    ports = [
        int(line.split()[1]) for line in config.read_text().splitlines() if line.strip().startswith("Port")
    ]
    assert all(listens(port) for port in ports)
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0
    assert not any(listens(port) for port in ports)


def test_a_bad_client_does_it_no_harm(tmp_path):
    with DemoHosts(tmp_path / "demo", ["demo1"]) as hosts:
        with socket.create_connection(("127.0.0.1", hosts.hosts[0].port)) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n" * 100)
        assert probe(hosts, "demo1").is_here


def test_a_client_that_goes_away_ends_no_program(tmp_path, eventually):
    home = tmp_path / "demo/demo1"
    with DemoHosts(tmp_path / "demo", ["demo1"]) as hosts:
        words = ["ssh", "-F", str(hosts.ssh_config), "-o", "StrictHostKeyChecking=accept-new", "demo1"]
        script = "touch running; while [ ! -e gone ]; do echo waiting; sleep 0.05; done; touch ended"
        client = subprocess.Popen([*words, script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually((home / "running").exists)
        client.kill()
        client.wait()
        (home / "gone").touch()
        eventually((home / "ended").exists)
