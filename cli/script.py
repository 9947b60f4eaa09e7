"""`fleet script`: a bash script that starts a worker."""

from __future__ import annotations

from typing import Any

import click

from cli.context import Context, pass_context
from cli.params import Duration, Folder, resource_options, resource_words, stagger_options, stagger_seconds
from cli.worker_options import worker_options, worker_words


@click.command()
@worker_options
@click.option("--slots", type=click.IntRange(min=1), help="Jobs at once; default: the machine's CPUs.")
@click.option("--output-dir", type=Folder(), metavar="DIR", help="Where jobs run and write, there.")
@resource_options
@click.option("--time-limit", type=Duration(), help="The worker has ended after so long (90, 5m, 2h).")
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Machines that start it together; they begin spread over a time that follows from that.",
)
@stagger_options
@click.option("--redis-host", metavar="NAME", help="What that machine calls this one, where Redis is.")
@pass_context
def script(context: Context, /, **options: Any) -> None:
    """Print a bash script that starts one worker where it is run, and ends it when it ends.

    No secret is in it: it names the file that holds the password of Redis, which must be there too.

        fleet script --redis-host 10.0.0.5 > worker.sh
    """
    from broker.settings import worker_environ
    from fleet.script import script as rendered

    settings = context.settings
    window = stagger_seconds(options, options["nodes"], settings.worker.registrations_per_second)
    words = [*worker_words(options, window), *_of_the_machine(options)]
    click.echo(
        rendered(
            context.endpoint(options["redis_host"]),
            words,
            environ=worker_environ(settings),
            slots=options["slots"],
            time_limit_seconds=options["time_limit"],
            stop_grace_seconds=settings.worker.stop_grace_seconds,
        ),
        nl=False,
    )


def _of_the_machine(options: dict[str, Any]) -> list[str]:
    words = ["--slots", str(options["slots"])] if options["slots"] else []
    if options["time_limit"]:
        words += ["--time-limit", f"{options['time_limit']:g}"]
    if options["output_dir"]:
        words += ["--output-dir", str(options["output_dir"])]
    return [*words, *resource_words(options)]
