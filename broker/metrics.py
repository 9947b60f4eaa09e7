"""All that the exporter tells, read in as many round trips for a large fleet as for a small one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import redis

from broker import bootstraps, history, keys, sets, status
from broker.bootstraps import Bootstraps
from broker.connection import replies
from broker.history import Totals
from broker.requirements import NOTHING, SEPARATOR, Offer, Requirements, base_of
from broker.status import FleetStatus, WorkerStatus

#: lists of jobs that are judged, those that wait longest first: each may ask every worker there is
_MOST_JUDGED = 200
_HOST = "host"


@dataclass(frozen=True)
class Snapshot:
    """The fleet, and what became of its jobs so far.

    `unplaceable`: queue or sublist -> queued jobs that no worker there is would ever take; `counters`: what
    belongs to no queue; `server`: the fields of INFO.
    """

    fleet: FleetStatus
    totals: Mapping[str, Totals]
    unplaceable: Mapping[str, int]
    bootstraps: Bootstraps
    counters: Mapping[str, int]
    server: Mapping[str, Any]


def read(client: redis.Redis) -> Snapshot:
    """Ask Redis; raises what redis-py raises."""
    fleet = status.read(client)
    totals = history.read(client)
    with client.pipeline(transaction=False) as pipe:
        pipe.hgetall(keys.COUNTERS)
        pipe.hgetall(keys.BOOTSTRAP)
        for section in _SECTIONS:
            pipe.info(section)
        counters, steps, *infos = replies(pipe)
    server = {name: value for info in infos if isinstance(info, dict) for name, value in info.items()}
    return Snapshot(
        fleet,
        totals,
        _unplaceable(client, fleet),
        bootstraps.parsed(steps),
        history.numbers(counters),
        server,
    )


_SECTIONS = ("server", "memory", "persistence", "stats", "replication")


def _unplaceable(client: redis.Redis, fleet: FleetStatus) -> dict[str, int]:
    waiting = [queue for queue in fleet.queues if queue.queued and not queue.paused]
    waiting.sort(key=lambda queue: -(queue.oldest_age_seconds or 0))
    judged = waiting[:_MOST_JUDGED]
    needs = _needs(client, [queue.name for queue in judged])
    offers = _offers(fleet.workers, needs.values())
    now = fleet.at.timestamp()
    found = {}
    for queue in judged:
        need = needs.get(queue.name) if SEPARATOR in queue.name else NOTHING
        there = offers.get(base_of(queue.name), ())
        if not any(need.matches(offer, now) for offer in there if need):
            found[queue.name] = queue.queued
    return found


def _needs(client: redis.Redis, names: Iterable[str]) -> dict[str, Requirements]:
    """What jobs of these lists ask for, those alone that ask for something."""
    bases = sorted({base_of(name) for name in names if SEPARATOR in name})
    known = sets.known(client, bases).sets if bases else {}
    return {f"{base}{SEPARATOR}{digest}": need for base in known for digest, need in known[base].items()}


def _offers(workers: Iterable[WorkerStatus], needs: Iterable[Requirements]) -> dict[str, Sequence[Offer]]:
    """By queue what its live workers are, each kind once: many hosts differ in nothing but their name."""
    by_host = any(rule.key == _HOST for need in needs for rule in need.labels)
    found: dict[str, dict[Any, Offer]] = {}
    for worker in workers:
        if worker.state == "offline":
            continue
        offer = worker.offer()
        if not by_host:
            offer = replace(offer, labels={key: v for key, v in offer.labels.items() if key != _HOST})
        kind = (tuple(sorted(offer.labels.items())), *(vars(offer)[name] for name in _OF_OFFER))
        for queue in worker.queues:
            found.setdefault(queue, {})[kind] = offer
    return {queue: list(kinds.values()) for queue, kinds in found.items()}


_OF_OFFER = ("cpus", "memory_bytes", "gpus", "slots", "ends_at", "gpu_names")
