"""The SSH launcher against real sshd: each way to fail has its own error, and the verbs work."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleet.launchers import agent, base
from fleet.launchers.ssh import Address, SshLauncher, SshOptions, open_launcher
from fleet.resources import Gpu, find_cpus, find_memory
from fleet.worker_config import WorkerConfig
from tests.conftest import wait_until
from tests.integration.sshd import PYTHON, SshdFarm, at, listens, write_key

pytestmark = pytest.mark.needs("sshd")


def probe(farm: SshdFarm, name: str, **how: Any) -> base.Probe:
    found: base.Probe = at(farm, name, lambda launcher: launcher.probe(), **how)
    return found


# --- connecting ------------------------------------------------------------------------------------


def test_a_new_host_key_is_accepted_once_and_recorded(farm):
    host = farm.add("host1")
    for _ in range(2):
        found = probe(farm, "host1")
        assert (found.is_here, found.our_address) == (True, "127.0.0.1")
    (line,) = farm.known_hosts.read_text().splitlines()
    key = (host.folder / "host_key.pub").read_text().split()[1]
    assert line == f"[127.0.0.1]:{host.port} ssh-ed25519 {key}"
    assert farm.known_hosts.stat().st_mode & 0o777 == 0o600


def test_a_key_is_added_below_what_known_hosts_holds(farm):
    farm.known_hosts.write_text("# mine, without a line break at its end")
    farm.add("host1")
    probe(farm, "host1")
    first, second = farm.known_hosts.read_text().splitlines()
    assert first == "# mine, without a line break at its end"
    assert second.startswith("[127.0.0.1]:")


def test_a_changed_host_key_is_refused_and_its_line_named(farm):
    host = farm.add("host1")
    farm.known_hosts.write_text("# a comment\n")
    probe(farm, "host1")
    host.stop()
    host.new_host_key()
    host.start()
    before = farm.known_hosts.read_text()
    with pytest.raises(base.HostKeyChanged) as caught:
        probe(farm, "host1")
    assert f"{farm.known_hosts}:2" in caught.value.message
    assert "has changed: SHA256:" in caught.value.message
    assert "remove that line" in caught.value.hint
    assert farm.known_hosts.read_text() == before


def test_a_host_that_refuses_is_told_from_one_that_does_not_answer(farm, silent_port, free_port):
    farm.alias("refusing", free_port())
    farm.alias("silent", silent_port)
    with pytest.raises(base.Refused, match="refused the connection"):
        probe(farm, "refusing")
    with pytest.raises(base.TimedOut, match=rf"silent \(\w+@127.0.0.1:{silent_port}\) within 0\.3 s"):
        probe(farm, "silent", connect_timeout_seconds=0.3)


def test_what_is_no_ssh_server_is_told(farm, spawn, eventually, free_port):
    port = free_port()
    spawn([PYTHON, "-I", "-m", "http.server", "-b", "127.0.0.1", str(port)], stderr=-3, cwd=farm.folder)
    farm.alias("web", port)
    eventually(lambda: listens(port))
    with pytest.raises(base.ConnectError, match=r"broke off|SSH") as caught:
        probe(farm, "web", connect_timeout_seconds=60)
    assert not isinstance(caught.value, base.Refused)


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a" * 64 + ".example"])
def test_a_name_without_address_is_told(farm, name):
    with pytest.raises(base.NameNotResolved, match="no address is known"):
        probe(farm, name)


def test_a_key_that_the_host_does_not_know_is_told(farm):
    farm.add("host1")
    write_key(farm.folder / "id2")
    port = farm.hosts["host1"].port
    farm.alias("denied", port, IdentityFile=str(farm.folder / "id2"), User="bob")
    with pytest.raises(base.KeyDenied) as caught:
        probe(farm, "denied")
    assert caught.value.message == f"denied (bob@127.0.0.1:{port}) accepts none of our keys"


def test_without_an_ssh_config_named_that_of_the_home_is_read(farm, free_port, tmp_path, monkeypatch):
    host, port = farm.add("host1"), free_port()
    farm.add("jump")
    farm.alias("behind", host.port, ProxyJump="jump")
    farm.alias("refusing", port, User="bob")
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    farm.config.rename(home / ".ssh/config")
    monkeypatch.setenv("HOME", str(home))
    farm.config = None  # type: ignore[assignment]
    assert probe(farm, "host1").is_here
    assert not probe(farm, "behind").is_here
    assert farm.known_hosts.exists()
    with pytest.raises(base.Refused, match=rf"^refusing \(bob@127.0.0.1:{port}\) refused"):
        probe(farm, "refusing")


def test_an_identity_file_that_is_missing_is_passed_over(farm):
    farm.add("host1")
    stanza = "  IdentityFile /does/not/exist\n"
    farm.config.write_text(farm.config.read_text() + stanza)
    assert probe(farm, "host1").cpus >= 1


def test_a_broken_ssh_config_is_told(farm):
    farm.config.write_text("Host *\n  Port many\n")
    with pytest.raises(base.ConnectError, match=r"ssh_config: .* line 2"):
        probe(farm, "host1")


def test_a_jump_host_is_gone_through_and_its_key_recorded(farm):
    jump, host = farm.add("jump"), farm.add("host1")
    farm.alias("behind", host.port, ProxyJump="jump")
    found = probe(farm, "behind")
    assert not found.is_here, "its loopback may not be ours"
    assert found.our_address is None, "what the jump host sees of us tells nothing of this one"
    recorded = farm.known_hosts.read_text()
    assert f"[127.0.0.1]:{jump.port} " in recorded
    assert f"[127.0.0.1]:{host.port} " in recorded


def test_a_jump_in_circles_ends(farm):
    farm.alias("one", 1, ProxyJump="two")
    farm.alias("two", 1, ProxyJump="one")
    with pytest.raises(base.ConnectError, match="in circles"):
        probe(farm, "one")


def test_a_proxy_command_is_used(farm):
    host = farm.add("host1")
    relay = farm.folder / "relay.py"
    relay.write_text(RELAY)
    farm.alias("proxied", host.port, ProxyCommand=f"{PYTHON} {relay} %h %p")
    assert not probe(farm, "proxied").is_here


RELAY = """
import os, socket, sys, threading
far = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def out():
    while data := far.recv(65536):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=out, daemon=True).start()
while data := os.read(0, 65536):
    far.sendall(data)
"""


def test_a_key_in_the_agent_opens_a_host(farm, spawn, eventually, tmp_path, monkeypatch):
    host = farm.add("host1")
    agent = tmp_path / "agent"
    spawn(["ssh-agent", "-D", "-a", str(agent)], stdout=-3)
    eventually(agent.exists)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
    assert shutil.which("ssh-add")
    spawn(["ssh-add", str(farm.folder / "id")], stderr=-3).wait()
    (farm.folder / "id").unlink()
    farm.config.write_text(
        f"Host host1\n HostName 127.0.0.1\n Port {host.port}\n UserKnownHostsFile {farm.known_hosts}\n"
    )
    assert probe(farm, "host1").is_here


# --- commands --------------------------------------------------------------------------------------


def test_a_probe_tells_what_the_host_is(farm):
    host = farm.add("host1")
    found = probe(farm, "host1")
    assert (found.system, found.home) == (os.uname().sysname, str(host.home))
    assert found.output_dir == str(host.output_dir)
    assert (found.memory_bytes, found.cpus) == (find_memory(), find_cpus())
    assert 0 < found.free_disk_bytes <= shutil.disk_usage(host.home).total
    assert abs(found.clock_skew_seconds) < 30
    assert found.venvs == found.gpus == ()


def test_gpus_are_counted(farm, tmp_path):
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf 'NVIDIA A100, 40960\\nNVIDIA A100, 40960\\n'\n")
    smi.chmod(0o755)
    farm.add("host1", PATH=f"{smi.parent}:{os.environ['PATH']}")
    assert probe(farm, "host1").gpus == tuple(Gpu("NVIDIA A100", 40960 * 2**20, index) for index in range(2))


def test_what_a_login_shell_prints_does_no_harm(farm):
    host = farm.add("host1")
    (host.home / ".bashrc").write_text("echo welcome\necho rq-fleet-noise >&2\n")
    assert probe(farm, "host1").home == str(host.home)


def test_a_host_without_python_is_told(farm, tmp_path):
    farm.add("host1", PATH=str(tmp_path / "empty"))
    launcher_candidates = ("python3", "python3.12")
    with pytest.raises(base.NoPython, match=r"^no Python 3\.11 or newer there$") as caught:
        at(farm, "host1", _with_candidates(launcher_candidates))
    assert "python=/path/to/python3" in caught.value.hint


def test_pythons_that_are_too_old_are_named(farm, tmp_path):
    old = tmp_path / "bin/python3"
    old.parent.mkdir()
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    farm.add("host1", PATH=str(old.parent))
    with pytest.raises(base.NoPython, match=rf"found {old} \(Python 3\.8\.1\)"):
        at(farm, "host1", _with_candidates(("python3",)))
    with pytest.raises(base.NoPython, match=rf"^{old} is no Python 3\.11 or newer there; found"):
        probe(farm, "host1", python=str(old))
    with pytest.raises(base.NoPython, match=r"^/none is no Python 3\.11 or newer there$"):
        probe(farm, "host1", python="/none")


def _with_candidates(candidates: tuple[str, ...]) -> Callable[[SshLauncher], Awaitable[Any]]:
    """A probe that looks for few Pythons, as this machine has one in every place."""

    async def work(launcher: SshLauncher) -> base.Probe:
        launcher._candidates = candidates
        return await launcher.probe()

    return work


def test_a_command_has_a_limit(farm):
    farm.add("host1")
    with pytest.raises(base.CommandTimeout, match=r"within 0\.2 s"):
        at(farm, "host1", lambda launcher: launcher._execute("exec sleep 2", "", 0.2))


@pytest.mark.parametrize("end", ["limit", "keepalive"])
def test_a_host_that_freezes_amid_a_command_ends_as_an_error(farm, eventually, end):
    host = farm.add("host1")
    farm.alias("watched", host.port, ServerAliveInterval="1", ServerAliveCountMax="2")
    running, over = host.home / "running", host.home / "over"
    forever = f"touch {running}; until [ -e {over} ]; do sleep 0.05; done"

    async def frozen(launcher: SshLauncher) -> None:
        seconds = 2.0 if end == "limit" else 100.0
        command = asyncio.create_task(launcher._execute(forever, "", seconds))
        await asyncio.to_thread(eventually, running.exists)
        host.freeze()
        await command

    error = base.CommandTimeout if end == "limit" else base.Disconnected
    with pytest.raises(error):
        at(farm, "host1" if end == "limit" else "watched", frozen)
    over.touch()
    host.thaw()


def test_a_connection_that_breaks_is_told(farm, eventually):
    host = farm.add("host1")
    running, over = host.home / "running", host.home / "over"
    forever = f"touch {running}; until [ -e {over} ]; do sleep 0.05; done"

    async def broken(launcher: SshLauncher) -> None:
        command = asyncio.create_task(launcher._execute(forever, "", 100))
        await asyncio.to_thread(eventually, running.exists)
        await asyncio.to_thread(host.stop)
        await command

    with pytest.raises(base.Disconnected, match="the SSH connection broke"):
        at(farm, "host1", broken)
    over.touch()


def test_a_user_who_cannot_run_commands_is_told(farm):
    host = farm.add("host1")
    config = host._config() + "ForceCommand echo This account is closed; false\n"
    host.stop()
    host._config = lambda: config  # type: ignore[method-assign]
    host.start()
    with pytest.raises(base.CommandFailed, match="ended with 1: This account is closed"):
        probe(farm, "host1")


# --- start, inspect, stop --------------------------------------------------------------------------


def order(host: Any, number: int = 0) -> WorkerConfig:
    return WorkerConfig(f"host1-{number}", "host1", "redis://:hush@127.0.0.1:1/0", str(host.output_dir))


def test_a_worker_is_started_once_and_stopped(farm, eventually):
    host = farm.add("host1")

    async def life(launcher: SshLauncher) -> None:
        await launcher.probe()
        (fresh,) = await launcher.start(PYTHON, [order(host)])
        assert fresh.fresh
        config = host.output_dir / "run/host1-0.config.json"
        assert config.stat().st_mode & 0o777 == 0o600
        assert WorkerConfig.from_json(config.read_text()) == order(host)
        started = json.loads((host.output_dir / "run/host1-0.started.json").read_text())
        environ = psutil.Process(fresh.pid).environ()
        assert environ[agent.TOKEN_VARIABLE] == started["token"]
        # it cannot reach Redis, so it ends by itself: that is seen, with the end of its log
        while (seen := await launcher.inspect(None, "host1", log_lines=5))[0].alive:
            await asyncio.sleep(0.05)
        assert seen[0].pid == fresh.pid
        assert "is not reachable" in seen[0].log
        assert "hush" not in seen[0].log
        (stopped,) = await launcher.stop(None, "host1", grace_seconds=1)
        assert stopped.how == "not running"
        assert not config.exists(), "credentials are not left behind"

    at(farm, "host1", life)


@pytest.mark.parametrize(
    ("noted", "carried"),
    [
        pytest.param({"start_time": 1000.0}, None, id="started at another time"),
        pytest.param({"token": "t1"}, None, id="started at that time, without our token"),
        pytest.param({"token": "t1"}, "t10", id="started at that time, with another token"),
    ],
)
def test_a_recycled_pid_is_never_taken_for_a_worker(farm, spawn, noted, carried):
    host = farm.add("host1")
    environ = {**os.environ, **({agent.TOKEN_VARIABLE: carried} if carried else {})}
    innocent = spawn(["sleep", "100"], env=environ)
    run = host.output_dir / "run"
    run.mkdir(parents=True)
    found = {"pid": innocent.pid, "start_time": psutil.Process(innocent.pid).create_time(), "version": "0"}
    for name in ("host1-0.json", "host1-0.started.json"):
        (run / name).write_text(json.dumps(found | noted))

    async def look_and_stop(launcher: SshLauncher) -> Any:
        return await launcher.inspect(None, "host1"), await launcher.stop(None, "host1", grace_seconds=0)

    seen, stopped = at(farm, "host1", look_and_stop)
    assert [worker.alive for worker in seen] == [False]
    assert [worker.how for worker in stopped] == ["not running"]
    assert innocent.poll() is None


def test_a_worker_that_ignores_sigterm_is_killed_with_its_children(farm, spawn, eventually, is_alive):
    host = farm.add("host1")
    deaf = "trap '' TERM; sleep 100 & while :; do sleep 0.1; done"
    worker = spawn(["sh", "-c", deaf])
    process = psutil.Process(worker.pid)
    eventually(lambda: len(process.children()) >= 1)
    run = host.output_dir / "run"
    run.mkdir(parents=True)
    note = f'{{"pid": {worker.pid}, "start_time": {process.create_time()}, "version": "0"}}'
    (run / "host1-0.json").write_text(note)
    children = process.children()

    async def force(launcher: SshLauncher) -> Any:
        return await launcher.stop(None, "host1", grace_seconds=100, force=True)

    (stopped,) = at(farm, "host1", force)
    assert (stopped.how, stopped.pid) == ("killed", worker.pid)
    assert worker.wait() == -signal.SIGKILL
    eventually(lambda: not any(is_alive(child.pid) for child in children))


def test_workers_of_another_host_in_a_shared_folder_are_left_alone(farm, spawn):
    host = farm.add("host1")
    other = spawn(["sleep", "100"])
    run = host.output_dir / "run"
    run.mkdir(parents=True)
    note = f'{{"pid": {other.pid}, "start_time": {psutil.Process(other.pid).create_time()}}}'
    for name in ("host10-0", "host1-gpu-0", "host1"):
        (run / f"{name}.json").write_text(note)
    assert at(farm, "host1", lambda launcher: launcher.stop(None, "host1", grace_seconds=0)) == ()
    assert other.poll() is None


def worker_of(run: Path, name: str, spawn: Any, on_sigterm: str) -> subprocess.Popen[Any]:
    """A process that passes for the worker `name`, and does `on_sigterm` when it is to end."""
    ready = run / f"{name}.ready"
    script = f"trap '{on_sigterm}' TERM; touch {ready}; while :; do sleep 0.05; done"
    worker: subprocess.Popen[Any] = spawn(["sh", "-c", script])
    wait_until(ready.exists, message=f"{name} listens to signals")
    note = {"pid": worker.pid, "start_time": psutil.Process(worker.pid).create_time(), "version": "0"}
    (run / f"{name}.json").write_text(json.dumps(note))
    return worker


def test_two_hosts_with_one_folder_stop_at_the_same_time(farm, spawn, tmp_path):
    farm.add("host1")
    farm.add("host2")
    run = tmp_path / "shared/run"
    run.mkdir(parents=True)
    for own, other in (("host1", "host2"), ("host2", "host1")):
        wait = f"touch {run}/{own}; while [ ! -e {run}/{other} ]; do sleep 0.05; done; exit"
        worker_of(run, f"{own}-0", spawn, wait)

    async def stop(name: str) -> str:
        launcher = await open_launcher(Address(name), SshOptions(config=farm.config))
        try:
            (stopped,) = await launcher.stop(str(run.parent), name, grace_seconds=150)
        finally:
            await launcher.close()
        return stopped.how

    async def both() -> list[str]:
        return await asyncio.gather(stop("host1"), stop("host2"))

    began = time.monotonic()
    assert asyncio.run(both()) == ["stopped", "stopped"], "each ended only as the other was told to"
    assert time.monotonic() - began < 150


def test_a_forced_stop_does_not_sit_out_the_grace_of_another_and_a_start_waits(farm, spawn, eventually):
    host = farm.add("host1")
    run = host.output_dir / "run"
    run.mkdir(parents=True)
    worker = worker_of(run, "host1-0", spawn, f"touch {run}/told")

    async def life(launcher: SshLauncher) -> None:
        await launcher.probe()
        graceful = asyncio.create_task(launcher.stop(None, "host1", grace_seconds=100))
        await asyncio.to_thread(eventually, (run / "told").exists)
        start = asyncio.create_task(launcher.start(PYTHON, [order(host)]))
        assert (await launcher.stop(None, "host1", grace_seconds=0, force=True))[0].how == "killed"
        assert worker.wait() == -signal.SIGKILL
        assert [stopped.name for stopped in await graceful] == ["host1-0"]
        (started,) = await start
        assert started.fresh, "not the one on its way out"
        await launcher.stop(None, "host1", grace_seconds=0, force=True)

    at(farm, "host1", life)
