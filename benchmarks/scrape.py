"""A scrape of `fleet metrics` with 10,000 workers and 1,000,000 jobs: seconds, and how many series."""

from __future__ import annotations

import re
import statistics
import time
import urllib.request
from collections.abc import Sequence

from benchmarks import backlog, harness
from benchmarks.harness import Site, median, number
from benchmarks.peers.base import COMMAND, Peer
from benchmarks.peers.fleet_worker import Fleet
from benchmarks.report import Bar, Section, Table
from benchmarks.status import crowd

_WORKERS, _JOBS = 10_000, 1_000_000
#: seconds a scrape may take
_MOST_SECONDS = 1.0
_SCRAPES = 7
_FORMS = {"fleet metrics": (), "fleet metrics --per-worker --rq-names": ("--per-worker", "--rq-names")}


def scrape(site: Site, peers: Sequence[Peer]) -> Section:
    """Seconds and series of each form."""
    del peers
    share = 100 if site.quick else 1
    workers, jobs = _WORKERS // share, _JOBS // share
    site.fresh()
    Fleet().fill(site, COMMAND, 1)
    backlog.take_model(site)
    backlog.deepen(site, jobs + workers)
    with crowd(site, workers, "--jobs", str(workers), "--beat-seconds", "600"):
        found = {name: _measured(site, options) for name, options in _FORMS.items()}
    size = f"{workers:,} workers, {jobs:,} jobs"
    header = (size, "s, median", "s, most", "series")
    rows = [
        (name, number(median(each), 2), number(max(each), 2), f"{series:,}")
        for name, (each, series) in found.items()
    ]
    seconds, _ = found["fleet metrics"]
    bar = Bar.at_most(f"scrape, {size}", _MOST_SECONDS, statistics.median(seconds), " s")
    return Section(
        "A scrape", [Table(header, rows)], [bar], data={name: each for name, (each, _) in found.items()}
    )


def _measured(site: Site, options: Sequence[str]) -> tuple[list[float], int]:
    log = site.log("metrics")
    log.write_text("")
    command = harness.python("-m", "cli", "metrics", "--redis", site.url, "--port", "0", *options)
    with harness.processes([command], log):
        harness.until(lambda: re.search(r"metrics at (\S+)", log.read_text()))
        address = re.findall(r"metrics at (\S+)", log.read_text())[-1]
        took, text = [], b""
        for _ in range(_SCRAPES):
            began = time.perf_counter()
            with urllib.request.urlopen(address, timeout=60) as reply:
                text = reply.read()
            took.append(time.perf_counter() - began)
    return took, sum(not line.startswith(b"#") for line in text.splitlines())
