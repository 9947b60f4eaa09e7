"""A fault before, during and after the calls that a worker makes to Redis in a scripted life."""

from __future__ import annotations

import pytest

from tests.chaos import lives
from tests.chaos.checker import check
from tests.chaos.harness import Harness

#: how many calls of a name are tried; of all others the first. benchmarks/chaos.py tries all
MOST = {"round": 6, "beat": 2, "BLPOP": 2, "SMEMBERS": 3, "GET": 2}
#: what a worker says to Redis in any life; the names of its other calls come and go with their order
ALWAYS = ["register", "round", "beat", "BLPOP", "SUBSCRIBE", "SET", "expired", "due", "output", "retire"]


@pytest.mark.timeout(600)
def test_a_fault_at_any_call_to_redis_loses_nothing_and_does_nothing_twice(harness: Harness) -> None:
    calls = lives.chosen(lives.calls_of_a_life(harness), MOST)
    assert not [name for name in ALWAYS if f"{name}#1" not in calls], calls
    wanted = lives.faults(calls)
    lived = lives.live(harness, wanted)
    missed = missing(judged(harness, lived), wanted)
    if missed:  # a busy machine may have kept a life from coming so far
        lived += lives.live(harness, missed, first_database=2 + len(lived))
        missed = missing(judged(harness, lived), wanted)
    assert not missed, f"never came about: {missed}"


def judged(harness: Harness, lived: list[lives.Life]) -> set[tuple[str, str]]:
    """Which faults came about, by call and kind; fails the test if anything contradicts a property."""
    found = lives.evidence_of(harness, lived)
    wrong = [f"{life.fault}: {one}" for life in lived for one in check(found[life.database])]
    assert not wrong, "\n".join(wrong[:20])
    return {(event["call"], event["how"]) for one in found.values() for event in one.named("failpoint")}


def missing(hit: set[tuple[str, str]], wanted: list[lives.Fault]) -> list[lives.Fault]:
    """Of the calls that are made in any life, the faults that did not come about."""
    names = {f"{name}#1" for name in (*ALWAYS, "lose")}
    return [fault for fault in wanted if fault.call in names and (fault.call, fault.how) not in hit]
