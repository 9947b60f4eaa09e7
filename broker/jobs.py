"""Jobs as people see them: read from RQ's hashes and registries, and from our fields in them."""

from __future__ import annotations

import fnmatch
import io
import json
import pickle
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from broker import chores, command, failures, keys
from broker.clock import from_iso
from broker.errors import NotFound
from broker.work import Tails

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
    attempts: tuple[AttemptView, ...] = ()
    result: Any = None


def show(client: redis.Redis, job_id: str) -> JobView:
    """One job with its attempts and result. Raises NotFound."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hgetall(keys.job(job_id))
        pipe.xrevrange(keys.of("results", job_id), count=1)
        fields, results = pipe.execute(raise_on_error=False)
    if isinstance(fields, Exception) or not fields:
        raise not_found(job_id, damaged=isinstance(fields, Exception))
    return _view(job_id, fields, _result(results, fields.get(b"data", b"")))


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
    queues = chores.known_queues(client)
    if queue is not None and queue not in queues:
        raise NotFound(f"no queue {queue}", f"There are: {', '.join(queues) or 'none yet'}.")
    states = (state,) if state else STATES
    depth = _SEARCHED if name else limit
    ids = _candidates(client, [queue] if queue else queues, states, depth)
    views = (_view(job_id, fields) for job_id, fields in _hashes(client, ids))
    chosen = [
        view for view in views if view.state in states and (not name or fnmatch.fnmatch(view.name, name))
    ]
    chosen.sort(key=lambda view: view.submitted_at or _EARLIEST, reverse=True)
    return chosen[:limit]


def states(client: redis.Redis, ids: Sequence[str]) -> dict[str, str | None]:
    """The state of each job; None where there is no such job."""
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hget(keys.job(job_id), "status")
        replies = pipe.execute(raise_on_error=False)
    known = (reply.decode() if isinstance(reply, bytes) else None for reply in replies)
    return dict(zip(ids, known, strict=True))


def unfinished(client: redis.Redis) -> int:
    """How many jobs of all queues have not ended."""
    with client.pipeline(transaction=False) as pipe:
        for queue in chores.known_queues(client):
            pipe.llen(keys.queue(queue))
            for registry in ("wip", "scheduled", "deferred"):
                pipe.zcard(keys.of(registry, queue))
        return sum(count for count in pipe.execute(raise_on_error=False) if isinstance(count, int))


def output(client: redis.Redis, job_id: str) -> Tails:
    """The tails of a job's output, of the attempt that wrote last."""
    names = ("stdout", "stderr", "stdout_end", "stderr_end")
    fields: list[Any] = client.hmget(keys.output(job_id), *names)
    out, err, out_end, err_end = fields
    return Tails(out or b"", err or b"", int(out_end or 0), int(err_end or 0))


def _candidates(client: redis.Redis, queues: Iterable[str], wanted: Iterable[str], depth: int) -> list[str]:
    registries = sorted({_REGISTRY[state] for state in wanted if state in _REGISTRY})
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            if "queued" in wanted:
                pipe.lrange(keys.queue(queue), -depth, -1)
            for registry in registries:
                pipe.zrevrange(keys.of(registry, queue), 0, depth - 1)
        replies = pipe.execute(raise_on_error=False)
    found = (member for reply in replies if isinstance(reply, list) for member in reply)
    return list(dict.fromkeys(member.decode("utf-8", "replace").partition(":")[0] for member in found))


def _hashes(client: redis.Redis, ids: Sequence[str]) -> Iterator[tuple[str, Mapping[bytes, bytes]]]:
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hgetall(keys.job(job_id))
        for job_id, fields in zip(ids, pipe.execute(raise_on_error=False), strict=True):
            if fields and not isinstance(fields, Exception):
                yield job_id, fields


def _view(job_id: str, fields: Mapping[bytes, bytes], result: Any = None) -> JobView:
    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode("utf-8", "replace")

    argv, function = _what(fields.get(b"data"), text("description"))
    exit_code, timeout = text("fleet_exit_code"), text("timeout")
    return JobView(
        id=job_id,
        name=text("description"),
        state=text("status") or "created",
        queue=text("origin"),
        argv=argv,
        function=function,
        exit_code=int(exit_code) if exit_code.lstrip("-").isdigit() else None,
        reason=text("fleet_reason") or None,
        submitted_at=from_iso(text("created_at")),
        started_at=from_iso(text("started_at")),
        ended_at=from_iso(text("ended_at")),
        timeout_seconds=int(timeout) if timeout.isdigit() else None,
        worker=text("worker_name") or None,
        attempts=tuple(_attempts(text)),
        result=result,
    )


def _what(data: bytes | None, description: str) -> tuple[tuple[str, ...] | None, str | None]:
    try:
        found = command.from_data(data)
    except command.Damaged:
        return None, None
    return (found.argv, None) if found else (None, description.partition("(")[0])


def _attempts(text: Callable[[str], str]) -> Iterator[AttemptView]:
    for line in text("fleet_attempts").splitlines():
        try:
            row = json.loads(line)
            times = (from_iso(row.get("started_at")), from_iso(row.get("ended_at")))
            yield AttemptView(int(row["fence"]), row["worker"], *times, row["outcome"], row.get("reason"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # somebody's damage: show the others
    lease = text("fleet_lease")
    if lease and text("status") == "started":
        fence = lease.partition(":")[0]
        started = from_iso(text("started_at"))
        yield AttemptView(
            int(fence) if fence.isdigit() else 0, text("worker_name"), started, None, None, None
        )


def _result(results: Any, data: bytes) -> Any:
    """What the job returned, where it is plain data; an error's text for a failure."""
    if isinstance(results, Exception) or not results:
        return None
    entry = results[0][1]
    if b"exc_string" in entry:
        return failures.decoded(entry[b"exc_string"])
    try:
        return _plain(b64decode(entry[b"return_value"]), command.inflated(data)[:1])
    except (KeyError, ValueError):
        return None


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts; runs nobody's code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name}")


def _plain(value: bytes, kind: bytes) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(value)).load() if kind == b"\x80" else json.loads(value)
    except pickle.UnpicklingError as exc:
        return f"<{exc}>"
    except Exception as exc:  # unpickling garbage raises whatever it likes
        return f"<unreadable: {type(exc).__name__}>"
