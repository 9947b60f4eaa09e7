"""Resident memory of an idle worker with one slot: the PSS of its whole tree of processes.

PSS counts a page that several processes share in parts, so a tree's sum is what it really takes.
Each worker has run one function before, so that what it then keeps for the next counts. Ours keeps its
sidecar, and for five minutes a warm executor (`worker.executor_idle_seconds`): it is measured just after the
function, and when the executor has ended, as in every worker that idles for longer. For that it is told to
end it at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from benchmarks import harness
from benchmarks.harness import Site, number
from benchmarks.peers.base import NOOP, Peer
from benchmarks.peers.fleet_worker import Fleet, FleetThatIdles
from benchmarks.report import Bar, Section, Table

#: the tree is taken for settled when its size stays the same for so long
_SETTLED_SECONDS = 0.5
_RIVALS = ("rq", "celery")
_JUST_WORKED = "fleet, just after a function"
#: the worker and its sidecar
_IDLE_PROCESSES = 2


def memory(site: Site, peers: Sequence[Peer]) -> Section:
    """MiB of each, after its first job; of ours also once it has been idle for long."""
    measures = {peer.name: partial(_idle, site, peer) for peer in peers if NOOP in peer.paces}
    if (ours := measures.pop(Fleet.name, None)) is not None:
        measures |= {_JUST_WORKED: ours, Fleet.name: partial(_idle, site, FleetThatIdles(), _IDLE_PROCESSES)}
    tried = {name: harness.tried(name, measure) for name, measure in measures.items()}
    found = {name: figures for name, figures in tried.items() if figures}
    rows = [
        (name, number(size, 1), str(count))
        for name, (size, count) in sorted(found.items(), key=lambda row: row[1][0])
    ]
    rivals = [name for name in _RIVALS if name in found and "fleet" in found]
    bars = [_bar(name, found[name][0], found["fleet"][0]) for name in rivals]
    table = Table(("an idle worker of one slot", "MiB (PSS)", "processes"), rows)
    return Section("Resident memory", [table], bars, data={name: size for name, (size, _) in found.items()})


def _bar(rival: str, theirs: float, ours: float) -> Bar:
    return Bar.at_most(f"memory of an idle worker, below {rival}'s", round(theirs, 1), ours, " MiB", 1)


def _idle(site: Site, peer: Peer, most_processes: float = float("inf")) -> tuple[float, int]:
    """MiB and number of processes of the worker's tree once it has done a job, has so few, and rests."""
    site.fresh()
    peer.fill(site, NOOP, 1)
    with harness.processes(peer.workers(site, NOOP, 1), site.log(peer.name)) as (process, *_):
        harness.until(lambda: peer.done(site) >= 1)
        harness.until(lambda: _tree(process.pid)[1] <= most_processes)
        size, count = _settled(process.pid)
    print(f"    {peer.name:<22} {size:>8.1f} MiB in {count} processes")
    return size, count


def _settled(pid: int) -> tuple[float, int]:
    last, since = _tree(pid), time.monotonic()
    while time.monotonic() - since < _SETTLED_SECONDS:
        time.sleep(0.1)
        now = _tree(pid)
        if abs(now[0] - last[0]) > 0.1 or now[1] != last[1]:
            last, since = now, time.monotonic()
    return last


def _tree(pid: int) -> tuple[float, int]:
    process = psutil.Process(pid)
    sizes = [_pss(each.pid) for each in (process, *process.children(recursive=True))]
    alive = [size for size in sizes if size]
    return sum(alive) / 1024, len(alive)


def _pss(pid: int) -> int:
    """KiB; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
