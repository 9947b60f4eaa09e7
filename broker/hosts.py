"""The hosts kept in Redis between calls of `fleet up`, `down`, `hosts`; and which workers are there.

A row is JSON that `fleet.hosts` writes and reads; here it is opaque.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from broker import keys


def kept(client: redis.Redis) -> dict[str, str]:
    """The rows by name of the host, in order of name. Raises what redis-py raises."""
    rows: dict[Any, Any] = client.hgetall(keys.HOSTS)
    return dict(sorted((name.decode(), row.decode()) for name, row in rows.items()))


def keep(client: redis.Redis, rows: Mapping[str, str]) -> None:
    """Add rows, in place of older ones of these names."""
    with client.pipeline() as pipe:
        for name, row in rows.items():
            pipe.hset(keys.HOSTS, name, row)
        pipe.execute()


def remove(client: redis.Redis, names: Sequence[str]) -> int:
    """Remove rows; returns how many there were."""
    return int(client.hdel(keys.HOSTS, *names)) if names else 0


@dataclass(frozen=True)
class Sign:
    """Of a worker's life: its incarnation, and whether it has left by itself, lately."""

    incarnation: bytes
    has_left: bool = False


def signs(client: redis.Redis, worker_names: Sequence[str]) -> dict[str, Sign | None]:
    """Who beats under each name, or who last left it by itself; None for neither. One round trip."""
    asked = [key for name in worker_names for key in (keys.worker_beat(name), keys.worker_left(name))]
    values: list[Any] = client.mget(asked) if asked else []
    pairs = zip(values[::2], values[1::2], strict=True)
    return dict(zip(worker_names, (_sign(beat, left) for beat, left in pairs), strict=True))


def _sign(beat: bytes | None, left: bytes | None) -> Sign | None:
    if beat is not None:
        return Sign(beat)
    return None if left is None else Sign(left, has_left=True)
