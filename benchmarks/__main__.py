"""All figures, or some rows: `python -m benchmarks [ROW...]`; `make bench` runs it.

    python -m benchmarks                                   everything, some 15 minutes
    python -m benchmarks noops --peers huey,saq --rounds 3 one row, beside two peers
    python -m benchmarks --quick                           a look whether all of it runs

Prints Markdown, writes figures.md and figures.json into `--out`, and with `--write-docs` the
figures in docs/performance.md and the plot beside it.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    anatomy,
    arrivals,
    growth,
    harness,
    latency,
    memory,
    peers,
    placement,
    report,
    scrape,
    sets,
    start,
    status,
    submission,
    throughput,
    up,
)
from benchmarks.harness import Site
from benchmarks.peers import MODULES
from benchmarks.peers.base import Peer
from benchmarks.report import Section

Row = Callable[[Site, Sequence[Peer]], Section]
ROWS: dict[str, Row] = {
    "commands": throughput.commands,
    "noops": throughput.noops,
    "latency": latency.latency,
    "submission": submission.submission,
    "memory": memory.memory,
    "start": start.start,
    "status": status.status,
    "scrape": scrape.scrape,
    "growth": growth.growth,
    "anatomy": anatomy.anatomy,
    "up": up.up,
    "sets": sets.measured,
    "placement": placement.placement,
    "arrivals": arrivals.arrivals,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    arguments = _arguments(argv)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or (0.25 if arguments.quick else 2.0)
    for number in (signal.SIGINT, signal.SIGTERM):  # end what was started, however it is told to end
        signal.signal(number, signal.default_int_handler)
    if os.getloadavg()[0] > 1:
        print(f"!!! THE MACHINE IS BUSY (load {os.getloadavg()[0]:.1f}): these will be no figures to keep")
    began = time.monotonic()
    with harness.site(rounds=rounds, seconds=seconds, quick=arguments.quick) as site:
        setting = report.setting(site)
        # peers read where Redis is when they are imported
        found = peers.available(["fleet", *(name for name in arguments.peers if name != "fleet")])
        versions = {peer.name: peer.version() for peer in found}
        sections: dict[str, Section] = {}
        result = report.Report(sections, versions, setting)
        for name in arguments.rows:
            sections[name] = _row(name, site, found)
            setting["took"] = f"{(time.monotonic() - began) / 60:.1f} min"
            result.save(arguments.out)  # after each row: a quarter of an hour is long to lose
    print("\n" + result.markdown())
    if arguments.write_docs:
        result.write_document()
        if "growth" in sections and sections["growth"].data:
            growth.plot(sections["growth"])
        if "arrivals" in sections and sections["arrivals"].data:
            arrivals.plot()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--peers", type=_peers, default=list(MODULES), help=f"of {', '.join(MODULES)}")
    parser.add_argument("--rounds", type=int, help="how often each is measured in turns (5)")
    parser.add_argument("--seconds", type=float, help="about how long one measurement takes (2)")
    parser.add_argument("--quick", action="store_true", help="one short round: no figures, but a test")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for the figures")
    parser.add_argument("--write-docs", action="store_true", help="also into docs/performance.md")
    arguments = parser.parse_args(argv)
    arguments.rows = arguments.rows or list(ROWS)
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return arguments


def _peers(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(MODULES):
        raise argparse.ArgumentTypeError(f"no peer {', '.join(sorted(unknown))}")
    return names


def _row(name: str, site: Site, found: Sequence[Peer]) -> Section:
    """Measure one row; a row that fails is no reason to lose the others."""
    print(f"{name}:", flush=True)
    try:
        return ROWS[name](site, found)
    except Exception as exc:
        traceback.print_exc()
        print(f"!!! ROW {name} FAILED", flush=True)
        return Section(name, [], notes=[f"Not measured: {type(exc).__name__}."])


if __name__ == "__main__":
    main()
