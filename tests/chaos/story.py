"""The story of each job: where it was after every atomic step that anybody ever took.

Replayed from Redis's journal, whatever the participants believed; more than any dump of the end can tell.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.chaos.journal import Command, Transaction, transactions

TERMINAL = frozenset(("finished", "failed", "stopped", "canceled"))
_QUEUE, _JOB, _RESULTS, _OUTPUT = b"rq:queue:", b"rq:job:", b"rq:results:", b"fleet:output:"
_REGISTRIES = {
    b"rq:%s:" % name.encode(): name for name in ("scheduled", "deferred", "finished", "failed", "canceled")
}
#: where a job that has ended is listed
_LISTED = {"finished": "finished", "failed": "failed", "stopped": "failed", "canceled": "canceled"}
#: fields of a job's hash that are looked at
_FIELDS = frozenset((b"status", b"fleet_lease", b"fleet_losses", b"origin"))
_LEASES, _WIP = b"fleet:leases", b"rq:wip:"
#: keys whose every change is told, and changes to them that move no job
_TOLD = (_QUEUE, _JOB, _RESULTS, _LEASES, _WIP, *_REGISTRIES)
_HARMLESS = (b"PEXPIREAT", b"PERSIST", b"SADD", b"SREM", b"ZREMRANGEBYSCORE", b"HINCRBY")
#: fields of a job's hash that our scripts write the time of the step into
_STAMPS = (b"enqueued_at", b"ended_at", b"started_at", b"last_heartbeat")


@dataclass(frozen=True)
class JobState:
    """Where a job is after a step. `places` names every place that holds it, more than one if it is so."""

    status: str = ""
    lease: str | None = None
    places: tuple[str, ...] = ()
    losses: int = 0
    origin: str = ""

    @property
    def exists(self) -> bool:
        return bool(self.status)

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL


@dataclass(frozen=True)
class Given:
    """A lease was given to a worker; `held` is the one that was in force until then, which must be none."""

    lease: str
    worker: str
    held: str | None


@dataclass(frozen=True)
class Record:
    """What became of an attempt, as written into the job's hash.

    `newest` is the lease given last; `expiry` when it would have run out and `at` when this was
    written, both in seconds of Redis's clock.
    """

    fence: str
    worker: str
    outcome: str
    reason: str
    newest: str | None
    expiry: float
    at: float


@dataclass(frozen=True)
class Written:
    """A result (`kind` is RQ's: 1 finished, 2 failed, 4 retried) or output, and the lease given last."""

    what: str
    by: str
    newest: str | None


@dataclass(frozen=True)
class Change:
    """What one atomic step did to one job."""

    step: int
    at: float
    job: str
    before: JobState
    after: JobState
    given: tuple[Given, ...] = ()
    records: tuple[Record, ...] = ()
    written: tuple[Written, ...] = ()


def fence_of(lease: str) -> str:
    return lease.partition(":")[0]


def execution_of(lease: str) -> str:
    return lease.partition(":")[2]


# --- replaying ------------------------------------------------------------------------------


def stories(paths: Iterable[Path]) -> dict[int, list[Change]]:
    """The story of all jobs, by database."""
    replays: dict[int, _Replay] = defaultdict(_Replay)
    found: dict[int, list[Change]] = defaultdict(list)
    for step, (database, commands) in enumerate(transactions(paths)):
        found[database] += replays[database].take(step, commands)
    return found


def replay(steps: Iterable[Transaction]) -> list[Change]:
    """The story of all jobs of one database."""
    reader = _Replay()
    return [change for number, step in enumerate(steps) for change in reader.take(number, step)]


@dataclass
class _Job:
    """What is known of a job while the journal is read."""

    fields: dict[bytes, bytes] = field(default_factory=dict)
    queues: Counter[str] = field(default_factory=Counter)
    registries: set[str] = field(default_factory=set)
    #: entries in RQ's registry of running jobs
    running: set[bytes] = field(default_factory=set)
    expiry: float | None = None
    last_expiry: float = 0.0
    newest: str | None = None
    shown: JobState = JobState()

    def state(self) -> JobState:
        status = self.fields.get(b"status", b"").decode()
        lease = self.fields.get(b"fleet_lease")
        state = JobState(
            status,
            lease.decode() if lease is not None else None,
            tuple(self._places(status, lease is not None)),
            int(self.fields.get(b"fleet_losses", b"0") or 0),
            self.fields.get(b"origin", b"").decode(),
        )
        return self.shown if state == self.shown else state

    def _places(self, status: str, has_lease: bool) -> Iterator[str]:
        for queue, count in self.queues.items():
            yield from [f"queue {queue}"] * count
        for registry in ("scheduled", "deferred"):
            if registry in self.registries:
                yield registry
        if self.expiry is not None:
            yield "leased" if has_lease and status == "started" else f"leased without a lease, {status}"
        elif has_lease:
            yield "a lease that does not run out"
        elif self.running and status == "started":
            yield "leased"  # as RQ's own worker does it
        if status in TERMINAL:
            yield status if _LISTED[status] in self.registries else f"{status}, in no registry"
        else:
            yield from (f"listed as {name}" for name in self.registries & set(_LISTED.values()))


class _Replay:
    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._queues: dict[bytes, deque[bytes]] = {}
        self._now = 0.0
        self._touched: set[str] = set()
        self._given: dict[str, list[Given]] = {}
        self._records: dict[str, list[Record]] = {}
        self._written: dict[str, list[Written]] = {}
        self._verbs: dict[bytes, Callable[[Command], None]] = {
            b"RPUSH": self._push,
            b"LPUSH": self._push,
            b"LPOP": self._pop,
            b"RPOP": self._pop,
            b"LTRIM": self._ltrim,
            b"LREM": self._lrem,
            b"LMOVE": self._lmove,
            b"HSET": self._hset,
            b"HMSET": self._hset,
            b"HSETNX": self._hset,
            b"HDEL": self._hdel,
            b"DEL": self._delete,
            b"UNLINK": self._delete,
            b"ZADD": self._zadd,
            b"ZREM": self._zrem,
            b"XADD": self._xadd,
            b"FLUSHALL": self._flush,
            b"FLUSHDB": self._flush,
        }

    def take(self, number: int, commands: Transaction) -> Iterator[Change]:
        """Take one step, and tell what it did to each job."""
        for command in commands:
            verb = self._verbs.get(command[0].upper())
            if verb:
                verb(command)
            elif len(command) > 1 and command[1].startswith(_TOLD) and command[0].upper() not in _HARMLESS:
                raise ValueError(f"a change of a kind that this reader does not know: {command!r}")
        yield from self._changes(number)

    def _changes(self, step: int) -> Iterator[Change]:
        for job_id in sorted(self._touched):
            job = self._jobs[job_id]
            before, after = job.shown, job.state()
            rows = [found.pop(job_id, ()) for found in (self._given, self._records, self._written)]
            if before is not after or any(rows):
                job.shown = after
                yield Change(step, self._now, job_id, before, after, *map(tuple, rows))  # type: ignore[arg-type]
        self._touched.clear()

    def _job(self, name: bytes) -> _Job:
        job_id = name.decode("utf-8", "replace")
        self._touched.add(job_id)
        return self._jobs.setdefault(job_id, _Job())

    # -- lists ---------------------------------------------------------------------------------

    def _push(self, command: Command) -> None:
        if command[1].startswith(_QUEUE):
            for name in command[2:]:
                self._put(command[1], name, left=command[0].upper() == b"LPUSH")

    def _put(self, key: bytes, name: bytes, *, left: bool) -> None:
        queue = self._queues.setdefault(key, deque())
        (queue.appendleft if left else queue.append)(name)
        self._job(name).queues[key[len(_QUEUE) :].decode()] += 1

    def _pop(self, command: Command) -> None:
        if command[1].startswith(_QUEUE):
            for _ in range(int(command[2]) if len(command) > 2 else 1):
                self._take(command[1], left=command[0].upper() == b"LPOP")

    def _take(self, key: bytes, *, left: bool) -> bytes | None:
        queue = self._queues.get(key)
        if not queue:
            return None
        name = queue.popleft() if left else queue.pop()
        self._forget_place(key, name)
        return name

    def _forget_place(self, key: bytes, name: bytes) -> None:
        queues, queue = self._job(name).queues, key[len(_QUEUE) :].decode()
        queues[queue] -= 1
        if queues[queue] <= 0:
            del queues[queue]

    def _ltrim(self, command: Command) -> None:
        key, first, last = command[1], int(command[2]), int(command[3])
        queue = self._queues.get(key, deque())
        last = last if last >= 0 else len(queue) + last
        for _ in range(len(queue) - 1 - last):
            self._take(key, left=False)
        for _ in range(first):
            self._take(key, left=True)

    def _lrem(self, command: Command) -> None:
        _, key, count, name = command
        queue = self._queues.get(key, deque())
        for _ in range(abs(int(count)) or len(queue)):
            if name not in queue:
                return
            if int(count) < 0:
                queue.reverse()
            queue.remove(name)
            if int(count) < 0:
                queue.reverse()
            self._forget_place(key, name)

    def _lmove(self, command: Command) -> None:
        _, source, target, side, to = command[:5]
        if source.startswith(_QUEUE):
            name = self._take(source, left=side.upper() == b"LEFT")
            if name is not None:
                self._put(target, name, left=to.upper() == b"LEFT")

    # -- hashes --------------------------------------------------------------------------------

    def _hset(self, command: Command) -> None:
        key, pairs = command[1], dict(zip(command[2::2], command[3::2], strict=True))
        if key.startswith(_JOB):
            self._hset_job(key[len(_JOB) :], pairs, only_new=command[0].upper() == b"HSETNX")
        elif key.startswith(_OUTPUT) and b"lease" in pairs:
            name = key[len(_OUTPUT) :]
            newest = self._job(name).newest
            self._note(self._written, name, Written("output", pairs[b"lease"].decode(), newest))

    def _hset_job(self, name: bytes, pairs: dict[bytes, bytes], *, only_new: bool) -> None:
        job = self._job(name)
        if only_new:
            pairs = {key: value for key, value in pairs.items() if key not in job.fields}
        self._read_clock(pairs)
        if pairs.get(b"fleet_lease"):
            self._give(name, job, pairs)
        job.fields.update((key, value) for key, value in pairs.items() if key in _FIELDS)
        if not job.fields.get(b"fleet_lease"):
            job.fields.pop(b"fleet_lease", None)
        if b"fleet_attempts" in pairs:
            self._record(name, job, pairs[b"fleet_attempts"].rpartition(b"\n")[2].decode())

    def _give(self, name: bytes, job: _Job, pairs: dict[bytes, bytes]) -> None:
        lease, held = pairs[b"fleet_lease"].decode(), job.fields.get(b"fleet_lease")
        worker = pairs.get(b"worker_name", b"").decode()
        self._note(self._given, name, Given(lease, worker, held.decode() if held else None))
        job.newest = lease

    def _record(self, name: bytes, job: _Job, line: str) -> None:
        if line.startswith("{"):
            row: dict[str, Any] = json.loads(line)
            at = _seconds(str(row["ended_at"]))
        else:
            fence, _, ended, worker = line.split(" ", 3)
            row, at = {"fence": fence, "worker": worker, "outcome": "finished"}, float(ended)
        record = Record(
            fence=str(row.get("fence")),
            worker=str(row.get("worker")),
            outcome=str(row.get("outcome")),
            reason=str(row.get("reason") or ""),
            newest=job.newest,
            expiry=job.last_expiry,
            at=at,
        )
        self._note(self._records, name, record)

    def _read_clock(self, pairs: dict[bytes, bytes]) -> None:
        for name in _STAMPS:
            if pairs.get(name, b"").endswith(b"Z"):
                self._now = max(self._now, _seconds(pairs[name].decode()))

    def _hdel(self, command: Command) -> None:
        if command[1].startswith(_JOB):
            job = self._job(command[1][len(_JOB) :])
            for name in command[2:]:
                job.fields.pop(name, None)

    # -- other kinds ---------------------------------------------------------------------------

    def _delete(self, command: Command) -> None:
        for key in command[1:]:
            if key.startswith(_JOB) and not key.endswith((b":dependents", b":dependencies")):
                self._job(key[len(_JOB) :]).fields.clear()
            elif key.startswith(_QUEUE):
                while self._take(key, left=True) is not None:
                    pass

    def _zadd(self, command: Command) -> None:
        key, rest = command[1], command[2:]
        options = {b"NX", b"XX", b"CH", b"GT", b"LT"}
        given = set()
        while rest and rest[0].upper() in options:
            given.add(rest[0].upper())
            rest = rest[1:]
        for score, name in zip(rest[::2], rest[1::2], strict=True):
            self._zadd_one(key, score, name, only_known=b"XX" in given)

    def _zadd_one(self, key: bytes, score: bytes, name: bytes, *, only_known: bool) -> None:
        if key == _LEASES:
            job = self._job(name)
            job.expiry = job.last_expiry = float(score) / 1000
            return
        if key.startswith(_WIP):
            self._job(name.rpartition(b":")[0]).running.add(name)
        registry = _registry(key)
        if registry and not (only_known and registry not in self._job(name).registries):
            self._job(name).registries.add(registry)

    def _zrem(self, command: Command) -> None:
        registry = _registry(command[1])
        for name in command[2:]:
            if command[1] == _LEASES:
                self._job(name).expiry = None
            elif command[1].startswith(_WIP):
                self._job(name.rpartition(b":")[0]).running.discard(name)
            elif registry:
                self._job(name).registries.discard(registry)

    def _xadd(self, command: Command) -> None:
        if not command[1].startswith(_RESULTS):
            return
        at = next(index for index, part in enumerate(command) if part == b"type")
        fields = dict(zip(command[at::2], command[at + 1 :: 2], strict=True))
        name = command[1][len(_RESULTS) :]
        by = fields.get(b"execution_id", b"").decode()
        kind = f"result {fields[b'type'].decode()}"
        self._note(self._written, name, Written(kind, by, self._job(name).newest))

    def _flush(self, command: Command) -> None:
        self._jobs.clear()
        self._queues.clear()
        self._touched.clear()

    def _note(self, rows: dict[str, list[Any]], name: bytes, row: Any) -> None:
        rows.setdefault(name.decode("utf-8", "replace"), []).append(row)


def _registry(key: bytes) -> str | None:
    kind = key[: key.find(b":", 3) + 1]
    return _REGISTRIES.get(kind)


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).astimezone(UTC).timestamp()


def final_states(changes: Sequence[Change]) -> dict[str, JobState]:
    """Where the journal leaves each job."""
    return {change.job: change.after for change in changes}
