"""`fleet up` and `fleet down`: start and end workers on many hosts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from cli.context import Context, error_fields, pass_context, print_json
from cli.params import Duration, resource_options
from cli.ssh import interruptible, max_parallel, ssh_from, ssh_options

if TYPE_CHECKING:
    from fleet.bootstrap import Orders
    from fleet.hosts import Host
    from fleet.launchers.ssh import SshOptions
    from fleet.results import HostResult, OnEvent, Report, WorkerResult

Options = dict[str, Any]


@click.command()
@click.argument("hosts_file", metavar="[HOSTS]", required=False)
@click.option("--workers-per-host", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option(
    "--slots", type=click.IntRange(min=1), metavar="N", help="Jobs at once; default: CPUs / workers."
)
@click.option(
    "--queues",
    default="default",
    show_default=True,
    help="Queues, most urgent first: a,b,c; or with weights: a:3,b:1.",
)
@click.option("--label", "labels", multiple=True, metavar="K=V", help="A label of the workers; repeatable.")
@click.option("--output-dir", metavar="DIR", help="Where jobs run and write, at the hosts; kept.")
@click.option(
    "--python", metavar="PYTHON", help="Python or uv at the hosts to install with, or Python to use as it is."
)
@click.option("--no-install", is_flag=True, help="Use the rq-fleet that is there.")
@click.option("--offline", is_flag=True, help="Bring all dependencies along; no host needs an index.")
@click.option(
    "--skip-version-check", is_flag=True, help="What is there may be of another version than this one."
)
@click.option("--upgrade", is_flag=True, help="Replace workers of an older version.")
@click.option("--executor-python", metavar="PYTHON", help="Interpreter for Python functions; needs rq.")
@click.option("--path", "paths", multiple=True, metavar="DIR", help="First on the path of Python functions.")
@click.option("--ephemeral", is_flag=True, help="Workers have one slot, and leave after one job.")
@click.option("--until-done", is_flag=True, help="Workers leave when no work remains.")
@resource_options
@click.option("--time-limit", type=Duration(), help="Workers have ended after so long (90, 5m, 2h).")
@click.option(
    "--startup-delay-seconds",
    type=Duration(zero=True),
    metavar="SECONDS",
    help="Workers begin within so long, each at its own moment; default: 0 for up to 100.",
)
@click.option(
    "--tunnel/--no-tunnel", default=None, help="Bring Redis to hosts that cannot reach it, over SSH; kept."
)
@click.option("--local", type=click.IntRange(min=1), metavar="N", help="N workers on this machine, no SSH.")
@click.option("--dry-run", is_flag=True, help="Connect and look, change nothing.")
@ssh_options
@pass_context
def up(context: Context, /, hosts_file: str | None, as_json: bool, **options: Any) -> int:
    """Start workers on every host of the file HOSTS ('-' reads stdin; none: the hosts kept).

    What runs already is left alone, so it may be run again at any time; with --upgrade a worker of
    an older version finishes its jobs, or hands them back after the grace, and a new one starts. A
    host is kept from the moment a worker is started there.
    """
    from fleet import kept_hosts

    named = _named_hosts(hosts_file, options)
    orders = _orders(context, options)
    ssh = ssh_from(context, options)
    client, url, bound_to = _redis_for(context, named, dry_run=options["dry_run"])
    with client or _Nothing():
        hosts = named or kept_hosts.choose(client, ())
        if client:
            kept_hosts.check(client, hosts)
            chosen = {name: options[name] for name in kept_hosts.SETTLED}
            hosts = kept_hosts.settled(client, hosts, chosen, named=bool(named))
        orders = replace(orders, redis_url=url, bound_to=bound_to)
        return _run(context, hosts, as_json, _bring_up(context, hosts, orders, ssh, client, options))


def _bring_up(
    context: Context, hosts: Sequence[Host], orders: Orders, ssh: SshOptions, client: Any, options: Options
) -> Callable[[OnEvent], Coroutine[Any, Any, Report]]:
    from fleet import bootstrap, journey, tunnel

    tunnels = None
    if any(host.is_tunnelled for host in hosts) and not orders.dry_run:
        tunnels = tunnel.tunnels_for_up(
            client,
            orders.redis_url,
            ssh,
            lease_seconds=context.settings.worker.lease_seconds,
            max_parallel=max_parallel(context, options),
        )
    return lambda on_event: bootstrap.up(
        hosts,
        orders,
        opener=journey.opener(ssh, python=options["python"]),
        client=client,
        max_parallel=max_parallel(context, options),
        on_event=on_event,
        tunnels=tunnels,
    )


@click.command()
@click.argument("names", metavar="[HOST]...", nargs=-1)
@click.option(
    "--grace", type=click.FloatRange(min=0), metavar="SECONDS", help="For running jobs; default 30."
)
@click.option("--force", is_flag=True, help="Kill at once; others run the jobs again.")
@ssh_options
@pass_context
def down(context: Context, /, names: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """End the workers of the hosts named, or of all that are kept, and look whether they ended."""
    from fleet import journey, kept_hosts, teardown, tunnel

    ssh = ssh_from(context, options)
    with context.redis() as client:
        hosts = kept_hosts.choose(client, names)
        tunnels = tunnel.folder_for(client)
    grace = options["grace"]
    return _run(
        context,
        hosts,
        as_json,
        lambda on_event: teardown.down(
            hosts,
            opener=journey.opener(ssh),
            max_parallel=max_parallel(context, options),
            on_event=on_event,
            grace_seconds=context.settings.worker.stop_grace_seconds if grace is None else grace,
            force=options["force"],
            tunnels=tunnels,
        ),
    )


# --- what was asked for ----------------------------------------------------------------------------


def _named_hosts(hosts_file: str | None, options: Options) -> tuple[Host, ...]:
    """The hosts of the command line; none: those kept are meant. Raises UsageError."""
    from fleet import hosts
    from fleet.worker_config import this_host

    if hosts_file and options["local"]:
        raise UsageError("HOSTS and --local exclude each other", "Run 'fleet up' twice.")
    if options["local"] and options["tunnel"]:
        raise UsageError("--local workers are on this machine", "--tunnel is for hosts that SSH leads to.")
    if options["local"]:
        chosen = hosts.HostOptions(workers=options["local"])
        return (hosts.Host(this_host(), options=chosen, launcher="local"),)
    return hosts.read(hosts_file) if hosts_file else ()


def _orders(context: Context, options: Options) -> Orders:
    """What to start. Raises UsageError for what no host could do."""
    from broker import names
    from cli.params import labels, resources
    from fleet.bootstrap import Orders

    queues = tuple(part.strip() for part in options["queues"].split(","))
    names.weighted_queues(queues)
    output_dir = options["output_dir"]
    if options["offline"] and options["no_install"]:
        raise UsageError("--offline and --no-install exclude each other", "--no-install brings nothing.")
    if output_dir is not None and not output_dir.startswith(("/", "~/")):
        raise UsageError(f"--output-dir {output_dir!r}: must begin with / or ~/, it is a folder of the hosts")
    if options["ephemeral"] and options["slots"]:
        raise UsageError("--ephemeral and --slots exclude each other", "An ephemeral worker has one slot.")
    here = (str(Path.cwd()),) if options["local"] else ()
    return Orders(
        redis_url="",
        workers_per_host=options["workers_per_host"],
        slots=options["slots"],
        queues=queues,
        labels=labels("--label", options["labels"]),
        output_dir=output_dir,
        install=not options["no_install"],
        offline=options["offline"],
        check_versions=not options["skip_version_check"],
        upgrade=options["upgrade"],
        grace_seconds=context.settings.worker.stop_grace_seconds,
        executor_python=options["executor_python"],
        paths=options["paths"] or here,
        resources=resources(options),
        settings=dataclasses.asdict(context.settings.worker),
        log_format=context.settings.log_format,
        log_level=context.settings.log_level,
        ephemeral=options["ephemeral"],
        until_done=options["until_done"],
        startup_delay_seconds=options["startup_delay_seconds"],
        time_limit_seconds=options["time_limit"],
        dry_run=options["dry_run"],
    )


def _redis_for(context: Context, named: Sequence[Host], *, dry_run: bool) -> tuple[Any, str, tuple[str, ...]]:
    """A client, its URL, and what the embedded broker is bound to, if it is that one.

    A dry run of named hosts needs no Redis and starts none.
    """
    if dry_run and named:
        return None, "", ()
    client = context.redis(start=not dry_run)
    return client, context.url(), context.embedded_addresses()


class _Nothing:
    """A context that holds nothing."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


# --- what is told ----------------------------------------------------------------------------------


def _run(
    context: Context,
    hosts: Sequence[Host],
    as_json: bool,
    work: Callable[[OnEvent], Coroutine[Any, Any, Report]],
) -> int:
    """Do the work, show it under way on stderr, print what became of it; returns the exit code."""
    from cli.progress import shown

    with shown(context, [host.name for host in hosts]) as on_event:
        report = asyncio.run(interruptible(context, work(on_event)))
    _say_mismatches(context, report)
    if as_json:
        print_json({"hosts": [_document(result) for result in report.hosts]})
    else:
        _print(report)
    return report.exit_code


def _say_mismatches(context: Context, report: Report) -> None:
    """All hosts that were refused for their version, in one place."""
    errors = [result.error for result in report.hosts if result.error]
    lines = [error.message for error in errors if error.code == "version_mismatch"]
    if lines:
        context.say("\n  ".join([f"Version check failed on {len(lines)} worker(s):", *lines]))


def _print(report: Report) -> None:
    """A line for each host, the reason and what to do below it where it failed."""
    width = max((len(result.host) for result in report.hosts), default=0)
    for result in report.hosts:
        click.echo(f"{result.host:<{width}}  {_line(result)}")
        if result.error and result.error.hint:
            click.echo(f"{'':<{width}}    {result.error.hint}")
    if report.interrupted:
        click.echo("Interrupted.", err=True)
    strange = [result.host for result in report.hosts if not result.kept and result.outcome != "planned"]
    if strange:
        click.echo(
            f"Not kept, for nothing was started there: {', '.join(strange)}."
            " Run it again with the file, or 'fleet hosts add' them.",
            err=True,
        )


def _line(result: HostResult) -> str:
    if result.error:
        return f"[FAILED] {result.step}: {result.error.message}"
    workers = ", ".join(_worker(worker, result.outcome) for worker in result.workers)
    note = f" ({result.note})" if result.note else ""
    return f"{result.outcome}{': ' if workers else ''}{workers}{note}"


def _worker(worker: WorkerResult, outcome: str) -> str:
    """The worker, and its state where that is not the host's."""
    about = [] if worker.state == outcome else [worker.state]
    about += [] if worker.pid is None else [f"pid {worker.pid}"]
    return f"{worker.name} ({', '.join(about)})" if about else worker.name


def _document(result: HostResult) -> dict[str, Any]:
    return {
        "host": result.host,
        "outcome": result.outcome,
        "step": result.step,
        "error": error_fields(result.error),
        "note": result.note,
        "kept": result.kept,
        "seconds": round(result.seconds, 3),
        "workers": [
            {"name": worker.name, "state": worker.state, "pid": worker.pid, "version": worker.version}
            for worker in result.workers
        ],
    }
