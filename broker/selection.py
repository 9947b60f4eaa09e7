"""Which jobs a verb means: `ID`, `ID-7`, `ID[3-9]`, `last`, `all`; and what it does to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import redis

from broker import arrays, control, jobs, keys, names, ranges, scripts, tasks
from broker.errors import NotFound, UsageError
from broker.ranges import Ranges

#: words that are no ids
LAST, ALL = "last", "all"
_WORD = re.compile(r"([^\[\]]*)\[([^\[\]]*)\]")
_TASK = re.compile(r"(.+)-(0|[1-9]\d{0,7})", re.ASCII)


@dataclass(frozen=True)
class Word:
    """A word as it was written: an id, `last` or `all`, and of an array the tasks meant, None: all."""

    text: str
    job_id: str
    tasks: Ranges | None = None


@dataclass(frozen=True)
class Target:
    """A job; or an array, with those of its tasks that are meant, None: all of it."""

    name: str
    job_id: str
    is_array: bool = False
    tasks: Ranges | None = None


def parse(text: str) -> Word:
    """Read a word. Raises UsageError."""
    found = _WORD.fullmatch(text)
    job_id, tasks = (found[1], ranges.parse(found[2])) if found else (text, None)
    if job_id == ALL and found:
        raise UsageError(f"{text!r}: 'all' has no tasks of its own", "Name an array: ID[3-9].")
    return Word(text, names.job_id(job_id), tasks)


def resolve(client: redis.Redis, words: Iterable[Word]) -> tuple[list[Target], list[str]]:
    """What these words mean, and those that mean nothing; `all` is the caller's to understand.

    Raises UsageError for tasks of what is no array.
    """
    wanted = [(word, last(client) if word.job_id == LAST else word.job_id) for word in words]
    ids = [job_id for _, job_id in wanted]
    known, are_arrays = jobs.states(client, ids), tasks.find(client, [*ids, *map(array_of, ids)])
    targets: dict[tuple[str, str], Target] = {}
    unknown = []
    for word, job_id in wanted:
        if known[job_id] is not None and word.tasks is None:
            target: Target | None = Target(job_id, job_id, job_id in are_arrays)
        elif known[job_id] is not None and job_id not in are_arrays:
            raise UsageError(f"{job_id} is no array: it has no tasks", "Name it without [...].")
        else:
            target = _tasks(client, word, job_id, are_arrays)
        if target:
            targets[target.job_id, str(target.tasks)] = target
        else:
            unknown.append(word.text)
    return list(targets.values()), unknown


def targets_of(client: redis.Redis, ids: Sequence[str]) -> list[Target]:
    """Jobs by their ids; tasks are left out where their array is among these."""
    are_arrays = tasks.find(client, ids)
    return [Target(one, one, one in are_arrays) for one in ids if array_of(one) not in are_arrays]


def last(client: redis.Redis) -> str:
    """The id of the newest submission. Raises NotFound."""
    found: bytes | None = client.get(keys.LAST)  # type: ignore[assignment]
    if not found:
        raise NotFound("nothing was submitted yet", "fleet submit -- COMMAND")
    return found.decode("utf-8", "replace")


def array_of(job_id: str) -> str:
    """The array whose task that would be; '' for an id that no task has."""
    found = _TASK.fullmatch(job_id)
    return found[1] if found else ""


def _tasks(client: redis.Redis, word: Word, job_id: str, are_arrays: set[str]) -> Target | None:
    """Tasks by their numbers, or one that is no job, for it was not begun, or has expired."""
    array = job_id if word.tasks is not None else array_of(job_id)
    if array not in are_arrays:
        return None
    asked = word.tasks if word.tasks is not None else ranges.parse(job_id.rpartition("-")[2])
    there = tasks.numbers(client, array)
    chosen = ranges.of(number for number in asked if number in there)
    return Target(f"{array}[{chosen}]" if word.tasks else job_id, array, True, chosen) if chosen else None


def failed_of(client: redis.Redis, target: Target) -> Target:
    """The same, less the tasks that did not fail."""
    failed = tasks.members(client, target.job_id, ("array_failed",), target.tasks)
    chosen = ranges.of(failed)
    return Target(f"{target.job_id}[{chosen}]", target.job_id, True, chosen)


def failing(client: redis.Redis, found: Iterable[Target]) -> list[str]:
    """The ids of those that have failed, and have not ended: of arrays, tasks."""
    ids: list[str] = []
    for one in found:
        if one.is_array:
            begun = tasks.members(client, one.job_id, ("array_waiting", "array_running"), one.tasks)
            ids += [f"{one.job_id}-{number}" for number in begun]
        else:
            ids.append(one.job_id)
    return jobs.failing(client, ids)


# --- verbs -------------------------------------------------------------------------------------


def cancel(client: redis.Redis, target: Target) -> str:
    """See broker.control.cancel. Raises NotFound."""
    if not target.is_array:
        return control.cancel(client, target.job_id)
    outcome = arrays.cancel(client, target.job_id, target.tasks)
    if not outcome:
        raise jobs.not_found(target.name)
    return outcome


def retry(client: redis.Redis, target: Target, *, only_failed: bool = False) -> tuple[str, int]:
    """Run an array's tasks again that failed or, unless `only_failed`, were stopped or canceled.

    Returns an outcome as broker.control.retry has it, and how many tasks were retried.
    """
    array, chosen = target.job_id, target.tasks
    count, outcome = 0, "retried"
    if not only_failed:
        outcome, count = _undrop(client, array, chosen)
    if outcome not in ("retried", "dependency"):
        return outcome or "not_found", 0
    kinds = ("array_failed",) if only_failed else ("array_failed", "array_canceled")
    begun = tasks.members(client, array, kinds, chosen)
    told = [outcome for _, outcome in control.retry(client, [f"{array}-{number}" for number in begun])]
    count += told.count("retried")
    if count or outcome == "dependency":
        return "retried" if count else outcome, count
    return (told[0] if told else _state_of(client, target) or "not_found"), 0


def _undrop(client: redis.Redis, array: str, chosen: Ranges | None) -> tuple[str, int]:
    count, outcome = 0, ""
    rows: Sequence[str] = [] if chosen is None else ranges.of(chosen).rows()
    for some in arrays.batches(rows):
        reply, moved = scripts.RETRY_ARRAY(client, [keys.job(array)], [array, *some])
        outcome, count = reply.decode("utf-8", "replace"), count + moved
    return outcome, count


def _state_of(client: redis.Redis, target: Target) -> str | None:
    if target.tasks is None:
        return jobs.states(client, [target.job_id])[target.job_id]
    return next(iter(tasks.states(client, target.job_id, target.tasks).values()), None)


def job_ids(client: redis.Redis, target: Target) -> Iterator[tuple[str, str | None]]:
    """The ids of the jobs that are meant, in order, with their states: an array's are its tasks."""
    if not target.is_array:
        yield target.job_id, jobs.states(client, [target.job_id])[target.job_id]
        return
    chosen = tasks.numbers(client, target.job_id) if target.tasks is None else target.tasks
    for number, state in tasks.states(client, target.job_id, chosen).items():
        yield f"{target.job_id}-{number}", state
