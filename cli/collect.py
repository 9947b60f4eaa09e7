"""`fleet collect-logs` and `fleet delete-logs`: what workers and jobs left at their hosts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from broker.printable import printable
from cli.context import Context, error_fields, pass_context, print_json
from cli.progress import shown
from cli.ssh import interruptible, max_parallel, ssh_from, ssh_options
from cli.tables import size

if TYPE_CHECKING:
    from fleet.collection import Found, OnBytes
    from fleet.results import HostResult, OnEvent, Report

Command = Callable[..., Any]
#: seconds between two drawings of the bar
_REDRAW_SECONDS = 0.1


def _remote_output_dir(command: Command) -> Command:
    text = "The workers' --output-dir, where it is not the one kept."
    return click.option("--remote-output-dir", metavar="DIR", help=text)(command)


@click.command("collect-logs")
@click.argument("names", metavar="[HOST]...", nargs=-1)
@click.option(
    "-l",
    "--local-output-dir",
    "folder",
    type=click.Path(path_type=Path),
    default="fleet-logs",
    show_default=True,
    metavar="DIR",
    help="Where to put a folder for each host.",
)
@_remote_output_dir
@click.option("--delete", is_flag=True, help="Then remove there what is safely here.")
@ssh_options
@pass_context
def collect_logs(context: Context, /, names: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Fetch workers' logs, jobs' output and jobs' folders from all kept hosts, or those named.

    Run it again to continue what was cut, and for what is new: nothing is fetched twice.
    """
    from fleet import collection, journey, kept_hosts

    output_dir, opener = _output_dir(options), journey.opener(ssh_from(context, options))
    with context.redis() as client:
        hosts = kept_hosts.choose(client, names)
        with _bar(context) as on_bytes, _steps(context) as on_event:
            work = collection.collect(
                hosts,
                options["folder"],
                opener=opener,
                client=client,
                max_parallel=max_parallel(context, options),
                on_event=on_event,
                on_bytes=on_bytes,
                output_dir=output_dir,
                delete=options["delete"],
            )
            report, found = asyncio.run(interruptible(context, work))
    return _tell(report, found, as_json)


@click.command("delete-logs")
@click.argument("names", metavar="[HOST]...", nargs=-1)
@_remote_output_dir
@click.option("--force", is_flag=True, help="Even while workers run there and write.")
@ssh_options
@pass_context
def delete_logs(context: Context, /, names: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Remove workers' logs, jobs' output and jobs' folders at all kept hosts, or those named."""
    from fleet import collection, journey, kept_hosts

    output_dir, opener = _output_dir(options), journey.opener(ssh_from(context, options))
    with context.redis() as client:
        hosts = kept_hosts.choose(client, names)
        with shown(context, [host.name for host in hosts]) as on_event:
            work = collection.delete(
                hosts,
                opener=opener,
                client=client,
                max_parallel=max_parallel(context, options),
                on_event=on_event,
                output_dir=output_dir,
                force=options["force"],
            )
            report, found = asyncio.run(interruptible(context, work))
    return _tell(report, found, as_json)


def _output_dir(options: dict[str, Any]) -> str | None:
    folder: str | None = options["remote_output_dir"]
    if folder is not None and not folder.startswith(("/", "~/")):
        raise UsageError(
            f"--remote-output-dir {folder!r}: must begin with / or ~/, it is a folder of the hosts"
        )
    return folder


# --- under way -------------------------------------------------------------------------------------


@contextmanager
def _steps(context: Context) -> Iterator[OnEvent]:
    """A line for each step; on a terminal the bar says it all."""
    if context.messages.is_terminal:
        yield lambda _: None
    else:
        with shown(context, ()) as on_event:
            yield on_event


@contextmanager
def _bar(context: Context) -> Iterator[OnBytes]:
    """A bar for each host with the bytes that are here, on a terminal."""
    if context.quiet or not context.messages.is_terminal:
        yield lambda _host, _done, _total: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=context.messages) as progress:
        yield _Bars(progress)


class _Bars:
    """Draws seldom: blocks come by the thousand."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._drawn: dict[str, float] = {}

    def __call__(self, host: str, done: int, total: int) -> None:
        if host not in self._tasks:
            self._tasks[host] = self._progress.add_task(host, total=total)
        now = time.monotonic()
        if done >= total or now - self._drawn.get(host, 0.0) > _REDRAW_SECONDS:
            self._drawn[host] = now
            self._progress.update(self._tasks[host], completed=done, total=max(done, total))


# --- what is told ----------------------------------------------------------------------------------


def _tell(report: Report, found: Sequence[Found], as_json: bool) -> int:
    rows = list(zip(report.hosts, found, strict=True))
    if as_json:
        print_json({"hosts": [_document(result, files) for result, files in rows]})
        return report.exit_code
    width = max((len(result.host) for result in report.hosts), default=0)
    for result, files in rows:
        click.echo(f"{result.host:<{width}}  {printable(_line(result, files))}")
        if result.error and result.error.hint:
            click.echo(f"{'':<{width}}    {printable(result.error.hint)}")
    if report.interrupted:
        click.echo("Interrupted. What came is kept; run it again to continue.", err=True)
    return report.exit_code


def _line(result: HostResult, files: Found) -> str:
    parts = list(_parts(files))
    if result.error:
        also = f" ({'; '.join(parts)})" if parts else ""
        return f"[FAILED] {result.step}: {result.error.message}{also}"
    note = f" ({result.note})" if result.note else ""
    return f"{result.outcome}: {'; '.join(parts) or 'nothing was there'}{note}"


def _parts(files: Found) -> Iterator[str]:
    """What became of files, each that is not nothing."""
    if files.folder and files.files:
        yield f"{_count(files.files)}, {size(files.total_bytes)}, in {files.folder}"
        yield f"{size(files.fetched_bytes)} fetched now" if files.fetched_bytes else "nothing new"
    if files.removed_files:
        yield f"{_count(files.removed_files)}, {size(files.removed_bytes)}, removed there"
    if files.kept:
        yield f"{_count(files.kept)} kept there: in use, or changed since"
    if files.passed_over:
        yield f"{files.passed_over} passed over: symbolic links and the like"
    if files.put_aside:
        yield f"{_count(files.put_aside)} of an earlier life put aside here as NAME.~N~"


def _count(number: int) -> str:
    return f"{number} file{'s' * (number != 1)}"


def _document(result: HostResult, files: Found) -> dict[str, Any]:
    told = {
        "host": result.host,
        "outcome": result.outcome,
        "step": result.step,
        "error": error_fields(result.error),
        "note": result.note,
        "seconds": round(result.seconds, 3),
    }
    return {**asdict(files), **told, "folder": files.folder and str(files.folder)}
