"""How long the steps of `fleet up` took at hosts, and how often each failed, since this Redis began.

The hash `fleet:bootstrap` has for each step a histogram, as broker/history.py has them, and `failed:STEP`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import redis

from broker import keys
from broker.history import Times, bucket_of, numbers, times

#: steps by which hosts are brought up, in their order
STEPS = ("connect", "probe", "version", "tunnel", "install", "start", "confirm")


@dataclass(frozen=True)
class Bootstraps:
    """By step: how long it took where it was done, and at how many hosts it failed."""

    done: Mapping[str, Times]
    failed: Mapping[str, int]


def record(client: redis.Redis, done: Iterable[tuple[str, float]], failed: Iterable[str]) -> None:
    """Add steps that were done, with the seconds they took, and steps that failed. One round trip."""
    with client.pipeline(transaction=False) as pipe:
        for step, seconds in done:
            pipe.hincrby(keys.BOOTSTRAP, f"{step}:{bucket_of(seconds)}", 1)
            pipe.hincrby(keys.BOOTSTRAP, f"{step}:us", round(seconds * 1e6))
        for step in failed:
            pipe.hincrby(keys.BOOTSTRAP, f"failed:{step}", 1)
        pipe.execute()


def parsed(row: Any) -> Bootstraps:
    """What the hash says."""
    counts = numbers(row)
    return Bootstraps(
        {step: times(counts, step) for step in STEPS},
        {step: counts.get(f"failed:{step}", 0) for step in STEPS},
    )
