"""`fleet slurm autoscale`: allocations as the backlog grows."""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

import click

from cli.context import Context, pass_context, print_json
from cli.params import Count, Duration, json_option, labels
from cli.slurm_plan import Plan, plan_of, request_options
from cli.tables import Column, show, state

if TYPE_CHECKING:
    import redis

    from broker.slurm import Pool
    from fleet.slurm.autoscale import PoolSeen

#: seconds without jobs after which workers of a pool leave
_IDLE_SECONDS = 300.0


@click.group()
def autoscale() -> None:
    """Submit allocations as the backlog grows: pools, and 'run', which looks after them."""


@autoscale.command("add")
@click.option("--name", default="default", show_default=True, help="Of the pool.")
@click.option("--max-workers", type=Count(), required=True, metavar="N", help="Never more than these.")
@click.option(
    "--backlog",
    type=Count(),
    default=1,
    show_default=True,
    metavar="N",
    help="Allocations that may wait in Slurm.",
)
@request_options
@pass_context
def add(context: Context, /, name: str, max_workers: int, backlog: int, **options: Any) -> None:
    """Keep a pool: what each of its allocations is like, and how many there may be.

    Slurm is asked first whether it would take it. Workers of a pool leave after --idle-timeout
    (default 5m). Nothing is submitted unless 'fleet slurm autoscale run' is running somewhere.

        fleet slurm autoscale add --max-workers 64 --nodes 4 --time 02:00:00 --cpus-per-task 16
    """
    from fleet.slurm import autoscale as scaling

    with context.redis(start=True) as client:
        plan = plan_of(context, options, idle_seconds=_IDLE_SECONDS)
        given = labels("--label", options["labels"])
        idle = options["idle_timeout"] or _IDLE_SECONDS
        pool = _pool(name, plan, options, max_workers, backlog, idle, scaling.offer_of(plan.request, given))
        said = scaling.add(client, pool)
    context.say(f"Slurm would take it: {said}")
    context.say(f"Pool {name} is kept: 'fleet slurm autoscale run' submits for it.")


def _pool(
    name: str,
    plan: Plan,
    options: dict[str, Any],
    most: int,
    backlog: int,
    idle: float,
    offer: dict[str, Any],
) -> Pool:
    import getpass

    from broker.slurm import Pool
    from fleet.worker_config import this_host

    return Pool(
        name=name,
        script=plan.script,
        job_name=plan.request.job_name,
        user=getpass.getuser(),
        host=this_host(),
        nodes=plan.request.nodes,
        workers_per_node=plan.request.workers_per_node,
        slots=plan.slots,
        queues=tuple(options["queues"].replace(" ", "").split(",")),
        max_workers=most,
        backlog=backlog,
        idle_timeout_seconds=idle,
        offer=offer,
    )


_POOL_COLUMNS = (
    Column("POOL", least=8),
    Column("STATE"),
    Column("ALLOCATIONS", right=True),
    Column("WORKERS", right=True),
    Column("BACKLOG", rank=2, right=True),
    Column("QUEUES", rank=1, least=8),
    Column("ABOUT", rank=1, least=12),
)


@autoscale.command("list")
@json_option
@pass_context
def list_pools(context: Context, /, as_json: bool) -> None:
    """The pools, how they are, and how many workers they have asked for."""
    from fleet.slurm import autoscale as scaling

    with context.redis() as client:
        found = scaling.pools(client)
    if as_json:
        print_json({"pools": [_pool_document(one) for one in found]})
    elif found:
        show(context.console, _POOL_COLUMNS, [_pool_row(one) for one in found])
    else:
        context.say("No pools: 'fleet slurm autoscale add' keeps one.")


def _pool_row(one: PoolSeen) -> list[Any]:
    return [
        one.pool.name,
        state("paused" if one.state.paused else "active"),
        str(one.allocations),
        f"{one.workers}/{one.pool.max_workers}",
        str(one.pool.backlog),
        ",".join(one.pool.queues),
        one.state.paused or one.state.error,
    ]


def _pool_document(one: PoolSeen) -> dict[str, Any]:
    pool, how = one.pool, one.state
    return {
        "name": pool.name,
        "state": "paused" if how.paused else "active",
        "paused": how.paused or None,
        "error": how.error or None,
        "submit_failures": how.submit_failures,
        "start_failures": how.start_failures,
        "allocations": one.allocations,
        "workers": one.workers,
        "max_workers": pool.max_workers,
        "backlog": pool.backlog,
        "nodes": pool.nodes,
        "workers_per_node": pool.workers_per_node,
        "queues": list(pool.queues),
        "idle_timeout_seconds": pool.idle_timeout_seconds,
    }


@autoscale.command()
@click.argument("name")
@pass_context
def pause(context: Context, /, name: str) -> None:
    """Submit nothing more for a pool; what is submitted goes on."""
    from broker import slurm as records

    with context.redis() as client:
        records.pause_pool(client, name, "by an operator")
    context.say(f"{name} is paused until 'fleet slurm autoscale resume {name}'")


@autoscale.command()
@click.argument("name")
@pass_context
def resume(context: Context, /, name: str) -> None:
    """Submit for a pool again, its failures forgotten."""
    from broker import slurm as records

    with context.redis() as client:
        records.resume_pool(client, name)
    context.say(f"{name} is active")


@autoscale.command()
@click.argument("name")
@click.option("--cancel", "everything", is_flag=True, help="Cancel also what runs.")
@pass_context
def remove(context: Context, /, name: str, everything: bool) -> None:
    """Keep a pool no longer; what waits in Slurm is cancelled, what runs goes on until it idles."""
    from broker import slurm as records
    from broker.errors import NotFound
    from fleet.slurm import submissions

    with context.redis() as client:
        records.remove_pool(client, name)
        try:
            submissions.cancel(client, [name], pending_only=not everything)
        except NotFound:
            pass  # it has submitted nothing
    context.say(f"removed {name}")


@autoscale.command()
@click.option(
    "--interval",
    type=Duration(),
    default=10.0,
    show_default=True,
    metavar="DURATION",
    help="Between two looks.",
)
@click.option("--once", is_flag=True, help="One look, as for cron.")
@pass_context
def run(context: Context, /, interval: float, once: bool) -> int:
    """Look after the pools until Ctrl-C: run it where sbatch is, in tmux say.

    Of several that run one acts, and another takes over within a minute where it is gone. It also cancels
    what waits in Slurm for jobs that are all done.
    """
    from fleet import logs

    logs.set_up(context.settings.log_format, context.settings.log_level)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    with context.redis(start=True) as client:
        return _look_after(client, over, interval, once=once)


def _look_after(client: redis.Redis, over: threading.Event, interval: float, *, once: bool) -> int:
    import redis as redis_errors

    from fleet.slurm.autoscale import Scaler
    from fleet.slurm.tools import SlurmError

    log, code = logging.getLogger("fleet.slurm"), 0
    scaler = Scaler(client)
    while not over.is_set():
        try:
            code = 0
            if not scaler.turn() and once:
                log.info("another runner is at it")
        except (SlurmError, redis_errors.RedisError, OSError) as exc:
            code = 1
            log.warning("%s", exc)
        if once:
            break
        over.wait(interval)
    try:
        scaler.close()
    except redis_errors.RedisError:
        pass  # the lease lapses by itself
    return code if once else 0
