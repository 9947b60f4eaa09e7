"""How many jobs a worker claims ahead, by what it measured."""

from __future__ import annotations

import pytest

from fleet.pace import AHEAD_SECONDS, MOST_AHEAD, Pace


def test_nothing_is_claimed_ahead_of_what_nobody_knows():
    assert Pace(4).stock() == 0


@pytest.mark.parametrize(("seconds", "stock"), [(1.0, 0), (0.02, 2), (0.005, 10), (1e-9, 2 * MOST_AHEAD)])
def test_short_jobs_are_claimed_ahead_and_long_ones_are_not(seconds, stock):
    pace = Pace(2)
    for _ in range(100):
        pace.ran(seconds)
    assert pace.stock() == stock


def test_what_waits_is_begun_in_time_though_slots_stand_empty_between_short_jobs():
    """A job takes 0.1 ms of each 2 ms that pass until its slot takes the next."""
    pace, a_start = Pace(2), 0.001
    for _ in range(100):
        pace.ran(0.0001)
        pace.waited(10 * a_start, before=10)
    assert 0 < pace.stock() * a_start < AHEAD_SECONDS


def test_the_first_to_begin_tell_nothing_of_how_fast_the_rest_will():
    pace = Pace(2)
    pace.ran(0.005)
    pace.waited(1.0, before=1)
    assert pace.stock() == 10


def test_all_is_forgotten_when_something_waited_for_too_long():
    pace = Pace(2)
    pace.ran(0.001)
    pace.waited(0.01, before=10)
    pace.forget()
    assert pace.stock() == 0
