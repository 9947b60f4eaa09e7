"""The harness: one Redis, a nursery of processes, one history; and the evidence that they leave."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis

from broker import keys, status
from broker.command import Command
from broker.connection import connect
from broker.submit import Options, submit_commands
from fleet.worker_config import WorkerConfig
from tests.chaos import commands, journal, story
from tests.chaos.evidence import Dump, Evidence
from tests.chaos.history import Event, History, read
from tests.conftest import REPOSITORY, RedisServer

#: a fleet in a hurry
SETTINGS = {
    "heartbeat_seconds": 0.4,
    "lease_seconds": 2.0,
    "stop_grace_seconds": 5.0,
    "kill_grace_seconds": 1.0,
}
#: the journal must hold every step that was acknowledged, and be whole
REDIS_OPTIONS = ("--appendfsync", "always", "--auto-aof-rewrite-percentage", "0", "--databases", "512")
#: what a drain must leave none of
_LEFT = ("fleet:leases", "fleet:wake:*", "fleet:worker*", "rq:wip:*", "rq:execution*", "rq:worker*")
#: seconds that Redis may take to read its journal
_LOADING_SECONDS = 120.0
_ENDED = frozenset(("finished", "failed", "stopped", "canceled"))


class PatientRedis(RedisServer):
    """A server that may take long to start: it reads all of its journal."""

    def _answers(self) -> bool:
        deadline = time.monotonic() + _LOADING_SECONDS
        while not super()._answers():
            if time.monotonic() > deadline or self.process is None or self.process.poll() is not None:
                return False
        return True


@dataclass
class Child:
    """A process of the nursery. `status` is its exit code, negative for a signal, None while it lives."""

    who: str
    pid: int = 0
    status: int | None = None


class Harness:
    """Everything of one experiment. `folder` holds all that it leaves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "history.jsonl"
        self.history = History(self.path, "harness")
        self.redis = PatientRedis(folder / "redis", REDIS_OPTIONS)
        self._nursery: subprocess.Popen[bytes] | None = None
        self._heard = threading.Condition()
        self._children: dict[str, Child] = {}
        self._by_pid: dict[int, Child] = {}
        self._configs = 0

    # -- processes ---------------------------------------------------------------------------

    def start(self) -> Harness:
        """Start Redis and the nursery."""
        self.redis.start()
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        threading.Thread(target=self._listen, name="nursery", daemon=True).start()
        return self

    def close(self) -> None:
        """End all that is left, the hard way."""
        if self._nursery and self._nursery.stdin:
            self._nursery.stdin.close()
            self._nursery.wait(60)
        self.redis.kill()
        self.history.close()

    def _listen(self) -> None:
        assert self._nursery is not None
        assert self._nursery.stdout is not None
        for line in self._nursery.stdout:
            answer = json.loads(line)
            with self._heard:
                if "born" in answer:
                    child = self._children[answer["who"]]
                    child.pid = answer["born"]
                    self._by_pid[child.pid] = child
                else:
                    self._mourn(self._by_pid.pop(answer["dead"]), answer["status"])
                self._heard.notify_all()
        self._nursery.stdout.close()

    def _mourn(self, child: Child, status: int) -> None:
        if child.who in self.workers:
            self.history.note("died", worker=child.who, wall=time.time(), status=status)
        child.status = status

    @property
    def workers(self) -> dict[str, Child]:
        """The workers that ever were, by name: their last lives."""
        return {who: child for who, child in self._children.items() if who.startswith("w")}

    def fork(self, role: str, who: str, **order: Any) -> Child:
        """Start a participant and wait until it is there."""
        assert self._nursery is not None
        assert self._nursery.stdin is not None
        child = self._children[who] = Child(who)
        order |= {"role": role, "who": who, "history": str(self.path)}
        order |= {"log": str(self.folder / f"{who}.log")}
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        self._nursery.stdin.flush()
        with self._heard:
            assert self._heard.wait_for(lambda: child.pid, 90), "the nursery does not answer"
        return child

    def worker(
        self,
        name: str,
        *,
        url: str | None = None,
        settings: dict[str, Any] | None = None,
        failpoint: Sequence[str] | None = None,
        clock_offset: float = 0.0,
        **fields: Any,
    ) -> Child:
        """Start a worker of the fleet; `fields` are those of WorkerConfig."""
        options: dict[str, Any] = {"host": "here", "output_dir": str(self.folder / "work")} | fields
        config = WorkerConfig(
            name=name,
            redis_url=url or self.redis.url,
            paths=(str(Path(__file__).parent),),
            settings=SETTINGS | (settings or {}),
            **options,
        )
        self._configs += 1
        file = self.folder / f"{name}.{self._configs}.json"
        file.write_text(config.to_json())
        return self.fork(
            "worker", name, config=str(file), failpoint=list(failpoint or ()), clock_offset=clock_offset
        )

    def kill(self, child: Child, number: int = signal.SIGKILL) -> None:
        """Send a signal; the death of a worker is written down before."""
        if number == signal.SIGKILL and child.who in self.workers:
            self.history.note("killed", target="worker", worker=child.who, wall=time.time())
        self.signal(child.pid, number)

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to any process, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait(self, child: Child, seconds: float = 90.0) -> int:
        """Wait for its end; returns its status."""
        with self._heard:
            self._heard.wait_for(lambda: child.status is not None, seconds)
        assert child.status is not None, self._where_it_hangs(child)
        return child.status

    def _where_it_hangs(self, child: Child) -> str:
        self.signal(child.pid, signal.SIGUSR1)  # a worker of ours then says what its threads do
        time.sleep(1.0)
        return self.log(child.who)

    def log(self, who: str) -> str:
        """What it said, for a message."""
        path = self.folder / f"{who}.log"
        return f"{who}:\n" + (path.read_text(errors="replace")[-3000:] if path.exists() else "(nothing)")

    # -- conditions ----------------------------------------------------------------------------

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
        """Poll; a Redis that is away is no answer yet."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(redis.RedisError, OSError):
                if found := condition():
                    return found
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            time.sleep(0.02)

    def until_registered(self, client: redis.Redis, worker: Child) -> None:
        """Wait until this very life of a worker is in the registry."""
        own = f'"pid": {worker.pid},'.encode()
        record = keys.worker_record(worker.who)
        self.until(lambda: own in (client.get(record) or b""), f"{worker.who} is there")

    def have_ended(self, client: redis.Redis, ids: Sequence[str]) -> bool:
        """Whether all these jobs are in a terminal state, or gone."""
        with client.pipeline(transaction=False) as pipe:
            for job in ids:
                pipe.hget(keys.job(job), "status")
            return all(reply is None or reply.decode() in _ENDED for reply in pipe.execute())

    @contextmanager
    def client(self, database: int = 0) -> Iterator[redis.Redis]:
        """A client of ours, past all faults but those of Redis itself."""
        found = connect(f"redis://127.0.0.1:{self.redis.port}/{database}")
        try:
            yield found
        finally:
            found.close()

    def submit(self, client: redis.Redis, *seconds: float, queue: str = "default") -> list[str]:
        """Commands that run for so long, intended and acknowledged; returns their ids."""
        ids = [f"job-{secrets.token_hex(4)}" for _ in seconds]
        for job in ids:
            self.history.note("intent", job=job, queue=queue, retries=0)
        rows = [(job, Command(commands.work(wanted))) for job, wanted in zip(ids, seconds, strict=True)]
        submit_commands(client, queue, rows, Options())
        self.history.note("ack", jobs=ids)
        return ids

    def runs(self, job: str) -> list[Event]:
        """The starts of a job, so far."""
        return [event for event in read(self.path) if event["event"] == "start" and event["job"] == job]

    def drain(self, children: Sequence[Child], seconds: float = 90.0) -> None:
        """Let workers leave, all at once."""
        for child in children:
            self.kill(child, signal.SIGTERM)
        for child in children:
            assert self.wait(child, seconds) == 0, self.log(child.who)
        self.history.note("drained")

    def descendants(self, child: Child) -> list[psutil.Process]:
        """The processes of a worker: sidecar, executors, commands."""
        try:
            return psutil.Process(child.pid).children(recursive=True)
        except psutil.Error:
            return []

    # -- evidence ------------------------------------------------------------------------------

    def evidence(self) -> Evidence:
        """What was left to judge by."""
        with self.client() as client:
            dump = dumped(client)
        changes = story.stories(journal.files(self.redis.folder))[0]
        return Evidence(list(read(self.path)), changes, dump)


def dumped(client: Any) -> Dump:
    """What is in Redis now."""
    names = [key.decode() for key in client.scan_iter("rq:job:*", count=1000)]
    ids = [name[7:] for name in names if not name.endswith((":dependents", ":dependencies"))]
    found = {}
    for start in range(0, len(ids), 1000):
        some = ids[start : start + 1000]
        with client.pipeline(transaction=False) as pipe:
            for job in some:
                pipe.hmget(keys.job(job), "status", "fleet_lease")
            for job, (state, lease) in zip(some, pipe.execute(), strict=True):
                found[job] = ((state or b"").decode(), lease.decode() if lease else None)
    queues = {keys.queue_of(key.decode()): key for key in client.smembers(keys.QUEUES)}
    queued = {name: [job.decode() for job in client.lrange(key, 0, -1)] for name, key in queues.items()}
    left = [key.decode() for pattern in _LEFT for key in client.scan_iter(pattern, count=1000)]
    return Dump(found, queued, sorted(set(left)))


def digest(client: redis.Redis) -> dict[str, str]:
    """Every key and what it holds, to tell whether anything changed."""
    keys_there: Any = client.scan_iter(count=1000)
    return {key.decode(): repr(_content(client, key)) for key in keys_there}


def _content(client: Any, key: bytes) -> Any:
    kind = client.type(key).decode()
    if kind == "hash":
        return sorted(client.hgetall(key).items())
    if kind == "zset":
        return client.zrange(key, 0, -1, withscores=True)
    if kind == "list":
        return client.lrange(key, 0, -1)
    if kind == "set":
        return sorted(client.smembers(key))
    return client.xrange(key) if kind == "stream" else client.get(key)


def counts(client: redis.Redis) -> dict[str, list[int]]:
    """What we say of the queues: queued, running, finished, failed."""
    found = status.read(client).queues
    return {q.name: [q.queued, q.running, q.finished, q.failed] for q in found}


def rq_counts(url: str) -> dict[str, list[int]]:
    """What `rq info` says of the queues: queued, running, finished, failed."""
    command = [str(Path(sys.executable).parent / "rq"), "info", "--raw", "--only-queues", "--url", url]
    said = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True).stdout
    rows = re.findall(r"^queue (\S+) (\d+), (\d+) executing, (\d+) finished, (\d+) failed", said, re.M)
    return {name: [int(number) for number in numbers] for name, *numbers in rows}
