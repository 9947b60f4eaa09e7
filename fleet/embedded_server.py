"""What we say to the embedded Redis, and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.errors import Conflict, FleetError
from fleet.embedded_copies import keys_in
from fleet.embedded_folder import RunningBroker
from fleet.redis_server import ANSWER_SECONDS

if TYPE_CHECKING:
    import redis


@dataclass(frozen=True)
class BrokerStatus:
    """What a running broker says of itself; sizes in bytes, times in seconds."""

    broker: RunningBroker
    #: "redis" or "valkey", and its own version (not the one of Redis that Valkey claims)
    server: str
    version: str
    uptime_seconds: int
    #: it still reads its data and answers nothing else
    loading: bool
    append_only: bool
    append_fsync: str
    append_only_last_write: str
    append_only_bytes: int
    last_backup: str
    eviction: str
    memory_bytes: int
    #: 0: no limit
    memory_limit_bytes: int
    keys: int


@contextmanager
def client_of(running: RunningBroker) -> Iterator[redis.Redis]:
    """A client of the broker; errors of redis-py become RedisUnreachable and RedisDenied."""
    from broker.connection import connect, translated

    with translated(running.address), connect(running.url, timeout_seconds=ANSWER_SECONDS) as client:
        yield client


def status_of(running: RunningBroker) -> BrokerStatus:
    """Ask the broker. Raises RedisUnreachable when it does not answer."""
    with client_of(running) as client:
        fsync = client.config_get("appendfsync")["appendfsync"]
        return _status(running, client.info("everything"), str(fsync))


def _status(running: RunningBroker, info: Mapping[str, Any], fsync: str) -> BrokerStatus:
    return BrokerStatus(
        broker=running,
        server="valkey" if "valkey_version" in info else "redis",
        version=str(info.get("valkey_version") or info["redis_version"]),
        uptime_seconds=info["uptime_in_seconds"],
        loading=bool(info["loading"]),
        append_only=bool(info["aof_enabled"]),
        append_fsync=fsync,
        append_only_last_write=info["aof_last_write_status"],
        append_only_bytes=info.get("aof_current_size", 0),
        last_backup=info["rdb_last_bgsave_status"],
        eviction=info["maxmemory_policy"],
        memory_bytes=info["used_memory"],
        memory_limit_bytes=info["maxmemory"],
        keys=keys_in(info),
    )


def shut_down(running: RunningBroker, *, force: bool) -> None:
    """Have the broker write its data and end; returns when it has been told.

    Raises Conflict, unless `force`, when it could not write its last changes to disk.
    """
    from redis import exceptions

    with client_of(running) as client:
        if not force and client.info("persistence")["aof_last_write_status"] != "ok":
            raise Conflict(
                f"the embedded Redis could not write its last changes to {running.data_dir}; "
                "they would be lost",
                "Free some space and try again, or use --force.",
            )
        try:
            client.shutdown()
        except (exceptions.ConnectionError, exceptions.TimeoutError):
            pass  # as it should be: it ends without an answer
        except exceptions.ResponseError as exc:
            raise FleetError(f"the embedded Redis refuses to stop: {exc}") from exc
