"""`fleet retry`: run again what failed, was stopped or canceled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from broker.errors import UsageError
from cli.context import Context, pass_context, print_json
from cli.outcomes import NOT_FOUND, exit_code
from cli.params import JobId, QueueName, json_option

if TYPE_CHECKING:
    import redis

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
@click.argument("job_ids", metavar="[JOB]...", type=JobId(), nargs=-1)
@click.option("--failed", is_flag=True, help="All that failed; those stopped or canceled stay so.")
@click.option("--queue", type=QueueName(), help="With --failed: only those of this queue.")
@json_option
@pass_context
def retry(
    context: Context, /, job_ids: tuple[str, ...], failed: bool, queue: str | None, as_json: bool
) -> int:
    """Run jobs again that failed, were stopped or canceled: under their ids, with all their retries.

    Jobs that failed because one of these did wait for it again.

    A line for each. Exit code 0: all; 3: some; 1: none, for they run, wait or have finished; 4: there are
    none. --failed: 0, also where nothing has failed.
    """
    if bool(job_ids) == failed or (queue is not None and not failed):
        raise UsageError("name jobs, or --failed", "fleet retry JOB... | fleet retry --failed [--queue Q]")
    with context.redis() as client:
        outcomes = _failed(client, queue) if failed else _named(client, job_ids)
    if as_json:
        print_json({"jobs": [{"id": job_id, "outcome": outcome} for job_id, outcome in outcomes.items()]})
    else:
        _print(outcomes)
    if not failed:
        return exit_code(outcomes.values(), (_RETRIED,))
    context.say(f"Retried: {len(outcomes)}." if outcomes else "No job has failed.")
    return 0


def _named(client: redis.Redis, job_ids: tuple[str, ...]) -> dict[str, str]:
    from broker import control

    return dict(control.retry(client, dict.fromkeys(job_ids)))


def _failed(client: redis.Redis, queue: str | None) -> dict[str, str]:
    """Those that were retried; what is no longer failed when its turn comes is somebody else's doing."""
    from broker import control, jobs

    told = control.retry(client, jobs.failed_ids(client, queue), ("failed",))
    return {job_id: outcome for job_id, outcome in told if outcome == _RETRIED}


def _print(outcomes: dict[str, str]) -> None:
    for job_id, outcome in outcomes.items():
        words = _WORDS.get(outcome, "not retried: it is {1} already, and will run")
        click.echo(f"{job_id}  {words.format(job_id, outcome)}")
