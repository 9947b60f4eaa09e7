"""Which sets of requirements jobs have asked for, queue by queue: what there is, and what is new.

Jobs of a set wait in the sublist `BASE@DIGEST` of their queue (broker/requirements.py). Producers write a
set down before its first job; workers are told at once, and read all anew where something may be missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import redis

from broker import keys, scripts
from broker.connection import replies
from broker.requirements import Requirements


@dataclass(frozen=True)
class Known:
    """All sets of some queues: base -> digest -> set. `version` counts every change of any queue's."""

    version: int
    sets: Mapping[str, Mapping[str, Requirements]]


@dataclass(frozen=True)
class News:
    """One set that is new, or gone (then it needs None), and the version with it."""

    version: int
    base: str
    digest: str
    need: Requirements | None


def add(client: redis.Redis, base: str, need: Requirements) -> None:
    """Write a set down, for a producer that pushes jobs by other means than submit.lua."""
    if digest := need.digest():
        scripts.ADD_SET(client, [keys.sets(base)], [base, digest, need.canonical()])


def known(client: redis.Redis, bases: Iterable[str]) -> Known:
    """The sets of these queues, at one moment, but those that a newer producer may have written otherwise."""
    names = list(bases)
    with client.pipeline(transaction=True) as pipe:
        pipe.get(keys.SETS_VERSION)
        for base in names:
            pipe.hgetall(keys.sets(base))
        version, *rows = replies(pipe)
    sets = {base: _sets(row) for base, row in zip(names, rows, strict=True)}
    return Known(_number(version), sets)


def _number(reply: Any) -> int:
    """A version; 0 where there is none, or somebody keeps something else there."""
    try:
        return int(reply or 0)
    except (TypeError, ValueError):
        return 0


def _sets(row: Any) -> dict[str, Requirements]:
    rows = row.items() if isinstance(row, dict) else ()
    found = {digest.decode("utf-8", "replace"): _need(text) for digest, text in rows}
    return {digest: need for digest, need in found.items() if need is not None}


def _need(text: Any) -> Requirements | None:
    try:
        return Requirements.from_canonical(text)
    except ValueError:
        return None


def news(document: Mapping[str, Any]) -> News | None:
    """A message of the channel `keys.NEWS`; None for anything that is none."""
    version, base, digest = (document.get(name) for name in ("version", "base", "digest"))
    if not (isinstance(version, int) and isinstance(base, str) and isinstance(digest, str)):
        return None
    return News(version, base, digest, _need(document.get("set", "")))
