"""What sets of requirements cost: claims a second where jobs ask for one thing, and for a hundred.

Straight to Redis, as a worker speaks to it: each round trip reports the ends of the jobs that it was given
and claims as many more; nothing runs. The jobs of a hundred sets come in turns, so far apart that each
claim has to go from list to list. And a real worker that runs no-ops, of one list and of a hundred.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import rq

from benchmarks import harness
from benchmarks.harness import Site, alternate, median, number, ratio
from benchmarks.peers.base import Peer
from benchmarks.peers.fleet_worker import WORKER, worker_command
from benchmarks.report import Bar, Section, Table
from broker import Queue, chores, keys, scripts, sets
from broker.requirements import Offer
from broker.session import Identity, Session
from broker.work import Claim, End
from broker.worker_settings import WorkerSettings
from fleet.placement import Placement
from fleet.resources import Resources
from fleet.room import Room

_SETS, _SLOTS = 100, 8
_GIB = 2**30
_APART_SECONDS = 0.02
#: jobs a second that must not be too few for a measurement
_CLAIMS, _NOOPS = 15_000, 8_000
_LEAST = 0.9

#: what the jobs of each set ask for, as people write it
Asked = Sequence[dict[str, Any]]


def _labels(count: int) -> Asked:
    return [{"labels": [f"rack!={number}"]} for number in range(count)]


def _room(count: int) -> Asked:
    return [{"cpus": 1, "memory": f"{number + 1}M"} for number in range(count)]


def measured(site: Site, _peers: Sequence[Peer]) -> Section:
    """One set beside a hundred, by what they ask for."""
    jobs = int(_CLAIMS * site.seconds / 2)
    claims = {
        "no set": partial(_claims, site, [{}], jobs),
        "one set: labels": partial(_claims, site, _labels(1), jobs),
        "100 sets: labels": partial(_claims, site, _labels(_SETS), jobs),
        "one set: CPUs and memory": partial(_claims, site, _room(1), jobs),
        "100 sets: CPUs and memory": partial(_claims, site, _room(_SETS), jobs),
        "no-ops of one set": partial(_noops, site, _labels(1), int(_NOOPS * site.seconds)),
        "no-ops of 100 sets": partial(_noops, site, _labels(_SETS), int(_NOOPS * site.seconds)),
    }
    found = alternate(claims, site.rounds)
    pairs = {
        "claims, 100 sets of labels beside one": ("one set: labels", "100 sets: labels"),
        "claims, 100 sets of CPUs and memory beside one": (
            "one set: CPUs and memory",
            "100 sets: CPUs and memory",
        ),
        "no-ops, 100 sets of labels beside one": ("no-ops of one set", "no-ops of 100 sets"),
    }
    bars = [
        Bar.at_least(what, _LEAST, ratio(found[many], found[one]), " x")
        for what, (one, many) in pairs.items()
    ]
    rows = [(name, number(median(each)), " ".join(map(number, each))) for name, each in found.items()]
    table = Table((f"{_SLOTS} jobs a round trip", "jobs/s, median", "rounds"), rows)
    return Section("Sets of requirements", [table], bars, data=found)


def _claims(site: Site, asked: Asked, jobs: int) -> float:
    """Claims and ends a second."""
    site.fresh()
    _spread(site, _fill(site, asked, jobs))
    worker = _Worker(site)
    worker.turn()
    started, done = time.perf_counter(), 0
    while count := worker.turn():
        done += count
    return done / (time.perf_counter() - started)


class _Worker:
    """The part of a worker that speaks to Redis."""

    def __init__(self, site: Site) -> None:
        self._client = site.client
        settings = WorkerSettings()
        self._session = Session(Identity(WORKER, "here", ("default",), 1, "3"), settings)
        self._session.register(self._client, "{}")
        offer = Offer({}, _SLOTS, 1024 * _GIB, (), _SLOTS)
        room = Room(Resources(_SLOTS, 1024 * _GIB), _SLOTS)
        self._placement = Placement(["default"], offer, room, settings)
        self._placement.learn(sets.known(self._client, ["default"]))
        self._held: Sequence[Claim] = ()

    def turn(self) -> int:
        """Report what was claimed as finished, and claim; returns how many came."""
        for claim in self._held:
            self._placement.give_back(claim.lease)
        ends = [End(claim, "finished", duration_seconds=0.001) for claim in self._held]
        self._placement.count(0)
        self._placement.lists()
        exchange = self._session.begin(ends, _SLOTS, places=self._placement.places(()))
        reply: Any = scripts.ROUND(self._client, exchange.keys, exchange.arguments)
        self._held = self._session.complete(exchange, reply).claims
        self._session.settle(exchange)
        for claim in self._held:
            self._placement.take(claim.lease, claim.queue)
        return len(self._held)


def _noops(site: Site, asked: Asked, jobs: int) -> float:
    """Functions a second, of a worker with two slots."""
    site.fresh()
    _fill(site, asked, jobs)

    def done() -> int:
        return int(site.client.hget(keys.rq_worker(WORKER), "successful_job_count") or 0)

    with harness.processes([worker_command(site, WORKER, slots=2)], site.log("sets")):
        return harness.rate_of(done, jobs)


def _fill(site: Site, asked: Asked, jobs: int) -> list[Queue]:
    """Queue jobs of each set, in turns; returns their lists."""
    some = max(1, min(100, jobs // len(asked)))
    rows = [rq.Queue.prepare_data("benchmarks.work.noop", result_ttl=3600) for _ in range(some)]
    lists = [Queue(connection=site.client, **said) for said in asked]
    for turn in range(jobs // some):
        lists[turn % len(lists)].enqueue_many(rows)
    return lists


def _spread(site: Site, lists: Sequence[Queue]) -> None:
    """Let it look as if one job had been queued after the other, a moment apart, of each list in turns."""
    ids = {queue: queue.get_job_ids() for queue in lists}
    began = datetime.now(UTC) - timedelta(seconds=_APART_SECONDS * sum(map(len, ids.values())))
    with site.client.pipeline(transaction=False) as pipe:
        for place, queue in enumerate(lists):
            for rank, job_id in enumerate(ids[queue]):
                at = began + timedelta(seconds=_APART_SECONDS * (rank * len(lists) + place))
                pipe.hset(keys.job(job_id), "enqueued_at", at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
        pipe.execute()
    chores.Ring().run(site.client)
