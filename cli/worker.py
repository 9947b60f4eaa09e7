"""`fleet worker`: one worker in the foreground."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import FleetError
from cli.context import Context, pass_context
from cli.params import Duration, Folder, labels, resource_options, resources
from fleet.logs import FORMATS, LEVELS

if TYPE_CHECKING:
    from fleet.worker_config import WorkerConfig

#: seconds that --check waits for Redis: whoever asks, asks again soon
_CHECK_SECONDS = 5.0


@click.command()
@click.option("--name", help="Name of the worker; default: HOST-0; in Slurm NODE-JOB-0.")
@click.option(
    "--queues",
    default="default",
    show_default=True,
    help="Queues, most urgent first: a,b,c; or with weights: a:3,b:1.",
)
@click.option("--slots", type=click.IntRange(min=1), help="Jobs at once; default 1, or what Slurm granted.")
@click.option("--burst", is_flag=True, help="Leave when the queues are empty.")
@click.option("--until-done", is_flag=True, help="Leave when no work remains: queued, to come, or running.")
@click.option("--max-jobs", type=click.IntRange(min=1), help="Leave after so many jobs.")
@click.option("--idle-timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Leave after idling.")
@click.option(
    "--startup-delay-seconds",
    type=Duration(zero=True),
    default=0.0,
    metavar="SECONDS",
    help="Begin at a moment within so long, its own.",
)
@click.option("--label", "labels", multiple=True, metavar="K=V", help="A label; may be repeated.")
@click.option("--ephemeral", is_flag=True, help="One slot, and leave after one job.")
@click.option("--executor", type=click.Choice(["warm", "fork"]), default="warm", show_default=True)
@click.option("--executor-python", metavar="PYTHON", help="Interpreter for Python functions; needs rq.")
@click.option("--path", "paths", multiple=True, metavar="DIR", help="First on the path of Python functions.")
@click.option("--output-dir", type=Folder(), metavar="DIR", help="Where jobs run and write.")
@resource_options
@click.option("--time-limit", type=Duration(), help="It has ended after so long (90, 5m, 2h).")
@click.option("--log-format", type=click.Choice(FORMATS), help="Of its log; default: human (see settings).")
@click.option("--log-level", type=click.Choice(LEVELS), help="The least that it logs; default: info.")
@click.option(
    "--stop-exit-code",
    type=click.IntRange(0, 255),
    default=0,
    metavar="N",
    help="Exit code where it was told to stop, for whoever has to start another then; default 0.",
)
@click.option("--check", is_flag=True, help="Start none: exit 0 if the one of this name runs here and beats.")
@pass_context
def worker(context: Context, /, **options: Any) -> int:
    """Run one worker here until it is told to stop (Ctrl-C twice hurries it)."""
    if options["check"]:
        return _check(context, options["name"], options["output_dir"])
    from fleet import assembly
    from fleet.signals import StopSignals

    signals = StopSignals(options["stop_exit_code"]).install()
    config = _in_its_place(_config(context, options))
    assembly.log_to_stderr(config)
    try:
        code = assembly.run(config, context.settings.worker, signals)
    except FleetError as exc:
        if config.log_format == "human":
            raise
        return assembly.refused(exc)
    if config.in_slurm and code == 0:
        _clear_up(context)
    return code or (signals.exit_code if signals.was_told else 0)


def _clear_up(context: Context) -> None:
    """Where no work remains, allocations that wait are of no use. Nothing of that is this worker's fault."""
    import redis

    from fleet.slurm import submissions

    try:
        with context.redis() as client:
            submissions.after_work(client)
    except (FleetError, redis.RedisError, OSError) as exc:
        logging.getLogger("fleet.worker").warning("allocations that wait were not looked at: %s", exc)


def _in_its_place(config: WorkerConfig) -> WorkerConfig:
    """What was not said follows from the job of Slurm in which it is started, else from this host."""
    from fleet.slurm import granted

    if granted.is_in_a_job(os.environ):
        return granted.adapted(config, os.environ)
    return replace(config, name=config.name or f"{config.host}-0", slots=config.slots or 1)


def _check(context: Context, name: str | None, output_dir: Path | None) -> int:
    """Whether the worker that these options would start is there already, and well."""
    from broker import names
    from broker.connection import address, connect, translated
    from fleet import health
    from fleet.outputs import Folders
    from fleet.worker_config import default_output_dir, this_host

    name = names.worker_name(name or f"{this_host()}-0")
    client = connect(context.url(), timeout_seconds=_CHECK_SECONDS)
    with translated(address(client)), client:
        incarnation = health.check(client, Folders(str(output_dir or default_output_dir())), name)
    context.say(f"{name} runs and beats (incarnation {incarnation}).")
    return 0


def _config(context: Context, options: dict[str, Any]) -> WorkerConfig:
    """What the command line says, as every launcher would say it."""
    from fleet.worker_config import WorkerConfig, default_output_dir, this_host

    ephemeral = options["ephemeral"]
    return WorkerConfig(
        name=options["name"] or "",
        host=this_host(),
        redis_url=context.url(),
        output_dir=str(options["output_dir"] or default_output_dir()),
        queues=tuple(part.strip() for part in options["queues"].split(",")),
        slots=options["slots"] or int(ephemeral),
        labels=labels("--label", options["labels"]),
        executor=options["executor"],
        executor_python=options["executor_python"] or sys.executable,
        # as `rq worker` does: the folder it is started in
        paths=options["paths"] or (str(Path.cwd()),),
        burst=options["burst"],
        until_done=options["until_done"],
        max_jobs=options["max_jobs"] or (1 if ephemeral else None),
        idle_timeout_seconds=options["idle_timeout"],
        startup_delay_seconds=options["startup_delay_seconds"],
        ephemeral=ephemeral,
        resources=resources(options),
        time_limit_seconds=options["time_limit"],
        log_format=options["log_format"] or context.settings.log_format,
        log_level=options["log_level"] or context.settings.log_level,
    )
