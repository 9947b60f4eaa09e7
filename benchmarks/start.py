"""What starting takes: `fleet --help`, and a worker from its start to its first beat."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Site, median, number
from benchmarks.peers.base import Peer
from benchmarks.peers.fleet_worker import WORKER, worker_command
from benchmarks.report import Bar, Section, Table
from broker import keys


def start(site: Site, peers: Sequence[Peer]) -> Section:
    """Seconds; a bare interpreter beside them."""
    del peers
    fleet = str(Path(sys.executable).with_name("fleet"))
    found = {
        "fleet --help": _times(site, lambda: _run([fleet, "--help"])),
        "a worker, start to first beat": _times(site, lambda: _first_beat(site)),
        "python -I -c pass": _times(site, lambda: _run(harness.python("-I", "-c", "pass"))),
    }
    rows = [(name, number(median(each), 3)) for name, each in found.items()]
    bars = [
        Bar.at_most("fleet --help", 0.3, median(found["fleet --help"]), " s"),
        Bar.at_most(
            "a worker's start to its first beat", 1, median(found["a worker, start to first beat"]), " s"
        ),
    ]
    return Section("Starting", [Table(("what", "s, median"), rows)], bars, data=found)


def _times(site: Site, measure: Callable[[], float]) -> list[float]:
    return [measure() for _ in range(3 if site.quick else 10)]


def _run(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _first_beat(site: Site) -> float:
    site.fresh()
    command = worker_command(site, WORKER)
    started = time.perf_counter()
    with harness.processes([command], site.log("start")):
        harness.until(lambda: site.client.exists(keys.worker_beat(WORKER)), look=0.002)
        return time.perf_counter() - started
