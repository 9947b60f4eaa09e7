"""Periodic chores of the fleet: each a small class of one shape, all in the table at the end.

They run inside the workers, one worker at a time, by a short lease in Redis. Each can be
repeated, or run twice at once, harmlessly: the scripts check what they change.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import redis

from broker import clock, dependents, failures, history, keys, names, scripts
from broker.errors import UsageError
from broker.requirements import base_of
from broker.work import fence_of
from broker.worker_settings import WorkerSettings

#: ms for which one worker does the chores without saying so again
_ELECTION_MS = 3000
#: nobody asked to do the chores for so many ms: Redis may have been away. Less than a lease surely has
#: left when a beat is due, more than a fleet of one takes between two questions
_SHORTEST_GAP_MS, _LONGEST_GAP_MS = 2000, 10_000
#: jobs recovered or moved, queues or workers looked at, by one script call: nobody waits long for it
_BATCH = 100
_QUEUES_AT_ONCE = 500
_WORKERS_AT_ONCE = 1000
_GROUPS_AT_ONCE = 25
_SETS_AT_ONCE = 100
#: members of a group looked at by one call: if many of them are gone, more are looked at
_SAMPLE = 20
#: leases and mirrors looked at by one script call
_LOOKED_AT = 500
#: seconds after which no further batch of lost jobs is recovered before the other chores have their turn
_RECOVERY_SECONDS = 0.5
#: due jobs of one queue moved by one call, and calls in a row before the other chores have their turn
_DUE_OF_ONE_QUEUE = 25
_MOST_CALLS = 100
#: jobs that wait for others looked at by one call
_DEFERRED_AT_ONCE = 200


T = TypeVar("T")


class Chore(Protocol):
    """One periodic duty; `run` returns how much it did."""

    @property
    def interval_seconds(self) -> float: ...

    def run(self, client: redis.Redis) -> int: ...


@dataclass(frozen=True)
class Election:
    """Whether the one who asked does the chores for the next seconds, and how many workers beat."""

    elected: bool
    alive: int


def elect(client: redis.Redis, incarnation: str, settings: WorkerSettings, *, troubled: bool) -> Election:
    """Ask to do the chores; `troubled`: Redis was away, or late, since this worker last asked.

    All workers ask, so that Redis itself knows when all were cut off from it.
    """
    lease_ms = _ms(settings.lease_seconds)
    elected, alive = scripts.ELECT(
        client,
        [keys.CHORES, keys.CHORES_SEEN, keys.RECOVERY_NOT_BEFORE, keys.LOSSES_NOT_BEFORE, keys.ALIVE],
        [incarnation, _ELECTION_MS, lease_ms, _gap_ms(lease_ms), int(troubled)],
    )
    return Election(elected == 1, alive)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _gap_ms(lease_ms: int) -> int:
    return max(_SHORTEST_GAP_MS, min(_LONGEST_GAP_MS, lease_ms // 3))


def known_queues(client: redis.Redis) -> list[str]:
    """The names of all queues that ever had a job, those alone that can be ours."""
    members: set[Any] = client.smembers(keys.QUEUES)
    return queue_names(members)


def queue_names(members: Iterable[bytes]) -> list[str]:
    """The names in rq:queues that our rules let in, sorted."""
    found = (key.decode("utf-8", "replace") for key in members)
    return sorted(name for name in map(keys.queue_of, found) if _is_name(name))


def lists_of(bases: Iterable[str], known: Iterable[str]) -> list[str]:
    """The lists of these queues: their own, and those of `known` that are sublists of them."""
    wanted = dict.fromkeys(bases)
    return [*wanted, *(name for name in known if name not in wanted and base_of(name) in wanted)]


def _is_name(name: str) -> bool:
    try:
        names.queue_name(base_of(name))
    except UsageError:
        return False
    return True


@dataclass(frozen=True)
class Recovery:
    """Jobs of workers that died go back to the front of their queues; those lost too often fail."""

    settings: WorkerSettings
    interval_seconds: float = 1.0

    def run(self, client: redis.Redis) -> int:
        """Those claimed last go first to the front, so that they are in their old order there."""
        began = clock.monotonic()
        lost = self._expired(client, began + _RECOVERY_SECONDS / 2)
        lost.sort(key=lambda row: fence_of(_text(row[1])), reverse=True)
        taken = 0
        for some in _batches(lost, _BATCH):
            taken += self._lose(client, some)
            if clock.monotonic() >= began + _RECOVERY_SECONDS:
                break
        return taken

    def _expired(self, client: redis.Redis, until: float) -> list[list[Any]]:
        """Rows of expired.lua; of very many those whose leases ran out first."""
        lease_ms = _ms(self.settings.lease_seconds)
        names = [keys.LEASES, keys.CHORES_SEEN, keys.RECOVERY_NOT_BEFORE]
        lost: list[list[Any]] = []
        passed = 0
        while passed >= 0:
            arguments = [lease_ms, _gap_ms(lease_ms), passed, _LOOKED_AT]
            more, passed = scripts.EXPIRED(client, names, arguments)
            lost += more
            if clock.monotonic() >= until:
                break
        return lost

    def _lose(self, client: redis.Redis, lost: list[list[Any]]) -> int:
        seen = _last_seen(client, {_text(row[2]) for row in lost})
        rows = [_lost_row(row, seen) for row in lost]
        taken: int = scripts.LOSE(
            client, [keys.LEASES, keys.LOSSES_NOT_BEFORE], [self.settings.losses_limit, 1, *rows]
        )
        return taken


def _lost_row(row: list[Any], seen: dict[str, str]) -> str:
    job, lease, worker = map(_text, row)
    reason = f"WorkerLost: worker {worker} {seen[worker]}stopped beating while it ran the job"
    return failures.lost_row(job, lease, reason)


def _last_seen(client: redis.Redis, workers: Iterable[str]) -> dict[str, str]:
    """For each worker what `failures.last_seen` tells."""
    ordered = sorted(workers)
    records = client.mget([keys.worker_record(name) for name in ordered])
    return dict(zip(ordered, map(failures.last_seen, records), strict=True))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


@dataclass(frozen=True)
class Due:
    """Jobs whose time has come go to their queues."""

    interval_seconds: float = 0.5

    def run(self, client: redis.Redis) -> int:
        moved, left = 0, known_queues(client)
        for _ in range(_MOST_CALLS):
            if not left:
                break
            some, left = left[:_QUEUES_AT_ONCE], left[_QUEUES_AT_ONCE:]
            done, unfinished = scripts.DUE(
                client, [keys.of("scheduled", queue) for queue in some], [_DUE_OF_ONE_QUEUE, _BATCH, *some]
            )
            moved += done
            left += [some[index - 1] for index in unfinished]
        return moved


@dataclass(frozen=True)
class Settle:
    """The dependents of jobs that ended are looked at, where these are more than one call looks at."""

    interval_seconds: float = 0.25

    def run(self, client: redis.Redis) -> int:
        for _ in range(_MOST_CALLS):
            if not dependents.settle_some(client):
                break
        return 0


@dataclass
class Deferred:
    """Jobs of ours no longer wait for what another client canceled or deleted."""

    interval_seconds: float = 10.0
    #: queues still to be looked at in this pass, and from which rank of their deferred jobs on
    _left: list[tuple[str, int]] = field(default_factory=list)

    def run(self, client: redis.Redis) -> int:
        self._left = self._left or [(queue, 0) for queue in known_queues(client)]
        done = 0
        for queue, rank in islice(iter(self._next, None), _MOST_CALLS):
            seen, moved = scripts.DEFERRED(
                client, [keys.of("deferred", queue), keys.SETTLING], [rank, _DEFERRED_AT_ONCE]
            )
            done += moved
            if seen < 0:
                dependents.settle_some(client)
                self._left.append((queue, rank))
            if seen == _DEFERRED_AT_ONCE:
                self._left.append((queue, rank + seen - moved))
        return done

    def _next(self) -> tuple[str, int] | None:
        return self._left.pop() if self._left else None


@dataclass(frozen=True)
class Ring:
    """Wake workers for queues that have jobs and no token: a crash or a plain producer left them so."""

    interval_seconds: float = 1.0

    def run(self, client: redis.Redis) -> int:
        return sum(
            len(scripts.RING(client, [keys.queue(queue) for queue in some], some))
            for some in _batches(known_queues(client), _QUEUES_AT_ONCE)
        )


@dataclass(frozen=True)
class Sweep:
    """Remove mirrors without a lease and entries of registries that ran out."""

    interval_seconds: float = 30.0

    def run(self, client: redis.Redis) -> int:
        return sum(_sweep(client, some) for some in _batches(known_queues(client), _QUEUES_AT_ONCE))


def _sweep(client: redis.Redis, queues: list[str]) -> int:
    removed, rank = 0, 0
    while queues:
        names = [keys.of(kind, queue) for queue in queues for kind in ("wip", "finished", "failed")]
        done, index, rank = scripts.SWEEP(client, names, [_LOOKED_AT, rank, *queues])
        removed, queues = removed + done, queues[index - 1 :]
    return removed


@dataclass(frozen=True)
class Tidy:
    """Names leave the set of workers with their record, and that of drained ones with the wish.

    How many workers beat is written down.
    """

    interval_seconds: float = 10.0

    def run(self, client: redis.Redis) -> int:
        gone, alive = _tidy(client, keys.FLEET_WORKERS, "worker_record")
        client.set(keys.ALIVE, alive)
        return gone + _tidy(client, keys.DRAINED, "worker_drain")[0]


def _tidy(client: redis.Redis, names: str, kind: str) -> tuple[int, int]:
    """How many left the set `names`, for they have no key of that kind, and how many of the others beat."""
    members: set[Any] = client.smembers(names)
    counts = [
        scripts.TIDY(client, [names], [kind, *some]) for some in _batches(list(members), _WORKERS_AT_ONCE)
    ]
    return sum(gone for gone, _ in counts), sum(alive for _, alive in counts)


@dataclass(frozen=True)
class PruneGroups:
    """Jobs of RQ's groups that ran out leave them: nobody else takes them away, and groups have no TTL."""

    interval_seconds: float = 60.0

    def run(self, client: redis.Redis) -> int:
        members: set[Any] = client.smembers(keys.GROUPS)
        left = [_text(name) for name in members]
        random.shuffle(left)  # where there are too many for one run, each has its turn
        gone = 0
        for _ in range(_MOST_CALLS):
            if not left:
                break
            some, left = left[:_GROUPS_AT_ONCE], left[_GROUPS_AT_ONCE:]
            groups = [keys.of("group", name) for name in some]
            done, unfinished = scripts.PRUNE_GROUPS(client, [keys.GROUPS, *groups], [_SAMPLE, *some])
            gone += done
            left += [some[index - 1] for index in unfinished]
        return gone


@dataclass(frozen=True)
class MendArrays:
    """Arrays learn what RQ's clients did to them and to their tasks; what is stopped is told so again."""

    interval_seconds: float = 5.0

    def run(self, client: redis.Redis) -> int:
        live: list[Any] = client.zrange(keys.ARRAYS, 0, -1)
        return sum(
            int(scripts.MEND_ARRAY(client, [keys.ARRAYS], [_text(array), _LOOKED_AT])) for array in live
        )


@dataclass(frozen=True)
class RetireSets:
    """Sets of requirements of which no job is left for an hour are forgotten, and so is their sublist."""

    interval_seconds: float = 60.0
    patience_seconds: float = 3600.0

    def run(self, client: redis.Redis) -> int:
        bases = {base_of(queue) for queue in known_queues(client) if queue != base_of(queue)}
        return sum(self._retire(client, base) for base in sorted(bases))

    def _retire(self, client: redis.Redis, base: str) -> int:
        digests: list[Any] = client.hkeys(keys.sets(base))
        patience_ms = _ms(self.patience_seconds)
        return sum(
            scripts.RETIRE_SETS(client, [keys.sets(base)], [patience_ms, base, *some])
            for some in _batches(digests, _SETS_AT_ONCE)
        )


@dataclass(frozen=True)
class Sample:
    """What became of jobs so far is written down, for its course."""

    interval_seconds: float = history.SAMPLE_SECONDS

    def run(self, client: redis.Redis) -> int:
        return history.sample(client)


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def table(settings: WorkerSettings) -> list[Chore]:
    """All chores with their intervals."""
    rest: list[Chore] = [Ring(), Sweep(), Tidy(), PruneGroups(), MendArrays(), RetireSets(), Sample()]
    return [Recovery(settings), Due(), Settle(), Deferred(), *rest]
