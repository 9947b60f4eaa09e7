"""Whether a job costs the same however many wait and however many workers are registered.

Python no-ops, for they show Redis's share best; one worker of two slots does the work, the other
workers are records and beats. The rate is taken over the front of the queue.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from benchmarks import backlog, harness
from benchmarks.harness import REPOSITORY, Site, median, number
from benchmarks.peers.base import NOOP, Peer
from benchmarks.peers.fleet_worker import WORKER, FleetOfOneWorker
from benchmarks.report import Bar, Section, Table
from benchmarks.status import crowd
from broker import keys

_DEPTHS = (1_000, 10_000, 100_000, 1_000_000)
_CROWDS = (1, 10, 100, 1000)
#: how much dearer a job may be at the far end; the figures vary by some 10 % from run to run
_FLAT = 1.25
#: jobs of one measurement: the shallowest queue must not run dry
_JOBS = 900
_LOOK_SECONDS = 0.002


def growth(site: Site, peers: Sequence[Peer]) -> Section:
    """Microseconds a job, by depth and by crowd; `plot` draws them."""
    del peers
    scale = 10 if site.quick else 1
    depths = {depth // scale: _costs(site, depth // scale, 1) for depth in _DEPTHS}
    sizes = sorted({max(1, size // scale) for size in _CROWDS})
    crowds = {size: _costs(site, 10_000 // scale, size) for size in sizes}
    bars = [
        Bar.at_most(f"cost of a job, {max(found):,} {what} beside {min(found):,}", _FLAT, _grown(found), " x")
        for found, what in ((depths, "jobs queued"), (crowds, "workers"))
    ]
    tables = [_table("jobs queued", depths), _table("workers registered", crowds)]
    data = {"us_by_depth": depths, "us_by_workers": crowds}
    return Section("Growth of costs", tables, bars, ["![time per job](growth.svg)"], data)


def _costs(site: Site, depth: int, workers: int) -> list[float]:
    """Of a job at the front of a queue that deep, the worker being one of `workers`; some samples."""
    site.fresh()
    fleet, jobs = FleetOfOneWorker(), min(_JOBS, depth * 9 // 10)
    _hold(site)
    fleet.fill(site, NOOP, 1)
    backlog.take_model(site)
    with (
        crowd(site, workers - 1) if workers > 1 else nullcontext(),
        harness.processes(fleet.workers(site, NOOP, 2), site.log("growth")),
    ):
        harness.until(lambda: site.client.exists(keys.worker_beat(WORKER)))
        _cost(site, depth, jobs)  # starts the executors
        costs = [_cost(site, depth, jobs) for _ in range(site.rounds)]
    print(f"    {depth:>9,} jobs, {workers:>5,} workers: {median(costs):,.0f} us a job")
    return costs


def _cost(site: Site, depth: int, jobs: int) -> float:
    """Microseconds a job; the queue is filled up while nobody claims."""
    backlog.deepen(site, depth)
    fleet = FleetOfOneWorker()
    before = fleet.done(site)
    started = time.perf_counter()
    _release(site)
    harness.until(lambda: fleet.done(site) - before >= jobs, look=_LOOK_SECONDS)
    cost = (time.perf_counter() - started) / (fleet.done(site) - before) * 1e6
    _hold(site)
    harness.until(lambda: not site.client.zcard(keys.LEASES))
    return cost


def _hold(site: Site) -> None:
    """Nobody claims any more, as `rq suspend` has it."""
    site.client.set(keys.SUSPENDED, 1)


def _release(site: Site) -> None:
    """Let the worker claim, and tell it so: `rq resume` would let it find out with its next beat."""
    site.client.delete(keys.SUSPENDED)
    site.client.lpush(keys.worker_signals(WORKER), "{}")
    site.client.lpush(keys.wake("default"), "1")


def _grown(found: dict[int, list[float]]) -> float:
    """The far end beside the near one."""
    return median(found[max(found)]) / median(found[min(found)])


def _table(what: str, found: dict[int, list[float]]) -> Table:
    rows = [
        (f"{size:,}", number(median(each)), " ".join(number(cost) for cost in each))
        for size, each in found.items()
    ]
    return Table((what, "µs a job, median", "rounds"), rows)


def plot(section: Section, file: Path = REPOSITORY / "docs" / "growth.svg") -> None:
    """Draw both curves. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fleet"  # the same figures make the same file
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True)
    panels = (("us_by_depth", "jobs queued"), ("us_by_workers", "workers registered"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        found: dict[int, list[float]] = section.data[key]
        axis.plot(list(found), [median(each) for each in found.values()], marker="o")
        for size, each in found.items():
            axis.plot([size] * len(each), each, "k.", alpha=0.3)
        axis.set(xscale="log", xlabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs a job")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
