"""What the fleet has asked of Slurm, and the pools by which it asks by itself: records in Redis.

A submission is known by the name of its job in Slurm, which is its own: so one of which the answer was lost
is found again there. It is written down before it is made.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import redis

from broker import clock, keys, scripts
from broker.connection import replies
from broker.errors import Conflict, NotFound

#: seconds for which what has ended stays on record
KEPT_SECONDS = 7 * 86_400


@dataclass(frozen=True)
class Submission:
    """Some allocations that were asked for together. Times are seconds of the epoch."""

    name: str
    #: who asked, and where: the job in Slurm is that user's
    user: str
    host: str
    nodes: int
    workers_per_node: int
    allocations: int
    queues: Sequence[str]
    submitted_at: float
    #: '' until sbatch has answered
    job_id: str = ""
    pool: str = ""
    #: its workers leave where no work remains, and so what has not begun is of no use then
    leaves: bool = False
    #: whether a worker of it was ever seen, and whether its end was counted, for its pool
    has_run: bool = False
    is_judged: bool = False
    ended_at: float | None = None
    #: how its allocations ended, as Slurm calls it; '' where Slurm has forgotten
    end: str = ""

    @property
    def workers(self) -> int:
        """How many it may bring."""
        return self.nodes * self.workers_per_node * self.allocations


@dataclass(frozen=True)
class Pool:
    """What is asked for as the backlog grows, one allocation at a time.

    `script` is the text for sbatch, and holds no secret; `offer` is what each worker would have, as far as
    the script says: `cpus`, `memory_bytes`, `gpus`, `labels`, `seconds`.
    """

    name: str
    script: str
    job_name: str
    user: str
    host: str
    nodes: int
    workers_per_node: int
    slots: int
    queues: Sequence[str]
    max_workers: int
    #: most allocations that wait in Slurm at once
    backlog: int
    idle_timeout_seconds: float
    offer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """Of one allocation."""
        return self.nodes * self.workers_per_node


@dataclass(frozen=True)
class PoolState:
    """How a pool is. `paused` says why, '' where it is not; `not_before`: epoch seconds, after a failure."""

    paused: str = ""
    submit_failures: int = 0
    start_failures: int = 0
    not_before: float = 0.0
    error: str = ""


def new_name(job_name: str) -> str:
    """A name that no other submission has."""
    return f"{job_name}-{secrets.token_hex(4)}"


# --- submissions ------------------------------------------------------------------------------------


def record(client: redis.Redis, submission: Submission) -> None:
    """Write it down, in place of what was known of it."""
    client.hset(keys.SLURM_SUBMISSIONS, submission.name, _text(submission))


def intend(client: redis.Redis, pool: Pool, submission: Submission) -> bool:
    """Write down that it is about to be made, if its pool may have these workers too, and is not paused."""
    found = scripts.SLURM_INTEND(
        client,
        [keys.SLURM_SUBMISSIONS, keys.SLURM_POOLS, keys.slurm_pool(pool.name)],
        [submission.name, _text(submission), pool.name, submission.workers, pool.max_workers],
    )
    return bool(found)


def forget(client: redis.Redis, names: Iterable[str]) -> None:
    """Strike these off the record."""
    if gone := list(names):
        client.hdel(keys.SLURM_SUBMISSIONS, *gone)


def submissions(client: redis.Redis) -> list[Submission]:
    """All on record, the oldest first; those that ended long ago are struck off."""
    found = [row for text in client.hvals(keys.SLURM_SUBMISSIONS) if (row := _submission(text))]
    oldest = clock.wall().timestamp() - KEPT_SECONDS
    old = {row.name for row in found if row.ended_at is not None and row.ended_at < oldest}
    forget(client, old)
    return sorted((row for row in found if row.name not in old), key=lambda row: row.submitted_at)


# --- pools ------------------------------------------------------------------------------------------


def add_pool(client: redis.Redis, pool: Pool) -> None:
    """Raises Conflict where there is one of that name."""
    if not client.hsetnx(keys.SLURM_POOLS, pool.name, _text(pool)):
        raise Conflict(
            f"there is a pool {pool.name}",
            f"Take another --name, or first: fleet slurm autoscale remove {pool.name}",
        )
    client.delete(keys.slurm_pool(pool.name))


def pools(client: redis.Redis) -> list[tuple[Pool, PoolState]]:
    """All there are, by name, and how they are."""
    found = sorted(
        (pool for text in client.hvals(keys.SLURM_POOLS) if (pool := _pool(text))), key=lambda pool: pool.name
    )
    with client.pipeline(transaction=False) as pipe:
        for pool in found:
            pipe.hgetall(keys.slurm_pool(pool.name))
        return list(zip(found, map(_state, replies(pipe)), strict=True)) if found else []


def pause_pool(client: redis.Redis, name: str, why: str) -> None:
    """It asks for nothing until it is resumed. Raises NotFound."""
    _known(client, name)
    client.hset(keys.slurm_pool(name), "paused", why)


def resume_pool(client: redis.Redis, name: str) -> None:
    """It asks again, its failures forgotten. Raises NotFound."""
    _known(client, name)
    client.delete(keys.slurm_pool(name))


def remove_pool(client: redis.Redis, name: str) -> None:
    """It asks for nothing any more. Raises NotFound."""
    _known(client, name)
    client.hdel(keys.SLURM_POOLS, name)
    client.delete(keys.slurm_pool(name))


def note_state(client: redis.Redis, name: str, state: PoolState) -> None:
    """How it went, for who looks; a pause by an operator meanwhile stays."""
    fields: dict[Any, Any] = asdict(state)
    if not state.paused:
        del fields["paused"]
    client.hset(keys.slurm_pool(name), mapping=fields)


def _known(client: redis.Redis, name: str) -> None:
    if not client.hexists(keys.SLURM_POOLS, name):
        there = ", ".join(pool.name for pool, _ in pools(client)) or "none"
        raise NotFound(f"no pool {name}", f"There are: {there}.")


# --- leases -----------------------------------------------------------------------------------------


def hold(client: redis.Redis, what: str, who: str, seconds: float) -> bool:
    """Take, or keep, the lease on doing `what` for the fleet; whether it is theirs now."""
    return bool(scripts.SLURM_LEASE(client, [keys.slurm_lease(what)], [who, round(seconds * 1000)]))


def let_go(client: redis.Redis, what: str, who: str) -> None:
    """Let another do it at once."""
    if client.get(keys.slurm_lease(what)) == who.encode():
        client.delete(keys.slurm_lease(what))


# --- as text ----------------------------------------------------------------------------------------


def _text(row: Submission | Pool) -> str:
    return json.dumps({name: value for name, value in asdict(row).items() if value is not None})


def _submission(text: Any) -> Submission | None:
    with suppress(ValueError, TypeError):
        return Submission(**json.loads(text))
    return None


def _pool(text: Any) -> Pool | None:
    with suppress(ValueError, TypeError):
        return Pool(**json.loads(text))
    return None


def _state(row: Any) -> PoolState:
    said = {name.decode(): value.decode() for name, value in row.items()} if isinstance(row, dict) else {}
    with suppress(ValueError):
        return PoolState(
            said.get("paused", ""),
            int(said.get("submit_failures", 0)),
            int(said.get("start_failures", 0)),
            float(said.get("not_before", 0.0)),
            said.get("error", ""),
        )
    return PoolState()
