"""The heartbeat, in a thread of its own: a busy, silent or hanging job cannot starve it.

It renews the worker's leases, tells the sidecar how long they hold, registers again when the
keys have lapsed, and posts what it learns to the worker's loop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import redis

from broker import clock
from broker.connection import is_denied
from broker.session import Session
from broker.work import Beat
from fleet import jitter
from fleet.logs import about

log = logging.getLogger("fleet.beater")


#: seconds, see `patience`
_SHORTEST_PATIENCE, _LONGEST_PATIENCE = 1.0, 15.0


@dataclass(frozen=True)
class Denied:
    """Redis knows us no more: the worker must end, not ask for ever."""

    reason: str


class Beater:
    """Beats every `heartbeat_seconds`, at once when asked; while Redis is away, as `fleet.jitter` has it."""

    def __init__(
        self,
        session: Session,
        client: redis.Redis,
        *,
        leases: Callable[[], dict[str, str]],
        record: Callable[[], str],
        renewed: Callable[[float], None],
        post: Callable[[Beat | Denied], None],
    ) -> None:
        """`leases` and `record` give the state to send, `renewed(deadline)` hears of each success
        (seconds on the boot clock until which jobs may run), `post` of what the loop must know."""
        self._session = session
        self._client = client
        self._leases = leases
        self._record = record
        self._renewed = renewed
        self._post = post
        self._wake = threading.Event()
        self._stopping = False
        #: whether the last beat arrived
        self.connected = True
        self._workers = 1
        self._pauses = jitter.returns_seconds(1, session.settings, session.identity)
        self._thread = threading.Thread(target=self._run, name="beater", daemon=True)

    def start(self) -> None:
        """Beat from now on."""
        self._thread.start()

    def beat_now(self) -> None:
        """Do not wait for the next turn."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread; waits for a beat under way."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=20)

    def _run(self) -> None:
        settings, identity = self._session.settings, self._session.identity
        while not self._stopping:
            was_connected = self.connected
            self._turn()
            if was_connected and not self.connected:
                self._pauses = jitter.returns_seconds(self._workers, settings, identity)
            self._wake.wait(settings.heartbeat_seconds if self.connected else next(self._pauses))
            self._wake.clear()

    def _turn(self) -> None:
        try:
            self._beat()
            if not self.connected:
                log.info("Redis is back", extra=about("redis_back"))
            self.connected = True
        except Exception as exc:  # whatever it is: without a heartbeat all jobs here are lost
            if is_denied(exc):
                self._stopping = True
                self._post(Denied(str(exc)))
                return
            if self.connected:
                is_known = isinstance(exc, redis.RedisError | OSError)
                log.warning(
                    "Redis does not answer: %s; jobs run on until their leases end",
                    exc,
                    exc_info=None if is_known else exc,
                    extra=about("redis_away"),
                )
            self.connected = False

    def _beat(self) -> None:
        sent = clock.boottime()
        # read before the leases are: a claim whose reply comes in between is not an orphan
        settled = self._session.claims_settled
        beat = self._session.beat(self._client, self._record(), self._leases(), settled)
        if beat.state == "ok":
            self._workers = max(1, beat.workers)
            self._renewed(sent + lease_margin(self._session.settings.lease_seconds))
        elif beat.state == "gone":
            beat = self._register_again()
        self._post(beat)

    def _register_again(self) -> Beat:
        log.warning("our record is gone from Redis: registering again", extra=about("record_gone"))
        taken = self._session.register(self._client, self._record())
        self._wake.set()  # the next beat renews the leases
        return Beat("taken" if taken else "gone")


def lease_margin(lease_seconds: float) -> float:
    """Seconds after a beat was sent until which its leases may be relied on: 5 s (a sixth of a
    short lease) before they run out, so that jobs are dead when another may start them."""
    return lease_seconds - min(5.0, lease_seconds / 6)


def patience(lease_seconds: float) -> float:
    """Seconds to wait for Redis's answer: a beat that hangs is sent again, on a new connection, before
    the leases end; and a Redis that is busy for a moment is not given up."""
    return min(_LONGEST_PATIENCE, max(_SHORTEST_PATIENCE, lease_seconds / 4))
