"""`fleet wait`: block until jobs have ended, and say by the exit code how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from cli.context import Context, pass_context, print_json
from cli.params import Duration, JobWord, json_option
from cli.selected import NONE_FAILING, failing, listed, targets

if TYPE_CHECKING:
    import redis

    from broker.ranges import Ranges
    from broker.selection import Word
    from broker.tasks import TaskCounts


_NO_ARRAYS: Mapping[str, TaskCounts] = {}


@click.command()
@click.argument("words", metavar="[JOB]...", type=JobWord(may_be_all=True), nargs=-1)
@click.option("--all", "wait_all", is_flag=True, help="Until no queue has a job left.")
@click.option("--failed", is_flag=True, help="Of all, or those named: what failed and is run again.")
@click.option("--timeout", type=Duration(zero=True), help="Give up after so long; exit code 5.")
@json_option
@pass_context
def wait(
    context: Context,
    /,
    words: tuple[Word, ...],
    wait_all: bool,
    failed: bool,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Wait until jobs have ended.

    JOB: an id, last, all, or tasks of an array (ID-7, 'ID[1,4-6]'). Exit code 0: all finished; 1: none did;
    3: some did; 4: there is no such job; 5: time ran out. --all judges by the jobs that were there when it
    began. --failed: 0, also where there are none.
    """
    from broker import selection, tasks

    if wait_all + (bool(words) or failed) != 1:
        raise UsageError("name jobs, or --all, or --failed", "fleet wait JOB... | fleet wait --all")
    with context.redis() as client:
        if failed:
            ended = _failing(context, client, words, timeout)
        elif wait_all or any(word.job_id == selection.ALL for word in words):
            ended = _all(context, client, timeout)
        else:
            ended = _some(context, client, words, timeout)
        counts = tasks.counts(client, ended)
    if as_json:
        print_json({"jobs": [_row(job_id, state, counts) for job_id, state in ended.items()]})
    else:
        say(context, ended, counts)
    return exit_code(ended, counts)


def _row(job_id: str, state: str | None, counts: Mapping[str, TaskCounts]) -> dict[str, Any]:
    tasks = {"tasks": asdict(counts[job_id])} if job_id in counts else {}
    return {"id": job_id, "state": state, **tasks}


def _some(
    context: Context, client: redis.Redis, words: Sequence[Word], timeout: float | None
) -> Mapping[str, str | None]:
    from broker import control, ranges

    wanted: list[str] = []
    chosen: dict[str, Ranges] = {}
    for target in targets(client, words):
        if target.tasks is None:
            wanted.append(target.job_id)
        else:
            chosen[target.job_id] = ranges.of([*chosen.get(target.job_id, ()), *target.tasks])
    with bar(context) as progress:
        return control.wait(client, wanted, chosen, timeout_seconds=timeout, progress=progress)


def _failing(
    context: Context, client: redis.Redis, words: Sequence[Word], timeout: float | None
) -> Mapping[str, str | None]:
    from broker import control

    wanted = failing(client, words)
    if not wanted:
        context.say(NONE_FAILING)
    with bar(context) as progress:
        return control.wait(client, wanted, {}, timeout_seconds=timeout, progress=progress)


def _all(context: Context, client: redis.Redis, timeout: float | None) -> Mapping[str, str | None]:
    from broker import control, jobs

    there = jobs.unfinished_ids(client)
    with bar(context) as progress:
        control.wait_all(client, timeout_seconds=timeout, progress=progress)
    # who canceled or deleted a job knows about it; those gone without a trace have expired
    return {job_id: state for job_id, state in jobs.states(client, there).items() if state}


def exit_code(ended: Mapping[str, str | None], counts: Mapping[str, TaskCounts] = _NO_ARRAYS) -> int:
    """As docs/cli.md has it; None is the state of a job that was deleted meanwhile. An array counts as
    as many jobs as it has tasks."""
    total = sum(counts[one].total if one in counts else 1 for one in ended)
    finished = sum(
        counts[one].finished if one in counts else state == "finished" for one, state in ended.items()
    )
    if finished == total:
        return 0
    if finished:
        return 3
    return 1 if any(ended.values()) else 4


def say(
    context: Context, ended: Mapping[str, str | None], counts: Mapping[str, TaskCounts] = _NO_ARRAYS
) -> None:
    """How many ended otherwise than they should, and which."""
    for state in sorted({state or "gone" for state in ended.values()} - {"finished"}):
        these = [job_id for job_id, other in ended.items() if (other or "gone") == state]
        context.say(f"{len(these)} of {len(ended)} {state}: {listed(these)}")
    for job_id, tasks in counts.items():
        if tasks.finished < tasks.total:
            told = f"{tasks.finished:,} finished, {tasks.failed:,} failed, {tasks.canceled:,} canceled"
            context.say(f"{job_id}: of {tasks.total:,} tasks {told}")


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
