"""`fleet slurm`: workers from a cluster that Slurm divides among its users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from cli.context import Context, pass_context, print_json
from cli.params import Count, json_option
from cli.slurm_autoscale import autoscale
from cli.slurm_plan import plan_of, request_options
from cli.tables import Column, age, show, state

if TYPE_CHECKING:
    from fleet.slurm.submissions import Seen


@click.group()
def slurm() -> None:
    """Workers from Slurm: the same workers, started by sbatch; they know when their time is over."""


slurm.add_command(autoscale)


@slurm.command()
@click.option("--allocations", type=Count(), default=1, show_default=True, metavar="N", help="A job array.")
@request_options
@pass_context
def script(context: Context, /, **options: Any) -> None:
    """Print the batch script that 'submit' with these options would submit.

    No secret is in it; the file with the password of Redis, which it names, must be there at the nodes.
    """
    click.echo(plan_of(context, options).script, nl=False)


@slurm.command()
@click.option("--allocations", type=Count(), default=1, show_default=True, metavar="N", help="A job array.")
@request_options
@json_option
@pass_context
def submit(context: Context, /, as_json: bool, **options: Any) -> None:
    """Submit workers to Slurm; prints the id of the job there.

    fleet slurm submit --nodes 4 --time 01:00:00 --cpus-per-task 8
    """
    from fleet.slurm import submissions

    with context.redis(start=True) as client:
        plan = plan_of(context, options)
        submission = submissions.new(plan.request, queues=plan.queues, leaves=plan.leaves)
        made = submissions.submit(client, submission, plan.script)
    if as_json:
        print_json({"name": made.name, "job_id": made.job_id, "workers": made.workers})
        return
    context.say(
        f"Submitted {made.name}: {made.workers} workers; 'fleet slurm status' shows what becomes of it."
    )
    click.echo(made.job_id)


# --- status and cancel ------------------------------------------------------------------------------

_COLUMNS = (
    Column("NAME", least=8),
    Column("JOB"),
    Column("STATE"),
    Column("NODES", right=True),
    Column("WORKERS", right=True),
    Column("LEFT", rank=1, right=True),
    Column("POOL", rank=2),
    Column("ABOUT", rank=3, least=12),
)


@slurm.command("status")
@click.option("--all", "show_all", is_flag=True, help="Those that ended within a week, too.")
@json_option
@pass_context
def status(context: Context, /, show_all: bool, as_json: bool) -> int:
    """What this fleet has submitted, how Slurm has it, and which workers came of it.

    Exit code 1: Slurm does not answer; what is known without it is shown.
    """
    from broker import status as fleet_status
    from fleet.slurm import submissions

    with context.redis() as client:
        seen, trouble = submissions.look(client)
        workers = _workers_by_job(fleet_status.read(client).workers)
    seen = [one for one in seen if show_all or as_json or one.state != "ended"]
    if as_json:
        print_json({"error": trouble or None, "submissions": [_document(one, workers) for one in seen]})
    elif seen:
        show(context.console, _COLUMNS, [_row(one, workers) for one in seen])
    else:
        context.say("Nothing is submitted: 'fleet slurm submit' does that.")
    if trouble and not as_json:
        click.echo(f"fleet: Slurm does not say how they are: {trouble}", err=True)
    return int(bool(trouble))


def _workers_by_job(workers: Sequence[Any]) -> dict[str, list[str]]:
    """The names of those that live, by the number of their job in Slurm."""
    found: dict[str, list[str]] = {}
    for worker in workers:
        if worker.state != "offline" and (job := worker.labels.get("slurm_job_id")):
            found.setdefault(job, []).append(worker.name)
    return found


def _row(one: Seen, workers: dict[str, list[str]]) -> list[Any]:
    submission, live = one.submission, one.live
    there = sum(len(workers.get(row.job_id, ())) for row in live)
    left = [row.seconds_left for row in live if not row.waits and row.seconds_left is not None]
    about = submission.end or "; ".join(dict.fromkeys(row.reason for row in live if row.waits))
    return [
        submission.name,
        submission.job_id,
        state(one.state),
        str(submission.nodes * submission.allocations),
        f"{there}/{submission.workers}",
        age(float(max(left))) if left else "",
        submission.pool,
        about,
    ]


def _document(one: Seen, workers: dict[str, list[str]]) -> dict[str, Any]:
    from datetime import UTC, datetime

    submission = one.submission
    return {
        "name": submission.name,
        "job_id": submission.job_id or None,
        "state": one.state,
        "pool": submission.pool or None,
        "user": submission.user,
        "host": submission.host,
        "queues": list(submission.queues),
        "submitted_at": datetime.fromtimestamp(submission.submitted_at, UTC),
        "nodes": submission.nodes,
        "workers_per_node": submission.workers_per_node,
        "workers": submission.workers,
        "end": submission.end or None,
        "allocations": [
            {
                "id": row.id,
                "state": row.state,
                "reason": row.reason,
                "nodes": row.nodes,
                "seconds_left": row.seconds_left,
                "workers": workers.get(row.job_id, []),
            }
            for row in one.rows or ()
        ],
    }


@slurm.command()
@click.argument("words", metavar="[NAME]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that this fleet has submitted.")
@click.option("--pending", is_flag=True, help="Only what has not begun.")
@json_option
@pass_context
def cancel(
    context: Context, /, words: tuple[str, ...], everything: bool, pending: bool, as_json: bool
) -> None:
    """Cancel submissions, by name, id in Slurm or pool. Their workers hand back what they run."""
    from fleet.slurm import submissions

    if everything == bool(words):
        raise UsageError("name submissions, or say --all", "'fleet slurm status' lists them.")
    with context.redis() as client:
        found = submissions.cancel(client, [submissions.ALL] if everything else words, pending_only=pending)
    if as_json:
        print_json({"submissions": [{"name": name, "outcome": outcome} for name, outcome in found.items()]})
        return
    for name, outcome in found.items():
        click.echo(f"{name}  {_OUTCOMES.get(outcome, outcome)}")
    if not found:
        context.say("There is nothing to cancel.")


_OUTCOMES = {
    "ended": "had ended",
    "submitting": "Slurm does not know it: nobody knows yet whether it was made",
}
