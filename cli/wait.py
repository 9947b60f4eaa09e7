"""`fleet wait`: block until jobs have ended, and say by the exit code how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from broker.errors import NotFound, UsageError
from cli.context import Context, pass_context, print_json
from cli.params import Duration, JobId, json_option

if TYPE_CHECKING:
    import redis

#: jobs named in a message
_NAMED = 10


@click.command()
@click.argument("job_ids", metavar="[JOB]...", type=JobId(), nargs=-1)
@click.option("--all", "wait_all", is_flag=True, help="Until no queue has a job left.")
@click.option("--timeout", type=Duration(zero=True), help="Give up after so long; exit code 5.")
@json_option
@pass_context
def wait(
    context: Context, /, job_ids: tuple[str, ...], wait_all: bool, timeout: float | None, as_json: bool
) -> int:
    """Wait until jobs have ended.

    Exit code 0: all finished; 1: none did; 3: some did; 4: there is no such job; 5: time ran out.
    --all judges by the jobs that were there when it began.
    """
    if bool(job_ids) == wait_all:
        raise UsageError("name jobs, or --all", "fleet wait JOB... | fleet wait --all")
    with context.redis() as client:
        ended = _all(context, client, timeout) if wait_all else _some(context, client, job_ids, timeout)
    if as_json:
        print_json({"jobs": [{"id": job_id, "state": state} for job_id, state in ended.items()]})
    else:
        say(context, ended)
    return exit_code(ended)


def _some(
    context: Context, client: redis.Redis, job_ids: Sequence[str], timeout: float | None
) -> Mapping[str, str | None]:
    from broker import control, jobs

    wanted = list(dict.fromkeys(job_ids))
    unknown = [job_id for job_id, state in jobs.states(client, wanted).items() if state is None]
    if unknown:
        raise NotFound(f"no such job: {_listed(unknown)}", "'fleet jobs' lists those there are.")
    with bar(context) as progress:
        return control.wait(client, wanted, timeout_seconds=timeout, progress=progress)


def _all(context: Context, client: redis.Redis, timeout: float | None) -> Mapping[str, str | None]:
    from broker import control, jobs

    there = jobs.unfinished_ids(client)
    with bar(context) as progress:
        control.wait_all(client, timeout_seconds=timeout, progress=progress)
    # who canceled or deleted a job knows about it; those gone without a trace have expired
    return {job_id: state for job_id, state in jobs.states(client, there).items() if state}


def exit_code(ended: Mapping[str, str | None]) -> int:
    """As docs/cli.md has it; None is the state of a job that was deleted meanwhile."""
    finished = sum(state == "finished" for state in ended.values())
    if finished == len(ended):
        return 0
    if finished:
        return 3
    return 1 if any(ended.values()) else 4


def say(context: Context, ended: Mapping[str, str | None]) -> None:
    for state in sorted({state or "gone" for state in ended.values()} - {"finished"}):
        these = [job_id for job_id, other in ended.items() if (other or "gone") == state]
        context.say(f"{len(these)} of {len(ended)} {state}: {_listed(these)}")


def _listed(job_ids: Sequence[str]) -> str:
    more = len(job_ids) - _NAMED
    return ", ".join(job_ids[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def bar(context: Context) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr where that is a terminal: gives the function that moves it."""
    if context.quiet or not context.messages.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("Waiting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=context.messages, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
