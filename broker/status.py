"""What `fleet status` shows: workers and queues, in a constant number of round trips.

One call lists names, a second fetches everything about workers, a third about queues, a fourth the
first job of each queue, a fifth and a sixth what arrays have not given out yet, however many there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import redis

from broker import chores, clock, connection, keys, tasks, tunnels
from broker.clock import from_iso
from broker.connection import replies
from broker.fitting import Free
from broker.requirements import SEPARATOR, Offer, Requirements, base_of, gpu_names

WorkerState = Literal["idle", "busy", "draining", "connecting", "offline"]


@dataclass(frozen=True)
class WorkerStatus:
    """One worker. Memory in bytes, age in seconds; `finished` and `failed` count since its start."""

    name: str
    host: str
    pid: int
    state: WorkerState
    queues: tuple[str, ...]
    slots: int
    running: tuple[str, ...]
    labels: Mapping[str, str]
    version: str
    cpus: int
    memory_bytes: int
    gpus: Sequence[Mapping[str, Any]]
    started_at: datetime | None
    last_heartbeat: datetime | None
    heartbeat_age_seconds: float | None
    finished: int
    failed: int
    notice: str = ""
    #: when it has to be gone; None: it stays
    ends_at: datetime | None = None
    #: what it had left for jobs at its last heartbeat; None: it did not say
    free: Free | None = None
    #: what of its host it would have, were it not promised to others there: `cpus`, `memory_bytes`, `gpus`;
    #: and `workers`, the names of these; None: it has all that it wanted
    elsewhere: Mapping[str, Any] | None = None
    #: the tunnel through which it finds Redis, how that is, and by whom it is held, or why it is down
    tunnel_id: str = ""
    tunnel: Literal["up", "down"] | None = None
    tunnel_note: str = ""
    #: since its start, as `finished` is
    seconds_worked: float = 0.0

    def offer(self) -> Offer:
        """What sets of requirements are judged by."""
        memories = tuple(int(gpu.get("memory_bytes", 0)) for gpu in self.gpus)
        ends_at = self.ends_at.timestamp() if self.ends_at else None
        names = gpu_names(self.labels, (str(gpu.get("name", "")) for gpu in self.gpus))
        return Offer(self.labels, self.cpus, self.memory_bytes, memories, self.slots, ends_at, names)


@dataclass(frozen=True)
class QueueStatus:
    """One queue, or a sublist of one: `requirements` say of which jobs.

    `oldest_age_seconds` is how long its first job waits; None for an empty one.
    """

    name: str
    queued: int
    running: int
    finished: int
    failed: int
    scheduled: int
    deferred: int
    oldest_age_seconds: float | None
    paused: bool
    requirements: str = ""
    canceled: int = 0


@dataclass(frozen=True)
class FleetStatus:
    """The whole fleet at one moment of Redis's clock."""

    at: datetime
    redis_version: str
    workers: tuple[WorkerStatus, ...]
    queues: tuple[QueueStatus, ...]


def read(client: redis.Redis) -> FleetStatus:
    """Ask Redis; raises what redis-py raises."""
    return _read(client, _names(client))


def read_queues(client: redis.Redis) -> tuple[QueueStatus, ...]:
    """The queues alone, whatever the number of workers; raises what redis-py raises."""
    return _read(client, replace(_names(client), workers=())).queues


@dataclass(frozen=True)
class _Names:
    """What there is to ask for, and what the first call said besides."""

    workers: Sequence[str]
    queues: Sequence[str]
    paused: frozenset[str]
    now: datetime
    redis_version: str


def _read(client: redis.Redis, names: _Names) -> FleetStatus:
    rows = iter(connection.ask(client, list(_about_workers(names.workers))))
    workers = [_worker(name, parts, names.now) for name, parts in _parts(names.workers, rows)]
    with client.pipeline(transaction=False) as pipe:
        for name in names.queues:
            _ask_queue(pipe, name)
        sublists = [name for name in names.queues if SEPARATOR in name]
        for name in sublists:
            base, _, digest = name.partition(SEPARATOR)
            pipe.hget(keys.sets(base), digest)
        rows = iter(replies(pipe))
    counts = {name: [next(rows) for _ in range(_QUEUE_PARTS)] for name in names.queues}
    asks = dict.fromkeys(names.queues, "") | {name: _readable(next(rows)) for name in sublists}
    since = _oldest(client, {name: parts[-1] for name, parts in counts.items()})
    more = tasks.unclaimed(client)
    queues = [
        _queue(
            name,
            parts,
            _age(names.now, since[name]),
            base_of(name) in names.paused,
            asks[name],
            more.get(name, tasks.Unclaimed()),
        )
        for name, parts in counts.items()
    ]
    found = _with_tunnels(client, [worker for worker in workers if worker])
    return FleetStatus(names.now, names.redis_version, found, tuple(queues))


def _with_tunnels(client: redis.Redis, workers: Sequence[WorkerStatus]) -> tuple[WorkerStatus, ...]:
    """The workers, those that hang on a tunnel with how that is."""
    notes = tunnels.read(client, {worker.tunnel_id for worker in workers if worker.tunnel_id})
    return tuple(
        replace(worker, tunnel=note.state, tunnel_note=note.error or note.by)
        if (note := notes.get(worker.tunnel_id))
        else worker
        for worker in workers
    )


def _oldest(client: redis.Redis, firsts: Mapping[str, Any]) -> dict[str, datetime | None]:
    """Since when the first job of each queue waits; None where there is none."""
    with client.pipeline(transaction=False) as pipe:
        for job in firsts.values():
            job_id = job.decode("utf-8", "replace") if isinstance(job, bytes) else ""
            pipe.hget(keys.job(job_id), "enqueued_at")
        times = [reply if isinstance(reply, bytes) else None for reply in replies(pipe)]
    return dict(zip(firsts, map(from_iso, times), strict=True))


def _age(now: datetime, since: datetime | None) -> float | None:
    return max(0.0, (now - since).total_seconds()) if since else None


def _names(client: redis.Redis) -> _Names:
    with client.pipeline(transaction=False) as pipe:
        pipe.smembers(keys.FLEET_WORKERS)
        pipe.smembers(keys.QUEUES)
        pipe.smembers(keys.PAUSED)
        pipe.time()
        pipe.info("server")
        workers, queues, paused, (seconds, micros), info = pipe.execute()
    held = frozenset(name.decode("utf-8", "replace") for name in paused)
    return _Names(
        sorted(name.decode("utf-8", "replace") for name in workers),
        # one may be paused before its first job
        chores.queue_names({*queues, *(keys.queue(name).encode() for name in held)}),
        held,
        datetime.fromtimestamp(seconds + micros / 1e6, clock.wall().tzinfo),
        server_version(info),
    )


def server_version(info: Mapping[str, Any]) -> str:
    """Redis's own version; Valkey's, which says 7.2.4 for compatibility, as `valkey 9.1.2`."""
    valkey = info.get("valkey_version")
    return f"valkey {valkey}" if valkey else str(info.get("redis_version", "unknown"))


#: strings of a worker, which one command fetches for all: a command for each would cost a second of
#: this process for ten thousand workers
_WORKER_STRINGS = (keys.worker_record, keys.worker_beat, keys.worker_drain)


_RQ_COUNTS = ("last_heartbeat", "successful_job_count", "failed_job_count", "total_working_time")


def _about_workers(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """The commands whose answers `_parts` takes in."""
    for key in _WORKER_STRINGS if names else ():
        yield "MGET", *map(key, names)
    for name in names:
        yield "HKEYS", keys.worker_leases(name)
        yield "HMGET", keys.rq_worker(name), *_RQ_COUNTS


def _parts(names: Sequence[str], rows: Iterator[Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each worker's name, record, beat, mark of a drain, leases and counts."""
    if names:
        columns = [next(rows) for _ in _WORKER_STRINGS]
        for name, *strings in zip(names, *columns, strict=True):
            yield name, (*strings, next(rows), next(rows))


def _worker(name: str, parts: Sequence[Any], now: datetime) -> WorkerStatus | None:
    """One worker, or None where its record is gone, or was damaged by somebody."""
    try:
        return _read_worker(name, parts, now)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _read_worker(name: str, parts: Sequence[Any], now: datetime) -> WorkerStatus | None:
    record, beating, draining, running, counts = parts
    fields = _document(record)
    if not fields:
        return None
    beat = from_iso(counts[0]) or from_iso(fields.get("at"))
    age = _age(now, beat)
    late = age is not None and age > 1.5 * float(fields.get("heartbeat_seconds", 10))
    takes_nothing = draining is not None or bool(fields.get("stopping"))
    return WorkerStatus(
        name=name,
        host=str(fields.get("host", "")),
        pid=int(fields.get("pid", 0)),
        state=_state(beating is not None, late, takes_nothing, bool(running)),
        queues=tuple(map(str, fields.get("queues", ()))),
        slots=int(fields.get("slots", 1)),
        running=tuple(sorted(job.decode() for job in running)),
        labels={str(key): str(value) for key, value in fields.get("labels", {}).items()},
        version=str(fields.get("version", "")),
        cpus=int(fields.get("cpus", 0)),
        memory_bytes=int(fields.get("memory_bytes", 0)),
        gpus=tuple(map(dict, fields.get("gpus", ()))),
        started_at=from_iso(fields.get("started_at")),
        last_heartbeat=beat,
        heartbeat_age_seconds=age,
        # RQ's record of a worker goes with its heartbeat; ours tells how far it had come
        finished=int(counts[1] or fields.get("finished", 0)),
        failed=int(counts[2] or fields.get("failed", 0)),
        notice=str(fields.get("notice", "")),
        ends_at=from_iso(fields.get("ends_at")),
        free=_free(fields.get("free")),
        elsewhere=dict(fields.get("elsewhere") or {}) or None,
        tunnel_id=str(fields.get("tunnel") or ""),
        seconds_worked=float(counts[3] or 0),
    )


def _free(left: Mapping[str, Any] | None) -> Free | None:
    if not left:
        return None
    return Free(
        int(left["slots"]), float(left["cpus"]), int(left["memory_bytes"]), tuple(map(float, left["gpus"]))
    )


def _state(alive: bool, late: bool, draining: bool, busy: bool) -> WorkerState:
    """`connecting`: its lease still holds, but a beat is overdue."""
    if not alive:
        return "offline"
    if late:
        return "connecting"
    if draining:
        return "draining"
    return "busy" if busy else "idle"


_QUEUE_PARTS = 8


def _ask_queue(pipe: Any, name: str) -> None:
    pipe.llen(keys.queue(name))
    for registry in ("wip", "finished", "failed", "scheduled", "deferred", "canceled"):
        pipe.zcard(keys.of(registry, name))
    pipe.lindex(keys.queue(name), 0)


def _queue(
    name: str,
    parts: Sequence[Any],
    age: float | None,
    paused: bool,
    asks: str,
    more: tasks.Unclaimed,
) -> QueueStatus:
    queued, running, finished, failed, scheduled, deferred, canceled = map(_count, parts[:7])
    queued, deferred = max(0, queued + more.queued), max(0, deferred + more.deferred)
    return QueueStatus(
        name, queued, running, finished, failed, scheduled, deferred, age, paused, asks, canceled
    )


def _readable(canonical: Any) -> str:
    """What jobs of a set ask for, as people write it."""
    try:
        return Requirements.from_canonical(canonical).readable()
    except ValueError:
        return "unknown"


def _count(reply: Any) -> int:
    """A count, or 0 where somebody keeps something else under the key."""
    return reply if isinstance(reply, int) else 0


def _document(text: bytes | None) -> dict[str, Any]:
    try:
        document = json.loads(text or b"{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
