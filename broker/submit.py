"""Submit command lines: many in one atomic call, without importing rq."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from broker import dependents, jobs, keys, names, scripts, tasks
from broker.command import Command
from broker.errors import Conflict, FleetError, NotFound, UsageError
from broker.requirements import NOTHING, Requirements

if TYPE_CHECKING:
    import redis

#: jobs sent to Redis in one call of submit.lua: it must not hold up everybody for long
_BATCH = 500
#: the same where all or none are to be in, which more than so many are by a gate
TOGETHER = 2000
#: what stands for the rest of a submission; no id of a job has a colon
_GATE = "gate:"
#: seconds for which a gate that is not open holds back what came behind it
_GATE_SECONDS = 120
#: characters of a job's name
LONGEST_NAME = 200
#: backoff of retries doubles up to this many seconds
LONGEST_RETRY_DELAY = 3600


#: what becomes of a job where one that it waits for does not finish
OnFailedDependency = Literal["fail", "wait"]


@dataclass(frozen=True)
class Options:
    """How a command is to be treated; times in seconds, None: no limit or the default.

    `requirements` say what it needs of the worker that runs it. `after` and `after_any` are ids of jobs that
    it waits for: until they have finished, or have ended in whatever way.
    """

    name: str | None = None
    timeout_seconds: int | None = None
    retries: int = 0
    retry_delay_seconds: float = 1.0
    result_ttl_seconds: int = 7 * 86400
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    on_failed_dependency: OnFailedDependency = "fail"
    #: how many tasks it has, for an array: broker.arrays submits these
    tasks: int | None = None
    requirements: Requirements = NOTHING

    def checked(self) -> Options:
        """Return itself. Raises UsageError for a number out of range."""
        if self.timeout_seconds is not None and self.timeout_seconds <= 0:
            raise UsageError(
                f"a timeout must be more than 0 seconds, got {self.timeout_seconds}",
                "Leave --timeout out for no limit.",
            )
        if self.retries < 0:
            raise UsageError(f"retries must be 0 or more, got {self.retries}")
        if self.retry_delay_seconds < 0:
            raise UsageError(f"a retry delay must be 0 or more seconds, got {self.retry_delay_seconds}")
        if self.on_failed_dependency not in get_args(OnFailedDependency):
            raise UsageError(f"on_failed_dependency is fail or wait, not {self.on_failed_dependency!r}")
        for job_id in (*self.after, *self.after_any):
            names.job_id(job_id)
        for job_id in set(self.after) & set(self.after_any):
            raise UsageError(f"job {job_id} is to finish, and to end in whatever way", "Name it once.")
        return self


@dataclass(frozen=True)
class Submission:
    """One job to be; `job_id` None: it gets a new one."""

    command: Command
    options: Options = Options()
    queue: str = "default"
    job_id: str | None = None

    def checked(self) -> Submission:
        """Return itself. Raises UsageError."""
        names.queue_name(self.queue)
        self.options.checked()
        self.command.checked()
        if self.job_id is not None:
            names.job_id(self.job_id)
        return self


@dataclass(frozen=True)
class Submitted:
    """A job that is in: `state` is queued, deferred, or failed for a job that it waits for."""

    id: str
    state: str


def submit_commands(
    client: redis.Redis, queue: str, commands: Iterable[tuple[str | None, Command]], options: Options
) -> list[str]:
    """Submit command lines, each with the id it shall have or None; returns the ids in order.

    Raises what `submit_all` does.
    """
    rows = [Submission(command, options, queue, job_id) for job_id, command in commands]
    return [job.id for job in submit_all(client, rows)]


def submit_all(client: redis.Redis, submissions: Iterable[Submission]) -> list[Submitted]:
    """Submit jobs; those that others of them wait for come first.

    Jobs go in batches of 500, each all or nothing. Raises UsageError, Conflict for an id
    that is taken or would wait for itself, NotFound for a job to wait for that is not there, and what
    redis-py raises: then batches before it are in.
    """
    rows = [_Row.of(submission) for submission in submissions]
    return [job for some in _batches(rows, _BATCH) for job in _submit_batch(client, some)]


def submit_together(client: redis.Redis, submissions: Iterable[Submission]) -> list[Submitted]:
    """The same, but all or nothing: none of them starts before the last is in.

    Up to 2,000 go in one step. More go in several, behind a gate that opens with the last one: should
    that never come, those before it are removed within minutes. Raises what `submit_all` does.
    """
    rows = [_Row.of(submission) for submission in submissions]
    return _submit_batch(client, rows) if len(rows) <= TOGETHER else _submit_gated(client, rows)


@dataclass(frozen=True)
class _Row:
    """A submission as submit.lua takes it; `base` is its queue, `need` what it asks for there."""

    id: str
    base: str
    need: Requirements
    parents: tuple[str, ...]
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, submission: Submission) -> _Row:
        """Raises UsageError."""
        chosen, options = submission.checked().job_id, submission.options
        parents = (
            *dict.fromkeys(options.after),
            *(f"~{job_id}" for job_id in dict.fromkeys(options.after_any)),
        )
        if parents and options.on_failed_dependency == "wait":
            parents += ("?",)
        if parents and chosen:
            parents += ("!",)
        fields = _fields(submission.command, options)
        job_id = chosen or names.new_job_id()
        return cls(job_id, submission.queue, options.requirements, parents, fields)

    def behind(self, gate: str) -> _Row:
        return replace(self, parents=(gate, *self.parents))


def _batches(rows: Sequence[_Row], size: int) -> Iterator[Sequence[_Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _submit_batch(client: redis.Redis, rows: Sequence[_Row]) -> list[Submitted]:
    if not rows:
        return []
    asked = dict.fromkeys((row.base, row.need) for row in rows if row.need != NOTHING)
    columns = tuple(dict.fromkeys(name for row in rows for name in row.fields))  # arrays have one more
    arguments: list[Any] = [len(columns), *columns, len(asked)]
    for base, need in asked:
        arguments += [base, need.digest(), need.canonical()]
    queues = {(row.base, row.need): row.need.queue_of(row.base) for row in rows}
    for row in rows:
        arguments += [row.id, queues[row.base, row.need], " ".join(row.parents)]
        arguments += [row.fields.get(column, "") for column in columns]
    first, *others = (part.decode("utf-8", "replace") for part in scripts.SUBMIT(client, [], arguments))
    if first == "unknown":
        raise _unknown(client, others[0])
    if first:
        raise _refused(first, others[0])
    states = dict(zip(others[::2], others[1::2], strict=True))
    return [Submitted(row.id, states.get(row.id, "queued")) for row in rows]


def _refused(why: str, job_id: str) -> Conflict:
    if why == "taken":
        return Conflict(f"there is a job {job_id} already", "Choose another id, or leave it out.")
    return Conflict(
        f"job {job_id} would wait for itself: what it is to wait for waits for it",
        "Choose another id, or leave it out.",
    )


def _unknown(client: redis.Redis, job_id: str) -> FleetError:
    """Why nothing can wait for that job, which is not there."""
    if job_id.startswith(_GATE):
        return _too_late()
    array, _, number = job_id.rpartition("-")
    if number.isdecimal() and int(number) in tasks.numbers(client, array):
        return NotFound(
            f"task {number} of array {array} has not begun, or has expired: no job can wait for it alone",
            f"--after {array} waits for all of its tasks; of an array, --after-array {array} for each alone.",
        )
    return NotFound(
        f"no job {job_id} to wait for", "It may have expired; 'fleet jobs' lists those there are."
    )


def _too_late() -> FleetError:
    return FleetError("the submission took too long, and was given up", "Nothing is in: submit it anew.")


def _submit_gated(client: redis.Redis, rows: Sequence[_Row]) -> list[Submitted]:
    gate, is_whole = _GATE + names.new_job_id(), False
    with client.pipeline(transaction=True) as pipe:
        pipe.hset(keys.job(gate), "status", "deferred")
        pipe.expire(keys.job(gate), _GATE_SECONDS)
        pipe.execute()
    try:
        for some in _batches([row.behind(gate) for row in rows], _BATCH):
            client.expire(keys.job(gate), _GATE_SECONDS)
            _submit_batch(client, some)
        is_whole = True
    finally:  # of an interrupt, too
        is_open = dependents.settle(client, gate, "finished" if is_whole else "canceled")
    if not is_open:
        raise _too_late()
    states = jobs.states(client, [row.id for row in rows])
    return [Submitted(job_id, state or "queued") for job_id, state in states.items()]


def _fields(command: Command, options: Options) -> Mapping[str, Any]:
    """The fields of a command's hash, as `rq.job.Job.to_dict` names them; those of an array have one more."""
    own = {} if options.tasks is None else {"fleet_array": options.tasks}
    return own | {
        "data": command.to_data(),
        "description": options.requirements.beside(described(options.name or " ".join(command.argv))),
        "timeout": options.timeout_seconds or -1,
        "result_ttl": options.result_ttl_seconds,
        "failure_ttl": options.result_ttl_seconds,
        "retries_left": options.retries,
        "retry_intervals": "[" + ",".join(map(str, backoff(options))) + "]",
        "worker_name": "",
        "started_at": "",
        "ended_at": "",
    }


def described(text: str) -> str:
    """`text` for people: not too long, and with bytes that are no UTF-8 spelled out."""
    short = text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
    return short.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def backoff(options: Options) -> Iterator[int]:
    """Seconds before each retry: doubling, with a random half on top, so that a crowd that failed
    together does not come back together; whole seconds, as RQ's scheduler counts."""
    delay = options.retry_delay_seconds
    for _ in range(options.retries):
        delay = min(delay, LONGEST_RETRY_DELAY)
        yield round(delay * random.uniform(1.0, 1.5))
        delay *= 2
