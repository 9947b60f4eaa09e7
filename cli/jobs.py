"""`fleet jobs`, `show` and `cancel`: what there is, and one end to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from broker import clock
from broker.errors import NotFound, UsageError
from broker.printable import printable
from broker.requirements import base_of
from cli.context import Context, json_value, pass_context, print_json
from cli.outcomes import NOT_FOUND, exit_code
from cli.params import JobId, JobWord, QueueName, json_option
from cli.selected import NONE_FAILING, failing
from cli.tables import Cell, Column, age, duration, size, state
from cli.tables import show as show_table

if TYPE_CHECKING:
    import redis

    from broker.jobs import AttemptView, JobView, Related
    from broker.selection import Target, Word
    from broker.tasks import TaskCounts
    from broker.usage import Usage

#: jobs named of those that one waits for
_RELATED = 10
_STATES = ("queued", "started", "finished", "failed", "deferred", "scheduled", "stopped", "canceled")
_JOB_COLUMNS = (
    Column("JOB"),
    Column("STATE"),
    Column("QUEUE", rank=1, least=7),
    Column("AGE", right=True),
    Column("TIME", rank=2, right=True),
    Column("NAME", least=12),
    Column("REASON", rank=3, least=16),
    Column("WORKER", rank=4, least=8),
)
_ATTEMPT_COLUMNS = (
    Column("FENCE", right=True),
    Column("WORKER", least=8),
    Column("STARTED", rank=1),
    Column("TIME", rank=2, right=True),
    Column("OUTCOME"),
    Column("REASON", least=10),
)


@click.command()
@click.option("--state", "wanted", type=click.Choice(_STATES), help="Only those in this state.")
@click.option("--queue", type=QueueName(), help="Only those of this queue.")
@click.option("--name", metavar="GLOB", help="Only those whose name fits, as 'train-*' does.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many.")
@click.option("--array", metavar="ID", type=JobId(), help="The tasks of that array, in their order.")
@json_option
@pass_context
def jobs(
    context: Context,
    /,
    wanted: str | None,
    queue: str | None,
    name: str | None,
    limit: int,
    array: str | None,
    as_json: bool,
) -> None:
    """List jobs, the newest first; an array is one line."""
    from broker import jobs as reader

    if array and queue:
        raise UsageError("--array and --queue exclude each other", "An array is in one queue.")
    with context.redis() as client:
        if array:
            found = reader.tasks_of(client, array, state=wanted, name=name, limit=limit)
        else:
            found = reader.listed(client, state=wanted, queue=queue, name=name, limit=limit)
    if as_json:
        print_json({"jobs": [_job_fields(job) for job in found]})
    elif found:
        now = clock.wall()
        show_table(context.console, _JOB_COLUMNS, [_job_row(job, now) for job in found])
    else:
        context.say("No such jobs." if wanted or queue or name else "No jobs yet: 'fleet submit -- COMMAND'.")


def _job_row(job: JobView, now: datetime) -> list[Cell]:
    took = _seconds(job.started_at, job.ended_at or (now if job.state == "started" else None))
    since = age(_seconds(job.submitted_at, now))
    reason = (job.reason or "") if job.state in ("failed", "stopped") else ""
    name = job.name or "(damaged)"
    if job.tasks:
        name = f"{_counts(job.tasks)}: {name}"
    return [
        job.id,
        state(job.state),
        base_of(job.queue),
        since,
        duration(took),
        name,
        reason,
        job.worker or "",
    ]


def _counts(tasks: TaskCounts) -> str:
    """`1,000 tasks, 3 running, 990 finished`: those places where there are any."""
    told = [f"{count:,} {place}" for place, count in asdict(tasks).items() if count and place != "total"]
    return ", ".join([f"{tasks.total:,} tasks", *told])


def _seconds(since: datetime | None, until: datetime | None) -> float | None:
    return (until - since).total_seconds() if since and until else None


def _job_fields(job: JobView) -> dict[str, Any]:
    """A job in a list: as in `fleet show`, less what only a close look gives."""
    close = ("attempts", "result", "dependencies", "dependents")
    return {name: value for name, value in _fields(job).items() if name not in close}


def _fields(job: JobView) -> dict[str, Any]:
    """`argv` for a command, `function` for a Python function."""
    what = {"function": job.function} if job.argv is None and job.function else {"argv": job.argv}
    return {
        "id": job.id,
        "name": job.name,
        "state": job.state,
        "queue": base_of(job.queue),
        "requirements": job.requirements,
        **what,
        "exit_code": job.exit_code,
        "reason": job.reason,
        "submitted_at": job.submitted_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "usage": job.usage._asdict() if job.usage else None,
        "attempts": [asdict(attempt) for attempt in job.attempts],
        "result": json_value(job.result),
        "dependencies": [asdict(other) for other in job.dependencies],
        "dependents": [asdict(other) for other in job.dependents],
        "tasks": asdict(job.tasks) if job.tasks else None,
        "array": job.array,
    }


@click.command()
@click.argument("words", metavar="JOB...", type=JobWord(), nargs=-1, required=True)
@click.option("--failed", is_flag=True, help="Of arrays: their tasks that failed.")
@json_option
@pass_context
def show(context: Context, /, words: tuple[Word, ...], failed: bool, as_json: bool) -> None:
    """Everything about jobs: state, times, exit code, reason, attempts, result; of an array its counts."""
    with context.redis() as client:
        found = list(_shown(client, words, failed=failed))
    if as_json and len(found) == 1 and not failed:
        print_json(_fields(found[0]))
    elif as_json:
        print_json({"jobs": [_fields(job) for job in found]})
    else:
        for number, job in enumerate(found):
            click.echo("\n" * bool(number), nl=False)
            _print(context, job)


def _shown(client: redis.Redis, words: Sequence[Word], *, failed: bool) -> Iterator[JobView]:
    from broker import jobs as reader
    from broker import selection
    from cli.selected import targets

    for target in targets(client, words, failed=failed):
        if target.tasks is None:
            yield reader.show(client, target.job_id)
            continue
        whole = reader.show(client, target.job_id)
        for job_id, place in selection.job_ids(client, target):
            try:
                yield reader.show(client, job_id)
            except NotFound:
                yield from reader.task_views(client, whole, {job_id: place})


def _print(context: Context, job: JobView) -> None:
    for title, cell in _lines(job):
        context.console.print(f"{title + ':':<11}", end="")
        text, style = cell if isinstance(cell, tuple) else (cell, "")
        context.console.print(printable(text), style=style, markup=False)
    if job.attempts:
        click.echo()
        show_table(context.console, _ATTEMPT_COLUMNS, [_attempt_row(attempt) for attempt in job.attempts])
    if job.function and job.state == "failed" and isinstance(job.result, str):
        click.echo("\n" + "\n".join(map(printable, job.result.splitlines())))


def _lines(job: JobView) -> Iterator[tuple[str, Cell]]:
    """What is known of the job, line by line; what is not is left out."""
    import shlex

    from broker.submit import described

    what = shlex.join(job.argv) if job.argv else job.function or "(cannot be read: somebody damaged it)"
    known: dict[str, Cell | None] = {
        "Job": job.id,
        "Name": job.name if job.name != described(" ".join(job.argv or ())) else None,
        "Array": job.array,
        "State": state(job.state),
        "Tasks": _counts(job.tasks) if job.tasks else None,
        "Queue": base_of(job.queue),
        "Asks for": job.requirements,
        "Command" if job.function is None else "Function": what,
        "Exit code": None if job.exit_code is None else str(job.exit_code),
        "Reason": job.reason,
        "Submitted": _time(job.submitted_at),
        "Started": _time(job.started_at),
        "Ended": _time(job.ended_at),
        "Took": duration(_seconds(job.started_at, job.ended_at)),
        "Used": _used(job.usage) if job.usage else None,
        "Timeout": duration(job.timeout_seconds) if job.timeout_seconds else None,
        "Worker": job.worker,
        "Result": _result(job),
        "After": _related(job.dependencies),
        "Needed by": _related([other for other in job.dependents if other.state != "finished"]),
    }
    return ((title, cell) for title, cell in known.items() if cell)


def _related(others: Sequence[Related]) -> str | None:
    """Some of them, each with its state."""
    told = [f"{other.id} ({other.state or 'gone'})" for other in others[:_RELATED]]
    more = [f"{len(others) - _RELATED} more"] if len(others) > _RELATED else []
    return ", ".join(told + more) or None


def _used(usage: Usage) -> str:
    """`1.2 s of CPU, 210 MB of memory`: what is known."""
    mean = f" (mean {size(usage.mean_memory_bytes)})" if usage.mean_memory_bytes else ""
    parts = {
        "of CPU": None if usage.cpu_seconds is None else duration(usage.cpu_seconds),
        f"of memory{mean}": size(usage.memory_bytes) if usage.memory_bytes else None,
        "of GPU memory": size(usage.gpu_memory_bytes) if usage.gpu_memory_bytes else None,
        "of its GPUs' time": None if usage.gpu_use is None else f"{usage.gpu_use:.0%}",
        "processes": str(usage.processes) if (usage.processes or 0) > 1 else None,
        "read": size(usage.read_bytes) if usage.read_bytes else None,
        "written": size(usage.written_bytes) if usage.written_bytes else None,
    }
    return ", ".join(f"{amount} {what}" for what, amount in parts.items() if amount)


def _result(job: JobView) -> str | None:
    """What a function returned; why it failed is its reason."""
    if job.result is None or job.state != "finished":
        return None
    return json.dumps(json_value(job.result), ensure_ascii=False, default=repr)


def _time(at: datetime | None) -> str | None:
    if at is None:
        return None
    return f"{at:%Y-%m-%d %H:%M:%SZ} ({age(_seconds(at, clock.wall()))} ago)"


def _attempt_row(attempt: AttemptView) -> list[Cell]:
    started = f"{attempt.started_at:%Y-%m-%d %H:%M:%SZ}" if attempt.started_at else ""
    took = duration(_seconds(attempt.started_at, attempt.ended_at))
    outcome = attempt.outcome or "running"
    return [str(attempt.fence), attempt.worker, started, took, state(outcome), attempt.reason or ""]


@click.command()
@click.argument("words", metavar="[JOB]...", type=JobWord(may_be_all=True), nargs=-1)
@click.option("--failed", is_flag=True, help="Of all, or those named: what failed and is to run again.")
@json_option
@pass_context
def cancel(context: Context, /, words: tuple[Word, ...], failed: bool, as_json: bool) -> int:
    """Take jobs from their queues, or stop them (the whole process group) where they run.

    JOB: an id, last, all, or tasks of an array (ID-7, 'ID[1,4-6]'). A line for each. Exit code 0: all; 3:
    some; 1: none, for they had ended; 4: there are none. --failed: 0, also where there are none.
    """
    if not (words or failed):
        raise UsageError("name jobs, or --failed", "fleet cancel JOB... | fleet cancel --failed")
    with context.redis() as client:
        outcomes = _cancel_all(client, words, failed=failed)
    if as_json:
        print_json({"jobs": [{"id": job_id, "outcome": outcome} for job_id, outcome in outcomes.items()]})
    else:
        for job_id, outcome in outcomes.items():
            click.echo(f"{job_id}  {_CANCELED.get(outcome, f'had ended already: {outcome}')}")
    if not outcomes:
        context.say(NONE_FAILING if failed else "No job waits or runs.")
        return 0
    return exit_code(outcomes.values(), _OUT_OF_THE_WAY)


#: what became of a job that is out of the way
_CANCELED = {
    "canceled": "canceled",
    "stopping": "stopping",
    "stopped": "had been stopped already",
    NOT_FOUND: "no such job",
}
_OUT_OF_THE_WAY = ("canceled", "stopping", "stopped")


def _cancel_all(client: redis.Redis, words: Sequence[Word], *, failed: bool) -> dict[str, str]:
    from broker import jobs as reader
    from broker import selection

    unknown: list[str] = []
    if failed:
        found = [selection.Target(job_id, job_id) for job_id in failing(client, words)]
    elif any(word.job_id == selection.ALL for word in words):
        found = selection.targets_of(client, reader.unfinished_ids(client))
    else:
        found, unknown = selection.resolve(client, words)
    outcomes = {target.name: _cancel(client, target) for target in found}
    return outcomes | dict.fromkeys(unknown, NOT_FOUND)


def _cancel(client: redis.Redis, target: Target) -> str:
    from broker import selection

    try:
        return selection.cancel(client, target)
    except NotFound:
        return NOT_FOUND
