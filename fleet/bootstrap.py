"""`fleet up`: many hosts at once, each succeeding or failing alone.

A host goes through connect, probe, version (where what is there is used), tunnel (where it needs
one), install, start, confirm. Up to `start` nothing of it is changed but for an install, which
counts only when complete; `start`, which also ends workers that make way, is never cut. So an
interrupt leaves every host either untouched, or started and known: it is kept in Redis before
anything is started there. A host at which nothing ever was (a name with a typo) is not kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from broker import connection
from broker import hosts as broker_hosts
from broker.hosts import Sign
from broker.worker_settings import WorkerSettings
from fleet import bundle, jitter, kept_hosts, reach, versions, wheelhouse
from fleet.confirmation import Confirmation
from fleet.fan_out import FanOut
from fleet.hosts import Host
from fleet.journey import Journey, Opener, opened, report
from fleet.launchers import base
from fleet.ledger import part
from fleet.results import HostResult, OnEvent, Report, WorkerResult
from fleet.step_times import StepTimes
from fleet.tunnel import Tunnels
from fleet.worker_config import WorkerConfig

if TYPE_CHECKING:
    import redis

#: seconds a worker gets from its start to its first beat
CONFIRM_SECONDS = 30.0
#: workers whose start is spread by itself, as hosts are started a few at a time
_SPREAD_BY_ITSELF = 100
#: a clock that is off by more is worth telling; leases go by the clock of Redis, logs do not
_SKEW_SECONDS = 5.0


@dataclass(frozen=True)
class Orders:
    """What to start on each host; the host's own options come first."""

    #: as this machine names it
    redis_url: str = field(repr=False)
    workers_per_host: int = 1
    #: None: as many as the host has CPUs, shared among its workers
    slots: int | None = None
    queues: tuple[str, ...] = ("default",)
    labels: Mapping[str, str] = field(default_factory=dict)
    #: at the host; None: ~/.local/state/rq-fleet/work
    output_dir: str | None = None
    #: whether to bring our bundle, or to use what is there
    install: bool = True
    #: whether to bring its dependencies, too
    offline: bool = False
    #: whether what is there must be of our version
    check_versions: bool = True
    #: whether workers older than we are make way for new ones
    upgrade: bool = False
    #: seconds that running jobs of such a worker get before they are handed back
    grace_seconds: float = 30.0
    #: None: the worker's own
    executor_python: str | None = None
    paths: tuple[str, ...] = ()
    ephemeral: bool = False
    until_done: bool = False
    #: what each host is said to have, by the arguments of `fleet.resources.detect`; its workers divide it
    resources: Mapping[str, int] = field(default_factory=dict)
    #: those of broker.worker_settings.WorkerSettings
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: of fleet.logs
    log_format: str = "human"
    log_level: str = "info"
    #: the window within which workers begin, each at its own moment; None: as their number demands
    startup_delay_seconds: float | None = None
    #: after so long they have ended
    time_limit_seconds: float | None = None
    dry_run: bool = False
    #: the addresses that the embedded broker listens on; none: it is another Redis
    bound_to: tuple[str, ...] = ()
    #: the tunnel that `redis_url` leads into
    tunnel: str | None = None


async def up(
    hosts: Sequence[Host],
    orders: Orders,
    *,
    opener: Opener,
    client: redis.Redis | None,
    max_parallel: int,
    on_event: OnEvent,
    tunnels: Tunnels | None = None,
    confirm_seconds: float = CONFIRM_SECONDS,
) -> Report:
    """Start workers on `hosts`; what lives already is left alone.

    `client` keeps the hosts and sees the beats; only a dry run may go without. Cancelling it, as
    Ctrl-C does, gives a report too, with `interrupted` set. Raises UsageError, and RedisUnreachable
    where it is away from the start.
    """
    known = await asyncio.to_thread(kept_hosts.load, client) if client else ()
    kept = {host.key for host in known}
    orders = replace(orders, startup_delay_seconds=_window(hosts, orders))
    steps = StepTimes(on_event)
    work = _Up(orders, opener, client, FanOut(max_parallel), steps, confirm_seconds, kept, tunnels)
    results = await work.fan_out.run(hosts, work.bring_up)
    if client and not orders.dry_run:
        await asyncio.to_thread(steps.keep, client)
    found = report(hosts, results, work.fan_out, "untouched")
    rows = zip(hosts, found.hosts, strict=True)
    return replace(found, hosts=tuple(replace(result, kept=host.key in kept) for host, result in rows))


@dataclass
class _Up:
    """Brings hosts up."""

    orders: Orders
    opener: Opener
    client: redis.Redis | None
    fan_out: FanOut[HostResult]
    on_event: OnEvent
    confirm_seconds: float
    #: the keys of the hosts that are kept in Redis
    kept: set[str]
    tunnels: Tunnels | None
    wheelhouses: wheelhouse.Wheelhouses = field(
        default_factory=lambda: wheelhouse.Wheelhouses(wheelhouse.cache_dir())
    )

    async def bring_up(self, host: Host) -> HostResult:
        """One host, from connect to confirm. Never raises but when cancelled before its start."""
        journey = Journey(host, self.on_event)
        return await journey.taken(self._brought_up(journey))

    async def _brought_up(self, journey: Journey) -> HostResult:
        async with opened(journey, self.opener) as launcher:
            return await self._steps(journey, launcher)

    async def _steps(self, journey: Journey, launcher: base.Launcher) -> HostResult:
        probe = await journey.take("probe", self._probe(journey.host, launcher), _described)
        if self._uses_what_is_there(journey.host):
            await journey.take("version", self._version(journey.host, probe), str)
        if self.orders.dry_run:
            return await self._planned(journey, launcher, probe)
        async with AsyncExitStack() as stack:
            orders = await self._orders_at(journey, probe, stack)
            python = await journey.take("install", self._python(journey.host, launcher, probe))
            wanted = workers_for(journey.host, orders, probe, python)
            before = await self._signs([order.name for order in wanted])
            replaced = await self._older(journey.host, launcher, wanted[0])
            await self._keep(journey, replace(journey.host, found_python=probe.python))
        journey.result("unconfirmed", workers=_unknown(wanted), note="was being started")
        with self.fan_out.uncut(journey.host):
            start = launcher.start(python, wanted, replace=replaced, grace_seconds=self.orders.grace_seconds)
            started = await journey.take("start", start, _told)
        unconfirmed = journey.result("unconfirmed", workers=_workers(started), note="started, not confirmed")
        if self.fan_out.interrupted:
            return unconfirmed
        confirmation = self._confirmed(journey.host, launcher, wanted, before, started)
        left = await journey.take("confirm", confirmation, _told_of_those_that_left)
        fresh = any(worker.fresh for worker in started)
        return journey.result(
            "started" if fresh else "running",
            workers=_workers(started, left),
            note=_note(journey.host, started),
        )

    async def _keep(self, journey: Journey, host: Host) -> None:
        """From now on something of ours may be there, which `fleet down` has to find.

        Redis cannot be stopped halfway: an interrupt waits for its answer, and then nothing is started.
        """
        if self.client is None:
            return
        with self.fan_out.uncut(host):
            try:
                await asyncio.to_thread(kept_hosts.keep, self.client, [host])
            except asyncio.CancelledError:  # the second: the thread goes on, and most likely keeps it
                self.kept.add(host.key)
                journey.result("untouched", note="interrupted while it was being kept")
                raise
        self.kept.add(host.key)
        if self.fan_out.interrupted:
            journey.result("untouched", note="interrupted; it is kept")
            raise asyncio.CancelledError

    async def _confirmed(
        self,
        host: Host,
        launcher: base.Launcher,
        wanted: Sequence[WorkerConfig],
        before: Mapping[str, Sign | None],
        started: Sequence[base.Started],
    ) -> frozenset[str]:
        """The names of those that have left already, all being done. Raises WorkerDied, NotRegistered.

        While workers wait for their moment the host holds no connection, nor a place among those at work.
        """
        folder, base_name = wanted[0].output_dir, host.worker_base
        confirmation = Confirmation(
            host=host.name,
            look=lambda lines: launcher.inspect(folder, base_name, log_lines=lines),
            signs=self._signs,
            limit_seconds=self.confirm_seconds,
            delay_seconds=max(map(_delay_seconds, wanted)),
            redis=connection.redacted(wanted[0].redis_url),
            before=before,
            tunnelled=host.is_tunnelled,
        )
        if not confirmation.delay_seconds:
            await confirmation.until_all_beat(started)
        elif await confirmation.silent({worker.name: worker for worker in started}):
            await launcher.close()
            async with self.fan_out.aside():
                look = partial(self._look_again, host, folder)
                await replace(confirmation, look=look).until_all_beat(started)
        signs = await self._signs([worker.name for worker in started])
        return frozenset(name for name, sign in signs.items() if sign and sign.has_left)

    async def _look_again(self, host: Host, folder: str, lines: int) -> tuple[base.Seen, ...]:
        async with self.fan_out.turn():
            launcher = await self.opener(host)
            try:
                return await launcher.inspect(folder, host.worker_base, log_lines=lines)
            finally:
                await launcher.close()

    async def _probe(self, host: Host, launcher: base.Launcher) -> base.Probe:
        probe = await launcher.probe(fetch_python=not self.orders.dry_run)
        if not self.orders.dry_run and not host.is_tunnelled:
            self._orders_for(probe)  # what cannot work is told before anything is installed
        return probe

    def _orders_for(self, probe: base.Probe) -> Orders:
        """The orders with the URL by which that host finds Redis. Raises RedisOutOfReach."""
        url = reach.url_for(self.orders.redis_url, self.orders.bound_to, probe)
        return replace(self.orders, redis_url=url)

    async def _orders_at(self, journey: Journey, probe: base.Probe, stack: AsyncExitStack) -> Orders:
        """The orders with how that host finds Redis; a tunnel that is new goes with `stack` if that fails."""
        if self.tunnels is None or not journey.host.is_tunnelled:
            return self._orders_for(probe)
        bring = stack.enter_async_context(self.tunnels.brought(journey.host))
        found = await journey.take("tunnel", bring, lambda tunnel: connection.redacted(tunnel.redis_url))
        return replace(self.orders, redis_url=found.redis_url, tunnel=found.tunnel_id)

    def _uses_what_is_there(self, host: Host) -> bool:
        """Whether its version has to be looked at: what we bring is ours."""
        return self.orders.check_versions and (not self.orders.install or host.launcher == "local")

    async def _version(self, host: Host, probe: base.Probe) -> str:
        return versions.check(host.name, probe)

    async def _older(self, host: Host, launcher: base.Launcher, first: WorkerConfig) -> dict[str, str | None]:
        """The workers to be replaced, and their versions."""
        if not self.orders.upgrade:
            return {}
        return versions.older(await launcher.inspect(first.output_dir, host.worker_base))

    async def _python(self, host: Host, launcher: base.Launcher, probe: base.Probe) -> str:
        """The interpreter that runs the workers, our bundle installed for it."""
        if self.orders.install:
            made = await asyncio.to_thread(bundle.build)
            brought = self.orders.offline and host.launcher != "local" and not probe.installed(made.key)
            wheels = await self.wheelhouses.for_host(made, probe) if brought else None
            return await launcher.install(made, wheels)
        return probe.in_use[0]

    async def _planned(self, journey: Journey, launcher: base.Launcher, probe: base.Probe) -> HostResult:
        """What would be done."""
        wanted = workers_for(journey.host, self.orders, probe, probe.python)
        seen = await launcher.inspect(wanted[0].output_dir, journey.host.worker_base)
        alive = {worker.name: worker for worker in seen if worker.alive}
        replaced = versions.older(seen) if self.orders.upgrade else {}
        rows = [_planned_row(order.name, alive.get(order.name), order.name in replaced) for order in wanted]
        key = (await asyncio.to_thread(bundle.build)).key
        missing = self.orders.install and not probe.installed(key)
        return journey.result("planned", workers=tuple(rows), note="would install" if missing else "")

    async def _signs(self, names: Sequence[str]) -> dict[str, Sign | None]:
        """What Redis knows of the life of workers. Raises RedisUnreachable, RedisDenied."""
        client = self.client
        if client is None:
            return dict.fromkeys(names)
        with connection.translated(connection.address(client)):
            return await asyncio.to_thread(broker_hosts.signs, client, names)


def workers_for(host: Host, orders: Orders, probe: base.Probe, python: str) -> tuple[WorkerConfig, ...]:
    """The workers that a host is to have. Raises UsageError."""
    options = host.options
    count = _count(host, orders)
    first = WorkerConfig(
        name=host.worker_name(0),
        host=host.name,
        redis_url=orders.redis_url,
        tunnel=orders.tunnel,
        output_dir=_absolute(options.output_dir or orders.output_dir or probe.output_dir, probe),
        queues=options.queues or orders.queues,
        startup_delay_seconds=orders.startup_delay_seconds or 0.0,
        slots=options.slots or orders.slots or max(1, orders.resources.get("cpus", probe.cpus) // count),
        labels={**orders.labels, **options.labels},
        executor_python=_absolute(orders.executor_python or python, probe),
        paths=tuple(_absolute(path, probe) for path in orders.paths),
        siblings=count,
        time_limit_seconds=orders.time_limit_seconds,
        settings=orders.settings,
        log_format=orders.log_format,
        log_level=orders.log_level,
        until_done=orders.until_done,
    )
    first = (first.as_ephemeral() if orders.ephemeral else first).checked()
    return tuple(_sibling(first, host, orders, number) for number in range(count))


def _sibling(first: WorkerConfig, host: Host, orders: Orders, number: int) -> WorkerConfig:
    said = {kind: part(total, number, first.siblings) for kind, total in orders.resources.items()}
    return replace(first, name=host.worker_name(number), sibling=number, resources=said)


def _count(host: Host, orders: Orders) -> int:
    return host.options.workers or orders.workers_per_host


def _window(hosts: Sequence[Host], orders: Orders) -> float:
    """Seconds within which workers begin: up to a hundred are spread well by so many hosts at once."""
    if orders.startup_delay_seconds is not None:
        return orders.startup_delay_seconds
    count = sum(_count(host, orders) for host in hosts)
    rate = WorkerSettings.from_json(orders.settings).registrations_per_second
    return jitter.window_seconds(count, rate) if count > _SPREAD_BY_ITSELF else 0.0


def _delay_seconds(order: WorkerConfig) -> float:
    return jitter.delay_seconds(order.startup_delay_seconds, order.host, order.name)


def _absolute(path: str, probe: base.Probe) -> str:
    return f"{probe.home}/{path[2:]}" if path.startswith("~/") else path


def _planned_row(name: str, worker: base.Seen | None, replaced: bool) -> WorkerResult:
    if worker is None:
        return WorkerResult(name, "would start")
    return WorkerResult(name, "would be replaced" if replaced else "running", worker.pid, worker.version)


def _workers(started: Sequence[base.Started], left: frozenset[str] = frozenset()) -> tuple[WorkerResult, ...]:
    def state(worker: base.Started) -> str:
        return "left" if worker.name in left else "started" if worker.fresh else "running"

    return tuple(WorkerResult(worker.name, state(worker), worker.pid, worker.version) for worker in started)


def _unknown(wanted: Sequence[WorkerConfig]) -> tuple[WorkerResult, ...]:
    return tuple(WorkerResult(order.name, "unknown") for order in wanted)


def _note(host: Host, started: Sequence[base.Started]) -> str:
    """Workers of another version, or with other options, are left alone, and that is said."""
    others = [worker for worker in started if worker.other_options]
    notes = [versions.note(started)]
    if any(not worker.fresh for worker in others):
        notes.append(f"runs with other options: 'fleet down {host.name}', then 'fleet up'")
    if any(worker.fresh for worker in others):
        notes.append("has other options than before")
    return "; ".join(filter(None, notes))


def _described(probe: base.Probe) -> str:
    skew = probe.clock_skew_seconds
    parts = (
        probe.system,
        f"Python {probe.python_version}",
        f"rq-fleet {probe.fleet_version}" if probe.fleet_version else "",
        f"{probe.cpus} CPUs",
        f"{probe.memory_bytes / 2**30:.0f} GiB",
        f"{len(probe.gpus)} GPUs" if probe.gpus else "",
        f"clock {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}" if abs(skew) > _SKEW_SECONDS else "",
    )
    return ", ".join(filter(None, parts))


def _told_of_those_that_left(names: frozenset[str]) -> str:
    return f"{', '.join(sorted(names))} left already" if names else ""


def _told(started: Sequence[base.Started]) -> str:
    return ", ".join(
        f"{worker.name} {'pid' if worker.fresh else 'already running, pid'} {worker.pid}"
        for worker in started
    )
