"""How long an idle system takes from submission to the job's first instruction, job by job.

Functions tell on a socket when they began; commands are `date +%s%N`, and what a bare spawn of the
same command takes here is measured in turns with them and taken off, for it is no system's own.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Site, number, percentile
from benchmarks.peers.base import COMMAND, PROBE, Peer
from benchmarks.peers.fleet_worker import Fleet, FleetWithPlainProducer
from benchmarks.report import Bar, Section, Table

_SLOTS = 2
#: seconds of idleness before each job, at random, so that nobody's rhythm is met
_IDLE = (0.005, 0.025)
_WARM_UP = 20
_MOST_ROUNDS = 3
#: for each second that a measurement is meant to take
_SAMPLES_PER_SECOND = 250
_STAMP = ("date", "+%s%N")


def latency(site: Site, peers: Sequence[Peer]) -> Section:
    """Functions of all peers, commands of ours and of a bare spawn."""
    count = max(20, int(_SAMPLES_PER_SECOND * site.seconds))
    ours = next((peer for peer in peers if isinstance(peer, Fleet)), None)
    able = [*peers, FleetWithPlainProducer()] if ours else peers
    functions = _in_turns(site, [peer for peer in able if PROBE in peer.paces], count)
    commands = _commands(site, ours, count) if ours else {}
    tables = [_table("functions, ms", functions)]
    if commands:
        tables.append(_table("commands (`date`), ms", commands))
    return Section(
        "Idle latency, submission to first instruction",
        tables,
        [*_function_bars(functions), *_command_bars(commands)],
        data={"functions_ms": functions, "commands_ms": commands},
    )


def _in_turns(site: Site, peers: Sequence[Peer], count: int) -> dict[str, list[float]]:
    """Samples of each, some in each round; a peer that fails has fewer, or is not there."""
    rounds = min(site.rounds, _MOST_ROUNDS)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for peer in peers:
            samples = harness.tried(peer.name, partial(_functions, site, peer, count // rounds))
            found.setdefault(peer.name, []).extend(samples or [])
    return {name: samples for name, samples in found.items() if samples}


def _table(what: str, found: dict[str, list[float]]) -> Table:
    ranked = sorted(found.items(), key=lambda row: percentile(row[1], 0.5))
    return Table(
        (what, "p50", "p90", "p99"),
        [
            (name, *(number(percentile(each, share), 2) for share in (0.5, 0.9, 0.99)))
            for name, each in ranked
        ],
    )


def _function_bars(found: dict[str, list[float]]) -> list[Bar]:
    ours = found.get("fleet")
    if not ours:
        return []
    bars = [
        Bar.at_most("idle latency of a function, p50", 3, percentile(ours, 0.5), " ms"),
        Bar.at_most("idle latency of a function, p99", 8, percentile(ours, 0.99), " ms"),
    ]
    for share in (0.5, 0.99):
        peers = {
            name: percentile(each, share) for name, each in found.items() if not name.startswith("fleet")
        }
        if peers:
            best = min(peers, key=lambda name: peers[name])
            what = f"idle latency of a function, p{share * 100:.0f}, below every peer's ({best})"
            bars.append(Bar.at_most(what, round(peers[best], 2), percentile(ours, share), " ms"))
    return bars


def _command_bars(found: dict[str, list[float]]) -> list[Bar]:
    if not found:
        return []
    rows = []
    for share, most in ((0.5, 3), (0.99, 8)):
        own = percentile(found["fleet"], share) - percentile(found["bare spawn"], share)
        what = f"idle latency of a command beyond a bare spawn's, p{share * 100:.0f}"
        rows.append(Bar.at_most(what, most, own, " ms"))
    return rows


# --- functions -------------------------------------------------------------------------------------


def _functions(site: Site, peer: Peer, count: int) -> list[float]:
    site.fresh()
    with (
        _listening(str(site.folder / "probe")) as (address, began),
        harness.processes(peer.workers(site, PROBE, _SLOTS), site.log(peer.name)),
    ):
        for _ in range(_WARM_UP):
            peer.submit(site, PROBE, address)
        for _ in range(_WARM_UP):
            began()
        found = [_one(site, peer, address, began) for _ in range(count)]
    print(f"    {peer.name:<22} p50 {percentile(found, 0.5):.2f} ms  p99 {percentile(found, 0.99):.2f} ms")
    return found


def _one(site: Site, peer: Peer, address: str, began: Callable[[], int]) -> float:
    """Milliseconds from just before submission."""
    time.sleep(random.uniform(*_IDLE))
    submitted = time.monotonic_ns()
    peer.submit(site, PROBE, address)
    return (began() - submitted) / 1e6


@contextmanager
def _listening(address: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """A socket for the probe's messages: its address, and what waits for the next."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(60)
        try:
            yield address, lambda: int(receiver.recv(64))
        finally:
            Path(address).unlink()


# --- commands --------------------------------------------------------------------------------------


def _commands(site: Site, ours: Fleet, count: int) -> dict[str, list[float]]:
    """Our commands and bare spawns, in turns."""
    found: dict[str, list[float]] = {"fleet": [], "bare spawn": []}
    site.fresh()
    with harness.processes(ours.workers(site, COMMAND, _SLOTS), site.log(ours.name)):
        for _ in range(_WARM_UP):
            _command(site, ours)
        for _ in range(count):
            found["fleet"].append(_command(site, ours))
            found["bare spawn"].append(_spawn(site))
    for name, each in found.items():
        print(
            f"    command, {name:<13} p50 {percentile(each, 0.5):.2f} ms  p99 {percentile(each, 0.99):.2f} ms"
        )
    return found


def _command(site: Site, ours: Fleet) -> float:
    time.sleep(random.uniform(*_IDLE))
    submitted = time.time_ns()
    job = ours.submit_command(site, _STAMP)
    return (int(ours.printed(site, job)) - submitted) / 1e6


def _spawn(site: Site) -> float:
    """The same, with nothing in between."""
    time.sleep(random.uniform(*_IDLE))
    path = str(site.folder / "stamp")
    actions = [(os.POSIX_SPAWN_OPEN, 1, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)]
    started = time.time_ns()
    pid = os.posix_spawnp(_STAMP[0], _STAMP, os.environ, file_actions=actions)
    os.waitpid(pid, 0)
    with open(path) as file:
        return (int(file.read()) - started) / 1e6
