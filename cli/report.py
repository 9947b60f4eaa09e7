"""`fleet report`: what ran where, when and at what cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from broker.printable import printable
from cli.context import Context, pass_context, print_json
from cli.params import Duration, json_option
from cli.tables import Cell, Column, duration, show, size, state

if TYPE_CHECKING:
    from fleet.report import Report
    from fleet.report_figures import Distribution

#: rows of each table in the terminal
_MOST_ROWS = 10
#: where `fleet collect-logs` puts what it fetches
_COLLECTED = Path("fleet-logs")
#: more jobs are not looked at: it takes seconds for each 100,000
_MOST_JOBS = 500_000


@click.command()
@click.option(
    "--html",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw it: write one page that works offline.",
)
@click.option(
    "-l",
    "--local-output-dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where 'fleet collect-logs' put what it fetched.  [default: fleet-logs, if it is there]",
)
@click.option("--since", type=Duration(), metavar="DURATION", help="Only what ran in the last 2h, 7d ...")
@json_option
@pass_context
def report(
    context: Context, /, file: Path | None, folder: Path | None, since: float | None, as_json: bool
) -> None:
    """What ran where, when and at what cost, of all jobs that Redis keeps.

    How hosts were used is known of this one, and of those from which 'fleet collect-logs' fetched it.
    """
    from broker import clock, past
    from broker.connection import translated
    from fleet import report as maker

    if file:
        _check(file)
    now = clock.wall().timestamp()
    with context.redis() as client, translated(context.redis_address):
        found = maker.make(
            past.read(client, _MOST_JOBS),
            maker.series_files([folder or _COLLECTED]),
            now,
            None if since is None else now - since,
        )
    if file:
        from fleet import report_page

        _write(file, report_page.render(found, context.redis_address))
        context.say(f"{file}: {size(file.stat().st_size)}")
    if as_json:
        print_json(_document(found))
    elif not file:
        _tell(context, found)


def _check(file: Path) -> None:
    """Better now than after all has been read. Raises UsageError."""
    if not file.absolute().parent.is_dir():
        raise UsageError(f"--html {file}: there is no folder {file.parent}", "Make it, or name another.")


def _write(file: Path, text: str) -> None:
    """As a whole or not at all. Raises UsageError."""
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        part.replace(file)
    except OSError as exc:
        with suppress(OSError):
            part.unlink()
        raise UsageError(f"cannot write {file}: {exc.strerror}", "Name another file with --html.") from exc


# --- as JSON -----------------------------------------------------------------------------------------


def _document(found: Report) -> dict[str, Any]:
    return {
        **{name: _moment(getattr(found, name)) for name in ("at", "began", "ended")},
        "kept": found.kept,
        "jobs": found.states,
        "attempts": found.outcomes,
        "left_out": found.left_out,
        "workers": found.workers,
        "busy_seconds": found.busy_seconds,
        "cpu_seconds": found.cpu_seconds,
        "waiting": _fields(found.waiting),
        "running": _fields(found.running),
        "busiest": [
            {
                found.row_kind: row.name,
                "attempts": row.attempts,
                "busy_seconds": row.busy_seconds,
                "unfinished": row.unfinished,
            }
            for row in found.rows
        ],
        "slowest": [_renamed(asdict(job)) for job in found.slowest],
        "failures": [
            {
                "reason": group.reason,
                "count": group.count,
                "jobs": group.jobs,
                "workers": sorted(group.workers),
            }
            for group in found.failures
        ],
        "memory": [asdict(one) for one in found.memory],
        "hosts": [asdict(host) for host in found.fleet.hosts] if found.fleet else [],
    }


def _renamed(job: dict[str, Any]) -> dict[str, Any]:
    return {"id": job.pop("job"), **job}


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _fields(found: Distribution | None) -> dict[str, Any] | None:
    if found is None:
        return None
    fields = asdict(found)
    edges = [None if math.isinf(edge) else edge for edge in fields.pop("edges")]
    counts = fields.pop("counts")
    return {
        **fields,
        "below": [{"seconds": edge, "count": n} for edge, n in zip(edges, counts, strict=True)],
    }


# --- for people --------------------------------------------------------------------------------------


def _tell(context: Context, found: Report) -> None:
    for line in _headlines(found):
        click.echo(line)
    for title, columns, rows in _tables(found):
        click.echo(f"\n{title}")
        show(context.console, columns, rows)


def _headlines(found: Report) -> Iterator[str]:
    if not found.states:
        yield "Nothing has run that Redis still knows of in this time."
    else:
        length = found.ended - found.began
        yield f"From {_second(found.began)} to {_second(found.ended)}, {duration(length)}"
        yield f"Jobs:     {_counts(found.states)}"
        yield f"Attempts: {_counts(found.outcomes)}; workers: {found.workers:,}, hosts: {found.hosts:,}"
        average = found.busy_seconds / length
        yield f"At once:  {average:.1f} on average; {duration(found.cpu_seconds)} of CPU"
    for title, one in (("Waited:  ", found.waiting), ("Ran:     ", found.running)):
        if one:
            parts = (f"{share} % within {duration(value)}" for share, value in ((50, one.p50), (99, one.p99)))
            yield f"{title} {', '.join(parts)}, longest {duration(one.longest)}"
    yield f"Kept now: {_counts({k: v for k, v in found.kept.items() if v}) or 'no job'}"
    if found.left_out:
        yield f"Left out: {found.left_out:,} older jobs"
    if found.fleet is None:
        yield "Hosts:    no samples of that time here; 'fleet collect-logs' fetches them"
    for problem in found.fleet.problems if found.fleet else ():
        yield f"Not read: {printable(problem)}"


def _second(at: float) -> str:
    return f"{_moment(at):%Y-%m-%d %H:%M:%SZ}"


def _counts(counts: Any) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda one: -one[1]))


_Table = tuple[str, tuple[Column, ...], list[tuple[Cell, ...]]]


def _tables(found: Report) -> Iterator[_Table]:
    """Those that have rows."""
    for make in (_hosts, _failures, _memory, _slowest):
        title, columns, rows = make(found)
        if rows:
            more = len(rows) - _MOST_ROWS
            yield (
                f"{title}{f' ({more} more with --html or --json)' if more > 0 else ''}",
                columns,
                rows[:_MOST_ROWS],
            )


def _hosts(found: Report) -> _Table:
    columns = (
        Column("HOST"),
        Column("CPUS", right=True),
        Column("BUSY", right=True),
        Column("MOST", right=True),
        Column("MEMORY", right=True),
        Column("TAKEN", right=True),
        Column("MOST", right=True),
        Column("GPUS BUSY", right=True, rank=1),
    )
    hosts = found.fleet.hosts if found.fleet else ()
    return (
        "Hosts",
        columns,
        [
            (
                host.name,
                str(host.cpus),
                f"{host.mean_cpus:.1f}",
                f"{host.most_cpus:.1f}",
                size(host.memory_bytes),
                size(round(host.mean_memory_bytes)),
                size(host.most_memory_bytes),
                "" if host.mean_gpus is None else f"{host.mean_gpus:.0%}",
            )
            for host in hosts
        ],
    )


def _failures(found: Report) -> _Table:
    columns = (
        Column("JOBS", right=True),
        Column("REASON", least=20),
        Column("SUCH AS", least=12, separator=" "),
    )
    rows: list[tuple[Cell, ...]] = [
        (f"{group.count:,}", group.reason, " ".join(group.jobs)) for group in found.failures
    ]
    return "Why jobs failed", columns, rows


def _memory(found: Report) -> _Table:
    columns = (
        Column("PROGRAM", least=12),
        Column("QUEUE", least=8),
        Column("JOBS", right=True),
        Column("ASKED", right=True),
        Column("99 % HAD", right=True),
        Column("MEMORY", least=20),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            one.program,
            one.queue,
            f"{one.jobs:,}",
            size(one.asked_bytes) if one.asked_bytes else "nothing",
            size(one.p99_bytes),
            f"ask for {size(one.suggested_bytes)}: {one.verdict}" if one.suggested_bytes else one.verdict,
        )
        for one in found.memory
    ]
    return "Memory asked for and used", columns, rows


def _slowest(found: Report) -> _Table:
    columns = (
        Column("RAN", right=True),
        Column("JOB"),
        Column("NAME", least=16),
        Column("STATE"),
        Column("WORKER", least=8),
        Column("CPU", right=True, rank=1),
        Column("MEMORY", right=True, rank=1),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            duration(job.seconds),
            job.job,
            job.name,
            state(job.state),
            job.worker,
            duration(job.cpu_seconds),
            size(job.memory_bytes) if job.memory_bytes else "",
        )
        for job in found.slowest
    ]
    return "The longest runs", columns, rows
