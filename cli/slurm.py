"""`fleet slurm`: workers from a cluster that Slurm divides among its users."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from cli.context import Context, pass_context, print_json
from cli.params import Count, Duration, json_option, labels, stagger_options, stagger_seconds
from cli.tables import Column, age, show, state
from cli.worker_options import worker_options, worker_words

if TYPE_CHECKING:
    import redis

    from broker.slurm import Pool
    from fleet.endpoint import Endpoint
    from fleet.slurm.autoscale import PoolSeen
    from fleet.slurm.request import Request
    from fleet.slurm.submissions import Seen

#: seconds that Slurm gives jobs between SIGTERM and SIGKILL where it does not tell
_KILL_WAIT_SECONDS = 30.0
#: seconds without jobs after which workers of a pool leave
_IDLE_SECONDS = 300.0

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
        type=click.Path(path_type=Path),
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


def _request_options(command: Any) -> Any:
    """What an allocation is, and what runs in it."""
    for option in reversed(_REQUEST_OPTIONS):
        command = option(command)
    return stagger_options(worker_options(command))


@dataclass(frozen=True)
class _Plan:
    """A submission that could be made."""

    request: Request
    script: str
    queues: tuple[str, ...]
    #: its workers leave where no work remains
    leaves: bool
    slots: int


@click.group()
def slurm() -> None:
    """Workers from Slurm: the same workers, started by sbatch; they know when their time is over."""


@slurm.command()
@click.option("--allocations", type=Count(), default=1, show_default=True, metavar="N", help="A job array.")
@_request_options
@pass_context
def script(context: Context, /, **options: Any) -> None:
    """Print the batch script that 'submit' with these options would submit.

    No secret is in it; the file with the password of Redis, which it names, must be there at the nodes.
    """
    click.echo(_plan(context, options).script, nl=False)


@slurm.command()
@click.option("--allocations", type=Count(), default=1, show_default=True, metavar="N", help="A job array.")
@_request_options
@json_option
@pass_context
def submit(context: Context, /, as_json: bool, **options: Any) -> None:
    """Submit workers to Slurm; prints the id of the job there.

    fleet slurm submit --nodes 4 --time 01:00:00 --cpus-per-task 8
    """
    from fleet.slurm import submissions

    with context.redis(start=True) as client:
        plan = _plan(context, options)
        submission = submissions.new(plan.request, queues=plan.queues, leaves=plan.leaves)
        made = submissions.submit(client, submission, plan.script)
    if as_json:
        print_json({"name": made.name, "job_id": made.job_id, "workers": made.workers})
        return
    context.say(
        f"Submitted {made.name}: {made.workers} workers; 'fleet slurm status' shows what becomes of it."
    )
    click.echo(made.job_id)


def _plan(context: Context, options: dict[str, Any], *, idle_seconds: float | None = None) -> _Plan:
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
    orders = scripts.Orders(
        options["python"] or sys.executable,
        words,
        worker_environ(settings) | _grace(tools.kill_wait_seconds(), settings.worker.stop_grace_seconds),
        _endpoint(context, options["redis_host"]),
        _text(options["setup"]),
        rendering.from_file(options["template"]) if options["template"] else None,
    )
    text = scripts.render(request, orders)
    _make_log_dir(output_dir)
    queues, _ = names.weighted_queues(tuple(options["queues"].replace(" ", "").split(",")))
    leaves = bool(options["until_done"] or options["idle_timeout"])
    return _Plan(request, text, queues, leaves, options["slots"] or options["cpus_per_task"] or 1)


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


def _grace(kill_wait: float | None, wanted_seconds: float) -> dict[str, str]:
    """So that a worker has handed back its jobs and signed off before Slurm kills it."""
    wait = _KILL_WAIT_SECONDS if kill_wait is None else kill_wait
    seconds = min(wanted_seconds, max(1.0, wait - max(2.0, wait / 6)))
    return {"FLEET_WORKER__STOP_GRACE_SECONDS": f"{seconds:g}"}


def _text(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"--setup {file}: {getattr(exc, 'strerror', None) or exc}") from exc


def _make_log_dir(output_dir: Path) -> None:
    """Slurm starts no job that cannot write its log, and says so nowhere."""
    try:
        (output_dir / "log").mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(
            f"cannot write to {output_dir}: {exc.strerror}", "Name another folder with --output-dir."
        ) from exc


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


# --- autoscale --------------------------------------------------------------------------------------


@slurm.group()
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
@_request_options
@pass_context
def add(context: Context, /, name: str, max_workers: int, backlog: int, **options: Any) -> None:
    """Keep a pool: what each of its allocations is like, and how many there may be.

    Slurm is asked first whether it would take it. Workers of a pool leave after --idle-timeout
    (default 5m). Nothing is submitted unless 'fleet slurm autoscale run' is running somewhere.

        fleet slurm autoscale add --max-workers 64 --nodes 4 --time 02:00:00 --cpus-per-task 16
    """
    from fleet.slurm import autoscale as scaling

    with context.redis(start=True) as client:
        plan = _plan(context, options, idle_seconds=_IDLE_SECONDS)
        given = labels("--label", options["labels"])
        idle = options["idle_timeout"] or _IDLE_SECONDS
        pool = _pool(name, plan, options, max_workers, backlog, idle, scaling.offer_of(plan.request, given))
        said = scaling.add(client, pool)
    context.say(f"Slurm would take it: {said}")
    context.say(f"Pool {name} is kept: 'fleet slurm autoscale run' submits for it.")


def _pool(
    name: str,
    plan: _Plan,
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
