"""Scripts that start a worker: what is in them, and what becomes of both when they are run and ended."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker import keys, status
from broker.connection import connect
from cli.main import main
from fleet import script
from fleet.endpoint import Endpoint
from tests.conftest import fleet_script
from tests.integration.conftest import FAST, Workers
from tests.integration.test_worker import waiting_for

GOLDEN = Path(__file__).parents[1] / "golden"
#: nothing that a shell would take for more than a value
HOSTILE = "$(touch pwned) `touch pwned` ';touch pwned;\" \\ &|<>*?~#!"


def rendered(url: str, *words: str, **options: Any) -> str:
    """A script for a Redis without a password."""
    environ = {f"FLEET_WORKER__{name.upper()}": f"{value}" for name, value in FAST.items()}
    return script.script(
        options.pop("endpoint", Endpoint(url)),
        ["--queues", "default", *words],
        **{"environ": environ, "slots": 2, "time_limit_seconds": None, "stop_grace_seconds": 1, **options},
    )


class Scripts:
    """Starts scripts; each has a folder for temporary files of its own."""

    def __init__(self, workers: Workers, spawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.workers = workers
        self._spawn = spawn
        self.temporary = workers.folder / "tmp"
        self.temporary.mkdir()
        monkeypatch.setenv("TMPDIR", str(self.temporary))

    def start(self, text: str, *words: str, wait: bool = True) -> subprocess.Popen[Any]:
        """Run it as NAME w0; returns when its worker beats."""
        path = self.workers.folder / "worker.sh"
        path.write_text(text)
        with (self.workers.folder / "w0.log").open("ab") as log:
            command = ["bash", str(path), "--name", "w0", *words]
            process = self._spawn(command, stdout=log, stderr=log)
        if wait:
            self.workers.until(
                lambda: self.workers.is_beating("w0") or process.poll() is not None, "w0 beats"
            )
            assert process.poll() is None, self.workers.log("w0")
        return process

    def nothing_is_left(self) -> None:
        """No temporary file, and no process but those of the tests."""
        self.workers.until(lambda: not list(self.temporary.iterdir()), "its temporary files are gone")
        self.workers.until(lambda: not of_the_script(self.workers.folder), "its processes are gone")


def of_the_script(folder: Path) -> list[psutil.Process]:
    """Processes that name the script, or were started by it."""
    mark = f"TMPDIR={folder / 'tmp'}/rq-fleet."
    return [process for process in psutil.process_iter() if mark in environment_of(process)]


def environment_of(process: psutil.Process) -> str:
    try:
        return " ".join(f"{name}={value}" for name, value in process.environ().items())
    except psutil.Error:
        return ""


@pytest.fixture
def scripts(workers: Workers, spawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Scripts:
    return Scripts(workers, spawn, monkeypatch)


# --- what is written -------------------------------------------------------------------------------

EVERYTHING = {
    "endpoint": Endpoint("redis://login1:7/0", "/home/me/.local/state/rq-fleet/broker/password"),
    "slots": None,
    "time_limit_seconds": 3600.0,
    "stop_grace_seconds": 30.0,
    "environ": {"FLEET_WORKER__LEASE_SECONDS": "120.0"},
}
SCRIPTS = {
    "script-plain.sh": ((), {"environ": {}}),
    "script-everything.sh": (("--time-limit", "3600", "--label", f"note={HOSTILE}"), EVERYTHING),
}


def as_kept(name: str) -> str:
    """The script, with the place of its program made one that is on no machine."""
    words, options = SCRIPTS[name]
    text = rendered("redis://10.0.0.5:7/0", *words, **dict(options))
    return text.replace(fleet_script(), "/opt/rq-fleet/bin/fleet")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_written_as_it_was(name):
    assert as_kept(name) == (GOLDEN / name).read_text()


@pytest.mark.needs("shellcheck")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name):
    done = subprocess.run(["shellcheck", GOLDEN / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# --- how it ends -----------------------------------------------------------------------------------


def long_job(workers: Workers) -> str:
    """A job that waits for ever, and runs by now."""
    runs, gate = workers.folder / "runs", workers.folder / "gate"
    job = workers.submit("sh", "-c", f"touch {runs}; {waiting_for(gate)}")
    workers.until(runs.exists, "it runs")
    return job


def to_it(number: int) -> Callable[[subprocess.Popen[Any]], None]:
    return lambda process: process.send_signal(number)


def to_its_group(number: int) -> Callable[[subprocess.Popen[Any]], None]:
    return lambda process: os.killpg(process.pid, number)


HURRIED = {"FLEET_WORKER__STOP_GRACE_SECONDS": "0.5"}


@pytest.mark.parametrize(
    "tell",
    [to_it(signal.SIGTERM), to_it(signal.SIGHUP), to_its_group(signal.SIGINT)],
    ids=["SIGTERM", "SIGHUP", "Ctrl-C"],
)
def test_a_script_that_is_told_to_end_ends_its_worker_in_order(scripts, workers, tell):
    process = scripts.start(rendered(workers.url, environ=HURRIED))
    (done,) = workers.wait([workers.submit("sh", "-c", "touch $TMPDIR/left")])
    assert done.state == "finished"
    job = long_job(workers)
    tell(process)
    assert process.wait(60) == 0, workers.log("w0")
    assert workers.log("w0").count("stopping: 1 jobs") == 1, "told once"
    assert workers.state(job) == "queued", "handed back"
    assert not workers.client.smembers(keys.FLEET_WORKERS)
    workers.assert_clean()
    scripts.nothing_is_left()


@pytest.mark.parametrize(
    "kill", [to_it(signal.SIGKILL), to_its_group(signal.SIGKILL)], ids=["it", "its group"]
)
def test_the_worker_of_a_script_that_is_killed_ends_in_order_too(scripts, workers, kill):
    process = scripts.start(rendered(workers.url, environ=HURRIED))
    job = long_job(workers)
    kill(process)
    workers.until(lambda: not workers.client.smembers(keys.FLEET_WORKERS), "the worker has left")
    assert workers.state(job) == "queued", "handed back, not lost"
    workers.assert_clean()
    scripts.nothing_is_left()


def test_a_script_that_is_told_to_end_while_it_starts_leaves_nothing(scripts, workers):
    dice = random.Random(6)
    for number in range(8):
        process = scripts.start(rendered(workers.url), wait=False)
        time.sleep(0.04 * number + dice.uniform(0, 0.04))  # the moment is what is tested
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, 128 + signal.SIGTERM, -signal.SIGTERM), workers.log("w0")
        workers.until(lambda: not of_the_script(workers.folder), "its processes are gone")
        assert not workers.client.smembers(keys.FLEET_WORKERS)


def test_a_worker_ends_at_its_time_limit_and_the_script_with_it(scripts, workers):
    job = workers.submit("sh", "-c", waiting_for(workers.folder / "gate"))
    process = scripts.start(rendered(workers.url, "--time-limit", "3", time_limit_seconds=3), wait=False)
    assert process.wait(60) == 0, workers.log("w0")
    assert workers.state(job) == "queued"
    scripts.nothing_is_left()


def test_a_worker_that_does_not_keep_its_time_limit_is_killed(scripts, workers, monkeypatch):
    monkeypatch.setattr(script, "MARGIN_SECONDS", 1)
    process = scripts.start(rendered(workers.url, time_limit_seconds=1), wait=False)
    bash = psutil.Process(process.pid)
    workers.until(lambda: stopped_worker_of(bash), "the worker, as soon as it is there")
    used = 0.0
    while process.poll() is None:
        used = sum(bash.cpu_times()[:2])
        time.sleep(0.05)
    assert process.returncode == 128 + signal.SIGKILL
    assert used < 0.5, "it waits, and does not ask over and over"
    scripts.nothing_is_left()


def stopped_worker_of(bash: psutil.Process) -> bool:
    """Whether it has one, which is stopped now."""
    for child in bash.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "--queues" in child.cmdline():
                child.suspend()
                return True
    return False


def test_the_exit_code_is_the_workers(scripts, workers):
    process = scripts.start(rendered(workers.url), "--output-dir", "/proc/none", wait=False)
    assert process.wait(60) == 2
    assert "cannot write to /proc/none" in workers.log("w0")
    scripts.nothing_is_left()


# --- what it needs ---------------------------------------------------------------------------------


def test_values_reach_the_worker_as_they_are_whatever_is_in_them(scripts, workers):
    process = scripts.start(rendered(workers.url, "--label", f"note={HOSTILE}", slots=None))
    (worker,) = status.read(workers.client).workers
    assert worker.labels["note"] == HOSTILE
    assert worker.slots == len(os.sched_getaffinity(0)), "as many as there are processors"
    assert not list(workers.folder.rglob("pwned"))
    process.terminate()
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("mode", "told"),
    [(None, "copy it to there, and chmod 600"), (0o640, "is open to others: chmod 600")],
)
def test_a_password_that_is_not_there_or_open_to_others_is_refused(tmp_path, mode, told):
    secret, path = tmp_path / "the secret", tmp_path / "worker.sh"
    if mode is not None:
        secret.write_text("hush\n")
        secret.chmod(mode)
    path.write_text(rendered("", endpoint=Endpoint("redis://127.0.0.1:1/0", str(secret))))
    done = subprocess.run(["bash", path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{secret}" in done.stderr
    assert told in done.stderr


def test_a_machine_without_rq_fleet_is_told_so(tmp_path):
    path = tmp_path / "worker.sh"
    path.write_text(rendered("redis://127.0.0.1:1/0").replace(fleet_script(), "/nowhere/fleet"))
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", path], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "rq-fleet is not installed here, nor on PATH: /nowhere/fleet" in done.stderr


# --- the verb --------------------------------------------------------------------------------------


@pytest.fixture
def broker_password(run_fleet: Callable[..., Any]) -> Iterator[str]:
    """The embedded broker runs; its password."""
    assert run_fleet("broker", "start").returncode == 0
    yield Path(os.environ["XDG_STATE_HOME"], "rq-fleet/broker/password").read_text().strip()
    run_fleet("broker", "stop", "--force")


def test_fleet_script_writes_one_that_works_and_holds_no_secret(run_fleet, broker_password, tmp_path, spawn):
    options = [
        "--nodes",
        "2",
        "--label",
        "zone=a b",
        "--slots",
        "3",
        "--num-cpus",
        "1",
        "--idle-timeout",
        "1h",
    ]
    env = {"FLEET_WORKER__STOP_GRACE_SECONDS": "7"}
    text = run_fleet("script", "--redis-host", "127.0.0.1", *options, "--time-limit", "1h", env=env).stdout
    assert broker_password not in text
    assert "--startup-delay-seconds 2 " in text
    assert "FLEET_WORKER__STOP_GRACE_SECONDS=7.0" in text
    path = tmp_path / "worker.sh"
    path.write_text(text)
    with (tmp_path / "log").open("wb") as log:
        process = spawn(["bash", path, "--startup-delay-seconds", "0"], stderr=log)
    done = run_fleet("submit", "--wait", "--", "true")
    assert done.returncode == 0, done.stderr
    with connect(run_fleet("broker", "url").stdout.strip()) as client:
        (worker,) = status.read(client).workers
    assert (worker.slots, worker.cpus, worker.labels["zone"]) == (3, 1, "a b")
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        assert broker_password not in " ".join([*one.cmdline(), environment_of(one)])
    process.terminate()
    assert process.wait(60) == 0, (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--no-stagger", "--startup-delay-seconds", "5"), "contradict each other"),
        (("--queues", "a:1,b"), "some of these queues have a weight"),
        (("--label", "k"), "--label 'k': not of the form NAME=VALUE"),
        (("--redis-host", "x y"), "no name and no address"),
        ((), "Name its machine as workers see it"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_printed(capsys, options, told):
    with pytest.raises(SystemExit) as caught:
        main(["--redis", "redis://127.0.0.1:1/0", "script", *options])
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out) == (2, "")
    assert told in printed.err


@pytest.mark.parametrize(
    ("options", "window"),
    [
        (("--nodes", "1"), None),
        (("--nodes", "100"), "60"),
        (("--nodes", "10000"), "200"),
        (("--nodes", "100", "--no-stagger"), None),
        (("--startup-delay-seconds", "5"), "5"),
    ],
)
def test_workers_begin_spread_over_a_window_that_follows_from_their_number(capsys, options, window):
    with pytest.raises(SystemExit):
        main(["--redis", "redis://db:1/0", "script", *options])
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('"$fleet" worker')]
    words = shlex.split(command)
    found = words[words.index("--startup-delay-seconds") + 1] if "--startup-delay-seconds" in words else None
    assert found == window
