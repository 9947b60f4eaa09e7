"""The delays that keep workers from arriving at once: even, and for ever the same."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import pytest

from benchmarks import arrivals
from broker.session import Identity
from broker.worker_settings import WorkerSettings
from fleet import jitter

RATE = WorkerSettings().registrations_per_second
#: chi-square of 60 bins (59 degrees of freedom) that even spreads exceed once in a thousand
_CHI_SQUARE = 98.3

CROWDS = {
    "a worker on each host": [(f"node{number}", f"node{number}-0") for number in range(1000)],
    "fifty on a host": [(f"gpu{n // 50}.lab", f"gpu{n // 50}.lab-{n % 50}") for n in range(1000)],
    "tasks of one Slurm job": [("login", "4711", str(n // 8), str(n % 8)) for n in range(1000)],
}


# --- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "seconds"),
    [
        *((0, 0), (1, 0), (2, 2), (10, 10), (11, 10 + 50 / 90), (55, 35), (100, 60)),
        *((101, 60), (3000, 60), (3001, 60.02), (10_000, 200)),
    ],
)
def test_the_window_grows_with_the_number_of_workers(workers, seconds):
    assert jitter.window_seconds(workers, RATE) == pytest.approx(seconds)


def test_redis_is_never_asked_for_more_registrations_than_it_may_be():
    windows = [jitter.window_seconds(workers, RATE) for workers in range(5000)]
    assert windows == sorted(windows)
    assert all(workers / RATE <= windows[workers] for workers in range(2, 5000))
    assert jitter.window_seconds(10_000, 20.0) == 500


# --- delays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "seconds"),
    [
        (("node1", "node1-0"), 18.238103804178536),
        (("localhost", "localhost-1"), 56.082681426778436),
        (("here", "w4"), 22.981279296800494),
        (("gpu7.example.com", "gpu7.example.com-0"), 17.487672865390778),
        (("login", "4711", "2", "3"), 41.60360620357096),
        (("höst", "h-st-0"), 9.828507844358683),
    ],
)
def test_a_delay_never_changes(identity, seconds):
    assert jitter.delay_seconds(60.0, *identity) == seconds


@pytest.mark.parametrize(
    ("environ", "of_slurm"),
    [
        ({}, ()),
        ({"SLURM_JOB_ID": "4711"}, ("4711",)),
        (
            {"SLURM_JOB_ID": "4711", "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "99"},
            ("4711", "2", "0"),
        ),
        ({"SLURM_JOB_ID": "4711", "SLURM_NODEID": "2", "SLURM_TASK_PID": "99"}, ("4711", "2", "99")),
    ],
)
def test_a_worker_is_told_from_others_by_host_and_name_and_its_place_in_slurm(environ, of_slurm):
    assert jitter.identity_of("node1", "node1-0", environ) == ("node1", "node1-0", *of_slurm)


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_a_delay_is_the_same_in_every_process(seed):
    script = "from fleet import jitter; print(jitter.delay_seconds(60.0, 'node1', 'node1-0'))"
    said = subprocess.check_output(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, text=True
    )
    assert float(said) == 18.238103804178536


@pytest.mark.parametrize("window", [0.0, 0.3, 1.0, 7.5, 60.0])
def test_delays_lie_in_the_window(window):
    delays = [jitter.delay_seconds(window, *identity) for identity in CROWDS["fifty on a host"]]
    assert all(0 <= delay < window or delay == window == 0 for delay in delays)
    assert window == 0 or len(set(delays)) == len(delays), "of less than a second's resolution"


@pytest.mark.parametrize("crowd", CROWDS.values(), ids=CROWDS.keys())
def test_a_thousand_workers_spread_evenly_over_a_minute(crowd):
    """Pearson's chi-square against the uniform distribution, a bin for each second."""
    assert_even([jitter.delay_seconds(60.0, *identity) for identity in crowd], 60.0)


def assert_even(moments: Iterable[float], window: float) -> None:
    """Sixty bins of equal length; p > 0.001, and none has more than twice its share."""
    bins = Counter(int(moment / window * 60) for moment in moments)
    share = bins.total() / 60
    assert sum((bins[number] - share) ** 2 / share for number in range(60)) < _CHI_SQUARE
    assert max(bins.values()) <= 2 * share


def test_of_ten_thousand_workers_no_second_has_more_than_chance_makes_of_an_even_spread():
    """What docs/performance.md plots: the rate Redis may be asked for, and some four standard deviations."""
    assert arrivals.peak(arrivals.arrivals_on_paper(10_000, 0.0)) == 10_000
    with_jitter = arrivals.peak(arrivals.arrivals_on_paper(10_000, jitter.window_seconds(10_000, RATE)))
    assert RATE < with_jitter <= RATE + 4 * RATE**0.5
    assert with_jitter == pytest.approx(arrivals.expected_peak(10_000, 200.0), rel=0.1)


# --- coming back -----------------------------------------------------------------------------------


def returns(workers: int, name: str, lease_seconds: float = 30.0) -> Iterable[float]:
    """When that worker tries, seconds after the connection was lost."""
    settings = WorkerSettings(lease_seconds=lease_seconds)
    return itertools.accumulate(jitter.returns_seconds(workers, settings, Identity(name, "host", (), 1, "")))


@pytest.mark.parametrize("outage_seconds", [0.0, 3.0, 100.0])
def test_whenever_an_outage_ends_a_large_fleet_comes_back_over_a_quarter_of_the_lease(outage_seconds):
    late = [
        next(at for at in returns(1000, f"w{number}") if at >= outage_seconds) - outage_seconds
        for number in range(1000)
    ]
    assert max(late) < 7.5
    assert_even(late, 7.5)


def test_a_small_fleet_comes_back_within_a_second():
    first, second, third = itertools.islice(returns(3, "w0"), 3)
    assert 0 <= first < 3 / RATE
    assert (second - first, third - second) == (pytest.approx(1.0), pytest.approx(1.0))


def test_a_short_lease_shortens_the_window():
    times = list(itertools.islice(returns(10_000, "w0", lease_seconds=20.0), 3))
    assert times[0] < 5
    assert times[2] - times[1] == pytest.approx(5.0)
