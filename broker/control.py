"""What operators change: one function each, so that it can be recorded in one place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from broker import arrays, clock, dependents, jobs, keys, labels, scripts, tasks
from broker.connection import replies
from broker.errors import WaitTimeout
from broker.ranges import Ranges
from broker.session import EPHEMERAL_RECORD_TTL

#: hears (done, total) of each look
Progress = Callable[[int, int], None]
#: seconds a canceled job is kept
CANCELED_TTL = 7 * 86400
#: seconds between looks while waiting: short at first, for jobs that take milliseconds
_FIRST_LOOK, _SLOWEST_LOOK = 0.02, 0.5
#: seconds a message to a worker is kept for
_SIGNAL_TTL = 60
#: the states that `retry` takes a job out of
RETRIABLE = ("failed", "stopped", "canceled")
#: jobs retried by one script call: nobody waits long for it
_JOBS_AT_ONCE = 100
#: workers told in one transaction
_WORKERS_AT_ONCE = 500


def cancel(client: redis.Redis, job_id: str) -> str:
    """Cancel a job, wherever it is. Returns 'canceled', 'stopping' where it runs, or the state in which it
    had ended already.

    What runs is told within two seconds: a command's process group gets SIGTERM, and SIGKILL if it has not
    ended after worker.kill_grace_seconds; a function is killed.

    Raises NotFound.
    """
    reply: bytes = scripts.CANCEL(client, [keys.job(job_id)], [job_id, CANCELED_TTL])
    outcome = arrays.cancel(client, job_id) if reply == b"array" else reply.decode("utf-8", "replace")
    if not outcome:
        raise jobs.not_found(job_id)
    if outcome == "canceled":
        dependents.settle(client)  # those that waited for it
    return outcome


def retry(
    client: redis.Redis, ids: Iterable[str], states: Sequence[str] = RETRIABLE
) -> Iterator[tuple[str, str]]:
    """Run jobs again that ended in one of `states`, as if submitted anew; gives (id, outcome) of each.

    'retried'; 'not_found'; 'stopping' and 'taken' where it is in other hands at this moment; 'dependency'
    where it would fail at once for a job that it waits for; or the state that forbids it. Jobs that failed
    for one that is retried wait for it again. Jobs go in batches, each in one step.
    """
    waiting = list(ids)
    for start in range(0, len(waiting), _JOBS_AT_ONCE):
        some = waiting[start : start + _JOBS_AT_ONCE]
        arguments = [len(states), *states, *some]
        outcomes: list[bytes] = scripts.RETRY(client, [keys.job(job_id) for job_id in some], arguments)
        for job_id, outcome in zip(some, outcomes, strict=True):
            yield job_id, outcome.decode("utf-8", "replace") or "not_found"
    dependents.settle(client)


# --- queues ----------------------------------------------------------------------------------------


def pause(client: redis.Redis, queue: str) -> str:
    """Let a queue give out no more jobs, until `resume`. Returns 'paused', or 'not_found' for a queue
    that never had a job and that no worker listens on."""
    if not _is_queue(client, queue):
        return "not_found"
    client.sadd(keys.PAUSED, queue)
    return "paused"


def resume(client: redis.Redis, queue: str) -> str:
    """Undo `pause`, and ring for the jobs that waited. Returns 'resumed', 'not_paused' or 'not_found'."""
    was_paused: int = scripts.RESUME(client, [keys.PAUSED, keys.queue(queue)], [queue])
    if was_paused:
        return "resumed"
    return "not_paused" if _is_queue(client, queue) else "not_found"


def _is_queue(client: redis.Redis, queue: str) -> bool:
    with client.pipeline(transaction=False) as pipe:
        pipe.sismember(keys.QUEUES, keys.queue(queue))
        pipe.exists(keys.of("queue_workers", queue))
        pipe.exists(keys.sets(queue))
        return any(pipe.execute())


# --- workers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What became of a wish about one worker, and the jobs that it runs."""

    outcome: str
    running: tuple[str, ...] = ()


def hosts_of_workers(client: redis.Redis) -> dict[str, str]:
    """The host of each worker that has a record, and of each name that is drained."""
    recorded: set[Any] = client.smembers(keys.FLEET_WORKERS)
    drained: set[Any] = client.smembers(keys.DRAINED)
    names = sorted(name.decode("utf-8", "replace") for name in recorded | drained)
    found = client.mget([key for name in names for key in _documents(name)]) if names else []
    hosts = map(_host, found[::2], found[1::2])
    return {name: host for name, host in zip(names, hosts, strict=True) if host is not None}


def _documents(name: str) -> tuple[str, str]:
    """Where a worker's host is written: in its record, and in the wish to drain it."""
    return keys.worker_record(name), keys.worker_drain(name)


def _host(record: bytes | str | None, wish: bytes | str | None) -> str | None:
    """None: there is no such worker, and its name is not drained."""
    if record is None and wish is None:
        return None
    try:
        return str(json.loads(record or wish or b"")["host"])
    except (ValueError, LookupError, TypeError):
        return ""  # somebody's damage, or a wish from other hands


def drain(client: redis.Redis, workers: Mapping[str, str]) -> dict[str, Told]:
    """Let workers finish what runs and take nothing new, until `undrain`; they hear of it at once.

    `workers`: name -> host, as `hosts_of_workers` has them. The wish holds across restarts; one about an
    ephemeral worker goes with its record.
    """
    ephemeral = _ephemeral(client, workers)

    def wish(pipe: Any, name: str) -> None:
        ttl = EPHEMERAL_RECORD_TTL if name in ephemeral else None
        pipe.set(keys.worker_drain(name), _document(workers[name]), ex=ttl)
        pipe.sadd(keys.DRAINED, name)

    return {name: Told("draining", running) for name, (_, running) in _tell(client, workers, wish).items()}


def _ephemeral(client: redis.Redis, names: Iterable[str]) -> set[str]:
    """Those of these workers whose record says that they leave after one job."""
    ordered = list(names)
    records = client.mget(map(keys.worker_record, ordered)) if ordered else []
    return {name for name, record in zip(ordered, records, strict=True) if _is_ephemeral(record)}


def _is_ephemeral(record: bytes | str | None) -> bool:
    try:
        return json.loads(record or b"{}")["ephemeral"] is True
    except (ValueError, LookupError, TypeError):
        return False


def _document(host: str) -> str:
    return json.dumps({"host": host, "at": clock.wall().isoformat()})


def undrain(client: redis.Redis, workers: Iterable[str]) -> dict[str, Told]:
    """Undo `drain`: each is 'undrained', or 'not_drained' where there was no such wish."""

    def wish(pipe: Any, name: str) -> None:
        pipe.delete(keys.worker_drain(name))
        pipe.srem(keys.DRAINED, name)

    return {
        name: Told("undrained" if was_drained else "not_drained", running)
        for name, (was_drained, running) in _tell(client, workers, wish).items()
    }


def _tell(
    client: redis.Redis, workers: Iterable[str], wish: Callable[[Any, str], None]
) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Write a wish of two commands and wake the worker, in one step for each.

    Returns the reply to the first of the two, and the jobs that run there.
    """
    told: dict[str, tuple[Any, tuple[str, ...]]] = {}
    names = list(workers)
    for start in range(0, len(names), _WORKERS_AT_ONCE):
        some = names[start : start + _WORKERS_AT_ONCE]
        with client.pipeline(transaction=True) as pipe:
            for name in some:
                wish(pipe, name)
                pipe.rpush(keys.worker_signals(name), json.dumps({"drain": True}))
                pipe.expire(keys.worker_signals(name), _SIGNAL_TTL)
                pipe.hkeys(keys.worker_leases(name))
            rows = replies(pipe)
        for name, first, running in zip(some, rows[::5], rows[4::5], strict=True):
            jobs_there = running if isinstance(running, list) else []
            told[name] = first, tuple(sorted(job.decode("utf-8", "replace") for job in jobs_there))
    return told


def label(
    client: redis.Redis, workers: Iterable[str], given: Mapping[str, str], taken: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Give workers labels, and take away such as were given so; they hear of it at once.

    Returns what each has of that kind then. It holds across restarts, until `forget`; what is said of
    an ephemeral worker goes with its record.
    """
    wanted = list(workers)
    ephemeral = _ephemeral(client, wanted)
    found: dict[str, dict[str, str]] = {}
    for start in range(0, len(wanted), _WORKERS_AT_ONCE):
        some = wanted[start : start + _WORKERS_AT_ONCE]
        with client.pipeline(transaction=True) as pipe:
            for name in some:
                ttl = EPHEMERAL_RECORD_TTL if name in ephemeral else None
                labels.change(pipe, name, given, taken, ttl)
                pipe.rpush(keys.worker_signals(name), json.dumps({"labels": True}))
                pipe.expire(keys.worker_signals(name), _SIGNAL_TTL)
            rows = replies(pipe)
        found |= {name: _labels(hash_) for name, hash_ in zip(some, rows[3::6], strict=True)}
    return found


def _labels(fields: Any) -> dict[str, str]:
    return (labels.told(fields) if isinstance(fields, dict) else None) or {}


def forget(client: redis.Redis, worker: str) -> tuple[str, int]:
    """Remove the record of a worker that is offline. Returns what came of it, and how many jobs it holds.

    'forgotten'; 'alive': it still beats; 'leases': others have not taken over its jobs yet; 'not_found'.
    The labels that operators gave it go with the record; a wish to drain the name stays.
    """
    names = [keys.worker_beat(worker), keys.worker_record(worker), keys.rq_worker(worker)]
    names += [keys.worker_signals(worker), keys.worker_leases(worker), keys.worker_ended(worker)]
    names.append(keys.worker_labels(worker))
    outcome, held = scripts.FORGET(client, names, [worker])
    return outcome.decode(), held


# --- waiting ---------------------------------------------------------------------------------------


def wait(
    client: redis.Redis,
    ids: Sequence[str],
    chosen: Mapping[str, Ranges] | None = None,
    *,
    timeout_seconds: float | None = None,
    progress: Progress | None = None,
) -> dict[str, str | None]:
    """Block until all jobs have ended; returns the state of each, None for one that is gone.

    `chosen` are tasks of arrays to wait for, too; each is `ID-7` in what is returned. `progress(done,
    total)` hears of each look, and counts the tasks of arrays that are waited for as a whole. Raises
    WaitTimeout.
    """
    ended: dict[str, str | None] = {}
    patience = _Patience(timeout_seconds)
    left, tasks_left = list(ids), dict(chosen or {})
    more = sum(map(len, tasks_left.values()))
    while left or tasks_left:
        found = jobs.states(client, left)
        for array, numbers in tasks_left.items():
            known = tasks.states(client, array, numbers)
            found |= {f"{array}-{number}": state for number, state in known.items()}
        ended |= {job: state for job, state in found.items() if state is None or state in jobs.ENDED}
        left = [job for job in left if job not in ended]
        tasks_left = {array: some for array, some in tasks_left.items() if _any_left(array, some, ended)}
        if progress:
            progress(*_progress(client, len(ended), len(ids) + more, left))
        patience.pause(len(left) + sum(map(len, tasks_left.values())))
    return ended


def _any_left(array: str, numbers: Ranges, ended: Mapping[str, str | None]) -> bool:
    return any(f"{array}-{number}" not in ended for number in numbers)


def _progress(client: redis.Redis, done: int, total: int, left: Sequence[str]) -> tuple[int, int]:
    """An array that goes on counts with all of its tasks."""
    going = tasks.counts(client, left).values()
    return done + sum(one.ended for one in going), total + sum(one.total - 1 for one in going)


def wait_all(
    client: redis.Redis, *, timeout_seconds: float | None = None, progress: Progress | None = None
) -> None:
    """Block until no queue has a job left. Raises WaitTimeout."""
    most = left = jobs.unfinished(client)
    patience = _Patience(timeout_seconds)
    while left:
        if progress:
            progress(most - left, most)
        patience.pause(left)
        left = jobs.unfinished(client)
        most = max(most, left)


class _Patience:
    """Pauses between looks, short ones first, until time runs out."""

    def __init__(self, timeout_seconds: float | None) -> None:
        self._timeout_seconds = timeout_seconds
        self._deadline = None if timeout_seconds is None else clock.monotonic() + timeout_seconds
        self._pause = _FIRST_LOOK

    def pause(self, left: int) -> None:
        """Rest before the next look, unless nothing is left. Raises WaitTimeout."""
        if not left:
            return
        rest = self._pause
        if self._deadline is not None:
            rest = min(rest, self._deadline - clock.monotonic())
            if rest <= 0:
                raise WaitTimeout(
                    f"{left} jobs had not ended after {self._timeout_seconds:g} s",
                    "They go on; 'fleet jobs' shows them.",
                )
        time.sleep(rest)
        self._pause = min(self._pause * 1.5, _SLOWEST_LOOK)
