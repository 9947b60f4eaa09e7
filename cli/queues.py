"""`fleet queues`, `pause` and `resume`: what waits, and whether it is given out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cli import fleet_rows
from cli.context import Context, pass_context, print_json
from cli.glyphs import Glyphs
from cli.outcomes import NOT_FOUND, exit_code
from cli.params import QueueName, json_option
from cli.tables import show as show_table

if TYPE_CHECKING:
    import redis

    from broker.status import QueueStatus


#: what people read of an outcome
_WORDS = {
    "paused": "paused: gives out no jobs until 'fleet resume {0}'; what runs goes on",
    "resumed": "resumed",
    "not_paused": "was not paused",
    NOT_FOUND: "no such queue: none had a job, and no worker listens on it; 'fleet queues' lists them",
}


@click.command()
@json_option
@pass_context
def queues(context: Context, /, as_json: bool) -> None:
    """How much waits, runs and has ended in each queue, and how long its first job waits."""
    from broker import status

    with context.redis() as client:
        found, courses = status.read_queues(client), fleet_rows.courses(client)
    if as_json:
        print_json({"queues": [asdict(queue) | _rate(queue, courses) for queue in found]})
    elif found:
        glyphs = Glyphs.of(context.console)
        show_table(
            context.console,
            fleet_rows.QUEUE_COLUMNS,
            [fleet_rows.queue_row(queue, glyphs, courses) for queue in found],
        )
    else:
        context.say("No queues yet: 'fleet submit -- COMMAND' makes one.")


def _rate(queue: QueueStatus, courses: fleet_rows.Courses) -> dict[str, float | None]:
    return {"finished_per_minute": fleet_rows.per_minute(courses.get(queue.name, ()))}


@click.command()
@click.argument("names", metavar="QUEUE...", type=QueueName(), nargs=-1, required=True)
@json_option
@pass_context
def pause(context: Context, /, names: tuple[str, ...], as_json: bool) -> int:
    """Let queues give out no more jobs until 'fleet resume'. What runs goes on; submitting goes on.

    Exit code 0: all are paused; 3: some; 4: there are no such queues.
    """
    from broker import control

    return _each(context, names, control.pause, as_json=as_json)


@click.command()
@click.argument("names", metavar="QUEUE...", type=QueueName(), nargs=-1, required=True)
@json_option
@pass_context
def resume(context: Context, /, names: tuple[str, ...], as_json: bool) -> int:
    """Let paused queues give out jobs again.

    Exit code 0: none of them is paused now; 3: some are unknown; 4: all are.
    """
    from broker import control

    return _each(context, names, control.resume, as_json=as_json)


def _each(
    context: Context, names: tuple[str, ...], change: Callable[[redis.Redis, str], str], *, as_json: bool
) -> int:
    with context.redis() as client:
        outcomes = {name: change(client, name) for name in dict.fromkeys(names)}
    _report(outcomes, as_json=as_json)
    return exit_code(outcomes.values(), ("paused", "resumed", "not_paused"))


def _report(outcomes: Mapping[str, str], *, as_json: bool) -> None:
    if as_json:
        print_json({"queues": [{"name": name, "outcome": outcome} for name, outcome in outcomes.items()]})
        return
    for name, outcome in outcomes.items():
        click.echo(f"{name}  {_WORDS[outcome].format(name)}")
