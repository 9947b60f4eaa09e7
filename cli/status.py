"""`fleet status`: workers and queues, once or as long as one looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from broker.errors import RedisDenied, RedisUnreachable, UsageError
from broker.printable import printable
from cli import fleet_rows, tables
from cli.context import PATIENCE_SECONDS, Context, error_fields, fail, pass_context, print_json
from cli.glyphs import Glyphs
from cli.params import Duration
from cli.ssh import max_parallel, ssh_from, ssh_options

if TYPE_CHECKING:
    import redis
    from rich.text import Text

    from broker.failed import Failure
    from broker.status import FleetStatus, QueueStatus, WorkerStatus
    from fleet.probing import ProbedHost

_Row = TypeVar("_Row")
#: what docs/cli.md promises
_WORKER_FIELDS = (
    *("name", "host", "pid", "state", "probe", "queues", "slots", "running", "labels", "version"),
    *("cpus", "memory_bytes", "gpus", "started_at", "last_heartbeat", "heartbeat_age_seconds"),
    *("finished", "failed", "tunnel", "ends_at", "free", "elsewhere"),
)
_QUEUE_FIELDS = (
    "name",
    "queued",
    "running",
    "finished",
    "failed",
    "oldest_age_seconds",
    "paused",
    "requirements",
)
#: workers and queues that a terminal is shown even where they are more than its lines
_MOST_ROWS = 40
#: where there are more, the fewest; and the lines that are none: headline, totals, heads, what was left out
_LEAST_ROWS, _OTHER_LINES = 3, 9
#: the last jobs that failed
_FAILURES = 3
_NO_WORKER = "No workers: 'fleet worker' starts one here, 'fleet up HOSTS' on other machines."


@click.command()
@click.option(
    "--watch",
    type=Duration(),
    is_flag=False,
    flag_value="1",
    metavar="[SECONDS]",
    help="Show it anew every so often (1 s), until q or Ctrl-C.",
)
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="On a terminal, too: all of a great fleet, not only those in trouble.",
)
@click.option("--probe", is_flag=True, help="Ask the kept hosts over SSH too.")
@ssh_options
@pass_context
def status(
    context: Context, /, watch: float | None, every: bool, probe: bool, as_json: bool, **options: Any
) -> None:
    """Workers, what they run and when they last beat; queues below.

    BEAT is the time since the last heartbeat; SLOTS, CPUS, MEMORY and GPUS are used/total. With --probe an
    offline worker is stale (its process is there, and does not beat), stopped, or unreachable (SSH failed).
    """
    if watch and probe:
        raise UsageError("--watch and --probe exclude each other", "Try: watch -n 60 fleet status --probe")
    if watch:
        with context.client(PATIENCE_SECONDS) as client:
            looking = _Looking(context, partial(_read, client))
            if as_json:
                _stream(looking, watch)
            _watch(looking, watch, every=every)
        return
    with context.redis() as client:
        read = _probing(context, client, options) if probe else partial(_read, client)
        if as_json:
            print_json(_document(context, read()))
        else:
            _print(context, read(), every=every)


@dataclass(frozen=True)
class _Found:
    """What there is to show. `hosts`: those that were asked over SSH; None: none were to be."""

    status: FleetStatus
    courses: fleet_rows.Courses
    failures: Sequence[Failure]
    hosts: Sequence[ProbedHost] | None = None


Read = Callable[[], _Found]


def _read(client: redis.Redis) -> _Found:
    from broker import failed
    from broker import status as reader

    return _Found(reader.read(client), fleet_rows.courses(client), failed.last(client, _FAILURES))


def _probing(context: Context, client: redis.Redis, options: Mapping[str, Any]) -> Read:
    """Asks the hosts first, so that what Redis says is the newer of both. Raises UsageError."""
    from fleet import journey, kept_hosts, probing

    opener = journey.opener(ssh_from(context, options))
    hosts = kept_hosts.load(client)
    if not hosts:
        context.say("No host is kept, so none is asked: 'fleet hosts add', or 'fleet up HOSTS'.")

    def read() -> _Found:
        limit = max_parallel(context, options)
        answers = asyncio.run(probing.ask(hosts, opener=opener, max_parallel=limit)) if hosts else ()
        seen = _read(client)
        found, asked = probing.merged(seen.status, answers)
        return replace(seen, status=found, hosts=asked)

    return read


def _document(context: Context, seen: _Found) -> dict[str, Any]:
    from broker.connection import redacted

    found = seen.status
    document = {
        "at": found.at,
        "redis": {"url": redacted(context.url()), "version": found.redis_version},
        "workers": [_worker_fields(worker) for worker in found.workers],
        "queues": [_queue_fields(queue, seen.courses) for queue in found.queues],
    }
    return document if seen.hosts is None else {**document, "hosts": [_host_fields(h) for h in seen.hosts]}


def _host_fields(host: ProbedHost) -> dict[str, Any]:
    return {
        "name": host.name,
        "probe": host.probe,
        "workers": host.workers,
        "error": error_fields(host.error),
    }


def _worker_fields(worker: WorkerStatus) -> dict[str, Any]:
    # not dataclasses.asdict: it copies everything, which takes a third of a second for 10,000 workers
    fields = {name: getattr(worker, name, None) for name in _WORKER_FIELDS}
    return fields if worker.free is None else {**fields, "free": vars(worker.free)}


def _queue_fields(queue: QueueStatus, courses: fleet_rows.Courses) -> dict[str, Any]:
    rate = fleet_rows.per_minute(courses.get(queue.name, ()))
    return {name: getattr(queue, name) for name in _QUEUE_FIELDS} | {"finished_per_minute": rate}


def _print(context: Context, found: _Found, *, every: bool) -> None:
    most = max(len(found.status.workers), len(found.status.queues))
    view = _screen(context, found, every=every or most <= _MOST_ROWS)
    tables.print_lines(context.console, _lines(context, found, view))


class _Looking:
    """Looks again and again, also while Redis is away, but not where it refuses us from the start."""

    def __init__(self, context: Context, read: Read) -> None:
        self.context = context
        self._read = read
        #: what was seen last
        self.seen: _Found | None = None

    def look(self) -> _Found | RedisUnreachable:
        """What there is now, or why that is not seen. Raises what is no passing trouble."""
        from cli.errors import explained

        try:
            self.seen = self._read()
        except Exception as exc:
            error = explained(exc, self.context)
            passes = self.seen is not None or not isinstance(error, RedisDenied)
            if not (isinstance(error, RedisUnreachable) and passes):
                raise
            return error
        return self.seen


def _stream(looking: _Looking, seconds: float) -> None:
    """A document a line, for programs; while Redis is away, on stderr what is wrong. Ctrl-C ends it."""
    while True:
        found = looking.look()
        if isinstance(found, RedisUnreachable):
            fail(found.message, code=found.code, exit_code=found.exit_code, as_json=True, hint=found.hint)
        else:
            print_json(_document(looking.context, found))
        time.sleep(seconds)


def _watch(looking: _Looking, seconds: float, *, every: bool) -> None:
    """The same lines again and again; while Redis is away, what was seen last, and since when it is."""
    from rich.text import Text

    from cli import watching

    context = looking.context
    last: list[Text] = []

    def look() -> list[Text]:
        nonlocal last
        found = looking.look()
        if isinstance(found, RedisUnreachable):
            at = looking.seen.status.at if looking.seen else None
            return [Text(fleet_rows.no_news(found, at), "bold red"), *last[1:]]
        last = list(_lines(context, found, _screen(context, found, every=every)))
        return last

    watching.watch(context.console, look, seconds)


def _screen(context: Context, seen: _Found, *, every: bool) -> _View:
    """What of it a screen shows: of both tables something."""
    found = seen.status
    console = context.console
    if not console.is_terminal or every:
        return _View(console.width if console.is_terminal else None, None, None)
    room = console.height - _OTHER_LINES - (len(seen.failures) + 2 if seen.failures else 0)
    queues = min(len(found.queues), max(_LEAST_ROWS, room // 3))
    return _View(console.width, max(_LEAST_ROWS, room - queues), queues)


# --- for people ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """How wide a line may be, and how many workers and queues are shown; None: no limit."""

    width: int | None
    workers: int | None
    queues: int | None


def _lines(context: Context, seen: _Found, view: _View) -> Iterator[Text]:
    """The headline, the workers with their notices, what hosts said, the queues."""
    from rich.text import Text

    found, glyphs = seen.status, Glyphs.of(context.console)
    yield Text(_headline(context, found), overflow="ellipsis", no_wrap=True)
    if found.workers:
        yield fleet_rows.totals_line(fleet_rows.totals(found.workers), glyphs, view.width)
    yield Text()
    shown, hidden = _chosen(found.workers, view.workers, fleet_rows.worst_first)
    if shown:
        rows = (fleet_rows.worker_row(worker, glyphs) for worker in shown)
        yield from tables.lines(fleet_rows.WORKER_COLUMNS, rows, view.width)
        yield from _notices(shown)
    else:
        yield Text(_NO_WORKER)
    if hidden:
        yield _left_out(f"{len(hidden):,} more", fleet_rows.by_state(hidden))
    yield from _host_lines(seen.hosts or ())
    if found.queues:
        yield Text()
        listed, others = _chosen(found.queues, view.queues, fleet_rows.longest_waiting_first)
        queue_rows = (fleet_rows.queue_row(queue, glyphs, seen.courses) for queue in listed)
        yield from tables.lines(fleet_rows.QUEUE_COLUMNS, queue_rows, view.width)
        if others:
            yield _left_out(f"{len(others):,} more", f"{sum(queue.queued for queue in others):,} queued")
    if seen.failures:
        yield Text()
        failures = (fleet_rows.failure_row(failure, found.at) for failure in seen.failures)
        yield from tables.lines(fleet_rows.FAILURE_COLUMNS, failures, view.width)


def _left_out(count: str, what: str) -> Text:
    from rich.text import Text

    return Text(f"{count} ('fleet status --all'): {what}", style="dim")


def _chosen(
    rows: Sequence[_Row], limit: int | None, ranked: Callable[[Iterable[_Row]], list[_Row]]
) -> tuple[Sequence[_Row], Sequence[_Row]]:
    """The rows to show and to leave out: where there are too many, the first ones of `ranked` are shown."""
    if limit is None or len(rows) <= limit:
        return rows, ()
    found = ranked(rows)
    return found[:limit], found[limit:]


def _headline(context: Context, found: FleetStatus) -> str:
    states = f": {fleet_rows.by_state(found.workers)}" if found.workers else ""
    workers = fleet_rows.workers(len(found.workers)) + states
    version = found.redis_version
    server = version if version.startswith("valkey") else f"Redis {version}"
    return f"{found.at:%H:%M:%SZ}  {workers}  {server} at {context.redis_address}"


def _notices(workers: Sequence[WorkerStatus]) -> Iterator[Text]:
    """What workers have to say: why one takes no jobs, for instance."""
    from rich.text import Text

    for worker in workers:
        if worker.notice:
            yield Text(f"! {worker.name}: {printable(worker.notice)}", style="yellow")
    down = {worker.host: worker.tunnel_note for worker in workers if worker.tunnel == "down"}
    for host, note in down.items():
        yield Text(f"! {host}: its tunnel to Redis is down: {printable(note)}", style="yellow")


def _host_lines(hosts: Sequence[ProbedHost]) -> Iterator[Text]:
    """The hosts that could not be asked, and those at which nothing runs."""
    from rich.text import Text

    for host in hosts:
        if host.error:
            said = printable(host.error.message)
            yield Text(f"! host {host.name} is unreachable: {said}", style="yellow")
        elif not host.workers:
            yield Text(f"host {host.name}: {host.probe}, no worker runs there")
