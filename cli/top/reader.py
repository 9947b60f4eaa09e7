"""Looks at Redis, in a thread of its own, so that keys never wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker import failed, running, status
from broker.errors import FleetError
from broker.failed import Failure
from broker.running import RunningJob
from cli import fleet_rows
from cli.errors import explained

if TYPE_CHECKING:
    import redis

    from broker.status import FleetStatus
    from cli.context import Context

#: a look is followed by a pause of so many times what it took: reading takes a tenth of one CPU at most
_PAUSES = 9.0
#: of the last jobs that failed, so many are shown
_FAILURES = 100


@dataclass(frozen=True)
class Seen:
    """The fleet at one moment, in a constant number of round trips."""

    status: FleetStatus
    jobs: list[RunningJob]
    courses: fleet_rows.Courses
    failures: list[Failure]
    by_state: str
    totals: list[fleet_rows.Total]


class Reader:
    """Tells `found` what it sees, and `failed` why it sees nothing; both are called in its thread."""

    def __init__(
        self,
        context: Context,
        client: redis.Redis,
        interval_seconds: float,
        *,
        found: Callable[[Seen], object],
        failed: Callable[[FleetError], object],
    ) -> None:
        self._context, self._client, self._interval = context, client, interval_seconds
        self._found, self._failed = found, failed
        self._wake = threading.Event()
        self._stopping = False
        self._running = running.RunningJobs()
        #: ids of jobs that are on the screen; replaced, never changed
        self.shown: Collection[str] = ()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No more looks; one that is under way may still be told."""
        self._stopping = True
        self._wake.set()

    def look_now(self) -> None:
        """Do not wait for the next turn."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            began = time.monotonic()
            pauses = _PAUSES if self._look() else 0.0  # to wait in vain takes no CPU
            self._wake.wait(max(self._interval, pauses * (time.monotonic() - began)))
            self._wake.clear()

    def _look(self) -> bool:
        """Whether something was seen."""
        try:
            self._found(self._read())
        except Exception as exc:  # whatever it is: who looks is to see it, and what comes next
            self._failed(explained(exc, self._context) or FleetError(f"{type(exc).__name__}: {exc}"))
            return False
        return True

    def _read(self) -> Seen:
        found = status.read(self._client)
        return Seen(
            found,
            self._running.look(self._client, found.workers, self.shown),
            fleet_rows.courses(self._client),
            failed.last(self._client, _FAILURES),
            fleet_rows.by_state(found.workers),
            fleet_rows.totals(found.workers),
        )
