"""How fast jobs can be submitted: in bulk, and one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.harness import Site, alternate, median, number
from benchmarks.peers.base import COMMAND, NOOP, Peer
from benchmarks.report import Bar, Section, Table

#: jobs of one bulk: ours and RQ's go in batches, other peers' one after another underneath
_BULK = 20_000
_FAST = ("fleet", "rq")


def submission(site: Site, peers: Sequence[Peer]) -> Section:
    """Jobs a second; nobody works on them."""
    measured = [peer for peer in peers if NOOP in peer.paces and peer.name != "rq-simple"]
    measures: dict[str, Callable[[], float]] = {}
    for peer in measured:
        kind = COMMAND if peer.name == "fleet" else NOOP
        size = (_BULK if peer.name in _FAST else 2000) // (10 if site.quick else 1)
        measures[f"{peer.name}, bulk"] = partial(_bulk, site, peer, kind, size)
        measures[f"{peer.name}, one by one"] = partial(_single, site, peer, kind)
    found = alternate(measures, min(site.rounds, 3))
    rows = [
        (peer.name, *(number(median(found[f"{peer.name}, {way}"])) for way in ("bulk", "one by one")))
        for peer in measured
    ]
    bars = []
    if "fleet, bulk" in found:
        bars = [
            Bar.at_least("submission in bulk", 20_000, median(found["fleet, bulk"]), "/s", 0),
            Bar.at_least("submission one by one", 1000, median(found["fleet, one by one"]), "/s", 0),
        ]
    table = Table(("submitted", "bulk, jobs/s", "one by one, jobs/s"), rows)
    return Section("Submission", [table], bars, data=found)


def _bulk(site: Site, peer: Peer, kind: str, jobs: int) -> float:
    site.fresh()
    started = time.perf_counter()
    peer.fill(site, kind, jobs)
    return jobs / (time.perf_counter() - started)


def _single(site: Site, peer: Peer, kind: str) -> float:
    site.fresh()
    submitted, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < site.seconds:
        peer.submit(site, kind)
        submitted += 1
    return submitted / seconds
