"""`desk`: what a program has that knows only `redis` and `rq`, and one worker that serves its queues.

Each test runs against a fleet worker and against a stock `rq worker`. The latter is the oracle: what
it does is what a producer may count on, so an expectation of ours that is not RQ's fails there.
`@pytest.mark.fleet_only` is on what is ours alone; docs/rq.md tells of each. `@pytest.mark.forks` is
on what depends on the executor: it runs a third time, against executors that fork for each job.

One worker serves all tests of this package, one job at a time. Redis is not flushed between them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import rq
from rq.exceptions import InvalidJobOperation
from rq.job import Job
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from fleet.worker_config import WorkerConfig
from tests.conftest import RedisServer, wait_until
from tests.integration.rq import functions

HERE = str(Path(functions.__file__).parent)
#: most urgent first
QUEUES = ("high", "default", "low")
#: the fleet tells serializers apart by itself; an `rq worker` has one
JSON_QUEUE = "json"
ENDED = {"finished", "failed", "stopped", "canceled"}
SETTINGS = {"heartbeat_seconds": 0.5, "lease_seconds": 60.0}

KINDS = ("fleet", "fleet-fork", "rq")


@dataclass
class Desk:
    """What a producer does: enqueue, wait, look. `worker` is the name of the worker that serves it."""

    kind: str
    url: str
    client: redis.Redis
    folder: Path
    worker: str
    start: Callable[[str, Sequence[str]], subprocess.Popen[bytes]]
    _files: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    def start_another(self, *queues: str) -> tuple[str, subprocess.Popen[bytes]]:
        """A second worker for those queues; its name and process."""
        name = f"{self.worker}-{next(self._files)}"
        return name, self.start(name, queues)

    def queue(self, name: str = "default", *, json: bool = False) -> rq.Queue:
        if json:
            self._need_json()
            return rq.Queue(JSON_QUEUE, connection=self.client, serializer=JSONSerializer)
        return rq.Queue(name, connection=self.client)

    def _need_json(self) -> None:
        if self.kind == "rq" and not self.client.exists(f"rq:worker:{self.worker}-json"):
            self.start(f"{self.worker}-json", [JSON_QUEUE])

    def enqueue(
        self, function: Any, *args: Any, queue: str = "default", json: bool = False, **options: Any
    ) -> Job:
        """Enqueue a function, one of functions where it is a plain name."""
        return self.queue(queue, json=json).enqueue(named(function), args=args, **options)

    def run(self, function: Any, *args: Any, **options: Any) -> Job:
        """Enqueue it and wait for its end; the job as it is stored then."""
        job = self.enqueue(function, *args, **options)
        self.wait(job)
        return self.fetch(job)

    def fetch(self, job: Job) -> Job:
        return Job.fetch(job.id, connection=self.client, serializer=job.serializer)

    def status(self, job: Job) -> str | None:
        try:
            return str(job.get_status().value)
        except InvalidJobOperation:
            return None

    def wait(self, *jobs: Job, seconds: float = 60) -> list[str | None]:
        """Wait until all have ended, or are gone; returns their states."""
        self.until(lambda: all(self.status(job) in {*ENDED, None} for job in jobs), "all ended", seconds)
        return [self.status(job) for job in jobs]

    def until(self, condition: Callable[[], Any], message: str = "", seconds: float = 60) -> Any:
        return wait_until(condition, timeout_seconds=seconds, message=message)

    def until_status(self, job: Job, status: str) -> None:
        self.until(lambda: self.status(job) == status, f"{job.id} {status}")
        if status == "scheduled":  # RQ says so before all of it is stored
            self.until(lambda: not self.client.exists(f"rq:executions:{job.id}"), "its execution is over")

    def file(self) -> Path:
        """A file that is not there yet."""
        return self.folder / f"file-{next(self._files)}"

    @contextmanager
    def busy(self, **options: Any) -> Iterator[Job]:
        """While this lasts the worker runs a job, and what is enqueued waits; yields that job."""
        begun, gate = self.file(), self.file()
        job = self.enqueue("begin_and_wait_for", str(begun), str(gate), **options)
        self.until(begun.exists, f"{job.id} runs")
        try:
            yield job
        finally:
            gate.touch()

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this lasts nothing is taken from any queue.

        Unlike `busy`: where jobs are short, a busy fleet worker may hold some that it has not begun.
        """
        with self.busy() as job:
            suspend(self.client)
        self.wait(job)
        try:
            yield
        finally:
            resume(self.client)

    def settled(self) -> None:
        """Wait until all that was enqueued before has been looked at."""
        assert self.run("add", 1, 1, queue="low").return_value() == 2

    def told(self, job: Job, what: str) -> str | None:
        """What a callback of the job noted under `what`."""
        found = self.client.get(f"test:{what}:{job.id}")
        return found.decode() if found else None

    def make_due(self, job: Job) -> None:
        """Let the time come that a scheduled job waits for."""
        assert self.client.zadd(f"rq:scheduled:{job.origin}", {job.id: 1}, xx=True, ch=True)
        self.tick(job.origin)

    def tick(self, queue: str = "default") -> None:
        """What RQ's scheduler does every second, in a process of its own; a fleet worker needs no help."""
        if self.kind == "rq":
            scheduler = RQScheduler([queue], connection=self.client, logging_level="WARNING")
            scheduler.acquire_locks()
            scheduler.enqueue_scheduled_jobs()
            scheduler.release_locks()

    def delay(self, job: Job) -> float:
        """Seconds until a scheduled job is due."""
        score = self.client.zscore(f"rq:scheduled:{job.origin}", job.id)
        seconds, microseconds = self.client.time()
        return float(score) - seconds - microseconds / 1e6


def named(function: Any) -> Any:
    return f"functions.{function}" if isinstance(function, str) and "." not in function else function


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="package")
def rq_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests of this package; each kind of worker has a database of its own."""
    server = RedisServer(tmp_path_factory.mktemp("rq-redis")).start()
    yield server
    server.stop()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Which kinds of worker a test is held against."""
    if "desk" in metafunc.fixturenames:
        oracle = () if metafunc.definition.get_closest_marker("fleet_only") else ("rq",)
        forks = ("fleet-fork",) if metafunc.definition.get_closest_marker("forks") else ()
        metafunc.parametrize("desk", ("fleet", *forks, *oracle), indirect=True, scope="package")


def _kind_of(item: pytest.Item) -> str:
    """The kind of worker that a test of this package is held against; the hook is told of all."""
    call = getattr(item, "callspec", None)
    is_ours = Path(__file__).parent in item.path.parents
    return str(call.params.get("desk", "")) if call and is_ours else ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One kind after the other, so that each worker is started once."""
    kinds = {index: kind for index, item in enumerate(items) if (kind := _kind_of(item)) in KINDS}
    at = list(kinds)
    ours = [items[index] for index in sorted(at, key=lambda index: KINDS.index(kinds[index]))]
    for index, item in zip(at, ours, strict=True):
        items[index] = item


@pytest.fixture(scope="package")
def desk(
    request: pytest.FixtureRequest, rq_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    """A producer's desk; the worker behind it is idle, or about to be."""
    kind: str = request.param
    folder = tmp_path_factory.mktemp(f"desk-{kind}")
    database = KINDS.index(kind)
    url = f"redis://127.0.0.1:{rq_redis.port}/{database}"
    started: list[subprocess.Popen[bytes]] = []
    with redis.Redis.from_url(url) as client:

        def start(name: str, queues: Sequence[str]) -> subprocess.Popen[bytes]:
            command = (_rq_command if kind == "rq" else _fleet_command)(url, name, queues, kind, folder)
            started.append(_started(command, folder / f"{name}.log"))
            wait_until(lambda: client.hget(f"rq:worker:{name}", "state") == b"idle", message=f"{name} waits")
            return started[-1]

        start(f"{kind}-worker", QUEUES if kind == "rq" else (*QUEUES, JSON_QUEUE))
        yield Desk(kind, url, client, folder, f"{kind}-worker", start)
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _rq_command(url: str, name: str, queues: Sequence[str], kind: str, folder: Path) -> list[str]:
    rq_script = str(Path(sys.executable).parent / "rq")
    serializer = ["--serializer", "json"] if JSON_QUEUE in queues else []
    return [rq_script, "worker", "--url", url, "--name", name, "--path", HERE, *serializer, *queues]


def _fleet_command(url: str, name: str, queues: Sequence[str], kind: str, folder: Path) -> list[str]:
    config = WorkerConfig(
        name=name,
        host="here",
        redis_url=url,
        output_dir=str(folder / "work"),
        queues=tuple(queues),
        executor="fork" if kind == "fleet-fork" else "warm",
        paths=(HERE,),
        settings=SETTINGS,
    )
    file = folder / f"{name}.json"
    file.write_text(config.to_json())
    return [sys.executable, "-I", "-m", "fleet.worker", "--config", str(file)]


def _started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environ | {"HOME": str(log.parent)},
            start_new_session=True,
        )
