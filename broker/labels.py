"""The labels that operators give workers: a hash for each worker, in its own key.

It outlives the worker's record, and a field without a name stays in it when the last label is taken
away: so a worker can tell that nobody wants its labels from a Redis that has lost them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import redis

from broker import keys

_MARK = ""


def told(fields: Mapping[bytes, bytes]) -> dict[str, str] | None:
    """The labels in a worker's hash; None where there is none."""
    if not fields:
        return None
    rows = {_text(name): _text(value) for name, value in sorted(fields.items())}
    return {name: value for name, value in rows.items() if name != _MARK}


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def change(
    pipe: Any, worker: str, given: Mapping[str, str], taken: Iterable[str], ttl_seconds: int | None
) -> None:
    """Set some labels and take others away, in the caller's transaction.

    Four commands, of which the last tells what the hash is then.
    """
    key = keys.worker_labels(worker)
    pipe.hset(key, mapping={_MARK: "1", **given})
    pipe.hdel(key, *taken, "\0")  # at least one field is named
    if ttl_seconds is None:
        pipe.persist(key)
    else:
        pipe.expire(key, ttl_seconds)
    pipe.hgetall(key)


def restore(client: redis.Redis, worker: str, labels: Mapping[str, str], ttl_seconds: int | None) -> None:
    """Write back labels that Redis has lost; what an operator has said since stays."""
    key = keys.worker_labels(worker)
    with client.pipeline(transaction=True) as pipe:
        for name, value in {_MARK: "1", **labels}.items():
            pipe.hsetnx(key, name, value)
        if ttl_seconds is not None:
            pipe.expire(key, ttl_seconds)
        pipe.execute()
