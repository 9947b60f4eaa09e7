"""This system: the slots spread over two workers of one host, its promise switched on in full.

Two, for the peers have two worker processes, and jobs as short as these keep one process busy with
starting and reporting them: `workers=2 slots=1` of a hosts file.

Promised: leases, fences, every end written once to Redis (append-only file, everysec); a job
whose worker dies runs again elsewhere and only one result is accepted. Commands: output captured
in files and its tail in Redis. Functions: warm executors, results stored as RQ stores them.
Functions are enqueued with `broker.Queue`, as the README says, and for idle latency also with RQ's.
"""

from __future__ import annotations

from typing import Any

import rq

from benchmarks import harness
from benchmarks.harness import REPOSITORY, Site
from benchmarks.peers.base import COMMAND, NOOP, PROBE, Peer
from broker import Queue, keys, outputs
from broker.command import Command
from broker.submit import Options, submit_commands
from fleet.worker_config import WorkerConfig

#: the only worker, or the first
WORKER = "bench-0"
_WORKERS = 2
_FUNCTIONS = {NOOP: "benchmarks.work.noop", PROBE: "benchmarks.work.probe"}


class Fleet(Peer):
    name = "fleet"
    packages = ("rq-fleet", "rq")
    paces = {COMMAND: 1000, NOOP: 8000, PROBE: 50}
    _workers = _WORKERS

    def fill(self, site: Site, work: str, jobs: int) -> None:
        if work == COMMAND:
            submit_commands(site.client, "default", [(None, Command(("true",)))] * jobs, Options())
            return
        for start in range(0, jobs, 1000):
            rows = [
                rq.Queue.prepare_data(_FUNCTIONS[work], result_ttl=3600)
                for _ in range(min(1000, jobs - start))
            ]
            self._queue(site).enqueue_many(rows)

    def submit(self, site: Site, work: str, *arguments: str) -> None:
        if work == COMMAND:
            self.submit_command(site, arguments or ("true",))
        else:
            self._queue(site).enqueue(_FUNCTIONS[work], *arguments, result_ttl=3600)

    def submit_command(self, site: Site, argv: tuple[str, ...]) -> str:
        """Submit one command; returns the job's id."""
        return submit_commands(site.client, "default", [(None, Command(argv))], Options())[0]

    def printed(self, site: Site, job: str) -> bytes:
        """What a job printed, once it has ended."""
        harness.until(lambda: outputs.look(site.client, job).state == "finished", look=0.002)
        return outputs.look(site.client, job).tails.stdout

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        count = min(slots, self._workers)
        return [worker_command(site, f"bench-{index}", slots=slots // count) for index in range(count)]

    def done(self, site: Site) -> int:
        return int(site.client.zcard(keys.of("finished", "default")))

    def _queue(self, site: Site) -> rq.Queue:
        return Queue(connection=site.client)


class FleetOfOneWorker(Fleet):
    """All slots in one worker, as `fleet up` has it unless told otherwise."""

    name = "fleet, one worker"
    paces = {COMMAND: 1000, NOOP: 8000}
    _workers = 1


class FleetWithPlainProducer(Fleet):
    """The same workers, fed by a program that knows RQ alone."""

    name = "fleet, fed by rq.Queue"
    paces = {PROBE: 50}

    def _queue(self, site: Site) -> rq.Queue:
        return rq.Queue(connection=site.client)


class FleetThatIdles(Fleet):
    """The same worker, as it is once it has had no function for long."""

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        settings = {"executor_idle_seconds": 0, "heartbeat_seconds": 1}
        return [worker_command(site, WORKER, slots=slots, settings=settings)]


def worker_command(site: Site, name: str, **fields: Any) -> list[str]:
    """The command of one worker, as a launcher starts it."""
    config = WorkerConfig(
        name, "here", site.url, str(site.folder / "work"), paths=(str(REPOSITORY),), **fields
    )
    file = site.folder / f"{name}.json"
    file.touch(mode=0o600)
    file.write_text(config.to_json())
    return harness.python("-I", "-m", "fleet.worker", "--config", str(file))


PEERS = {"fleet": Fleet()}
