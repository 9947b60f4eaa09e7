"""Faults at random: a small storm, whose seed is another each time, and is printed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

import pytest

from tests.chaos import figures
from tests.chaos.checker import check
from tests.chaos.evidence import Evidence
from tests.chaos.harness import Harness
from tests.chaos.storm import Plan, Storm


@pytest.mark.timeout(480)
def test_a_storm_loses_nothing_and_does_nothing_twice(
    harness: Harness, acquit: Callable[[Evidence], None]
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**6))
    print(f"again with: CHAOS_SEED={seed}")
    plan = Plan(seed, jobs=800, seconds=12.0, worker_kills=12, redis_restarts=2, other_faults=24, slow=0.3)
    Storm(harness, plan, print).run()
    evidence = harness.evidence()
    found = figures.of(evidence, check(evidence))
    print(found)
    acquit(evidence)
    assert found.acknowledged >= 700
    assert found.worker_deaths >= 8, "some may have been about to leave"
