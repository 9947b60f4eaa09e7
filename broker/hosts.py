"""The hosts kept in Redis between calls of `fleet up`, `down`, `hosts`; and which workers beat.

A row is JSON that `fleet.hosts` writes and reads; here it is opaque.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def beats(client: redis.Redis, worker_names: Sequence[str]) -> dict[str, bytes | None]:
    """What the beat of each worker says, its incarnation; None where none beats. One round trip."""
    values: list[Any] = client.mget([keys.worker_beat(name) for name in worker_names]) if worker_names else []
    return dict(zip(worker_names, values, strict=True))
