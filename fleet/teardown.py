"""`fleet down`: end the workers of many hosts at once, and look whether they ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fleet import tunnel
from fleet.fan_out import FanOut
from fleet.hosts import Host
from fleet.journey import Journey, Opener, opened, report
from fleet.launchers import base
from fleet.results import HostResult, OnEvent, Report, WorkerResult
from fleet.tunnel_folder import TunnelFolder, key_of


async def down(
    hosts: Sequence[Host],
    *,
    opener: Opener,
    max_parallel: int,
    on_event: OnEvent,
    grace_seconds: float,
    force: bool = False,
    tunnels: TunnelFolder | None = None,
) -> Report:
    """End the workers of `hosts` and look whether they ended; then what tunnels lead there from here.

    Raises UsageError.
    """
    work = _Down(opener, FanOut(max_parallel), on_event, grace_seconds, force, tunnels)
    results = await work.fan_out.run(hosts, work.take_down)
    return report(hosts, results, work.fan_out, "untouched")


@dataclass
class _Down:
    """Takes hosts down."""

    opener: Opener
    fan_out: FanOut[HostResult]
    on_event: OnEvent
    grace_seconds: float
    force: bool
    tunnels: TunnelFolder | None

    async def take_down(self, host: Host) -> HostResult:
        """One host. Never raises but when cancelled before anything is done to it."""
        journey = Journey(host, self.on_event)
        return await journey.taken(self._taken_down(journey))

    async def _taken_down(self, journey: Journey) -> HostResult:
        async with opened(journey, self._reached) as launcher:
            journey.result("unconfirmed", note="was being stopped")
            stopped = await journey.take("stop", self._stop(journey.host, launcher), _ended)
            ended = any(worker.how in ("stopped", "killed") for worker in stopped)
            done = partial(
                journey.result,
                "stopped" if ended else "not running",
                workers=tuple(WorkerResult(worker.name, worker.how, worker.pid) for worker in stopped),
            )
            done(note="its tunnel was being closed")  # only that can be cut short, or fail, from here on
            if any(worker.how == "remains" for worker in stopped):
                return journey.failed(_remains(stopped))
            return done(
                note="its tunnel is closed" if await self._untunnelled(journey.host, launcher) else ""
            )

    async def _untunnelled(self, host: Host, launcher: base.Launcher) -> bool:
        """Close the tunnel that leads there from here; false where there is none. Raises HostError."""
        if self.tunnels is None:
            return False
        socket = self.tunnels.socket_path(key_of(host.key))
        try:
            was_there = await tunnel.end(self.tunnels, host)
        except OSError as exc:
            raise base.HostError(
                f"its workers have ended, but its tunnel could not be closed: {exc}",
                f"Mend that, then run 'fleet down {host.name}' again.",
            ) from exc
        if was_there and socket:  # whoever held it may have died, or not have reached the host just now
            await launcher.unlink((socket, f"{socket}.sshd"))
        return was_there

    async def _reached(self, host: Host) -> base.Launcher:
        try:
            return await self.opener(host)
        except base.ConnectError as exc:
            exc.hint = f"{exc.hint} What runs on {host.name} runs on.".strip()
            raise

    async def _stop(self, host: Host, launcher: base.Launcher) -> tuple[base.Stopped, ...]:
        return await launcher.stop(
            host.options.output_dir, host.worker_base, grace_seconds=self.grace_seconds, force=self.force
        )


def _remains(stopped: Sequence[base.Stopped]) -> base.HostError:
    left = ", ".join(f"{worker.name} (pid {worker.pid})" for worker in stopped if worker.how == "remains")
    return base.HostError(
        f"{left} did not end", "Look at those processes there; 'fleet down --force' tries again."
    )


def _ended(stopped: Sequence[base.Stopped]) -> str:
    return ", ".join(f"{worker.name} {worker.how}" for worker in stopped) or "nothing ran"
