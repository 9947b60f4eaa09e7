"""Workers as systemd user units, where their user lingers: they live and end as others do.

systemd itself has to be PID 1; a stand-in starts what the unit says (tests/integration/systemd.py),
and systemd-analyze says whether systemd would take that unit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleet import user_unit
from fleet.launchers.agent import NO_UNIT_VARIABLE, TOKEN_VARIABLE
from tests.integration.fleets import FAST, pids, rows, submit
from tests.integration.sshd import PYTHON, SshdFarm, SshdHost, fleet_processes
from tests.integration.systemd import Manager


@pytest.fixture
def manager(farm: SshdFarm) -> Manager:
    return Manager(farm.folder / "run")


@pytest.fixture
def host(farm: SshdFarm, manager: Manager) -> SshdHost:
    """A host whose user has that manager."""
    environ = {"PATH": manager.path, "XDG_RUNTIME_DIR": str(manager.runtime), "OF_THE_LOGIN": "a  b\\n=c"}
    return farm.add("host1", **environ)


@pytest.fixture
def fleet(
    run_fleet: Any, farm: SshdFarm, host: SshdHost, fleet_redis_url: str, tmp_path: Path
) -> Callable[..., Any]:
    def run(verb: str, *options: str, **environ: str) -> Any:
        file = tmp_path / "hosts.txt"
        file.write_text("host1\n")
        more = [file, "--no-install", "--python", PYTHON] if verb == "up" else []
        return run_fleet(
            verb, "--json", "--ssh-config", farm.config, *more, *options, env={**FAST, **environ}
        )

    return run


def started(done: Any, outcome: str = "started") -> int:
    """The PID of the worker."""
    assert (done.returncode, rows(done)["host1"]["outcome"]) == (0, outcome), done.stdout + done.stderr
    (pid,) = pids(rows(done)).values()
    return pid


@pytest.mark.needs("sshd")
def test_a_worker_of_a_lingering_user_is_a_unit_and_otherwise_as_any(
    fleet, host, manager, farm, redis_client, eventually
):
    pid = started(fleet("up"))
    (unit,) = manager.units
    assert manager.calls.count("start") == 1
    assert os.getpgid(pid) == os.getsid(pid) == pid
    environ = psutil.Process(pid).environ()
    assert environ["OF_THE_LOGIN"] == "a  b\\n=c", "its jobs find what the login has"
    assert not [name for name in environ if name.startswith(("SSH_", "FLEET_"))]
    note = json.loads((host.output_dir / "run/host1-0.started.json").read_text())
    assert (note["pid"], note["token"], note["unit_file"]) == (pid, environ[TOKEN_VARIABLE], str(unit))
    assert "registered at Redis" in (host.output_dir / "log/host1-0.log").read_text()
    job = submit(redis_client, "exit 0")
    eventually(lambda: redis_client.hget(f"rq:job:{job}", "status") == b"finished")

    assert started(fleet("up"), "running") == pid, "nothing is started twice"
    ended = fleet("down")
    assert (ended.returncode, rows(ended)["host1"]["workers"][0]["state"]) == (0, "stopped")
    eventually(lambda: not fleet_processes(farm.folder))
    assert manager.calls.count("start") == 1, "what was told to end stays ended"
    assert manager.units == []
    assert list((host.output_dir / "run").glob("*.environ")) == []


@pytest.mark.needs("sshd")
def test_a_unit_whose_worker_died_is_started_anew_by_up_alone(fleet, host, manager, eventually):
    first = started(fleet("up"))
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not list(manager.runtime.glob("*.pid")))
    second = started(fleet("up"))
    assert second != first
    assert len(manager.units) == 1
    assert manager.calls.count("start") == 2
    assert fleet("down").returncode == 0


@pytest.mark.needs("sshd")
@pytest.mark.parametrize("doubt", ["lingers not", "show", "daemon-reload", "start", "no worker"])
def test_where_anything_is_in_doubt_there_is_no_unit(fleet, host, manager, farm, eventually, doubt):
    if doubt == "lingers not":
        manager.lingers("no")
    elif doubt == "no worker":  # the unit comes up, and its process cannot be the worker
        (manager.runtime / "fails.nothing").touch()
        script = manager.runtime / "bin/systemctl"
        script.write_text(script.read_text().replace('says["ExecStart"]', '"/bin/false"'))
    else:
        manager.fails(doubt)
    pid = started(fleet("up"))
    assert os.getsid(pid) == pid
    assert manager.units == []
    assert "unit_file" not in json.loads((host.output_dir / "run/host1-0.started.json").read_text())
    assert fleet("down").returncode == 0
    eventually(lambda: not fleet_processes(farm.folder))


@pytest.mark.needs("sshd")
@pytest.mark.parametrize("verb", ["loginctl", "daemon-reload"])
def test_a_systemd_that_hangs_is_waited_for_once(fleet, manager, farm, eventually, verb):
    manager.hangs(verb)
    done = fleet("up", "--workers-per-host", "5")
    assert (done.returncode, len(pids(rows(done)))) == (0, 5), done.stdout + done.stderr
    assert (manager.calls.count(verb), manager.units) == (1, [])
    for pid in pids(rows(done)).values():
        assert NO_UNIT_VARIABLE not in psutil.Process(pid).environ()
    assert fleet("down").returncode == 0
    eventually(lambda: not fleet_processes(farm.folder))


@pytest.mark.needs("sshd")
def test_no_secret_is_in_a_unit(fleet, host, manager, own_redis):
    secret = "hunt-for-this-secret"
    server = own_redis("--requirepass", secret)
    url = {"FLEET_REDIS_URL": f"redis://:{secret}@127.0.0.1:{server.port}/0"}
    pid = started(fleet("up", **url))
    (unit,) = manager.units
    assert secret not in unit.read_text()
    assert secret not in " ".join([*psutil.Process(pid).environ().values(), *psutil.Process(pid).cmdline()])
    assert secret not in (manager.runtime / "calls").read_text()
    assert fleet("down", **url).returncode == 0


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("folder", ["plain", 'with blanks, 100%h, a "quote" and \\'])
def test_systemd_takes_the_unit(tmp_path, folder):
    there = tmp_path / folder
    there.mkdir()
    wanted = user_unit.Start(
        name="host1-0",
        argv=[PYTHON, "-c", f"print({str(there)!r})"],
        environ={},
        token="t" * 32,
        folder=there,
        log=there / "log",
        environ_file=there / "host1-0.environ",
        stop_grace_seconds=2.5,
    )
    text = user_unit.unit(wanted)
    assert verified(tmp_path, text) == []
    assert "\nOOMPolicy=continue\n" in text, "one job without memory does not end the worker"
    (fault,) = verified(tmp_path, text.replace("KillMode=mixed", "KillMode=mixd"))
    assert "kill mode" in fault, "what is off is told"


def verified(folder: Path, text: str) -> list[str]:
    """What systemd has to say of a unit; of others on this machine it may say anything."""
    file = folder / "rq-fleet-host1-0.service"
    file.write_text(text)
    argv = ["systemd-analyze", "verify", "--user", "--man=no", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return [line for line in (done.stdout + done.stderr).splitlines() if file.name in line]


def test_what_the_unit_runs_becomes_the_worker(tmp_path):
    """With exactly the environment that it was given, and its log for what it says."""
    file, log = tmp_path / "environ", tmp_path / "log"
    file.write_text("A=1\n2\0B==\0C=\0LC_ALL=C.UTF-8")
    show = "import os; print(os.environ['A'], len(os.environ), os.environ['B'], os.getcwd(), os.getpid())"
    module = [PYTHON, "-I", "-m", "fleet.user_unit", str(file), str(tmp_path), str(log)]
    process = subprocess.Popen([*module, PYTHON, "-I", "-c", show], env={"NOT_THIS": "1"})
    assert process.wait() == 0
    assert log.read_text() == f"1\n2 4 = {tmp_path} {process.pid}\n"
    assert log.stat().st_mode & 0o777 == 0o600
    assert not file.exists()
