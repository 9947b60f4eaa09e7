"""What a submission to Slurm is told on the command line, and what that makes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from cli.context import Context
from cli.params import Count, Folder, stagger_options, stagger_seconds
from cli.worker_options import worker_options, worker_words

if TYPE_CHECKING:
    from fleet.endpoint import Endpoint
    from fleet.slurm.request import Request

_GRACE_VARIABLE = "FLEET_WORKER__STOP_GRACE_SECONDS"

_REQUEST_OPTIONS = (
    click.option(
        "--nodes", type=Count(), default=1, show_default=True, metavar="N", help="Of an allocation."
    ),
    click.option("--workers-per-node", type=Count(), default=1, show_default=True, metavar="N"),
    click.option(
        "--time",
        metavar="LIMIT",
        default="",
        help="Time limit as sbatch has it: 90 (minutes), 1:30:00, 2-12.",
    ),
    click.option("--account", metavar="NAME", default="", help="Who is charged."),
    click.option("--partition", metavar="NAME", default=""),
    click.option("--qos", metavar="NAME", default=""),
    click.option("--cpus-per-task", type=Count(), metavar="N", help="CPUs of each worker."),
    click.option("--mem", metavar="SIZE", default="", help="Memory of each node: 16G."),
    click.option("--gpus", metavar="[TYPE:]N", default="", help="GPUs of each node."),
    click.option("--constraint", metavar="FEATURES", default="", help="Features of nodes."),
    click.option(
        "--extra", metavar="OPTION", multiple=True, help="Any option of sbatch: '--exclusive'; repeatable."
    ),
    click.option("--job-name", metavar="NAME", default="fleet", show_default=True),
    click.option(
        "--output-dir",
        type=Folder(),
        metavar="DIR",
        help="Where jobs run and write; DIR/log has the logs.",
    ),
    click.option(
        "--setup",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Shell that comes first in the script, as 'module load'.",
    ),
    click.option(
        "--template",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Your own script, as a Jinja template.",
    ),
    click.option("--slots", type=Count(), metavar="N", help="Jobs at once; default: the CPUs granted."),
    click.option(
        "--python", metavar="PYTHON", help="The Python at nodes that has rq-fleet; default: this one."
    ),
    click.option("--redis-host", metavar="NAME", help="What nodes call the machine of Redis."),
)


def request_options(command: Any) -> Any:
    """What an allocation is, and what runs in it."""
    for option in reversed(_REQUEST_OPTIONS):
        command = option(command)
    return stagger_options(worker_options(command))


@dataclass(frozen=True)
class Plan:
    """A submission that could be made."""

    request: Request
    script: str
    queues: tuple[str, ...]
    #: its workers leave where no work remains
    leaves: bool
    slots: int


def plan_of(context: Context, options: dict[str, Any], *, idle_seconds: float | None = None) -> Plan:
    """What the options say, checked. Raises UsageError, RedisUnreachable."""
    from broker import names
    from broker.settings import worker_environ
    from fleet import rendering
    from fleet.slurm import script as scripts
    from fleet.slurm import tools
    from fleet.worker_config import default_output_dir

    if idle_seconds is not None and options["idle_timeout"] is None:
        options = {**options, "idle_timeout": idle_seconds}
    output_dir = (options["output_dir"] or default_output_dir()).expanduser().absolute()
    request = _request(options, str(output_dir)).checked()
    workers, settings = request.workers * request.allocations, context.settings
    window = stagger_seconds(options, workers, settings.worker.registrations_per_second)
    words = [*worker_words(options, window), "--output-dir", str(output_dir)]
    words += ["--slots", str(options["slots"])] if options["slots"] else []
    words += [] if options["paths"] else ["--path", str(Path.cwd())]
    grace = scripts.grace_seconds(settings.worker.stop_grace_seconds, tools.kill_wait_seconds())
    orders = scripts.Orders(
        options["python"] or sys.executable,
        words,
        worker_environ(settings) | {_GRACE_VARIABLE: f"{grace:g}"},
        _endpoint(context, options["redis_host"]),
        _text(options["setup"]),
        rendering.from_file(options["template"]) if options["template"] else None,
    )
    text = scripts.render(request, orders)
    scripts.make_log_dir(output_dir)
    queues, _ = names.weighted_queues(tuple(options["queues"].replace(" ", "").split(",")))
    leaves = bool(options["until_done"] or options["idle_timeout"])
    return Plan(request, text, queues, leaves, options["slots"] or options["cpus_per_task"] or 1)


def _request(options: dict[str, Any], output_dir: str) -> Request:
    from fleet.slurm.request import Request

    same = (
        *("nodes", "workers_per_node", "time", "account", "partition", "qos", "cpus_per_task", "mem", "gpus"),
        *("constraint", "extra", "job_name"),
    )
    return Request(
        **{name: options[name] for name in same},
        allocations=options.get("allocations", 1),
        output_dir=output_dir,
    )


def _endpoint(context: Context, redis_host: str | None) -> Endpoint:
    """Where nodes find Redis. Loopback will do where the nodes are this very machine."""
    from fleet.slurm import tools

    try:
        return context.endpoint(redis_host)
    except UsageError:
        if redis_host is None and tools.is_all_here():
            return context.endpoint("127.0.0.1")
        raise


def _text(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"--setup {file}: {getattr(exc, 'strerror', None) or exc}") from exc
