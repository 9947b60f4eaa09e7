"""Where a job's time goes: what each process takes of the processors for it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from benchmarks import harness
from benchmarks.harness import Site
from benchmarks.peers.base import COMMAND, NOOP, Peer
from benchmarks.peers.fleet_worker import Fleet
from benchmarks.report import Section, Table

_WHO = ("jobs' own processes", "executors", "workers", "sidecars", "Redis")


@dataclass(frozen=True)
class Spent:
    """Microseconds a job: of the clock, and of the processors by who took them."""

    wall: float
    by: dict[str, float]


def anatomy(site: Site, peers: Sequence[Peer]) -> Section:
    """Two workers of one slot, a backlog."""
    del peers
    found = {work: _spent(site, work) for work in (COMMAND, NOOP)}
    rows = [(who, *(f"{found[work].by[who]:.0f}" for work in found)) for who in (*_WHO, "in all")]
    rows.append(("of the clock", *(f"{spent.wall:.0f}" for spent in found.values())))
    busy = (f"{spent.by['in all'] / spent.wall / (os.cpu_count() or 1):.0%}" for spent in found.values())
    rows.append(("of all processors' time", *busy))
    return Section(
        "Where a job's time goes",
        [Table(("µs a job, two workers of one slot", "`true`", "a no-op"), rows)],
        [],
        data={work: spent.by for work, spent in found.items()},
    )


def _spent(site: Site, work: str) -> Spent:
    """Measured from when a tenth of the jobs is done until all are."""
    fleet, server = Fleet(), psutil.Process(int(site.client.info()["process_id"]))
    jobs = fleet.jobs(work, site.seconds)
    site.fresh()
    fleet.fill(site, work, jobs)
    with harness.processes(fleet.workers(site, work, 2), site.log("fleet")) as processes:
        harness.until(lambda: fleet.done(site) >= jobs // 10)
        workers = [psutil.Process(process.pid) for process in processes]
        begun, started, before = fleet.done(site), time.perf_counter(), _times(workers, server)
        harness.until(lambda: fleet.done(site) >= jobs)
        seconds, after, count = time.perf_counter() - started, _times(workers, server), jobs - begun
    by = {who: (after[who] - before[who]) / count * 1e6 for who in _WHO}
    return Spent(seconds / count * 1e6, {**by, "in all": sum(by.values())})


def _times(workers: Sequence[psutil.Process], server: psutil.Process) -> dict[str, float]:
    """Seconds of the processors that each had so far; executors live on, commands are reaped."""
    found = {**dict.fromkeys(_WHO, 0.0), "Redis": _seconds(server)}
    for worker in workers:
        own = worker.cpu_times()
        found["workers"] += own.user + own.system
        found["jobs' own processes"] += own.children_user + own.children_system
    for child in [child for worker in workers for child in worker.children()]:
        with suppress(psutil.NoSuchProcess):  # a command that ended meanwhile, or is a zombie yet
            command = " ".join(child.cmdline())
            for who, program in (("executors", "executor_main"), ("sidecars", "sidecar_main")):
                found[who] += _seconds(child) if program in command else 0.0
    return found


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
