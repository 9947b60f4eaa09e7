"""The loop's connections to Redis: up and down together, and back after a spread-out pause."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable
from contextlib import suppress

import redis

from broker import clock
from broker.line import Line
from broker.session import Session
from broker.waiting import Channels, Waiter
from fleet import jitter
from fleet.logs import about

log = logging.getLogger("fleet.worker")

#: seconds for which a connection must hold, or its end belongs to the outage before it
_STABLE_SECONDS = 1.0


class Links:
    """A connection for rounds, one that waits, one for messages, and a client for the rest."""

    def __init__(self, session: Session, client: redis.Redis, selector: selectors.BaseSelector) -> None:
        self.client = client
        self.line = Line(client)
        block = max(1, int(session.settings.lease_seconds))
        self.waiter = Waiter(client, session.identity, block)
        self.channels = Channels(client, session.identity)
        self._session = session
        self._selector = selector
        self._watched: list[int] = []
        self.up = False
        self.retry_at = 0.0
        self._up_at = 0.0
        self._said = ""
        self._pauses = jitter.returns_seconds(1, session.settings, session.identity)

    def connect(
        self, on_answer: Callable[[], None], on_wake: Callable[[], None], on_message: Callable[[], None]
    ) -> None:
        """Open all and watch them. Raises what redis-py raises."""
        for link, handler in ((self.line, on_answer), (self.waiter, on_wake), (self.channels, on_message)):
            link.connect()
            self._selector.register(link.fileno(), selectors.EVENT_READ, handler)
            self._watched.append(link.fileno())
        self.up, self._up_at = True, clock.monotonic()

    def lost(self, exc: Exception, fleet_size: int) -> None:
        """Drop all and set the time of the next attempt; not for all workers the same."""
        now = clock.monotonic()
        # a Redis that is full, loading or a replica can be connected to, and refuses all the same
        is_new = self.up and now - self._up_at >= _STABLE_SECONDS
        if is_new or str(exc) != self._said:
            self._said = str(exc)
            log.warning("Redis does not answer: %s", exc, extra=about("redis_away"))
        if is_new:
            self._pauses = jitter.returns_seconds(fleet_size, self._session.settings, self._session.identity)
        self.retry_at = now + next(self._pauses)
        self.close()

    def close(self) -> None:
        """Drop all."""
        for fd in self._watched:
            with suppress(KeyError, ValueError):
                self._selector.unregister(fd)
        self._watched.clear()
        self.up = False
        with suppress(redis.RedisError, OSError):
            self.line.close()
            self.waiter.close()
            self.channels.close()
            self.client.connection_pool.disconnect()
