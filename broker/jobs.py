"""Jobs as people see them: read from RQ's hashes and registries, and from our fields in them."""

from __future__ import annotations

import fnmatch
import json
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import redis

from broker import attempts, chores, command, failures, keys, outputs, tasks, template, usage
from broker.clock import from_iso
from broker.connection import replies
from broker.errors import NotFound
from broker.requirements import apart, base_of
from broker.tasks import TaskCounts
from broker.usage import Usage
from broker.work import Tails, fence_of

#: the states of a job, RQ's own
STATES = ("queued", "started", "finished", "failed", "deferred", "scheduled", "stopped", "canceled")
ENDED = frozenset(("finished", "failed", "stopped", "canceled"))
#: which registry lists the jobs of a state; jobs that were stopped are among the failed
_REGISTRY = {
    "started": "wip",
    "finished": "finished",
    "failed": "failed",
    "stopped": "failed",
    "deferred": "deferred",
    "scheduled": "scheduled",
    "canceled": "canceled",
}
#: jobs looked at in each registry when a name is searched for
_SEARCHED = 10_000
#: dependents of a job that are told
_DEPENDENTS = 1000
#: jobs asked about in one round trip
_AT_ONCE = 1000
_EARLIEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class AttemptView:
    """One attempt: `outcome` is finished, failed, stopped, lost or handed-back; None while it runs."""

    fence: int
    worker: str
    started_at: datetime | None
    ended_at: datetime | None
    outcome: str | None
    reason: str | None


@dataclass(frozen=True)
class Related:
    """A job that another waits for, or that waits for it; `state` None: it is gone."""

    id: str
    state: str | None


@dataclass(frozen=True)
class JobView:
    """Everything about one job. `argv` for a command, `function` for a Python function."""

    id: str
    name: str
    state: str
    queue: str
    argv: tuple[str, ...] | None
    function: str | None
    exit_code: int | None
    reason: str | None
    submitted_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    timeout_seconds: float | None
    worker: str | None
    #: of the last attempt that ended
    usage: Usage | None = None
    attempts: tuple[AttemptView, ...] = ()
    result: Any = None
    #: what it asks for of its worker, '' for nothing
    requirements: str = ""
    dependencies: tuple[Related, ...] = ()
    dependents: tuple[Related, ...] = ()
    #: of an array: how many of its tasks are where
    tasks: TaskCounts | None = None
    #: of a task: its array
    array: str | None = None


def show(client: redis.Redis, job_id: str) -> JobView:
    """One job with its attempts and result. Raises NotFound."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hgetall(keys.job(job_id))
        pipe.xrevrange(keys.of("results", job_id), count=1)
        pipe.srandmember(keys.of("dependents", job_id), _DEPENDENTS)
        fields, results, waiting = replies(pipe)
    if isinstance(fields, Exception) or not fields:
        raise not_found(job_id, damaged=isinstance(fields, Exception))
    view = _counted(client, [_view(job_id, fields, _result(results, fields.get(b"data", b"")))])[0]
    after = _ids(fields.get(b"dependency_ids"))
    before = [] if isinstance(waiting, Exception) else sorted(map(_text, waiting))
    if not after and not before:
        return view
    found = states(client, [*after, *before])
    return replace(view, dependencies=_related(after, found), dependents=_related(before, found))


def _ids(text: bytes | None) -> list[str]:
    try:
        return [str(job_id) for job_id in json.loads(text or b"[]")]
    except (ValueError, TypeError):
        return []


def _related(ids: Iterable[str], found: Mapping[str, str | None]) -> tuple[Related, ...]:
    return tuple(Related(job_id, found[job_id]) for job_id in dict.fromkeys(ids))


def not_found(job_id: str, *, damaged: bool = False) -> NotFound:
    """The error for an id that names no job."""
    if damaged:
        return NotFound(f"what is stored as job {job_id} is no job", "Somebody wrote over rq:job:" + job_id)
    return NotFound(f"no job {job_id}", "It may have expired; 'fleet jobs' lists those there are.")


def listed(
    client: redis.Redis,
    *,
    state: str | None = None,
    queue: str | None = None,
    name: str | None = None,
    limit: int = 100,
) -> list[JobView]:
    """Jobs, the newest first, at most `limit`; `name` is a glob. Raises NotFound for an unknown queue."""
    queues = _chosen(client, queue)
    states = (state,) if state else STATES
    # some registries hold more than what is asked for, and those of all states tasks of arrays
    depth = _SEARCHED if name or state in ("failed", "stopped") else limit
    heads, skipped = _newest(client, queues, states, name, depth)
    if skipped and len(heads) < limit and depth < _SEARCHED:
        heads, _ = _newest(client, queues, states, name, _SEARCHED)
    return _counted(client, list(_views(client, [head.id for head in heads[:limit]])))


def _newest(
    client: redis.Redis, queues: Sequence[str], states: Sequence[str], name: str | None, depth: int
) -> tuple[list[_Head], int]:
    """Jobs of these states, the newest first, from the `depth` newest of each list; and how many of their
    entries were tasks of arrays, which are left out."""
    ids = _candidates(client, queues, states, depth)
    live: list[Any] = client.zrevrange(keys.ARRAYS, 0, depth - 1)
    found = list(_heads(client, list(dict.fromkeys([*ids, *map(_text, live)]))))
    known = frozenset(ids)
    heads = [
        head
        for head in found
        if not head.is_task
        and head.state in states
        and (head.queue in queues or head.id in known)
        and _matches(head.name, name)
    ]
    heads.sort(key=lambda head: head.submitted_at or _EARLIEST, reverse=True)
    return heads, sum(head.is_task for head in found)


def tasks_of(
    client: redis.Redis, array: str, *, state: str | None = None, name: str | None = None, limit: int = 100
) -> list[JobView]:
    """The first tasks of an array that are in a state, begun or not; `name` is a glob. Raises NotFound."""
    whole = show(client, array)
    if whole.tasks is None:
        raise NotFound(f"{array} is no array", "'fleet jobs' lists arrays with their counts.")
    numbers = tasks.numbers(client, array)
    states = {
        f"{array}-{number}": found
        for number, found in tasks.states(client, array, numbers).items()
        if found and state in (None, found)
    }
    some = states if name else dict(islice(states.items(), limit))
    views = task_views(client, whole, some)
    return list(islice((view for view in views if _matches(view.name, name)), limit))


def task_views(client: redis.Redis, array: JobView, states: Mapping[str, str | None]) -> Iterator[JobView]:
    """The tasks of an array that have these ids and states, begun or not, without what only `show` tells."""
    begun = {view.id: view for view in _views(client, list(states))}
    unbegun = replace(array, tasks=None, array=array.id, started_at=None, ended_at=None, reason=None)
    for job_id, state in states.items():
        yield begun.get(job_id) or replace(unbegun, id=job_id, state=state or "expired")


def _counted(client: redis.Redis, views: list[JobView]) -> list[JobView]:
    """The same; arrays with the counts of their tasks, and started from the first of them on."""
    found = tasks.counts(client, [view.id for view in views if view.tasks])
    return [replace(view, tasks=found.get(view.id)) if view.tasks else view for view in views]


def _matches(text: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(text, pattern)


def states(client: redis.Redis, ids: Sequence[str]) -> dict[str, str | None]:
    """The state of each job; None where there is no such job."""
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hget(keys.job(job_id), "status")
        known = [_text(reply) if isinstance(reply, bytes) else None for reply in replies(pipe)]
    return dict(zip(ids, known, strict=True))


def gone(client: redis.Redis, ids: Sequence[str]) -> set[str]:
    """Which of these jobs are not kept any more."""
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.exists(keys.job(job_id))
        return {job_id for job_id, kept in zip(ids, pipe.execute(), strict=True) if not kept}


def unfinished(client: redis.Redis, queues: Iterable[str] | None = None) -> int:
    """How many jobs of `queues`, or of all there are, have not ended: queued, scheduled, deferred or running.

    Those of their sublists, too. At one moment: a job that moves from one to another is not missed.
    """
    bases = None if queues is None else list(queues)
    lists, now = None, _lists_of(bases, chores.known_queues(client))
    count = 0
    while lists != now:  # another may have come up meanwhile
        lists = now
        count, known = _count_unfinished(client, lists)
        now = _lists_of(bases, known)
    return count


def _lists_of(bases: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    return list(known) if bases is None else chores.lists_of(bases, known)


def _count_unfinished(client: redis.Redis, lists: Sequence[str]) -> tuple[int, list[str]]:
    """How many there are, and which queues there were at that moment."""
    with client.pipeline(transaction=True) as pipe:
        for queue in lists:
            pipe.llen(keys.queue(queue))
            for registry in ("wip", "scheduled", "deferred"):
                pipe.zcard(keys.of(registry, queue))
        pipe.smembers(keys.QUEUES)
        *counts, members = replies(pipe)
    return sum(count for count in counts if isinstance(count, int)), chores.queue_names(members)


def unfinished_ids(client: redis.Redis) -> list[str]:
    """The ids of the jobs of all queues that have not ended."""
    return _candidates(client, chores.known_queues(client), ("queued", "started", "scheduled", "deferred"), 0)


def retriable_ids(client: redis.Redis) -> list[str]:
    """The ids of the jobs of all queues that failed, were stopped or canceled."""
    return _candidates(client, chores.known_queues(client), ("failed", "canceled"), 0)


def failing(client: redis.Redis, ids: Sequence[str]) -> list[str]:
    """Those of these jobs that have failed, and have not ended: they are run again, or will be."""
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hmget(keys.job(job_id), "status", "fleet_attempts")
        rows = replies(pipe) if ids else []
    found = dict(zip(ids, rows, strict=True))
    return [job_id for job_id, row in found.items() if isinstance(row, list) and _is_failing(*row)]


def _is_failing(status: bytes | None, record: bytes | None) -> bool:
    if status is None or _text(status) in ENDED:
        return False
    told = _attempts(lambda name: _text(record) if name == "fleet_attempts" else "")
    return any(attempt.outcome == "failed" for attempt in told)


def failed_ids(client: redis.Redis, queue: str | None = None) -> list[str]:
    """The ids of the jobs that failed or were stopped, of one queue or all, the oldest first.

    Raises NotFound for an unknown queue.
    """
    return list(reversed(_candidates(client, _chosen(client, queue), ("failed",), 0)))


def _chosen(client: redis.Redis, queue: str | None) -> list[str]:
    """All lists, or those of one queue."""
    lists = chores.known_queues(client)
    chosen = [name for name in lists if queue in (None, base_of(name))]
    if queue is not None and not chosen:
        queues = sorted({base_of(name) for name in lists})
        raise NotFound(f"no queue {queue}", f"There are: {', '.join(queues) or 'none yet'}.")
    return chosen


def output(client: redis.Redis, job_id: str) -> Tails:
    """The tails of a job's output, of the attempt that wrote last."""
    return outputs.look(client, job_id).tails


def _candidates(client: redis.Redis, queues: Iterable[str], wanted: Iterable[str], depth: int) -> list[str]:
    """Ids of jobs that may be in a state of `wanted`: the newest `depth` of each list, or (0) all."""
    registries = sorted({_REGISTRY[state] for state in wanted if state in _REGISTRY})
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            if "queued" in wanted:
                pipe.lrange(keys.queue(queue), -depth, -1)
            for registry in registries:
                pipe.zrevrange(keys.of(registry, queue), 0, depth - 1)
        found = (member for reply in replies(pipe) if isinstance(reply, list) for member in reply)
    return list(dict.fromkeys(_text(member).partition(":")[0] for member in found))


@dataclass(frozen=True)
class _Head:
    """As much of a job as choosing it needs."""

    id: str
    state: str
    name: str
    submitted_at: datetime | None
    queue: str
    is_task: bool


def _heads(client: redis.Redis, ids: Sequence[str]) -> Iterator[_Head]:
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        with client.pipeline(transaction=False) as pipe:
            for job_id in some:
                pipe.hmget(keys.job(job_id), *_HEAD)
            for job_id, fields in zip(some, replies(pipe), strict=True):
                if isinstance(fields, list) and fields[0]:
                    status, name, created, queue, array, array_of, started = fields
                    state = _state(_text(status), array, started)
                    is_task = array_of is not None
                    told, _ = apart(_text(name), _text(queue))
                    yield _Head(job_id, state, told, from_iso(created), _text(queue), is_task)


_HEAD = ("status", "description", "created_at", "origin", "fleet_array", "fleet_array_of", "started_at")


def _state(status: str, array: bytes | None, started: bytes | None) -> str:
    """As RQ has it; but an array is started once a task of it is, until it ends."""
    if array is not None and started and status in ("queued", "deferred"):
        return "started"
    return status


def _views(client: redis.Redis, ids: Sequence[str]) -> Iterator[JobView]:
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hgetall(keys.job(job_id))
        for job_id, fields in zip(ids, replies(pipe), strict=True):
            if fields and not isinstance(fields, Exception):
                yield _view(job_id, fields)


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def _integer(value: str | bytes | None) -> int | None:
    try:
        return int(value or "")
    except ValueError:
        return None


def _view(job_id: str, fields: Mapping[bytes, bytes], result: Any = None) -> JobView:
    def text(name: str) -> str:
        return _text(fields.get(name.encode()))

    name, asks = apart(text("description"), text("origin"))
    argv, function = _what(job_id, fields, name)
    array = fields.get(b"fleet_array")
    timeout = _integer(text("timeout"))
    return JobView(
        id=job_id,
        name=name,
        state=_state(text("status"), array, fields.get(b"started_at")) or "created",
        queue=text("origin"),
        argv=argv,
        function=function,
        exit_code=_integer(text("fleet_exit_code")),
        reason=text("fleet_reason") or None,
        submitted_at=from_iso(text("created_at")),
        started_at=from_iso(text("started_at")),
        ended_at=from_iso(text("ended_at")),
        timeout_seconds=timeout if timeout and timeout > 0 else None,
        worker=text("worker_name") or None,
        usage=usage.from_json(text("fleet_usage")),
        attempts=tuple(_attempts(text)),
        result=result,
        requirements=asks,
        tasks=TaskCounts(_integer(array) or 0, 0, 0, 0, 0, 0) if array is not None else None,
        array=text("fleet_array_of") or None,
    )


def _what(
    job_id: str, fields: Mapping[bytes, bytes], description: str
) -> tuple[tuple[str, ...] | None, str | None]:
    try:
        found = template.command_of(job_id, fields)
    except command.Damaged:
        return None, None
    return (found.argv, None) if found else (None, description.partition("(")[0])


def _attempts(text: Callable[[str], str]) -> Iterator[AttemptView]:
    for row in attempts.rows(text("fleet_attempts")):
        try:
            yield _attempt(row)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            continue  # somebody's damage: show the others
    lease = text("fleet_lease")
    if lease and text("status") == "started":
        started = from_iso(text("started_at"))
        yield AttemptView(fence_of(lease), text("worker_name"), started, None, None, None)


def _attempt(row: Mapping[str, Any]) -> AttemptView:
    reason = row.get("reason")
    return AttemptView(
        fence=int(row["fence"]),
        worker=str(row["worker"]),
        started_at=from_iso(row.get("started_at")),
        ended_at=from_iso(row.get("ended_at")),
        outcome=str(row["outcome"]),
        reason=None if reason is None else str(reason),
    )


def _result(results: Any, data: bytes) -> Any:
    """What the job returned, where it is plain data; an error's text for a failure."""
    if isinstance(results, Exception) or not results:
        return None
    from broker.returned import plain  # a worker, which imports this module, has no use for pickle

    entry = results[0][1]
    if b"exc_string" in entry:
        return failures.decoded(entry[b"exc_string"])
    try:
        return plain(b64decode(entry[b"return_value"]), command.inflated(data)[:1])
    except (KeyError, ValueError):
        return None
