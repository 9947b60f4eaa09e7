"""The Prometheus exporter: Redis is read when it is scraped, and nothing is kept but the connection."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import redis
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import InfoMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from broker import __version__, clock, connection, metrics
from broker.errors import FleetError
from broker.metrics import Snapshot
from fleet.families import Choices, gauge, told

if TYPE_CHECKING:
    from prometheus_client.core import Metric

log = logging.getLogger("fleet.metrics")

#: seconds for one reply of Redis
_PATIENCE_SECONDS = 5.0


@dataclass(eq=False)
class FleetCollector(Collector):
    """Asks `read` for a snapshot at each scrape; Redis away is a metric, and said once on stderr."""

    read: Callable[[], Snapshot]
    choices: Choices
    #: how many scrapes there were, and the seconds they took
    _asked: int = 0
    _seconds: float = 0.0
    _trouble: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def collect(self) -> Iterator[Metric]:
        """All metrics; without Redis those alone that say so."""
        began = clock.monotonic()
        snapshot = self._snapshot()
        with self._lock:
            self._asked += 1
            self._seconds += clock.monotonic() - began
        yield gauge("fleet_redis_up", "Whether Redis answered this scrape.", snapshot is not None)
        build = InfoMetricFamily("fleet_build", "The version of the exporter.")
        build.add_metric([], {"version": __version__})
        yield build
        if snapshot is not None:
            yield from told(snapshot, self.choices)
        if self.choices.rq_names:
            yield SummaryMetricFamily(
                "rq_request_processing_seconds",
                "Time spent collecting RQ data",
                count_value=self._asked,
                sum_value=self._seconds,
            )

    def _snapshot(self) -> Snapshot | None:
        try:
            snapshot = self.read()
        except (redis.RedisError, OSError, FleetError) as exc:
            self._tell(str(exc))
            return None
        self._tell("")
        return snapshot

    def _tell(self, trouble: str) -> None:
        if trouble and not self._trouble:
            log.warning("Redis does not answer: %s", trouble)
        elif self._trouble and not trouble:
            log.warning("Redis answers again")
        self._trouble = trouble


def serve(url: str, host: str, port: int, choices: Choices) -> tuple[int, Callable[[], None]]:
    """Serve until the returned function is called; returns the port, too. Raises OSError for one in use.

    Redis may be away when it begins. Answers come before Prometheus gives up, which takes it 10 s.
    """
    client = connection.connect(url, timeout_seconds=_PATIENCE_SECONDS)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(lambda: metrics.read(client), choices))
    server, thread = start_http_server(port, addr=host, registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()
        client.close()

    return server.server_port, stop
