"""What has run, for a report: jobs with their attempts, as far as Redis still keeps them.

Jobs that wait are counted, not read: they have not run, or not lately. Numbers of them may be great, so
jobs are read in lots, and each is as small as can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from broker import attempts, chores, keys, sets, usage
from broker.clock import from_iso
from broker.connection import replies
from broker.requirements import SEPARATOR, Requirements, apart, base_of
from broker.usage import Usage

#: jobs asked about in one round trip
_AT_ONCE = 1000
#: the registries of what may have run
_REGISTRIES = ("wip", "finished", "failed", "canceled", "scheduled")
_FIELDS = (
    *("description", "origin", "status", "created_at", "enqueued_at", "started_at", "ended_at"),
    *("worker_name", "fleet_attempts", "fleet_lease", "fleet_reason", "fleet_usage", "fleet_array"),
)


class Attempt(NamedTuple):
    """One attempt; times in seconds since 1970, on Redis's clock. `ended` and `outcome` None: it runs."""

    fence: int
    worker: str
    started: float
    ended: float | None
    outcome: str | None


class PastJob(NamedTuple):
    """A job that has run, or runs. `queued`: when it was queued last; `need`: what it asked for, if known."""

    id: str
    name: str
    queue: str
    state: str
    submitted: float | None
    queued: float | None
    reason: str
    usage: Usage | None
    need: Requirements | None
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class Past:
    """`jobs` is read while it is gone through; `kept` counts what there is of each state, of all queues.

    `left_out`: how many of those that may have run are not read, the oldest of each queue.
    """

    jobs: Iterator[PastJob]
    kept: Mapping[str, int]
    left_out: int


def read(client: redis.Redis, most: int) -> Past:
    """At most some `most` jobs, the newest of each queue first. Raises what redis-py raises."""
    queues = chores.known_queues(client)
    counts = _counts(client, queues)
    total = sum(counts[queue, name] for queue in queues for name in _REGISTRIES)
    needs = sets.known(client, sorted({base_of(queue) for queue in queues})).sets
    found = _jobs(client, _ids(client, queues, counts, min(1.0, most / max(total, 1))), needs)
    kept = {name: sum(counts[queue, name] for queue in queues) for name in _KEPT}
    return Past(found, {_KEPT[name]: count for name, count in kept.items()}, max(0, total - most))


#: list of jobs -> what they are
_KEPT = {
    "queue": "queued",
    "deferred": "deferred",
    "scheduled": "scheduled",
    "wip": "started",
    "finished": "finished",
    "failed": "failed",
    "canceled": "canceled",
}


def _counts(client: redis.Redis, queues: Sequence[str]) -> dict[tuple[str, str], int]:
    names = [name for name in _KEPT if name != "queue"]
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            pipe.llen(keys.queue(queue))
            for name in names:
                pipe.zcard(keys.of(name, queue))
        found = [count if isinstance(count, int) else 0 for count in replies(pipe)]
    lists = [(queue, name) for queue in queues for name in ("queue", *names)]
    return dict(zip(lists, found, strict=True))


def _ids(
    client: redis.Redis, queues: Sequence[str], counts: Mapping[tuple[str, str], int], share: float
) -> list[str]:
    """Of each list the newest ones, that share of it."""
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for name in _REGISTRIES:
                if wanted := round(counts[queue, name] * share):
                    pipe.zrevrange(keys.of(name, queue), 0, wanted - 1)
        found = (member for reply in replies(pipe) if isinstance(reply, list) for member in reply)
    return list(dict.fromkeys(_text(member).partition(":")[0] for member in found))


def _jobs(
    client: redis.Redis, ids: Sequence[str], needs: Mapping[str, Mapping[str, Requirements]]
) -> Iterator[PastJob]:
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        with client.pipeline(transaction=False) as pipe:
            for job_id in some:
                pipe.hmget(keys.job(job_id), _FIELDS)
            rows = replies(pipe)
        for job_id, row in zip(some, rows, strict=True):
            # an array's own job has not run: its tasks have
            if isinstance(row, list) and row[2] and row[-1] is None:
                yield _job(job_id, dict(zip(_FIELDS, map(_text, row), strict=True)), needs)


def _job(job_id: str, row: Mapping[str, str], needs: Mapping[str, Mapping[str, Requirements]]) -> PastJob:
    origin = row["origin"]
    queue = base_of(origin)
    return PastJob(
        job_id,
        apart(row["description"], origin)[0],
        queue,
        row["status"],
        _seconds(row["created_at"]),
        _seconds(row["enqueued_at"]),
        row["fleet_reason"],
        usage.from_json(row["fleet_usage"]) if row["fleet_usage"] else None,
        needs.get(queue, {}).get(origin.partition(SEPARATOR)[2]),
        tuple(_attempts(row)),
    )


def _attempts(row: Mapping[str, str]) -> Iterator[Attempt]:
    for told in attempts.rows(row["fleet_attempts"]):
        try:
            yield from _attempt(told)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            continue  # somebody's damage
    began = _seconds(row["started_at"])
    if row["status"] == "started" and row["fleet_lease"] and began is not None:
        fence = row["fleet_lease"].partition(":")[0]
        yield Attempt(int(fence) if fence.isdecimal() else 0, row["worker_name"], began, None, None)


def _attempt(row: Mapping[str, Any]) -> Iterator[Attempt]:
    """Nothing, where it never began."""
    began, ended = _seconds(row.get("started_at")), _seconds(row.get("ended_at"))
    if began is not None and ended is not None:
        yield Attempt(int(row["fence"]), str(row["worker"]), began, max(began, ended), str(row["outcome"]))


def _seconds(text: str | None) -> float | None:
    at = from_iso(text)
    return None if at is None else at.timestamp()


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
