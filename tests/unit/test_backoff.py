"""How long a command waits before each of its retries."""

from __future__ import annotations

import pytest

from broker.submit import LONGEST_RETRY_DELAY, Options, backoff


def delays(retries: int, first: float) -> list[int]:
    return list(backoff(Options(retries=retries, retry_delay_seconds=first)))


@pytest.mark.parametrize("first", [1.0, 10.0, 100.0])
def test_each_retry_waits_twice_as_long_and_up_to_half_as_much_again(first):
    for number, delay in enumerate(delays(5, first)):
        assert first * 2**number <= delay + 0.5
        assert delay - 0.5 <= 1.5 * first * 2**number


def test_a_crowd_that_failed_together_does_not_come_back_together():
    assert len({delays(1, 1000)[0] for _ in range(100)}) > 50


@pytest.mark.parametrize("first", [1.0, 1e9])
def test_no_delay_is_much_longer_than_an_hour(first):
    found = delays(5000, first)
    assert len(found) == 5000
    assert LONGEST_RETRY_DELAY <= found[-1] <= 1.5 * LONGEST_RETRY_DELAY


def test_no_delay_stays_none():
    assert delays(3, 0.0) == [0, 0, 0]
    assert delays(0, 1.0) == []
