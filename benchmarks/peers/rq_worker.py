"""RQ: `rq worker` (a fork for each job) and `rq worker -w rq.SimpleWorker` (none), two processes each.

Promised: results stored; a job whose worker dies is found in its registry and put back by whoever
cleans up, after minutes. Not promised: between BLPOP and the registry a job can be lost; nothing
keeps two workers from running a job, and both results are taken. SimpleWorker: a job that kills
its process takes the worker with it. Filled by `enqueue_many`.
"""

from __future__ import annotations

import rq

from benchmarks import harness
from benchmarks.harness import Site
from benchmarks.peers.base import COMMAND, NOOP, PROBE, Peer

_FUNCTIONS = {kind: f"benchmarks.work.{kind}" for kind in (COMMAND, NOOP, PROBE)}


class Rq(Peer):
    packages = ("rq",)

    def __init__(self, name: str, worker_class: str, command_pace: int, noop_pace: int) -> None:
        self.name = name
        self.paces = {COMMAND: command_pace, NOOP: noop_pace, PROBE: 20}
        self._class = worker_class

    def fill(self, site: Site, work: str, jobs: int) -> None:
        for start in range(0, jobs, 1000):
            rows = [
                rq.Queue.prepare_data(_FUNCTIONS[work], result_ttl=3600)
                for _ in range(min(1000, jobs - start))
            ]
            rq.Queue(connection=site.client).enqueue_many(rows)

    def submit(self, site: Site, work: str, *arguments: str) -> None:
        rq.Queue(connection=site.client).enqueue(_FUNCTIONS[work], *arguments, result_ttl=3600)

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        options = ["--url", site.url, "--worker-class", self._class, "--logging_level", "WARNING"]
        return [harness.python("-m", "rq.cli", "worker", *options, "default")] * slots

    def done(self, site: Site) -> int:
        return int(site.client.zcard("rq:finished:default"))


PEERS = {
    "rq": Rq("rq", "rq.worker.Worker", 75, 85),
    "rq-simple": Rq("rq-simple", "rq.worker.SimpleWorker", 300, 440),
}
