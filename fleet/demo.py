"""`fleet demo`: the whole thing on this machine, for real.

Its own Redis, its own hosts reached over real SSH, workers started by `fleet up`, jobs of both
kinds, a worker killed amid them and its jobs recovered, and everything cleaned up. Each scene
runs the very commands that a user would type and shows them, so that the demo teaches.

All it makes lies in one temporary folder, and all it starts carries that folder in its
environment, so that it can be found and ended whatever happened.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import psutil
import redis

from broker import jobs, status
from broker.command import Command
from broker.connection import connect
from broker.errors import FleetError
from broker.queue import Queue
from broker.submit import Options, submit_commands
from fleet.embedded import EmbeddedBroker, state_dir

HOSTS = ("demo1", "demo2", "demo3")
SLOTS = 2
#: of each kind: commands, and Python functions
JOBS = 150
#: a worker that dies is noticed sooner than by default, so that nobody has to wait for it
_HURRY = {"FLEET_WORKER__HEARTBEAT_SECONDS": "2", "FLEET_WORKER__LEASE_SECONDS": "8"}
_MARK = "FLEET_DEMO_FOLDER"
_TASKS = '''"""Functions that the demo enqueues with plain RQ."""
import time


def simulate(seed):
    time.sleep(0.05 + seed % 3 * 0.05)
    return seed * seed
'''


@contextmanager
def _holding_interrupts_back() -> Iterator[None]:
    """What is started within lets Ctrl-C in when it can answer it, as `fleet` does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stage(Protocol):
    """Where the demo is seen: the terminal, by way of cli/demo.py."""

    def scene(self, title: str) -> None:
        """A new part begins."""

    def command(self, line: str) -> None:
        """A command is about to run; its output follows."""

    def note(self, text: str) -> None:
        """A remark between commands."""

    def progress(self, done: int, total: int) -> None:
        """So many jobs have ended."""


class Demo:
    """One performance, in a folder of its own."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.folder = Path(tempfile.mkdtemp(prefix="fleet-demo-"))
        self._environ = self._own_environ(os.environ)
        self._sshd: subprocess.Popen[bytes] | None = None
        self._client: redis.Redis | None = None

    def play(self, *, keep: bool = False) -> None:
        """All scenes, but for the last if all shall stay. Raises FleetError where one of them fails."""
        self._start_redis()
        self._start_hosts()
        self._start_workers()
        ids = self._submit()
        victim = self._watch_and_kill(ids)
        self._show_recovery(ids, victim)
        self._compare_with_rq()
        if not keep:
            self._stop_workers()

    def how_to_go_on(self) -> str:
        """What to type after a demo that was kept, and how to end it."""
        programs, ssh = Path(sys.executable).parent, "--ssh-config ssh_config"
        pid = self._sshd.pid if self._sshd else 0
        return f"""
Still running: a Redis, {len(HOSTS)} hosts and their workers, all in {self.folder}. To use them:

    cd {self.folder}; export XDG_STATE_HOME=$PWD/state PATH={programs}:$PATH
    fleet status; fleet submit -- hostname

To end it:

    fleet down {ssh}; fleet broker stop; kill {pid}
    cd; unset XDG_STATE_HOME; rm -r {self.folder}
"""

    def close(self) -> None:
        """End all that was started and remove the folder. Not to be interrupted."""
        for process in processes_of(self.folder):
            with suppress(psutil.Error):
                process.kill()
        if self._sshd:
            self._sshd.wait(10)
        if self._client:
            self._client.close()
        # the server's own environment is not to be trusted: it writes its title over it
        with suppress(FleetError):
            self._broker().stop(force=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- scenes ----------------------------------------------------------------------------

    def _start_redis(self) -> None:
        self._stage.scene("A Redis of our own")
        # not the default port: that is for the user's own
        self._fleet("broker", "start", "--port", str(_free_port()))
        self._client = connect(self._redis_url())

    def _start_hosts(self) -> None:
        self._stage.scene(f"{len(HOSTS)} hosts, reached over SSH")
        command = [sys.executable, "-I", "-m", "fleet.demo_sshd", str(self.folder), *HOSTS]
        # its own streams, all of them: what outlives us must not hold on to our terminal, or pipe
        with open(self.folder / "sshd.log", "wb") as log:
            self._sshd = subprocess.Popen(
                command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        if self._sshd.stdout is None or not self._sshd.stdout.readline():
            raise FleetError("the demo's SSH server did not start", "Is another program in its way?")
        self._stage.note("An SSH server on loopback plays them: real keys, real shells, a home for each.")
        (self.folder / "hosts.txt").write_text("".join(f"{host} slots={SLOTS}\n" for host in HOSTS))
        self._run(["cat", "hosts.txt"], shown="cat hosts.txt")

    def _start_workers(self) -> None:
        self._stage.scene("Workers on every host")
        self._stage.note("Your own hosts get rq-fleet installed; these share a disk with us and need not.")
        (self.folder / "tasks.py").write_text(_TASKS)
        self._fleet(
            *("up", "hosts.txt", "--ssh-config", "ssh_config"),
            *("--no-install", "--python", sys.executable, "--path", str(self.folder)),
        )

    def _submit(self) -> list[str]:
        self._stage.scene(f"{2 * JOBS} jobs, of both kinds")
        first = self._fleet("submit", "--", "sh", "-c", "echo hello from $FLEET_HOST", output=True).strip()
        sys.stdout.write(f"{first}\n")
        client = self._connected()
        lines = [f"sleep 0.{number % 3}; echo {number}" for number in range(JOBS - 7)] + ["sleep 2"] * 6
        commands = [(None, Command(("sh", "-c", line))) for line in lines]
        ids = submit_commands(client, "default", commands, Options())
        self._stage.note(f"{len(ids)} more commands, and {JOBS} Python functions with plain RQ:")
        self._stage.note("    rq.Queue('default', connection=redis).enqueue('tasks.simulate', 42)")
        queue = Queue("default", connection=client)
        functions = [queue.enqueue("tasks.simulate", seed).id for seed in range(JOBS)]
        return [first, *ids, *functions]

    def _watch_and_kill(self, ids: Sequence[str]) -> str:
        """Watch the jobs; kill a worker once a third have ended. Returns its name."""
        victim = ""
        for done in self._watch(ids):
            if not victim and done >= len(ids) // 3:
                victim = self._kill_a_busy_worker()
        return victim

    def _kill_a_busy_worker(self) -> str:
        for worker in status.read(self._connected()).workers:
            if worker.state == "busy":
                os.kill(worker.pid, signal.SIGKILL)
                self._stage.command(f"kill -9 {worker.pid}")
                self._stage.note(
                    f"{worker.name} is dead, with {len(worker.running)} jobs running. Their processes died"
                    " with it; its lease runs out in 8 s (30 s by default), then others run them."
                )
                return worker.name
        return ""

    def _watch(self, ids: Sequence[str]) -> Iterator[int]:
        """Yield how many of the jobs have ended, until all have."""
        done = 0
        while done < len(ids):
            states = jobs.states(self._connected(), ids)
            done = sum(state in jobs.ENDED for state in states.values())
            self._stage.progress(done, len(ids))
            yield done
            time.sleep(0.1)

    def _show_recovery(self, ids: Sequence[str], victim: str) -> None:
        self._stage.scene("Nothing lost, nothing done twice")
        views = [jobs.show(self._connected(), job_id) for job_id in ids]
        recovered = [view for view in views if any(attempt.outcome == "lost" for attempt in view.attempts)]
        finished = sum(view.state == "finished" for view in views)
        self._stage.note(
            f"{finished} of {len(ids)} jobs finished; {len(recovered)} were lost with {victim} and run again."
        )
        if recovered:
            self._fleet("show", recovered[0].id)
        self._fleet("logs", ids[0])
        if finished < len(ids):
            raise FleetError(f"{len(ids) - finished} jobs did not finish")

    def _compare_with_rq(self) -> None:
        self._stage.scene("What we see, and what RQ's own tools see")
        self._fleet("status")
        self._stage.command("rq info")
        self._stage.note("(the URL of Redis is in RQ_REDIS_URL: passwords do not belong on command lines)")
        environ = self._environ | {"RQ_REDIS_URL": self._redis_url()}
        self._run([sys.executable, "-m", "rq.cli", "info"], environ=environ)

    def _stop_workers(self) -> None:
        self._stage.scene("Down again")
        self._fleet("down", "--ssh-config", "ssh_config", partial=True)

    # -- means -----------------------------------------------------------------------------

    def _fleet(self, *arguments: str, output: bool = False, partial: bool = False) -> str:
        """Run `fleet ARGUMENTS`, shown. Raises FleetError where it fails; `partial` allows exit code 3."""
        shown = " ".join(part if part.isprintable() and " " not in part else repr(part) for part in arguments)
        shown = shown.replace(sys.executable, "PYTHON").replace(str(self.folder), ".")
        command = [sys.executable, "-I", "-m", "cli", *arguments]
        return self._run(command, shown=f"fleet {shown}", output=output, partial=partial)

    def _run(
        self,
        command: Sequence[str],
        *,
        shown: str = "",
        output: bool = False,
        partial: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> str:
        if shown:
            self._stage.command(shown)
        sys.stdout.flush()
        with _holding_interrupts_back():
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environ or self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if output else None,
                text=True,
            )
        with process:
            try:
                out, _ = process.communicate()
            except BaseException:
                process.kill()
                raise
        if process.returncode not in ((0, 3) if partial else (0,)):
            raise FleetError(f"{shown or command[0]} ended with exit code {process.returncode}", "See above.")
        return out or ""

    def _connected(self) -> redis.Redis:
        if self._client is None:
            raise FleetError("the demo's Redis has not been started")
        return self._client

    def _redis_url(self) -> str:
        running = self._broker().running()
        if running is None:
            raise FleetError("the demo's Redis is gone")
        return running.url

    def _broker(self) -> EmbeddedBroker:
        return EmbeddedBroker(state_dir(self._environ))

    def _own_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Nothing of the user's fleet is touched: settings, state and broker are the demo's own."""
        kept = {name: value for name, value in environ.items() if not name.startswith(("FLEET_", "RQ_"))}
        own = {"XDG_STATE_HOME": f"{self.folder}/state", "XDG_CONFIG_HOME": f"{self.folder}/config"}
        return kept | own | _HURRY | {_MARK: str(self.folder)}


def _free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that the demo in `folder` started, near or far: they all carry its name."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            environ = process.environ()
            home = environ.get("HOME", "")
            if environ.get(_MARK) == str(folder) or home.startswith(f"{folder}/"):
                found.append(process)
    return found


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no signal stop what must be done to the end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
