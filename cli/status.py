"""`fleet status`: workers and queues, once or as long as one looks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from cli import tables
from cli.context import Context, error_fields, pass_context, print_json
from cli.queues import QUEUE_COLUMNS, queue_row
from cli.ssh import max_parallel, ssh_from, ssh_options
from cli.tables import Cell, Column

if TYPE_CHECKING:
    import redis
    from rich.text import Text

    from broker.status import FleetStatus, QueueStatus, WorkerStatus
    from fleet.probing import ProbedHost

_WATCH_SECONDS = 1.0
_COLUMNS = (
    Column("WORKER", least=24),
    Column("STATE"),
    Column("PROBE", rank=1),
    Column("SLOTS", right=True),
    Column("BEAT", right=True),
    Column("QUEUES", rank=1, least=10, separator=","),
    Column("RUNNING", rank=2, least=19, separator=" "),
    Column("DONE", rank=3, right=True),
    Column("FAILED", rank=3, right=True),
    Column("HOST", rank=4, least=16),
    Column("TUNNEL", rank=4),
    Column("CPUS", rank=5, right=True),
    Column("MEMORY", rank=5, right=True),
    Column("GPUS", rank=6, least=8),
    Column("LABELS", rank=7, least=12, separator=","),
    Column("VERSION", rank=8),
)
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
#: workers that a terminal is shown, and in --watch the fewest of them and the lines that are no workers:
#: the headline, the heads of both tables, blank lines, what was left out
_MOST_WORKERS, _LEAST_WORKERS, _OTHER_LINES = 200, 5, 7
#: states of workers, those first that want to be looked at
_URGENCY = ("offline", "connecting", "draining", "busy", "idle")
_MIB = 2**20
_NO_WORKER = "No workers: 'fleet worker' starts one here, 'fleet up HOSTS' on other machines."


@click.command()
@click.option("--watch", is_flag=True, help="Show it anew once a second, until Ctrl-C.")
@click.option("--probe", is_flag=True, help="Ask the kept hosts over SSH too.")
@ssh_options
@pass_context
def status(context: Context, /, watch: bool, probe: bool, as_json: bool, **options: Any) -> None:
    """Workers, what they run and when they last beat; queues below.

    BEAT is the time since the last heartbeat, SLOTS is used/total. With --probe an offline worker is
    stale (its process is there, and does not beat), stopped, or unreachable (SSH failed).
    """
    if watch and probe:
        raise UsageError("--watch and --probe exclude each other", "Try: watch -n 60 fleet status --probe")
    with context.redis() as client:
        read = _probing(context, client, options) if probe else partial(_read, client)
        if watch and as_json:
            _stream(context, read)
        elif watch:
            _watch(context, read)
        elif as_json:
            print_json(_document(context, read()))
        else:
            _print(context, read())


@dataclass(frozen=True)
class _Found:
    """What there is to show. `hosts`: those that were asked over SSH; None: none were to be."""

    status: FleetStatus
    hosts: Sequence[ProbedHost] | None = None


Read = Callable[[], _Found]


def _read(client: redis.Redis) -> _Found:
    from broker import status as reader

    return _Found(reader.read(client))


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
        return _Found(*probing.merged(_read(client).status, answers))

    return read


def _document(context: Context, seen: _Found) -> dict[str, Any]:
    from broker.connection import redacted

    found = seen.status
    document = {
        "at": found.at,
        "redis": {"url": redacted(context.url()), "version": found.redis_version},
        "workers": [_worker_fields(worker) for worker in found.workers],
        "queues": [_queue_fields(queue) for queue in found.queues],
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


def _queue_fields(queue: QueueStatus) -> dict[str, Any]:
    return {name: getattr(queue, name) for name in _QUEUE_FIELDS}


def _print(context: Context, found: _Found) -> None:
    view = _View(context.console.width, _MOST_WORKERS) if context.console.is_terminal else _View(None, None)
    tables.print_lines(context.console, _lines(context, found, view))


def _stream(context: Context, read: Read) -> None:
    """A document a line, for programs; Ctrl-C ends it."""
    while True:
        print_json(_document(context, read()))
        time.sleep(_WATCH_SECONDS)


def _watch(context: Context, read: Read) -> None:
    """The same lines again and again, in place on a terminal; Ctrl-C ends it."""
    from rich.console import Group
    from rich.live import Live

    if not context.console.is_terminal:
        while True:
            _print(context, read())
            click.echo()
            time.sleep(_WATCH_SECONDS)
    with Live(console=context.console, auto_refresh=False, vertical_overflow="crop") as live:
        last: list[Text] = []
        while True:
            last = _look(context, read, last)
            live.update(Group(*last), refresh=True)
            time.sleep(_WATCH_SECONDS)


def _look(context: Context, read: Read, last: list[Text]) -> list[Text]:
    """What there is to see now; while Redis is away, what was seen last and that it is away."""
    from rich.text import Text

    from broker.errors import RedisUnreachable
    from cli.errors import explained

    try:
        found = read()
        room = context.console.height - len(found.status.queues) - _OTHER_LINES
        return list(_lines(context, found, _View(context.console.width, max(room, _LEAST_WORKERS))))
    except Exception as exc:
        error = explained(exc, context)
        if not isinstance(error, RedisUnreachable):
            raise
        return [Text(f"{error.message}; trying again", style="bold red"), *last[1:]]


# --- for people ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """How wide a line may be, and how many workers are shown; None: no limit."""

    width: int | None
    workers: int | None


def _lines(context: Context, seen: _Found, view: _View) -> Iterator[Text]:
    """The headline, the workers with their notices, what hosts said, the queues."""
    from rich.text import Text

    found = seen.status
    yield Text(_headline(context, found), overflow="ellipsis", no_wrap=True)
    yield Text()
    shown, hidden = _chosen(found.workers, view.workers)
    if shown:
        yield from tables.lines(_COLUMNS, map(_worker_row, shown), view.width)
        yield from _notices(shown)
    else:
        yield Text(_NO_WORKER)
    if hidden:
        yield Text(f"{len(hidden)} more: {_by_state(hidden)}. A pipe, or --json, gets them all.")
    yield from _host_lines(seen.hosts or ())
    if found.queues:
        yield Text()
        yield from tables.lines(QUEUE_COLUMNS, map(queue_row, found.queues), view.width)


def _chosen(
    workers: Sequence[WorkerStatus], limit: int | None
) -> tuple[Sequence[WorkerStatus], Sequence[WorkerStatus]]:
    """The workers to show and to leave out: where there are too many, those in trouble come first."""
    if limit is None or len(workers) <= limit:
        return workers, ()
    ranked = sorted(workers, key=lambda worker: (not worker.notice, _URGENCY.index(worker.state)))
    return ranked[:limit], ranked[limit:]


def _headline(context: Context, found: FleetStatus) -> str:
    count = len(found.workers)
    workers = f"{count} worker{'s' * (count != 1)}" + (f": {_by_state(found.workers)}" if count else "")
    version = found.redis_version
    server = version if version.startswith("valkey") else f"Redis {version}"
    return f"{found.at:%H:%M:%SZ}  {workers}  {server} at {context.redis_address}"


def _by_state(workers: Sequence[WorkerStatus]) -> str:
    counts = Counter(map(_state, workers))
    return ", ".join(f"{counts[state]} {state}" for state in sorted(counts))


def _notices(workers: Sequence[WorkerStatus]) -> Iterator[Text]:
    """What workers have to say: why one takes no jobs, for instance."""
    from rich.text import Text

    for worker in workers:
        if worker.notice:
            yield Text(f"! {worker.name}: {tables.printable(worker.notice)}", style="yellow")
    down = {worker.host: worker.tunnel_note for worker in workers if worker.tunnel == "down"}
    for host, note in down.items():
        yield Text(f"! {host}: its tunnel to Redis is down: {tables.printable(note)}", style="yellow")


def _host_lines(hosts: Sequence[ProbedHost]) -> Iterator[Text]:
    """The hosts that could not be asked, and those at which nothing runs."""
    from rich.text import Text

    for host in hosts:
        if host.error:
            said = tables.printable(host.error.message)
            yield Text(f"! host {host.name} is unreachable: {said}", style="yellow")
        elif not host.workers:
            yield Text(f"host {host.name}: {host.probe}, no worker runs there")


def _state(worker: WorkerStatus) -> str:
    """What is known of it: for one that is offline, what its host says."""
    return (worker.state == "offline" and _probe(worker)) or worker.state


def _probe(worker: WorkerStatus) -> str:
    return getattr(worker, "probe", None) or ""


def _worker_row(worker: WorkerStatus) -> list[Cell]:
    offline = worker.state == "offline"
    return [
        worker.name,
        tables.state(_state(worker)),
        tables.state(_probe(worker)),
        f"{len(worker.running)}/{worker.slots}",
        (tables.age(worker.heartbeat_age_seconds), "bold red" if offline else ""),
        ",".join(worker.queues),
        " ".join(worker.running),
        str(worker.finished),
        str(worker.failed),
        worker.host,
        tables.state(worker.tunnel or ""),
        _cpus(worker),
        _memory(worker),
        _gpus(worker),
        ",".join(f"{name}={value}" for name, value in worker.labels.items()),
        worker.version,
    ]


def _cpus(worker: WorkerStatus) -> str:
    """`1.5/8`: used, of how many."""
    if not worker.cpus or worker.free is None:
        return str(worker.cpus or "")
    return f"{worker.cpus - worker.free.cpus:g}/{worker.cpus}"


def _memory(worker: WorkerStatus) -> str:
    """`2.0 GiB/64.0 GiB`; what was promised to jobs, not what they have."""
    if not worker.memory_bytes:
        return ""
    total = tables.size(worker.memory_bytes)
    if worker.free is None:
        return total
    used = max(0, worker.memory_bytes - worker.free.memory_bytes)
    # what is less than the MiB that memory is promised in is nobody's
    return f"{tables.size(used) if used >= _MIB else 0}/{total}"


def _gpus(worker: WorkerStatus) -> str:
    """`1/2x A100`, by kind: how many are used, and in part, of how many."""
    names = [str(gpu.get("name", "GPU")) for gpu in worker.gpus]
    left: dict[str, float] = {}
    for name, share in zip(names, worker.free.gpus if worker.free else (), strict=False):
        left[name] = left.get(name, 0) + share
    return ", ".join(
        (f"{names.count(name) - left[name]:g}/" if name in left else "") + f"{names.count(name)}x {name}"
        for name in dict.fromkeys(names)
    )
