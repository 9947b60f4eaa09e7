"""Dramatiq: two processes, Redis for messages and results.

Promised: messages are acknowledged after they were processed; those of a dead worker are requeued
by others' maintenance after its heartbeat timeout (60 s). Results are stored. Not promised: one
accepted result; a paused worker's messages run a second time and both count. Functions run in
eight threads in each process, its default; commands in one, so that two run at a time. It fetches
256 messages ahead, by its documented variable: its default, twice the threads, is much slower
for such short jobs (no-ops: 500/s with one thread, 3,800/s with eight; 4,900/s so).
"""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks import harness, work
from benchmarks.harness import URL_VARIABLE, Site
from benchmarks.peers.base import COMMAND, NOOP, PROBE, Peer

_PREFETCH = "dramatiq_queue_prefetch=256"
_URL = os.environ.get(URL_VARIABLE, "redis://")
broker = RedisBroker(url=_URL)
broker.add_middleware(Results(backend=RedisBackend(url=_URL)))
dramatiq.set_broker(broker)
_ACTORS = {
    kind: dramatiq.actor(function, actor_name=kind, store_results=True, result_ttl=3_600_000)
    for kind, function in ((COMMAND, work.command), (NOOP, work.noop), (PROBE, work.probe))
}


class Dramatiq(Peer):
    name = "dramatiq"
    packages = ("dramatiq",)
    paces = {COMMAND: 800, NOOP: 4000, PROBE: 50}

    _submitted = 0

    def fill(self, site: Site, work: str, jobs: int) -> None:
        super().fill(site, work, jobs)
        self._submitted = jobs

    def submit(self, site: Site, work: str, *arguments: str) -> None:
        _ACTORS[work].send(*arguments)

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        threads = "1" if work == COMMAND else "8"
        options = ["--processes", str(slots), "--threads", threads]
        return [["env", _PREFETCH, *harness.python("-m", "dramatiq", __name__, *options)]]

    def done(self, site: Site) -> int:
        return self._submitted - int(site.client.hlen("dramatiq:default.msgs"))


PEERS = {"dramatiq": Dramatiq()}
