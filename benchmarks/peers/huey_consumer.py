"""Huey: one consumer with two worker processes, Redis list and results.

Promised: results stored. Not promised: anything on a crash: a task is popped before it runs, so
what a killed worker had taken is gone. It blocks in BLPOP, so that idle latency is its best.
"""

from __future__ import annotations

import os

from huey import RedisHuey

from benchmarks import harness, work
from benchmarks.harness import URL_VARIABLE, Site
from benchmarks.peers.base import COMMAND, NOOP, PROBE, Peer

huey = RedisHuey("bench", url=os.environ.get(URL_VARIABLE, "redis://"), blocking=True)
_TASKS = {
    kind: huey.task(name=kind)(function)
    for kind, function in ((COMMAND, work.command), (NOOP, work.noop), (PROBE, work.probe))
}


class Huey(Peer):
    name = "huey"
    packages = ("huey",)
    paces = {COMMAND: 800, NOOP: 4000, PROBE: 50}

    def submit(self, site: Site, work: str, *arguments: str) -> None:
        _TASKS[work](*arguments)

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        options = ["--workers", str(slots), "--worker-type", "process", "--quiet", "--no-periodic"]
        return [harness.python("-m", "huey.bin.huey_consumer", f"{__name__}.huey", *options)]

    def done(self, site: Site) -> int:
        return int(site.client.hlen("huey.results.bench"))


PEERS = {"huey": Huey()}
