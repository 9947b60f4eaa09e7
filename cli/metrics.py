"""`fleet metrics`: the Prometheus exporter, in the foreground."""

from __future__ import annotations

import signal
import threading

import click

from broker.errors import FleetError
from cli.context import Context, pass_context

#: with `(other)` fewer than ten values of a label
_DEFAULT_QUEUES = 8


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=9726, show_default=True, help="0: any free one."
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where to listen; 0.0.0.0: everywhere, and whoever reaches it may read.",
)
@click.option("--per-worker", is_flag=True, help="Series of each worker, too: as many as there are workers.")
@click.option("--per-set", is_flag=True, help="Jobs of each set of requirements on its own.")
@click.option("--rq-names", is_flag=True, help="Also what rq-exporter tells, under its names.")
@click.option(
    "--max-queues",
    type=click.IntRange(1, 100),
    default=_DEFAULT_QUEUES,
    show_default=True,
    metavar="N",
    help="Queues with a label of their own, those used first; the others are summed.",
)
@pass_context
def metrics(
    context: Context,
    /,
    port: int,
    host: str,
    per_worker: bool,
    per_set: bool,
    rq_names: bool,
    max_queues: int,
) -> None:
    """Serve metrics for Prometheus at http://ADDRESS:PORT/metrics, until Ctrl-C or SIGTERM.

    Each scrape reads Redis. Where that does not answer, fleet_redis_up is 0, and the exporter goes on.
    ops/prometheus in the repository has rules and alerts, ops/grafana dashboards.
    """
    from fleet import exporter, logs
    from fleet.families import Choices

    logs.set_up(context.settings.log_format, context.settings.log_level)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    choices = Choices(per_worker, per_set, rq_names, max_queues)
    try:
        bound, stop = exporter.serve(context.url(), host, port, choices)
    except (OSError, OverflowError) as exc:
        raise FleetError(
            f"cannot listen on {host}:{port}: {exc}", "Choose another --port or --host."
        ) from exc
    context.say(f"metrics at http://{host}:{bound}/metrics")
    ended.wait()
    stop()
