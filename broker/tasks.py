"""The tasks of arrays as people see them, and as they see themselves: read from what _arrays.lua keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from broker import keys
from broker.connection import replies
from broker.errors import UsageError
from broker.ranges import Ranges, from_rows, parse


@dataclass(frozen=True)
class TaskCounts:
    """How many tasks of an array are where; `queued` are all that are still to run."""

    total: int
    queued: int
    running: int
    finished: int
    failed: int
    canceled: int

    @property
    def ended(self) -> int:
        return self.finished + self.failed + self.canceled


_SETS = ("array_waiting", "array_running", "array_failed", "array_canceled")


def counts(client: redis.Redis, ids: Iterable[str]) -> dict[str, TaskCounts]:
    """The counts of each array of `ids`; of those that are none there is nothing."""
    found: dict[str, TaskCounts] = {}
    ordered = list(ids)
    with client.pipeline(transaction=False) as pipe:
        for array in ordered:
            pipe.hmget(keys.array(array), "total", "left", "held", "finished", "stop", "unmet")
            for kind in _SETS:
                pipe.scard(keys.of(kind, array))
            pipe.lrange(keys.of("array_dropped", array), 0, -1)
        rows = iter(replies(pipe)) if ordered else iter(())
    for array in ordered:
        fields, *sizes, dropped = (next(rows) for _ in range(len(_SETS) + 2))
        if isinstance(fields, list) and fields[0]:
            found[array] = _counted(fields, list(map(_number, sizes)), dropped)
    return found


def _counted(fields: Sequence[Any], sizes: Sequence[int], dropped: Any) -> TaskCounts:
    total, left, held, finished = map(_number, fields[:4])
    waiting, running, failed, canceled = sizes
    never = len(from_rows(dropped)) if isinstance(dropped, list) else 0
    counts = {"queued": left + waiting, "failed": failed, "canceled": canceled + never}
    counts[_HELD[_state_of_held(*fields[4:])]] += held
    return TaskCounts(total=total, running=running, finished=finished, **counts)


_HELD = {"deferred": "queued", "failed": "failed", "canceled": "canceled"}


def _state_of_held(stop: bytes | None, unmet: bytes | None) -> str:
    """Of tasks that wait for those of another array."""
    return "canceled" if stop else "failed" if unmet else "deferred"


def _number(value: Any) -> int:
    """A count, or 0 where somebody keeps something else there."""
    try:
        return int(value or 0)
    except (TypeError, ValueError):
        return 0


@dataclass(frozen=True)
class Unclaimed:
    """How many more than its lists tell wait in a queue, and wait there for others; may be negative."""

    queued: int = 0
    deferred: int = 0

    def __add__(self, other: Unclaimed) -> Unclaimed:
        return Unclaimed(self.queued + other.queued, self.deferred + other.deferred)


def unclaimed(client: redis.Redis) -> dict[str, Unclaimed]:
    """By queue: tasks that are no jobs yet, in place of the one entry that their array has there."""
    found: dict[str, Unclaimed] = {}
    live: list[Any] = client.zrange(keys.ARRAYS, 0, -1)
    arrays = [member.decode("utf-8", "replace") for member in live]
    with client.pipeline(transaction=False) as pipe:
        for array in arrays:
            pipe.hmget(keys.array(array), "left", "held", "started_at")
            pipe.hmget(keys.job(array), "status", "origin")
        rows = iter(replies(pipe)) if arrays else iter(())
    for fields, job in zip(rows, rows, strict=True):
        if isinstance(fields, list) and isinstance(job, list) and job[0] and job[1]:
            queue = job[1].decode("utf-8", "replace")
            found[queue] = found.get(queue, Unclaimed()) + _more(job[0], fields)
    return found


def _more(status: bytes, fields: Sequence[bytes | None]) -> Unclaimed:
    left, held = _number(fields[0]), _number(fields[1])
    if status == b"queued":
        return Unclaimed(left - 1, held)
    if status == b"deferred" and fields[2]:  # all is given out, or as much as may run at once
        return Unclaimed(left, held - 1)
    return Unclaimed(0, left + held - 1) if status == b"deferred" else Unclaimed()


def find(client: redis.Redis, ids: Iterable[str]) -> set[str]:
    """Those of `ids` that are arrays."""
    ordered = list(ids)
    with client.pipeline(transaction=False) as pipe:
        for job_id in ordered:
            pipe.exists(keys.array(job_id))
        return {job_id for job_id, there in zip(ordered, replies(pipe), strict=True) if there == 1}


def numbers(client: redis.Redis, array: str) -> Ranges:
    """The numbers of all tasks of an array; none for what is no array."""
    text: Any = client.hget(keys.array(array), "numbers")
    try:
        return parse((text or b"").decode("ascii", "replace"))
    except UsageError:  # none, or somebody's damage
        return Ranges(())


_STATES = ("queued", "started", "failed", "canceled")  # of _SETS


def states(client: redis.Redis, array: str, chosen: Ranges) -> dict[int, str | None]:
    """The state of each of these tasks, as that of a job, begun or not; None where there is none.

    From what the array knows of them: it is right also where the job of a task has expired.
    """
    with client.pipeline(transaction=True) as pipe:
        pipe.get(keys.of("array_finished", array))
        pipe.lrange(keys.of("array_todo", array), 0, -1)
        pipe.lrange(keys.of("array_dropped", array), 0, -1)
        pipe.hmget(keys.array(array), "stop", "unmet")
        for kind in _SETS:
            pipe.smembers(keys.of(kind, array))
        finished, todo, dropped, marks, *sets = replies(pipe)
    places = {_number(one): state for state, found in zip(_STATES, sets, strict=True) for one in found}
    waits, never = from_rows(todo), from_rows(dropped)
    rest = (("queued", waits), ("canceled", never), (_state_of_held(*marks), numbers(client, array)))

    def state_of(number: int) -> str | None:
        if has_bit(finished or b"", number):
            return "finished"
        return places.get(number) or next((state for state, some in rest if number in some), None)

    return {number: state_of(number) for number in chosen}


def has_bit(bitmap: bytes, number: int) -> bool:
    """Whether Redis's bitmap has that bit."""
    return number // 8 < len(bitmap) and bool(bitmap[number // 8] >> (7 - number % 8) & 1)


def members(client: redis.Redis, array: str, kinds: Sequence[str], chosen: Ranges | None) -> list[int]:
    """The numbers in these sets that are of `chosen`, in order; all: None."""
    with client.pipeline(transaction=True) as pipe:
        for kind in kinds:
            pipe.smembers(keys.of(kind, array))
        found = {_number(member) for reply in replies(pipe) if isinstance(reply, set) for member in reply}
    return sorted(found if chosen is None else (number for number in found if number in chosen))


_VARIABLES = {b"fleet_task_line": "FLEET_TASK_LINE", b"fleet_task_json": "FLEET_TASK_JSON"}


def variables(job_id: str, fields: Mapping[bytes, bytes]) -> dict[str, str]:
    """What the job of that id and hash is told of its array, if it is a task of one."""
    array = fields.get(b"fleet_array_of")
    if array is None:
        return {}
    name = array.decode("utf-8", "replace")
    found = {"FLEET_ARRAY_ID": name, "FLEET_TASK_ID": job_id[len(name) + 1 :]}
    for field, variable in _VARIABLES.items():
        if field in fields:
            found[variable] = fields[field].decode("utf-8", "surrogateescape")
    return found
