"""Go on with the dependents of jobs that ended, where one call was not enough."""

from __future__ import annotations

import redis

from broker import keys, scripts


def settle(client: redis.Redis, gate: str = "", how: str = "") -> bool:
    """Look at all dependents that are still to be looked at.

    `gate` is first ended as `how` says, 'finished' or 'canceled'; returns whether it is.
    """
    left, is_so = scripts.SETTLE(client, [keys.SETTLING], [gate, how])
    while left:
        left = settle_some(client)
    return bool(is_so)


def settle_some(client: redis.Redis) -> int:
    """Look at some hundreds; returns how many are left."""
    left: int = scripts.SETTLE(client, [keys.SETTLING], ["", ""])[0]
    return left
