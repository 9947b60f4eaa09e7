"""Fixtures for tests with real workers: `workers.start("w0", slots=2)` and what they are asked."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from broker import jobs, keys
from broker.command import Command
from broker.connection import connect
from broker.submit import Options, submit_commands
from fleet.worker_config import WorkerConfig
from tests.integration import fleets
from tests.integration.sshd import PYTHON, SshdFarm, fleet_processes

#: what there is to wait for comes soon, and nobody is taken for lost, however busy the machine
FAST = {"heartbeat_seconds": 0.5, "lease_seconds": 30.0, "stop_grace_seconds": 5.0, "kill_grace_seconds": 1.0}
#: for all workers of a test in which one is lost
HASTY = {"heartbeat_seconds": 0.5, "lease_seconds": 5.0}


class Workers:
    """Real workers in processes of their own; all are killed when the test ends."""

    def __init__(self, url: str, folder: Path, spawn: Callable[..., subprocess.Popen[Any]]) -> None:
        self.url = url
        self.folder = folder
        self.client = connect(url)
        self._spawn = spawn
        self._started = 0
        self._eventually: Callable[..., Any]

    def start(
        self, name: str, *, settings: dict[str, Any] | None = None, wait: bool = True, **fields: Any
    ) -> subprocess.Popen[Any]:
        """Start one and wait until it is registered; its log is `self.log(name)`."""
        options = {"host": "here", "output_dir": str(self.folder / "work"), "slots": 1} | fields
        prefix = options.pop("prefix", ())
        paths = options.pop("paths", (str(Path(__file__).parent),))
        config = WorkerConfig(
            name=name, redis_url=self.url, paths=paths, settings=FAST | (settings or {}), **options
        )
        self._started += 1
        file = self.folder / f"{name}.{self._started}.config.json"
        file.write_text(config.to_json())
        with open(self.folder / f"{name}.log", "ab") as log:
            command = [*prefix, sys.executable, "-I", "-m", "fleet.worker", "--config", str(file)]
            process = self._spawn(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        if wait:
            self.until(lambda: self.is_beating(name) or process.poll() is not None, f"{name} registered")
            assert process.poll() is None, self.log(name)
        return process

    def is_beating(self, name: str) -> bool:
        return bool(self.client.exists(keys.worker_beat(name)))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, condition: Callable[[], Any], message: str = "", seconds: float = 60) -> Any:
        """Poll `condition`; a Redis that is away, or still loading, is no answer yet."""

        def asked() -> Any:
            try:
                return condition()
            except redis.ConnectionError:
                return False

        return self._eventually(asked, timeout_seconds=seconds, message=message)

    def submit(self, *argv: str, **options: Any) -> str:
        """Submit one command; returns the job's id."""
        return self.submit_many([argv], **options)[0]

    def submit_in(self, cwd: object, *argv: str) -> str:
        """Submit one command that runs in a folder of the caller's."""
        command = Command(argv, cwd=str(cwd))
        return submit_commands(self.client, "default", [(None, command)], Options())[0]

    def submit_many(
        self, lines: Sequence[Sequence[str]], queue: str = "default", **options: Any
    ) -> list[str]:
        commands = [(None, Command(tuple(argv))) for argv in lines]
        return submit_commands(self.client, queue, commands, Options(**options))

    def state(self, job_id: str) -> str | None:
        return jobs.states(self.client, [job_id])[job_id]

    def wait(self, job_ids: Sequence[str], seconds: float = 90) -> list[jobs.JobView]:
        """Wait until all have ended; returns them."""
        self.until(
            lambda: all(state in jobs.ENDED for state in jobs.states(self.client, job_ids).values()),
            f"{len(job_ids)} jobs ended",
            seconds,
        )
        return [jobs.show(self.client, job_id) for job_id in job_ids]

    def kill(self, process: subprocess.Popen[Any], number: int = signal.SIGKILL) -> None:
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            process.wait(60)

    def leftovers(self) -> dict[str, Any]:
        """What must be gone once everything is drained: leases, executions, running marks."""
        return {
            "leases": self.client.zrange(keys.LEASES, 0, -1),
            "executions": list(self.client.scan_iter("rq:execution*")),
            "running": [key for key in self.client.scan_iter("rq:wip:*") if self.client.zcard(key)],
            "held": list(self.client.scan_iter("fleet:worker:*:leases")),
        }

    def assert_clean(self) -> None:
        assert not any(self.leftovers().values()), self.leftovers()


@pytest.fixture
def workers(
    redis_url: str, tmp_path: Path, spawn: Callable[..., Any], eventually: Callable[..., Any]
) -> Iterator[Workers]:
    """Workers on the session's Redis."""
    yield from _workers(redis_url, tmp_path, spawn, eventually)


@pytest.fixture
def workers_of(
    tmp_path: Path, spawn: Callable[..., Any], eventually: Callable[..., Any]
) -> Iterator[Callable[[str], Workers]]:
    """`workers_of(url)`: workers on a Redis of the test's own."""
    made: list[Workers] = []

    def make(url: str) -> Workers:
        found = next(_workers(url, tmp_path, spawn, eventually))
        made.append(found)
        return found

    yield make
    for found in made:
        found.client.close()


def _workers(url: str, folder: Path, spawn: Any, eventually: Any) -> Iterator[Workers]:
    found = Workers(url, folder, spawn)
    found._eventually = eventually
    yield found
    found.client.close()


@pytest.fixture
def farm(tmp_path: Path, spawn: Any) -> Iterator[SshdFarm]:
    farm = SshdFarm(tmp_path / "farm", spawn)
    yield farm
    for process in fleet_processes(farm.folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def fleet(run_fleet: Any, farm: SshdFarm, fleet_redis_url: str, tmp_path: Path) -> Callable[..., Any]:
    """`fleet("up", "a", "b")` with a hosts file of these hosts; without names just the verb."""

    def run(verb: str, *names: str, options: tuple[str, ...] = (), **how: Any) -> Any:
        file = tmp_path / "hosts.txt"
        file.write_text("".join(f"{name}\n" for name in names))
        words = [verb, *options, "--ssh-config", farm.config, *([file] if names else [])]
        words += ["--no-install", "--python", PYTHON] if verb == "up" and "--python" not in options else []
        return run_fleet(*words, env={**fleets.FAST, **how.pop("env", {})}, **how)

    return run
