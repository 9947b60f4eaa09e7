"""One host on its way through the steps, and how it is reached at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from broker import clock
from broker.errors import FleetError
from fleet.fan_out import FanOut
from fleet.hosts import Host
from fleet.launchers import base
from fleet.results import Event, HostResult, OnEvent, Outcome, Report, Step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fleet.launchers.ssh import SshOptions

Opener = Callable[[Host], Awaitable[base.Launcher]]
Value = TypeVar("Value")


def opener(ssh: SshOptions, *, python: str | None = None) -> Opener:
    """How hosts are reached: SSH, or nothing at all for this machine."""

    async def open_launcher(host: Host) -> base.Launcher:
        chosen = host.options.python or python
        if host.launcher == "local":
            from fleet.launchers.local import LocalLauncher

            return LocalLauncher(python=chosen, limit_seconds=ssh.command_timeout_seconds)
        from fleet.launchers import ssh as over_ssh

        address = over_ssh.Address(host.name, host.user, host.port)
        launcher = await over_ssh.open_launcher(address, ssh, python=chosen)
        if host.found_python and not chosen:
            launcher.try_first(host.found_python)
        return launcher

    return open_launcher


@dataclass
class Journey:
    """One host on its way: the step it is at, and how long it took."""

    host: Host
    on_event: OnEvent
    began: float = field(default_factory=clock.monotonic)
    step: Step = "connect"
    #: what is true of the host already, should the rest be cut short
    so_far: HostResult | None = None

    async def taken(self, steps: Awaitable[HostResult]) -> HostResult:
        """What became of the host. Raises only CancelledError, where nothing was done to it yet."""
        try:
            return await steps
        except asyncio.CancelledError:
            if self.so_far is None:
                raise
            return self.so_far
        except Exception as exc:  # one host's trouble, foreseen or not, is not that of the others
            return self.failed(exc)

    async def take(
        self, step: Step, work: Awaitable[Value], tell: Callable[[Value], str] = lambda _: ""
    ) -> Value:
        """Do `work` as `step`, and tell when it begins and ends."""
        self.step, began = step, clock.monotonic()
        self.on_event(Event(self.host.name, step, "begun"))
        value = await work
        self.on_event(Event(self.host.name, step, "done", tell(value), clock.monotonic() - began))
        return value

    def failed(self, exc: Exception) -> HostResult:
        """The result where `exc` ended it: what is known of its workers is still told."""
        error = (
            exc if isinstance(exc, FleetError) else base.HostError(f"unexpected: {exc!r}", "This is a bug.")
        )
        self.on_event(Event(self.host.name, self.step, "failed", error.message))
        workers = self.so_far.workers if self.so_far else ()
        return self.result("failed", step=self.step, error=error, workers=workers)

    def result(self, outcome: Outcome, **more: Any) -> HostResult:
        """What is told of the host, also where it is cut off after this."""
        seconds = clock.monotonic() - self.began
        self.so_far = HostResult(self.host.name, outcome, seconds=seconds, **more)
        return self.so_far


@asynccontextmanager
async def opened(journey: Journey, opener: Opener) -> AsyncIterator[base.Launcher]:
    launcher = await journey.take("connect", opener(journey.host))
    try:
        yield launcher
    finally:
        await launcher.close()


def report(
    hosts: Sequence[Host],
    results: Sequence[HostResult | None],
    fan_out: FanOut[HostResult],
    given_up: Outcome,
) -> Report:
    pairs = zip(hosts, results, strict=True)
    filled = [result or HostResult(host.name, given_up, note="interrupted") for host, result in pairs]
    return Report(tuple(filled), fan_out.interrupted)
