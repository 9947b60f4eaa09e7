"""`fleet retry`: run again what failed, was stopped or canceled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from cli.context import Context, pass_context, print_json
from cli.outcomes import NOT_FOUND, exit_code
from cli.params import JobWord, QueueName, json_option

if TYPE_CHECKING:
    import redis

    from broker.selection import Word

_RETRIED = "retried"
#: what people read of an outcome; another one is the state that forbids it
_WORDS = {
    _RETRIED: "retried",
    NOT_FOUND: "no such job",
    "stopping": "not retried: its worker is still ending it; try again in a few seconds",
    "taken": "not retried: somebody else is about to run it again; 'fleet show {0}' tells",
    "dependency": "not retried: it would fail at once, for what it waits for did not finish; retry that one",
    "finished": "not retried: it has finished; 'fleet submit' runs it anew",
    "started": "not retried: it runs; 'fleet cancel {0}' first",
}


@click.command()
@click.argument("words", metavar="[JOB]...", type=JobWord(may_be_all=True), nargs=-1)
@click.option("--failed", is_flag=True, help="All that failed, or of arrays named the tasks that did.")
@click.option("--queue", type=QueueName(), help="With --failed: only those of this queue.")
@json_option
@pass_context
def retry(
    context: Context, /, words: tuple[Word, ...], failed: bool, queue: str | None, as_json: bool
) -> int:
    """Run jobs again that failed, were stopped or canceled: under their ids, with all their retries.

    Jobs that failed because one of these did wait for it again. JOB: an id, last, all, or tasks of an array
    (ID-7, 'ID[1,4-6]'); of an array all tasks that did not finish.

    A line for each. Exit code 0: all; 3: some; 1: none, for they run, wait or have finished; 4: there are
    none. --failed: 0, also where nothing has failed.
    """
    if not (words or failed) or (queue is not None and (words or not failed)):
        raise UsageError("name jobs, or --failed", "fleet retry JOB... | fleet retry --failed [--queue Q]")
    with context.redis() as client:
        counts: dict[str, int] = {}
        outcomes = _named(client, words, counts, failed=failed) if words else _failed(client, queue)
    if as_json:
        print_json({"jobs": [_row(job_id, outcome, counts) for job_id, outcome in outcomes.items()]})
    else:
        _print(outcomes, counts)
    if words:
        return exit_code(outcomes.values(), (_RETRIED,))
    context.say(f"Retried: {len(outcomes)}." if outcomes else "No job has failed.")
    return 0


def _row(job_id: str, outcome: str, counts: Mapping[str, int]) -> dict[str, Any]:
    return {"id": job_id, "outcome": outcome} | ({"tasks": counts[job_id]} if job_id in counts else {})


def _named(
    client: redis.Redis, words: Sequence[Word], counts: dict[str, int], *, failed: bool
) -> dict[str, str]:
    """The outcome of each; `counts` gets how many tasks of each array were retried."""
    from broker import control, jobs, selection

    unknown: list[str] = []
    if any(word.job_id == selection.ALL for word in words):
        found = selection.targets_of(client, jobs.retriable_ids(client))
    else:
        found, unknown = selection.resolve(client, words)
    plain = [one.job_id for one in found if not one.is_array]
    states = ("failed",) if failed else control.RETRIABLE
    outcomes = dict.fromkeys([*(one.name for one in found), *unknown], NOT_FOUND)
    outcomes |= control.retry(client, plain, states)
    for array in (one for one in found if one.is_array):
        outcomes[array.name], counts[array.name] = selection.retry(client, array, only_failed=failed)
    return outcomes


def _failed(client: redis.Redis, queue: str | None) -> dict[str, str]:
    """Those that were retried; what is no longer failed when its turn comes is somebody else's doing."""
    from broker import control, jobs

    told = control.retry(client, jobs.failed_ids(client, queue), ("failed",))
    return {job_id: outcome for job_id, outcome in told if outcome == _RETRIED}


def _print(outcomes: Mapping[str, str], counts: Mapping[str, int]) -> None:
    for job_id, outcome in outcomes.items():
        words = _WORDS.get(outcome, "not retried: it is {1} already, and will run")
        told = f" ({counts[job_id]:,} of its tasks)" if counts.get(job_id) else ""
        click.echo(f"{job_id}  {words.format(job_id, outcome)}{told}")
