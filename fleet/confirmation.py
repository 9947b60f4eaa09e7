"""Started means registered and beating in Redis, not that a process is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from broker import clock
from broker.connection import NOT_REACHABLE
from broker.hosts import Sign
from fleet.launchers import base

#: seconds between two looks at Redis for the beats of a host
_POLL_SECONDS = 0.05
#: the same where workers wait for their moment to begin, and so do many hosts at once
_CALM_POLL_SECONDS = 1.0
#: seconds between two looks at the host whether the worker lives
_LOOK_SECONDS = 1.0
_LOG_LINES = 12

#: names of workers -> the signs of life that Redis has of them
Signs = Callable[[Sequence[str]], Awaitable[Mapping[str, Sign | None]]]
#: lines of their logs that are wanted -> the host's workers, as they are found there
Look = Callable[[int], Awaitable[tuple[base.Seen, ...]]]


@dataclass
class Confirmation:
    """Waits until the workers of a host beat; says why where one does not."""

    host: str
    look: Look
    signs: Signs
    limit_seconds: float
    #: for which workers wait before they begin: until then nobody looks whether they live
    delay_seconds: float
    #: the address of Redis, fit to be printed
    redis: str
    #: signs before the start: what is left of an earlier life does not count
    before: Mapping[str, Sign | None]
    #: whether the host finds it through a tunnel
    tunnelled: bool = False

    async def until_all_beat(self, started: Sequence[base.Started]) -> None:
        """One that did all there was to do, and has left, did beat. Raises WorkerDied, NotRegistered."""
        pending = {worker.name: worker for worker in started}
        begin = clock.monotonic() + self.delay_seconds
        deadline, next_look = begin + self.limit_seconds, begin + _LOOK_SECONDS
        while pending := await self.silent(pending):
            if clock.monotonic() > next_look:
                await self._must_live(pending)
                next_look = clock.monotonic() + _LOOK_SECONDS
            if clock.monotonic() > deadline:
                raise await self._not_registered(pending)
            await asyncio.sleep(_CALM_POLL_SECONDS if self.delay_seconds else _POLL_SECONDS)

    async def silent(self, pending: Mapping[str, base.Started]) -> dict[str, base.Started]:
        """Those of `pending`, by name, that do not beat yet."""
        signs = await self.signs(list(pending))
        return {
            name: worker
            for name, worker in pending.items()
            if signs[name] is None or (worker.fresh and signs[name] == self.before[name])
        }

    async def _must_live(self, pending: Mapping[str, base.Started]) -> None:
        for worker in await self.look(_LOG_LINES):
            if worker.name in pending and not worker.alive:
                raise self._died(worker)

    def _died(self, worker: base.Seen) -> base.WorkerDied:
        text = f"worker {worker.name} died. Last log:\n{worker.log}"
        if NOT_REACHABLE in worker.log:
            return base.RedisNotReached(f"no Redis at {self.redis} from there: {text}", self._mend_reach())
        return base.WorkerDied(text, self._mend_reach() if "Redis at" in worker.log else "")

    async def _not_registered(self, pending: Mapping[str, base.Started]) -> base.NotRegistered:
        log = "\n".join(worker.log for worker in await self.look(_LOG_LINES) if worker.name in pending)
        return base.NotRegistered(
            f"{', '.join(pending)} runs, but did not register at {self.redis} within"
            f" {self.delay_seconds + self.limit_seconds:g} s. Last log:\n{log}",
            self._mend_reach(),
        )

    def _mend_reach(self) -> str:
        """What to do about Redis."""
        if self.tunnelled:
            return "It looks for Redis in the tunnel from here: does Redis answer here, and is the tunnel up?"
        return (
            f"Can {self.host} reach {self.redis}? Look at firewalls, and at what Redis is bound to."
            " Or bring Redis there over SSH: run this again with --tunnel, or tunnel=yes in that host's line."
        )
