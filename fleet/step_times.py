"""What the steps of `fleet up` took, left in Redis for the exporter."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from broker import bootstraps
from fleet.results import Event, OnEvent

if TYPE_CHECKING:
    import redis

log = logging.getLogger("fleet.up")


@dataclass
class StepTimes:
    """Remembers the events that it hands on."""

    on_event: OnEvent
    _done: list[tuple[str, float]] = field(default_factory=list)
    _failed: list[str] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if event.state == "done":
            self._done.append((event.step, event.seconds))
        elif event.state == "failed":
            self._failed.append(event.step)
        self.on_event(event)

    def keep(self, client: redis.Redis) -> None:
        """Leave them in Redis; without it the hosts are up all the same."""
        from redis import RedisError

        try:
            bootstraps.record(client, self._done, self._failed)
        except RedisError as exc:
            log.debug("step times were not kept: %s", exc)
