"""A small fleet in virtual time, on the real scripts: benchmarks/simulation.py says what is real in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis

from benchmarks import placement
from benchmarks.simulation import Job, Machine, Simulation, best_bound, virtual_time
from broker.connection import connect
from broker.requirements import MEBIBYTE, Offer, parse

GIB = 1024 * MEBIBYTE


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client as workers have it; the scripts go by virtual time."""
    with virtual_time(), connect(redis_url) as found:
        yield found


@pytest.mark.parametrize("seed", [1, 2])
def test_a_mixed_fleet_is_packed_and_nothing_is_promised_twice_or_starves(client: redis.Redis, seed: int):
    fleet, work = placement.machines(10), placement.jobs(500, seed)
    found = Simulation(client, fleet, work, placement.SETTINGS).run(check_every=5)
    assert found.faults == []
    assert placement.starved(found, placement.SETTINGS) == []
    assert found.begun == found.ended + found.refused == 500
    assert placement.cpus_in_use(fleet, work, 0, best_bound(fleet, work) / 2) > 0.8


def run(client: redis.Redis, machine: Machine, jobs: list[Job], **settings: float):
    found = Simulation(client, [machine], jobs, replace(placement.SETTINGS, **settings)).run()
    assert found.faults == []
    return found


def test_jobs_that_fill_a_machine_fill_it(client: redis.Redis):
    machine = Machine("m", Offer({}, 8, 16 * GIB, (), 16))
    jobs = [Job(parse({"cpus": cpus, "memory": "1G"}), 10) for cpus in (4, 2, 1, 0.5) for _ in range(8)]
    found = run(client, machine, jobs)
    assert found.makespan == pytest.approx(best_bound([machine], jobs), rel=0.3)


def test_a_large_job_is_passed_by_and_yet_has_its_turn(client: redis.Redis):
    """Small ones keep coming and always fit; the large one needs the whole machine."""
    machine = Machine("m", Offer({}, 4, 4 * GIB, (), 4))
    small = [Job(parse({"cpus": 1}), 10, comes_at) for comes_at in range(400)]
    large = Job(parse({"cpus": 4}), 10, 5)
    run(client, machine, [*small, large], reserve_after_seconds=60.0)
    assert large.began_at is not None
    assert 60 <= large.began_at - large.comes_at <= 60 + 2 * 10
    before = [job for job in small if job.began_at is not None and job.began_at < large.began_at]
    assert len(before) >= 20, "they were taken past it meanwhile"


def test_low_jobs_have_a_turn_however_long_the_high_ones_last(client: redis.Redis):
    machine = Machine("m", Offer({}, 1, GIB, (), 1))
    high = [Job(parse({"priority": "high"}), 10) for _ in range(60)]
    low = [Job(parse({"priority": "low"}), 10) for _ in range(3)]
    run(client, machine, high + low, priority_ageing_seconds=5.0)
    began = sorted(job.began_at for job in low if job.began_at is not None)
    assert len(began) == 3
    # 20 levels of 5 s each lie between them
    assert 100 <= began[0] <= 120
    assert 90 <= began[1] - began[0] <= 130


def test_shares_of_gpus_and_whole_ones_live_side_by_side(client: redis.Redis):
    machine = Machine("m", Offer({}, 16, 64 * GIB, (80 * GIB, 16 * GIB, 16 * GIB), 16))
    asked = [{"gpus": 0.5}] * 6 + [{"gpus": 1, "gpu_memory": "40G"}] * 3 + [{"gpus": 2}] * 3 + [{"gpus": 3}]
    found = run(client, machine, [Job(parse(one), 10) for one in asked], reserve_after_seconds=30.0)
    assert found.ended == len(asked)
