"""`fleet up` that is cut short at each of its steps: by Ctrl-C, by a host that dies, by one that hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker import __version__
from fleet import bundle
from tests.conftest import REPOSITORY
from tests.integration.fleets import FAST, beating, rows
from tests.integration.gate import Gate
from tests.integration.sshd import SshdFarm, fleet_processes

# longer than what its parts may take, one after the other
pytestmark = [pytest.mark.needs("sshd"), pytest.mark.timeout(300)]

STEPS = ("connect", "probe", "install", "start", "detach", "confirm")
#: seconds in which a host that hangs is given up
PATIENCE = {"ConnectTimeout": "8", "ServerAliveInterval": "2", "ServerAliveCountMax": "4"}
#: the command line, with a bundle that is installed in no time: a reference to what is here
DRIVER = """
import os, pathlib, sys
from fleet import bundle
data = pathlib.Path(os.environ["BUNDLE"]).read_bytes()
made = bundle.Bundle("rq_fleet-0.0-py3-none-any.whl", data, "reference", {version!r})
bundle.build = lambda: made
from cli.main import main
main()
"""


@pytest.fixture
def gate(farm: SshdFarm) -> Gate:
    """The gate of host1; host2 has none."""
    host = farm.add("host1")
    farm.add("host2")
    return Gate(host)


@pytest.fixture
def command(
    farm: SshdFarm, gate: Gate, fleet_redis_url: str, tmp_path: Path, monkeypatch: Any
) -> Callable[..., list[Any]]:
    """The words of `fleet up` for both hosts."""
    wheel = tmp_path / "reference.whl"
    wheel.write_bytes(reference())
    monkeypatch.setenv("BUNDLE", str(wheel))
    hosts = tmp_path / "hosts.txt"

    def words(verb: str, *options: Any) -> list[Any]:
        program = [sys.executable, "-c", DRIVER.format(version=__version__), verb]
        # to install takes seconds: only one host does, and nothing else where it is not what matters
        others = f"host2 python={sys.executable}\n" if "--no-install" in options else ""
        hosts.write_text(f"host1 python={gate.python}\n{others}")
        return [*program, "--ssh-config", farm.config, *options, *([hosts] if verb == "up" else [])]

    return words


@pytest.fixture
def fleet(command: Callable[..., list[Any]]) -> Callable[..., Any]:
    """`fleet("up", ...)`: to its end, as JSON."""

    def run(verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*map(str, command(verb, "--json", *options))],
            env={**os.environ, **FAST},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def install_at(step: str) -> tuple[str, ...]:
    """The option of `fleet up` for a test of that step."""
    return () if step == "install" else ("--no-install",)


def others_at(step: str) -> list[str]:
    """The hosts beside host1 in a test of that step."""
    return [] if step == "install" else ["host2"]


def reference() -> bytes:
    """A wheel that makes what is here importable."""
    info = "rq_fleet-0.0.dist-info"
    paths = [str(REPOSITORY), *(path for path in sys.path if path.endswith("site-packages"))]
    files = {
        "rq_fleet_here.pth": "\n".join(paths).encode(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: rq-fleet\nVersion: 0.0\n",
        f"{info}/WHEEL": bundle._WHEEL.encode(),
    }
    return bundle._zipped(files)


def workers(farm: SshdFarm, name: str) -> list[psutil.Process]:
    return [p for p in fleet_processes(farm.folder / name) if is_worker(p)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "fleet.worker" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


class Up:
    """`fleet up` under way, for hosts of which the first has stopped at a step."""

    def __init__(self, words: list[Any], spawn: Any, folder: Path) -> None:
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = spawn(words, stdout=out, stderr=err, env={**os.environ, **FAST})

    def is_at(self, step: str, gate: Gate) -> bool:
        """Whether it has come to that step at host1, and has host2 up."""
        said = self.err.read_text()
        came = {"connect": True, "confirm": "host1: start ok" in said}.get(step, gate.reached.exists())
        return came and all(f"{host}: confirm ok" in said for host in others_at(step))

    def ended(self) -> tuple[int, dict[str, str]]:
        """The exit code, and what is said of each host."""
        code = self.process.wait(timeout=60)
        assert "Traceback" not in self.err.read_text(), self.err.read_text()
        lines = [line.split(None, 1) for line in self.out.read_text().splitlines() if line[0] != " "]
        return code, {line[0]: line[1] for line in lines}


@pytest.fixture
def under_way(
    command: Callable[..., list[Any]], farm: SshdFarm, gate: Gate, spawn: Any, tmp_path: Path, eventually: Any
) -> Callable[[str], Up]:
    def up(step: str) -> Up:
        if step == "connect":
            if "ConnectTimeout" not in farm.config.read_text():  # the interrupt comes before that
                farm.config.write_text(f"{farm.config.read_text()}Host host1\n  ConnectTimeout 250\n")
            farm.hosts["host1"].freeze()
        else:
            gate.shut(step)
        up = Up(command("up", *install_at(step)), spawn, tmp_path)
        eventually(lambda: up.is_at(step, gate), timeout_seconds=90, message=f"host1 is at {step}")
        return up

    return up


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupt_at_any_step_leaves_a_host_untouched_or_started_and_known(
    under_way, farm, gate, fleet, redis_client, eventually, step
):
    up = under_way(step)
    up.process.send_signal(signal.SIGINT)
    if step in ("start", "detach"):  # these are not cut, and it is said that they are waited for
        eventually(lambda: "a second Ctrl-C" in up.err.read_text())
        assert up.process.poll() is None
        gate.open()
    code, said = up.ended()
    assert code == 130
    assert all(said[host].startswith(f"started: {host}-0") for host in others_at(step))
    if step in ("connect", "probe", "install"):
        assert said["host1"] == "untouched (interrupted)"
        assert not farm.hosts["host1"].output_dir.exists()
        if not others_at(step):  # nothing was started, so nothing is kept
            return
    else:
        assert said["host1"].startswith("unconfirmed: host1-0 (")
        assert said["host1"].endswith("(started, not confirmed)")
    gate.open()
    farm.hosts["host1"].thaw()
    down(farm, fleet, eventually)


@pytest.mark.parametrize("step", ["start", "detach"])
def test_a_second_interrupt_waits_for_nothing_and_tells_what_may_have_been_started(
    under_way, farm, gate, fleet, eventually, step
):
    up = under_way(step)
    for _ in range(2):
        up.process.send_signal(signal.SIGINT)
        eventually(lambda: "a second Ctrl-C" in up.err.read_text())
    code, said = up.ended()
    assert code == 130
    assert said["host1"] == "unconfirmed: host1-0 (unknown) (was being started)"
    gate.open()
    eventually(lambda: workers(farm, "host1"), message="the host went on by itself")
    down(farm, fleet, eventually)


@pytest.mark.parametrize("step", STEPS)
def test_a_host_that_dies_at_any_step_fails_alone_and_is_mended_by_the_next_up(
    under_way, farm, gate, fleet, redis_client, eventually, step
):
    host = farm.hosts["host1"]
    if step == "connect":
        host.stop()
    else:
        up = under_way(step)
        host.stop()
        for process in fleet_processes(host.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        code, said = up.ended()
        shown = "start" if step == "detach" else step
        assert said["host1"].startswith(f"[FAILED] {shown}:"), said
        assert code == (3 if others_at(step) else 1)
        assert all(said[host].startswith(f"started: {host}-0") for host in others_at(step))
    if step == "connect":
        failed = fleet("up", *install_at(step))
        assert (failed.returncode, rows(failed)["host1"]["step"]) == (3, "connect")
    gate.open()
    host.start()
    mended(farm, fleet("up", *install_at(step)), redis_client, ["host1", *others_at(step)])
    down(farm, fleet, eventually)


@pytest.mark.parametrize("step", ["connect", "start"])
def test_a_host_that_hangs_at_any_step_fails_alone_and_is_mended_by_the_next_up(
    under_way, farm, gate, fleet, redis_client, eventually, step
):
    patience = "".join(f"  {name} {value}\n" for name, value in PATIENCE.items())
    before = farm.config.read_text()
    farm.config.write_text(f"{before}Host host1\n{patience}")
    up = under_way(step)
    farm.hosts["host1"].freeze()
    code, said = up.ended()
    assert said["host1"].startswith(f"[FAILED] {step}:"), said
    assert code == (3 if others_at(step) else 1)
    farm.config.write_text(before)
    gate.open()
    farm.hosts["host1"].thaw()
    mended(farm, fleet("up", *install_at(step)), redis_client, ["host1", *others_at(step)])
    down(farm, fleet, eventually)


def mended(farm: SshdFarm, done: subprocess.CompletedProcess[str], client: Any, hosts: list[str]) -> None:
    """The same again has started what was missing, and nothing twice."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done)
    assert found["host1"]["outcome"] in ("started", "running")
    assert beating(client) == [f"{host}-0" for host in hosts]
    assert {host: len(workers(farm, host)) for host in hosts} == dict.fromkeys(hosts, 1)


def down(farm: SshdFarm, fleet: Any, eventually: Any) -> None:
    """All that is known ends, and nothing else was there."""
    done = fleet("down")
    assert done.returncode == 0, done.stdout + done.stderr
    eventually(lambda: not fleet_processes(farm.folder))
