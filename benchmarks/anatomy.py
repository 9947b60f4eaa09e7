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

_WHO = ("jobs' own processes", "executors", "worker", "sidecar", "Redis")


@dataclass(frozen=True)
class Spent:
    """Microseconds a job: of the clock, and of the processors by who took them."""

    wall: float
    by: dict[str, float]


def anatomy(site: Site, peers: Sequence[Peer]) -> Section:
    """Two slots, a backlog."""
    del peers
    found = {work: _spent(site, work) for work in (COMMAND, NOOP)}
    rows = [(who, *(f"{found[work].by[who]:.0f}" for work in found)) for who in (*_WHO, "in all")]
    rows.append(("of the clock", *(f"{spent.wall:.0f}" for spent in found.values())))
    busy = (f"{spent.by['in all'] / spent.wall / (os.cpu_count() or 1):.0%}" for spent in found.values())
    rows.append(("of all processors' time", *busy))
    return Section(
        "Where a job's time goes",
        [Table(("µs a job, two slots", "`true`", "a no-op"), rows)],
        [],
        data={work: spent.by for work, spent in found.items()},
    )


def _spent(site: Site, work: str) -> Spent:
    """Measured from when a tenth of the jobs is done until all are."""
    fleet, server = Fleet(), psutil.Process(int(site.client.info()["process_id"]))
    jobs = fleet.jobs(work, site.seconds)
    site.fresh()
    fleet.fill(site, work, jobs)
    with harness.processes(fleet.workers(site, work, 2), site.log("fleet")) as [process]:
        harness.until(lambda: fleet.done(site) >= jobs // 10)
        worker = psutil.Process(process.pid)
        begun, started, before = fleet.done(site), time.perf_counter(), _times(worker, server)
        harness.until(lambda: fleet.done(site) >= jobs)
        seconds, after, count = time.perf_counter() - started, _times(worker, server), jobs - begun
    by = {who: (after[who] - before[who]) / count * 1e6 for who in _WHO}
    return Spent(seconds / count * 1e6, {**by, "in all": sum(by.values())})


def _times(worker: psutil.Process, server: psutil.Process) -> dict[str, float]:
    """Seconds of the processors that each had so far; executors live on, commands are reaped."""
    own, found = worker.cpu_times(), dict.fromkeys(_WHO, 0.0)
    found["worker"], found["Redis"] = own.user + own.system, _seconds(server)
    found["jobs' own processes"] = own.children_user + own.children_system
    for child in worker.children():
        with suppress(psutil.NoSuchProcess):  # a command that ended meanwhile, or is a zombie yet
            command = " ".join(child.cmdline())
            for who, program in (("executors", "executor_main"), ("sidecar", "sidecar_main")):
                found[who] += _seconds(child) if program in command else 0.0
    return found


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
