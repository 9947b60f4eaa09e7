"""Who is looked at, how often, and what is told of it."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from fleet import sampler
from fleet.function_attempt import FunctionAttempt
from fleet.limits import Limit
from fleet.processes import Process
from fleet.resources import GpuUse
from fleet.room import Grant
from fleet.sampler import Rhythm, Sampler, TooLarge

_MIB = 2**20


def _attempt(
    pgid: int, memory_bytes: int | None = None, lease: str = "1:a", gpus: tuple[int, ...] = ()
) -> Any:
    grant = Grant(memory_bytes=memory_bytes, gpu_ids=gpus)
    return SimpleNamespace(
        claim=SimpleNamespace(lease=lease),
        pgid=pgid,
        limit=None if grant == Grant() else Limit(grant, None, None),
        is_unmetered=memory_bytes is None,
        seen_bytes=0,
        known={},
        counts=lambda *_: True,
    )


@pytest.fixture
def hog():
    """The number of a process that has 64 MiB."""
    script = "x = b'x' * (64 * 2**20); print(flush=True); input()"
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as child:
        assert child.stdout
        child.stdout.readline()
        yield child.pid
        child.kill()


@pytest.fixture
def told():
    return []


@pytest.fixture
def ours(told):
    """A sampler at work."""
    one = Sampler(lambda gpus: [GpuUse(index, None, 7) for index in gpus or ()], told.append)
    one.start()
    yield one
    one.stop()


def test_who_has_too_much_is_named_until_it_is_gone(ours, told, hog, eventually):
    low, high = _attempt(hog, 32 * _MIB, "1:low"), _attempt(hog, 512 * _MIB, "2:high")
    ours.add(high)
    ours.add(low)
    eventually(lambda: TooLarge("1:low") in told)
    assert low.limit.ran_out
    assert not high.limit.ran_out
    eventually(lambda: high.limit.seen_bytes >= 64 * _MIB)
    ours.remove("1:low")
    ours.remove("1:low")
    assert set(told) == {TooLarge("1:low")}


def test_peaks_are_noted_where_nobody_else_tells_them(ours, hog, eventually):
    free, held = _attempt(hog), _attempt(hog, 512 * _MIB, "2:b", gpus=(0, 3))
    ours.add(held)
    ours.add(free)
    eventually(lambda: free.seen_bytes >= 64 * _MIB)
    eventually(lambda: held.limit.seen_gpu_bytes == 14)
    assert held.seen_bytes == 0


def test_it_goes_on_after_what_nobody_foresaw(told, hog, eventually, caplog):
    one, broken = Sampler(lambda _: (), told.append), _attempt(hog, 32 * _MIB, "2:broken")
    broken.counts = None
    one.add(_attempt(hog, 32 * _MIB, "1:low"))
    one.add(broken)
    one.start()
    try:
        eventually(lambda: len(told) > 3)
    finally:
        one.stop()
    assert caplog.text.count("Traceback") == 1, "it is told once"
    assert "TypeError" in caplog.text


def test_of_a_function_its_executor_and_what_was_there_before_do_not_count():
    limit = Limit(Grant(memory_bytes=_MIB), None, None)
    one: Any = SimpleNamespace(limit=limit, pgid=10, has_own_processes=True)
    late, early = limit.made_at + 1, limit.made_at - 1
    counts = FunctionAttempt.counts
    assert not counts(one, 10, Process(1, 10, late, 0))
    assert not counts(one, 11, Process(10, 10, early, 0))
    assert counts(one, 12, Process(10, 10, late, 0))
    warm: Any = SimpleNamespace(limit=None, pgid=10, has_own_processes=False)
    assert counts(warm, 10, Process(1, 10, early, 0))


def test_looking_takes_a_small_part_of_the_time(monkeypatch):
    now, looked = [0.0], 0
    monkeypatch.setattr(sampler.clock, "monotonic", lambda: now[0])
    rhythm = Rhythm(1.0, 500)
    for second in range(60):
        now[0] = float(second)
        with rhythm.turn() as is_time:
            looked += is_time
            until = time.thread_time() + 0.01
            while is_time and time.thread_time() < until:
                pass
    assert 1 < looked <= 60 * 0.002 / 0.01 + 1
