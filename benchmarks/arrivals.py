"""How many workers knock on Redis in a second when many start together, with jitter and without.

    python -m benchmarks.arrivals       on paper: 10,000 workers, and docs/arrivals.svg
    python -m benchmarks arrivals       also with real registrations, against a real Redis

On paper each worker takes as long to start as a real one, give or take, after its moment of the window has
come: `fleet.jitter`, as the worker itself asks it. In code each arrival opens a connection, registers and
beats as a worker does.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import REPOSITORY, Site, number, percentile
from benchmarks.peers.base import Peer
from benchmarks.report import Bar, Section, Table
from broker.connection import connect
from broker.session import Identity, Session
from broker.worker_settings import WorkerSettings
from fleet import jitter

SETTINGS = WorkerSettings()
RATE = SETTINGS.registrations_per_second
MANY = 10_000
#: workers on each node of the submission
_ON_A_NODE = 8
#: seconds that a start takes, as `make bench` finds them, and what machines differ by
_START_SECONDS, _START_SPREAD = 0.17, 0.05
#: real registrations, and how many of them may be under way at once
_REAL, _AT_ONCE = 1000, 100


def arrivals_on_paper(workers: int, window_seconds: float) -> list[float]:
    """When each worker of one submission registers, seconds after all were launched; sorted."""
    dice = random.Random(workers)
    return sorted(
        jitter.delay_seconds(window_seconds, *who) + max(0.0, dice.gauss(_START_SECONDS, _START_SPREAD))
        for who in identities(workers)
    )


def identities(workers: int) -> Iterator[tuple[str, ...]]:
    """Who they are, by what a worker of a Slurm job tells of itself."""
    for each in range(workers):
        node, task = divmod(each, _ON_A_NODE)
        environ = {"SLURM_JOB_ID": "4711", "SLURM_NODEID": f"{node}", "SLURM_LOCALID": f"{task}"}
        yield jitter.identity_of(f"node{node:04}", f"node{node:04}-{task}", environ)


def peak(moments: Sequence[float]) -> int:
    """Most arrivals in a second of the clock."""
    return max(Counter(int(moment) for moment in moments).values())


def expected_peak(workers: int, window_seconds: float) -> float:
    """About the most that independent moments make of any second: rate + sqrt(2 rate ln seconds).

    The maximum of so many Poisson variables of a large rate: nearly normal, with the rate as variance.
    """
    rate = workers / window_seconds
    return rate + math.sqrt(2 * rate * math.log(window_seconds))


# --- real registrations ----------------------------------------------------------------------------


def arrive(site: Site, moments: Sequence[float]) -> tuple[list[float], list[float]]:
    """Real registrations, begun at these moments: when each was in, and how long it took; seconds."""
    done: list[float] = []
    took: list[float] = []
    lock, started = threading.Lock(), time.perf_counter()

    def one(each: int, moment: float) -> None:
        time.sleep(max(0.0, moment - (time.perf_counter() - started)))
        begun = max(moment, 0.0)
        register(site, each)
        ended = time.perf_counter() - started
        with lock:
            done.append(ended)
            took.append(ended - begun)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for task in [pool.submit(one, each, moment) for each, moment in enumerate(moments)]:
            task.result()
    return sorted(done), took


def register(site: Site, each: int) -> None:
    """What a worker does when it comes: a connection of its own, the registry, the first heartbeat."""
    host = f"node{each // _ON_A_NODE:04}"
    session = Session(
        Identity(f"{host}-{each % _ON_A_NODE}", host, ("default",), each + 1, "3.11.7"), SETTINGS
    )
    with connect(site.url) as client:
        session.register(client, "{}")
        session.beat(client, "{}", {}, 0)


# --- the row ---------------------------------------------------------------------------------------


def arrivals(site: Site, peers: Sequence[Peer]) -> Section:
    """Peaks on paper, and of real registrations."""
    del peers
    section = on_paper()
    workers = _REAL // (50 if site.quick else 1)
    window = jitter.window_seconds(workers, RATE) / (10 if site.quick else 1)
    rows, data = [], {}
    for name, seconds in (("at once", 0.0), ("with jitter", window)):
        site.fresh()
        before = _redis_seconds(site)
        done, took = arrive(site, arrivals_on_paper(workers, seconds))
        cost = (_redis_seconds(site) - before) / workers
        data[name] = {"done": done, "took": took, "redis_us": cost * 1e6}
        rows.append(
            (
                *(f"{workers:,} {name}", number(peak(done)), number(max(done), 1)),
                *(number(percentile(took, share) * 1000, 1) for share in (0.5, 0.99)),
                number(cost * 1e6),
            )
        )
    header = ("real registrations", "most in a second", "last, s", "p50, ms", "p99, ms", "Redis, µs each")
    return Section(
        section.title,
        [*section.tables, Table(header, rows)],
        section.bars,
        section.notes,
        section.data | data,
    )


def _redis_seconds(site: Site) -> float:
    used = site.client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def on_paper() -> Section:
    """What 10,000 workers and other crowds make of a second."""
    sizes = (10, 100, 1000, MANY, 100_000)
    windows = {size: jitter.window_seconds(size, RATE) for size in sizes}
    peaks = {size: peak(arrivals_on_paper(size, window)) for size, window in windows.items()}
    bare = {size: peak(arrivals_on_paper(size, 0.0)) for size in sizes}
    rows = [
        (
            *(f"{size:,}", number(windows[size]), number(bare[size]), number(peaks[size])),
            number(expected_peak(size, windows[size])),
        )
        for size in sizes
    ]
    table = Table(("workers", "window, s", "most in a second, at once", "with jitter", "by formula"), rows)
    bar = Bar.at_most(f"most registrations in a second, {MANY:,} workers", 2 * RATE, peaks[MANY], "/s", 0)
    data = {"peaks": peaks, "peaks_at_once": bare}
    return Section("Arriving", [table], [bar], ["![arrivals](arrivals.svg)"], data)


def plot(file: Path = REPOSITORY / "docs" / "arrivals.svg") -> None:
    """Draw the paper. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fleet"  # the same figures make the same file
    window = jitter.window_seconds(MANY, RATE)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3))
    for seconds, label in ((0.0, "at once"), (window, "with jitter")):
        counts = Counter(int(moment) for moment in arrivals_on_paper(MANY, seconds))
        moments = list(range(-1, max(counts) + 2))
        left.step(moments, [counts[moment] or 0.5 for moment in moments], where="post", label=label)
    left.axhline(RATE, color="k", linestyle=":", linewidth=1)
    left.set(
        yscale="log", ylim=(0.5, 2 * MANY), xlabel=f"seconds, {MANY:,} workers", ylabel="registrations/s"
    )
    sizes = sorted({round(10 ** (step / 8)) for step in range(8, 41)})
    for label, spread in (("at once", False), ("with jitter", True)):
        found = [
            peak(arrivals_on_paper(size, jitter.window_seconds(size, RATE) if spread else 0.0))
            for size in sizes
        ]
        right.plot(sizes, found, label=label)
    right.axhline(RATE, color="k", linestyle=":", linewidth=1)
    right.set(xscale="log", yscale="log", xlabel="workers", ylabel="most registrations/s")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    print(on_paper().markdown())
    plot()
