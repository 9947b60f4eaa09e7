"""`fleet explain`: why a job is where it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from broker.printable import printable
from broker.requirements import base_of
from cli.context import Context, pass_context, print_json
from cli.params import JobId, json_option

if TYPE_CHECKING:
    from broker.explain import Explanation


@click.command()
@click.argument("job_id", metavar="JOB", type=JobId())
@json_option
@pass_context
def explain(context: Context, /, job_id: str, as_json: bool) -> None:
    """Why a job is not running: every reason, with numbers. Of one that runs, or has ended: where and how.

    What workers have free is what they said with their last heartbeat.
    """
    from broker import explain as reader

    with context.redis() as client:
        found = reader.explain(client, job_id)
    if as_json:
        print_json(_fields(found))
        return
    click.echo(_headline(found))
    for reason in found.reasons:
        click.echo(f"  {printable(reason.message)}")


def _headline(found: Explanation) -> str:
    asks = found.need.readable() if found.need else ""
    return f"{found.job.id} is {found.job.state} in {base_of(found.job.queue)}" + (
        f", asks for {asks}" if asks else ""
    )


def _fields(found: Explanation) -> dict[str, object]:
    return {
        "id": found.job.id,
        "state": found.job.state,
        "queue": base_of(found.job.queue),
        "requirements": None if found.need is None else found.need.readable(),
        "reasons": [
            {"code": reason.code, "message": reason.message, **reason.numbers} for reason in found.reasons
        ],
    }
