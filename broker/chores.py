"""Periodic chores of the fleet: each a small class of one shape, all in the table at the end.

They run inside the workers, one worker at a time, by a short lease in Redis. Each can be
repeated, or run twice at once, harmlessly: the scripts check what they change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import redis

from broker import failures, keys, names, scripts
from broker.errors import UsageError
from broker.settings import WorkerSettings

#: seconds for which one worker does the chores without saying so again
ELECTION_SECONDS = 3
#: chores not seen for longer mean that Redis was away: longer than an election takes
_OUTAGE_MS = 10_000
#: jobs recovered or moved by one script call: nobody waits long for it
_BATCH = 100
#: batches of one queue's due jobs in a row, before the other queues have their turn
_MOST_BATCHES = 50


class Chore(Protocol):
    """One periodic duty; `run` returns how much it did."""

    @property
    def interval_seconds(self) -> float: ...

    def run(self, client: redis.Redis) -> int: ...


def elected(client: redis.Redis, incarnation: str) -> bool:
    """Whether this worker does the chores for the next seconds."""
    if client.set(keys.CHORES, incarnation, nx=True, ex=ELECTION_SECONDS):
        return True
    if client.get(keys.CHORES) != incarnation.encode():
        return False
    client.expire(keys.CHORES, ELECTION_SECONDS)
    return True


def known_queues(client: redis.Redis) -> list[str]:
    """The names of all queues that ever had a job, those alone that can be ours."""
    members: set[Any] = client.smembers(keys.QUEUES)
    return queue_names(members)


def queue_names(members: Iterable[bytes]) -> list[str]:
    """The names in rq:queues that our rules let in, sorted."""
    found = (key.decode("utf-8", "replace") for key in members)
    return sorted(name for name in map(keys.queue_of, found) if _is_name(name))


def _is_name(name: str) -> bool:
    try:
        names.queue_name(name.partition("@")[0])
    except UsageError:
        return False
    return True


@dataclass(frozen=True)
class Recovery:
    """Jobs of workers that died go back to the front of their queues; those lost too often fail."""

    settings: WorkerSettings
    interval_seconds: float = 1.0

    def run(self, client: redis.Redis) -> int:
        lease_ms = int(self.settings.lease_seconds * 1000)
        lost = scripts.EXPIRED(
            client,
            [keys.LEASES, keys.CHORES_SEEN, keys.RECOVERY_NOT_BEFORE],
            [lease_ms, _OUTAGE_MS, _BATCH],
        )
        if not lost:
            return 0
        hosts = _hosts(client, {_text(row[2]) for row in lost})
        rows = [_lost_row(row, hosts) for row in lost]
        taken: int = scripts.LOSE(client, [keys.LEASES], [self.settings.losses_limit, 1, *rows])
        return taken


def _lost_row(row: list[Any], hosts: dict[str, str]) -> str:
    job, lease, worker, _, _, counted = row
    where = hosts.get(_text(worker), "")
    reason = f"WorkerLost: worker {_text(worker)} {where}stopped beating while it ran the job"
    return failures.lost_row(_text(job), _text(lease), reason, uncounted=not counted)


def _hosts(client: redis.Redis, workers: Iterable[str]) -> dict[str, str]:
    """For each worker that left a record: "(host h, last beat 2026-...) "."""
    ordered = sorted(workers)
    records = client.mget([keys.worker_record(name) for name in ordered])
    found = {}
    for name, record in zip(ordered, records, strict=True):
        fields = _fields(record)
        if fields is not None:
            found[name] = f"(host {fields.get('host')}, last beat {fields.get('at')}) "
    return found


def _fields(record: Any) -> dict[str, Any] | None:
    """A worker's record, or None where there is none, or garbage."""
    try:
        fields = json.loads(record or b"")
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


@dataclass(frozen=True)
class Due:
    """Jobs whose time has come go to their queues."""

    interval_seconds: float = 0.5

    def run(self, client: redis.Redis) -> int:
        return sum(_move_due(client, queue) for queue in known_queues(client))


def _move_due(client: redis.Redis, queue: str) -> int:
    moved = 0
    for _ in range(_MOST_BATCHES):
        batch: int = scripts.DUE(client, [keys.of("scheduled", queue)], [queue, _BATCH])
        moved += batch
        if batch < _BATCH:
            break
    return moved


@dataclass(frozen=True)
class Ring:
    """Wake workers for queues that have jobs and no token: a crash or a plain producer left them so."""

    interval_seconds: float = 1.0

    def run(self, client: redis.Redis) -> int:
        queues = known_queues(client)
        return len(scripts.RING(client, [keys.queue(queue) for queue in queues], queues))


@dataclass(frozen=True)
class Sweep:
    """Remove mirrors without a lease and entries of registries that ran out."""

    interval_seconds: float = 30.0

    def run(self, client: redis.Redis) -> int:
        return sum(
            scripts.SWEEP(
                client, [keys.of(kind, queue) for kind in ("wip", "finished", "failed")], [queue, 1000]
            )
            for queue in known_queues(client)
        )


@dataclass(frozen=True)
class Forget:
    """Names whose record ran out leave the set of workers."""

    interval_seconds: float = 60.0

    def run(self, client: redis.Redis) -> int:
        members: set[Any] = client.smembers(keys.FLEET_WORKERS)
        workers = list(members)
        records = client.mget([keys.worker_record(_text(name)) for name in workers]) if workers else []
        gone = [name for name, record in zip(workers, records, strict=True) if record is None]
        for name in gone:
            client.srem(keys.FLEET_WORKERS, name)
        return len(gone)


def table(settings: WorkerSettings) -> list[Chore]:
    """All chores with their intervals."""
    return [Recovery(settings), Due(), Ring(), Sweep(), Forget()]
