"""Jobs a second beside the peers: commands (`true`) with two and four slots, and Python no-ops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.harness import Site, alternate, median, number, ratio
from benchmarks.peers.base import COMMAND, NOOP, Peer
from benchmarks.peers.fleet_worker import Fleet, FleetOfOneWorker
from benchmarks.report import Bar, Section, Table

_FEW, _MANY = 2, 4
#: who is measured with four slots too
_BOUNDS = (Fleet.name, "xargs", "hyperqueue")


def commands(site: Site, peers: Sequence[Peer]) -> Section:
    """`true`, output captured."""
    two = _measured(site, peers, COMMAND, _FEW)
    four = _measured(site, [peer for peer in peers if peer.name in _BOUNDS], COMMAND, _MANY)
    bars = [
        _bar(two, "xargs", 0.75, f"commands, {_FEW} slots, beside xargs -P{_FEW}"),
        _bar(four, "xargs", 0.90, f"commands, {_MANY} slots, beside xargs -P{_MANY}"),
        _bar(two, "hyperqueue", 2.5, f"commands, {_FEW} slots, beside HyperQueue"),
        _fastest(two, 1.0, "commands, beside the fastest peer", besides=("xargs",)),
    ]
    tables = [_table(two, f"{_FEW} at once"), _table(four, f"{_MANY} at once")]
    return Section("Commands (`true`)", tables, [bar for bar in bars if bar], data={"two": two, "four": four})


def noops(site: Site, peers: Sequence[Peer]) -> Section:
    """A Python function that does nothing, its result stored."""
    two = _measured(site, peers, NOOP, _FEW)
    bars = [
        _fastest(two, 2.0, "Python no-ops, beside the fastest peer"),
        _bar(two, "rq", 80, "Python no-ops, beside rq worker"),
    ]
    return Section(
        "Python no-ops, results stored",
        [_table(two, "two processes")],
        [bar for bar in bars if bar],
        data=two,
    )


def _measured(site: Site, peers: Sequence[Peer], work: str, slots: int) -> dict[str, list[float]]:
    """Jobs a second of each, round by round."""
    able = [peer for peer in peers if work in peer.paces]
    if any(isinstance(peer, Fleet) for peer in able):
        able.append(FleetOfOneWorker())
    measures = {
        peer.name: partial(peer.rate, site, work, peer.jobs(work, site.seconds), slots) for peer in able
    }
    return alternate(measures, site.rounds)


def _table(found: dict[str, list[float]], what: str) -> Table:
    ours = found.get("fleet", [])
    rows = [
        (name, number(median(each)), number(ratio(ours, each), 2) if ours else "-", _spread(each))
        for name, each in sorted(found.items(), key=lambda row: -(median(row[1]) or 0))
    ]
    return Table((what, "jobs/s, median", "fleet ÷ it, median of rounds", "rounds"), rows)


def _spread(samples: Sequence[float]) -> str:
    return " ".join(number(sample) for sample in samples)


def _bar(found: dict[str, list[float]], peer: str, least: float, what: str) -> Bar | None:
    if peer not in found or "fleet" not in found:
        return None
    return Bar.at_least(what, least, ratio(found["fleet"], found[peer]), " x")


def _fastest(
    found: dict[str, list[float]], least: float, what: str, besides: Sequence[str] = ()
) -> Bar | None:
    """A bar beside whichever peer is the fastest."""
    peers = {name: median(each) for name, each in found.items() if name not in besides}
    rates = {name: rate for name, rate in peers.items() if rate == rate and not name.startswith(Fleet.name)}
    if not rates or "fleet" not in found:
        return None
    fastest = max(rates, key=lambda name: rates[name])
    return _bar(found, fastest, least, f"{what} ({fastest})")
