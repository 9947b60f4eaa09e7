"""Arrays of tasks: one submission, one id, one entry of a queue, however many tasks; see _array.lua."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import redis

from broker import keys, names, scripts
from broker.command import LONGEST_ARGUMENT, Command
from broker.connection import replies
from broker.errors import Conflict, FleetError, UsageError
from broker.ranges import LARGEST, Ranges, from_rows, of
from broker.submit import Options, submit_commands

#: what a task is given besides its number: a line, a JSON document, or a JSON list of arguments
ItemKind = Literal["line", "json", "arguments"]

#: seconds that a submission may rest before what is there of it goes
_OPEN_SECONDS = 600
#: items of one field; _array.lua has it, too
_ITEMS_IN_CHUNK = 32
#: seconds that a canceled task is kept
_CANCELED_TTL = 7 * 86400
#: chunks, and ranges, sent in one round trip
_AT_ONCE = 200
#: bytes of an item, for it is a variable of the task's environment
_LONGEST_ITEM = LONGEST_ARGUMENT - len("FLEET_TASK_LINE=")
#: characters of an array's id: those of its tasks are longer
_LONGEST_ID = 128 - len(f"-{LARGEST}")


@dataclass(frozen=True)
class Tasks:
    """What tasks an array has: those of `numbers`, or one from 1 on for each of `items`."""

    numbers: Ranges
    items: Sequence[bytes] | None = None
    kind: ItemKind | None = None
    #: more failures than that stop the array; None: no number does
    max_fails: int | None = None
    #: how many run at once; None: as many as there is room for
    max_parallel: int | None = None

    def checked(self) -> Tasks:
        """Return itself. Raises UsageError for what no task could be given."""
        if not len(self.numbers):
            raise UsageError("there are no tasks", "An array needs one line, or element, at least.")
        for number, item in enumerate(self.items or (), 1):
            if len(item) > _LONGEST_ITEM:
                raise UsageError(
                    f"item {number} has {len(item)} bytes; at most {_LONGEST_ITEM} fit into a variable",
                    "Put it in a file, and its name here.",
                )
            if b"\0" in item:
                raise UsageError(f"item {number} has a NUL byte", "No program can be given one.")
        return self


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


# --- submitting --------------------------------------------------------------------------------


def submit(
    client: redis.Redis,
    queue: str,
    command: Command,
    options: Options,
    tasks: Tasks,
    array_id: str | None = None,
) -> str:
    """Submit an array and return its id; nothing of it runs unless all of it is there.

    Raises UsageError, Conflict for an id that is taken, and what redis-py raises: what was sent by then
    goes within ten minutes.
    """
    array = names.new_job_id() if array_id is None else _checked_id(array_id)
    names.queue_name(queue)
    command.checked()
    options.checked()
    _open(client, array, tasks.checked())
    try:
        _upload(client, array, tasks)
        submit_commands(client, queue, [(array, command)], replace(options, tasks=len(tasks.numbers)))
    except Conflict:
        client.delete(*_kept(array))
        raise
    return array


def _checked_id(array: str) -> str:
    if len(array) > _LONGEST_ID:
        raise UsageError(f"the id of an array has at most {_LONGEST_ID} characters, got {len(array)}")
    return names.job_id(array)


def _kept(array: str) -> list[str]:
    return [keys.array(array), *(keys.of(f"array_{part}", array) for part in ("items", "todo"))]


def _open(client: redis.Redis, array: str, tasks: Tasks) -> None:
    count = len(tasks.numbers)
    fields: dict[str, Any] = {"total": count, "left": count}
    fields |= {"items": tasks.kind} if tasks.kind else {}
    for name in ("max_fails", "max_parallel"):
        if getattr(tasks, name) is not None:
            fields[name] = getattr(tasks, name)
    flat = [part for row in fields.items() for part in row]
    if not scripts.OPEN_ARRAY(client, [keys.job(array), keys.array(array)], [_OPEN_SECONDS, *flat]):
        raise Conflict(f"there is a job {array} already", "Choose another id, or leave it out.")


def _upload(client: redis.Redis, array: str, tasks: Tasks) -> None:
    """The ranges and the items, in batches; each puts off the end of what is there."""
    todo, items = keys.of("array_todo", array), keys.of("array_items", array)
    rows = iter(tasks.numbers.rows())
    while some := list(islice(rows, _AT_ONCE)):
        _send(client, array, lambda pipe, some=some: pipe.rpush(todo, *some))
    chunks = enumerate(_chunks(tasks.items or ()))
    while packed := dict(islice(chunks, _AT_ONCE)):
        _send(client, array, lambda pipe, packed=packed: pipe.hset(items, mapping=packed))


def _send(client: redis.Redis, array: str, write: Any) -> None:
    with client.pipeline(transaction=False) as pipe:
        write(pipe)
        for key in _kept(array):
            pipe.expire(key, _OPEN_SECONDS)
        is_there = replies(pipe)[1]
    if not is_there:
        raise FleetError("the submission took too long: what was sent before has gone", "Try again.")


def _chunks(items: Sequence[bytes]) -> Iterator[bytes]:
    """Items as _array.lua reads them: each with its length before it."""
    for start in range(0, len(items), _ITEMS_IN_CHUNK):
        some = items[start : start + _ITEMS_IN_CHUNK]
        yield b"".join(part for item in some for part in (struct.pack("<I", len(item)), item))


# --- reading -----------------------------------------------------------------------------------

_SETS = ("array_waiting", "array_running", "array_failed", "array_canceled")


def counts(client: redis.Redis, ids: Iterable[str]) -> dict[str, TaskCounts]:
    """The counts of each array of `ids`; of those that are none there is nothing."""
    found: dict[str, TaskCounts] = {}
    ordered = list(ids)
    with client.pipeline(transaction=False) as pipe:
        for array in ordered:
            pipe.hmget(keys.array(array), "total", "left", "held", "finished")
            for kind in _SETS:
                pipe.scard(keys.of(kind, array))
            pipe.lrange(keys.of("array_dropped", array), 0, -1)
        rows = iter(replies(pipe)) if ordered else iter(())
    for array in ordered:
        fields, *sizes, dropped = (next(rows) for _ in range(len(_SETS) + 2))
        if isinstance(fields, list) and fields[0]:
            found[array] = _counted(list(map(_number, fields)), list(map(_number, sizes)), dropped)
    return found


def _counted(fields: Sequence[int], sizes: Sequence[int], dropped: Any) -> TaskCounts:
    total, left, held, finished = fields
    waiting, running, failed, canceled = sizes
    never = len(from_rows(dropped)) if isinstance(dropped, list) else 0
    return TaskCounts(total, left + held + waiting, running, finished, failed, canceled + never)


def _number(value: Any) -> int:
    """A count, or 0 where somebody keeps something else there."""
    try:
        return int(value or 0)
    except (TypeError, ValueError):
        return 0


# --- changing ----------------------------------------------------------------------------------


def cancel(client: redis.Redis, array: str, chosen: Ranges | None = None) -> str:
    """Cancel an array, or some of its tasks: what is not begun never will be, what runs is ended.

    Returns 'canceled', 'stopping' where something runs (its workers end it within two seconds), the state
    in which the array had ended, or '' for no such array.
    """
    outcome = ""
    for ranges in _batches([] if chosen is None else of(chosen).rows()):
        reply, _ = scripts.CANCEL_ARRAY(client, [keys.job(array)], [array, *ranges])
        outcome = reply.decode("utf-8", "replace")
    if outcome != "stopping":
        return outcome
    numbers = _members(client, array, ("array_waiting", "array_running"), chosen)
    told = _cancel_tasks(client, [f"{array}-{number}" for number in numbers])
    return "stopping" if "stopping" in told else "canceled"


def _batches(rows: list[str]) -> Iterator[list[str]]:
    """At least one."""
    return (rows[start : start + _AT_ONCE] for start in range(0, max(1, len(rows)), _AT_ONCE))


def _members(client: redis.Redis, array: str, kinds: Sequence[str], chosen: Ranges | None) -> list[int]:
    """The numbers in these sets that are of `chosen`, in order; all: None."""
    with client.pipeline(transaction=True) as pipe:
        for kind in kinds:
            pipe.smembers(keys.of(kind, array))
        found = {_number(member) for reply in replies(pipe) if isinstance(reply, set) for member in reply}
    return sorted(found if chosen is None else (number for number in found if number in chosen))


def _cancel_tasks(client: redis.Redis, ids: Sequence[str]) -> set[str]:
    """What became of them, see broker.control.cancel."""
    return {
        outcome.decode("utf-8", "replace")
        for job_id in ids
        if (outcome := scripts.CANCEL(client, [keys.job(job_id)], [job_id, _CANCELED_TTL]))
    }


# --- what a task finds about itself ------------------------------------------------------------

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
