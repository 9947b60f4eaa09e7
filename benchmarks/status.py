"""`fleet status` with 10,000 workers and 1,000,000 jobs, as it is typed, from start to end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import backlog, harness
from benchmarks.harness import Site, median, number
from benchmarks.peers.base import COMMAND, Peer
from benchmarks.peers.fleet_worker import Fleet
from benchmarks.report import Bar, Section, Table

_WORKERS, _JOBS = 10_000, 1_000_000
_FORMS = {"fleet status --json": ("--json",), "fleet status": ()}


def status(site: Site, peers: Sequence[Peer]) -> Section:
    """Seconds of each form, with few and with many; `rq info` beside the many."""
    del peers
    share = 100 if site.quick else 1
    small = _measured(site, 10, 1000)
    large = _measured(site, _WORKERS // share, _JOBS // share, beside=True)
    header = (
        "s, median",
        "10 workers, 1,000 jobs",
        f"{_WORKERS // share:,} workers, {_JOBS // share:,} jobs",
    )
    rows = [
        (name, number(median(small[name]), 2) if name in small else "-", number(median(each), 2))
        for name, each in large.items()
    ]
    bars = [
        Bar.at_most(
            f"{name}, {_WORKERS // share:,} workers, {_JOBS // share:,} jobs", 1, median(large[name]), " s"
        )
        for name in _FORMS
    ]
    return Section("`fleet status`", [Table(header, rows)], bars, data={"small": small, "large": large})


def _measured(site: Site, workers: int, jobs: int, *, beside: bool = False) -> dict[str, list[float]]:
    site.fresh()
    Fleet().fill(site, COMMAND, 1)
    backlog.take_model(site)
    backlog.deepen(site, jobs + workers)
    with crowd(site, workers, "--jobs", str(workers), "--beat-seconds", "600"):
        found = {name: [_fleet(site, *form) for _ in range(5)] for name, form in _FORMS.items()}
        if beside:
            found["rq info"] = [_timed(harness.python("-m", "rq.cli", "info", "--url", site.url))]
    return found


@contextmanager
def crowd(site: Site, workers: int, *options: str) -> Iterator[None]:
    """So many workers of benchmarks/crowd.py, registered."""
    log = site.folder / "crowd.log"
    log.write_text("")
    command = harness.python("-m", "benchmarks.crowd", str(workers), *options)
    with harness.processes([command], log) as (process,):
        harness.until(lambda: "ready" in log.read_text() or process.poll() is not None, 120)
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        yield


def _fleet(site: Site, *form: str) -> float:
    fleet = str(Path(sys.executable).with_name("fleet"))
    return _timed([fleet, "status", *form], FLEET_REDIS_URL=site.url)


def _timed(command: Sequence[str], **environ: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environ})
    return time.perf_counter() - started
