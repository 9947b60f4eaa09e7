"""How well jobs that ask for CPUs, memory, GPUs and labels are packed: a fleet in virtual time.

    python -m benchmarks placement         1,000 workers, 100,000 jobs

Everything that decides is real: the scripts in a real Redis, each worker's session, room and waiting. Jobs
take no processes and no time, but in the calendar. See benchmarks/simulation.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.harness import Site, number
from benchmarks.peers.base import Peer
from benchmarks.report import Bar, Section, Table
from benchmarks.simulation import Findings, Job, Machine, Simulation, best_bound, virtual_time
from broker.requirements import MEBIBYTE, Offer, Requirements, parse
from broker.worker_settings import WorkerSettings

_GIB = 1024 * MEBIBYTE
#: how many of a hundred workers are such: small and large hosts, and two kinds of GPUs
_MACHINES = (
    (67, Machine("small", Offer({"zone": "eu"}, 4, 16 * _GIB, (), 8))),
    (10, Machine("large", Offer({"zone": "us"}, 16, 128 * _GIB, (), 32))),
    (15, Machine("l4", Offer({"zone": "us", "gpu_type": "l4"}, 4, 32 * _GIB, (24 * _GIB,), 8))),
    (8, Machine("a100", Offer({"zone": "eu", "gpu_type": "a100"}, 16, 128 * _GIB, (80 * _GIB,) * 4, 32))),
)
#: how many of a thousand jobs ask for what
_JOBS: tuple[tuple[int, dict[str, object]], ...] = (
    (345, {}),
    (150, {"cpus": 1}),
    (110, {"cpus": 0.5, "memory": "1G"}),
    (100, {"cpus": 2, "memory": "4G"}),
    (60, {"cpus": 1, "memory": "6G"}),
    (70, {"cpus": 4, "memory": "8G"}),
    (8, {"cpus": 8, "memory": "48G"}),
    (2, {"cpus": 16}),
    (1, {"cpus": 2, "exclusive": True}),
    (60, {"cpus": 1, "labels": ["zone=eu"]}),
    (30, {"cpus": 2, "labels": ["zone!=eu"]}),
    (25, {"gpus": 0.5}),
    (20, {"gpus": 1, "cpus": 2, "memory": "8G"}),
    (12, {"gpus": 1, "gpu_memory": "40G", "cpus": 2}),
    (7, {"gpus": 2, "labels": ["gpu_type=a*"]}),
    (2, {"gpus": 4, "cpus": 8, "memory": "64G"}),
)
#: how many of a hundred jobs have that priority
_PRIORITIES = ((70, "normal"), (15, "high"), (10, "low"), (5, "urgent"))
#: seconds that a job takes, evenly spread
_SHORTEST, _LONGEST = 20.0, 100.0
#: the share of the jobs that is there from the beginning; the others come in the course of this many seconds
_AT_ONCE, _ARRIVALS = 0.6, 300.0
#: priorities age, and room is held, sooner than by default: a run is some 20 virtual minutes long
SETTINGS = replace(
    WorkerSettings(),
    heartbeat_seconds=60.0,
    lease_seconds=1e6,
    priority_ageing_seconds=3.0,
    reserve_after_seconds=120.0,
)


def machines(count: int) -> list[Machine]:
    """A fleet of so many, always the same."""
    return [machine for share, machine in _MACHINES for _ in range(max(1, count * share // 100))][:count]


def jobs(count: int, seed: int) -> list[Job]:
    """So many jobs, mixed by chance."""
    chance = random.Random(seed)
    needs = {
        (index, name): parse({**said, "priority": name})
        for index, (_, said) in enumerate(_JOBS)
        for _, name in _PRIORITIES
    }
    return [_job(chance, needs) for _ in range(count)]


def _job(chance: random.Random, needs: dict[tuple[int, str], Requirements]) -> Job:
    (index,) = chance.choices(range(len(_JOBS)), [share for share, _ in _JOBS])
    (name,) = chance.choices([name for _, name in _PRIORITIES], [share for share, _ in _PRIORITIES])
    comes_at = 0.0 if chance.random() < _AT_ONCE else chance.uniform(1, _ARRIVALS)
    return Job(needs[index, name], chance.uniform(_SHORTEST, _LONGEST), comes_at)


def cpus_in_use(fleet: Sequence[Machine], work: Sequence[Job], since: float, until: float) -> float:
    """The share of all CPUs that jobs had between two moments, on average; a plain job has half of one."""
    used = sum(
        (job.need.cpus or 0.5) * max(0.0, min(job.began_at + job.seconds, until) - max(job.began_at, since))
        for job in work
        if job.began_at is not None
    )
    return used / (until - since) / sum(machine.offer.cpus for machine in fleet)


def starved(found: Findings, settings: WorkerSettings) -> list[str]:
    """Levels of priority, and first jobs of their kind, that waited longer than they may.

    A level has a turn at the latest when neglect has lifted it above all others, and its job fits. For one
    that does not fit room is held in time, by a worker that holds none for another: these are few here.
    """
    top = max(found.neglect)
    most = settings.reserve_after_seconds + 5 * _LONGEST
    late = [
        f"{need.readable()}: stood first for {waited:.0f} s"
        for need, waited in found.longest_first.items()
        if waited > (top - need.priority) * settings.priority_ageing_seconds + most
    ]
    return late + [
        f"priority {level}: no turn for {waited:.0f} s"
        for level, waited in found.neglect.items()
        if waited
        > (top - level) * settings.priority_ageing_seconds + settings.reserve_after_seconds + _LONGEST
    ]


def placement(site: Site, peers: Sequence[Peer]) -> Section:
    """Utilisation against the best bound, and everything that must not be."""
    del peers
    workers, count = (60, 3_000) if site.quick else (1_000, 100_000)
    fleet, work = machines(workers), jobs(count, seed=1)
    site.fresh()
    with virtual_time():
        found = Simulation(site.client, fleet, work, SETTINGS).run(check_every=max(1, count // 1000))
    bound = best_bound(fleet, work)
    faults = found.faults + starved(found, SETTINGS)
    busy = cpus_in_use(fleet, work, 0, found.last_given_at)
    rows = [
        ("the last job was given out after, s", number(found.last_given_at)),
        ("CPUs in use until then, of all, %", number(100 * busy)),
        ("all jobs had ended after, s", number(found.makespan)),
        ("the soonest that any packing could have ended, s", number(bound)),
        ("longest time that a level of priority had no turn, s", number(max(found.neglect.values()))),
        ("longest time that a job stood first of its kind, s", number(max(found.longest_first.values()))),
        ("promised twice, idle beside work, out of turn, starved", number(len(faults))),
        ("calls of round.lua", number(found.rounds)),
        ("this machine took, s", number(found.real_seconds)),
    ]
    title = f"Packing: {workers:,} workers, {count:,} jobs, {len({job.need for job in work})} sets"
    bars = [
        Bar.at_least("packing, of the best bound", 0.9, bound / found.makespan),
        Bar.at_most("packing, faults", 0, len(faults)),
    ]
    notes = ["; ".join(faults[:5])] if faults else []
    return Section(title, [Table(("virtual time", "found"), rows)], bars, notes, {"seconds": found.makespan})
