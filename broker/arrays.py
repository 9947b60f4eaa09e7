"""Arrays of tasks: one submission, one id, one entry of a queue, however many tasks; see _arrays.lua."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import redis

from broker import keys, names, scripts
from broker import tasks as reading
from broker.command import LONGEST_ARGUMENT
from broker.connection import replies
from broker.errors import Conflict, FleetError, NotFound, UsageError
from broker.ranges import LARGEST, Ranges, of
from broker.submit import Submission, Submitted, submit_all

#: what a task is given besides its number: a line, a JSON document, or a JSON list of arguments
ItemKind = Literal["line", "json", "arguments"]

#: seconds that a submission may rest before what is there of it goes
_OPEN_SECONDS = 600
#: items of one field; _arrays.lua has it, too
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
    #: the array whose task of the same number must have finished before one of this begins
    after: str | None = None

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


# --- submitting --------------------------------------------------------------------------------


def submit(client: redis.Redis, submission: Submission, tasks: Tasks) -> Submitted:
    """Submit an array; nothing of it runs unless all of it is there.

    Raises what `broker.submit.submit_all` does: what was sent by then goes within ten minutes.
    """
    whole = prepare(client, submission, tasks)
    try:
        return submit_all(client, [whole])[0]
    except (Conflict, NotFound):
        forget(client, [whole])
        raise


def prepare(client: redis.Redis, submission: Submission, tasks: Tasks) -> Submission:
    """Send the tasks of an array; returns the submission that makes it run, within ten minutes.

    Raises UsageError, Conflict for an id that is taken, NotFound, and what redis-py raises.
    """
    array = names.new_job_id() if submission.job_id is None else _checked_id(submission.job_id)
    tasks = _with_numbers(client, tasks)
    options = replace(submission.options, tasks=len(tasks.numbers))
    whole = replace(submission, job_id=array, options=options).checked()
    _open(client, array, tasks)
    try:
        numbers = _follow(client, array, tasks, options.on_failed_dependency)
        _upload(client, array, numbers, tasks.items or ())
    except (Conflict, NotFound):
        forget(client, [whole])
        raise
    return whole


def forget(client: redis.Redis, prepared: Iterable[Submission]) -> None:
    """Remove the tasks of arrays that were prepared and could not be submitted."""
    for submission in prepared:
        if submission.options.tasks is not None and submission.job_id:
            client.delete(*_kept(submission.job_id))


def _with_numbers(client: redis.Redis, tasks: Tasks) -> Tasks:
    """Those that wait for another array's have the numbers of these. Raises UsageError, NotFound."""
    if tasks.after is None:
        return tasks.checked()
    theirs = reading.numbers(client, tasks.after)
    if not len(theirs):
        raise _no_array(tasks.after)
    if len(tasks.numbers) and tasks.numbers.parts != theirs.parts:
        hint = "Both must have the same; 'fleet submit --after-array ID' takes them from there."
        raise UsageError(f"{tasks.after} has the tasks {theirs}, this one {tasks.numbers}", hint)
    return replace(tasks, numbers=theirs).checked()


def _no_array(array: str) -> NotFound:
    return NotFound(f"no array {array} to wait for", "'fleet jobs' lists those there are.")


def _follow(client: redis.Redis, array: str, tasks: Tasks, on_failed: str) -> Ranges:
    """Have tasks wait for those of another array; returns the numbers that can begin now."""
    if tasks.after is None:
        return tasks.numbers
    finished = scripts.FOLLOW_ARRAY(client, [keys.array(tasks.after)], [tasks.after, array, on_failed])
    if finished is None:
        raise _no_array(tasks.after)
    done = of(number for number in tasks.numbers if reading.has_bit(finished, number))
    with client.pipeline(transaction=True) as pipe:
        pipe.hincrby(keys.array(array), "held", -len(done))
        pipe.hincrby(keys.array(array), "left", len(done))
        pipe.execute()
    return done


def _checked_id(array: str) -> str:
    if len(array) > _LONGEST_ID:
        raise UsageError(f"the id of an array has at most {_LONGEST_ID} characters, got {len(array)}")
    return names.job_id(array)


def _kept(array: str) -> list[str]:
    return [keys.array(array), *(keys.of(f"array_{part}", array) for part in ("items", "todo"))]


def _open(client: redis.Redis, array: str, tasks: Tasks) -> None:
    count = len(tasks.numbers)
    held = count if tasks.after is not None else 0
    fields: dict[str, Any] = {
        "total": count,
        "left": count - held,
        "held": held,
        "numbers": str(tasks.numbers),
    }
    fields |= {"items": tasks.kind} if tasks.kind else {}
    for name in ("max_fails", "max_parallel"):
        if getattr(tasks, name) is not None:
            fields[name] = getattr(tasks, name)
    flat = [part for row in fields.items() for part in row]
    if not scripts.OPEN_ARRAY(client, [keys.job(array), keys.array(array)], [_OPEN_SECONDS, *flat]):
        raise Conflict(f"there is a job {array} already", "Choose another id, or leave it out.")


def _upload(client: redis.Redis, array: str, numbers: Ranges, given: Sequence[bytes]) -> None:
    """The ranges and the items, in batches; each puts off the end of what is there."""
    todo, items = keys.of("array_todo", array), keys.of("array_items", array)
    rows = iter(numbers.rows())
    while some := list(islice(rows, _AT_ONCE)):
        _send(client, array, lambda pipe, some=some: pipe.rpush(todo, *some))
    chunks = enumerate(_chunks(given))
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
    """Items as _arrays.lua reads them: each with its length before it."""
    for start in range(0, len(items), _ITEMS_IN_CHUNK):
        some = items[start : start + _ITEMS_IN_CHUNK]
        yield b"".join(part for item in some for part in (struct.pack("<I", len(item)), item))


# --- changing ----------------------------------------------------------------------------------


def cancel(client: redis.Redis, array: str, chosen: Ranges | None = None) -> str:
    """Cancel an array, or some of its tasks: what is not begun never will be, what runs is ended.

    Returns 'canceled', 'stopping' where something runs (its workers are told within two seconds), the state
    in which they had ended, or '' for no such array.
    """
    outcome, dropped = "", 0
    for ranges in batches([] if chosen is None else of(chosen).rows()):
        reply, count = scripts.CANCEL_ARRAY(client, [keys.job(array)], [array, *ranges])
        outcome, dropped = reply.decode("utf-8", "replace"), dropped + count
    if outcome != "stopping":
        return outcome
    begun = reading.members(client, array, ("array_waiting", "array_running"), chosen)
    told = _cancel_tasks(client, [f"{array}-{number}" for number in begun])
    if chosen is None or dropped or told & {"stopping", "canceled"}:
        return "stopping" if "stopping" in told else "canceled"
    return next((state for state in reading.states(client, array, chosen).values() if state), "")


def batches(rows: Sequence[str]) -> Iterator[Sequence[str]]:
    """Ranges for one call each; at least one of these."""
    return (rows[start : start + _AT_ONCE] for start in range(0, max(1, len(rows)), _AT_ONCE))


def _cancel_tasks(client: redis.Redis, ids: Sequence[str]) -> set[str]:
    """What became of them, see broker.control.cancel."""
    return {
        outcome.decode("utf-8", "replace")
        for job_id in ids
        if (outcome := scripts.CANCEL(client, [keys.job(job_id)], [job_id, _CANCELED_TTL]))
    }
