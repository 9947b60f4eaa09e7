"""What running processes have had at most, and what looking for it costs."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from fleet import peaks
from fleet.peaks import Peaks, peak_bytes

_MIB = 2**20
_SAYS = "import sys; print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def start():
    """`start(program)`: a Python that has said that it is ready, and ends with the test."""
    started = []

    def run(program: str) -> int:
        child = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(child)
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        return child.pid

    yield run
    for child in started:
        child.communicate()


def test_what_was_given_back_counts(start):
    had = peak_bytes(start(f"x = bytearray(60 * 2**20); del x; {_SAYS}"))
    assert 60 * _MIB <= had < 100 * _MIB


def test_of_one_that_a_thread_started(start):
    inner = f"x = bytearray(60 * 2**20); {_SAYS}"
    run = f"subprocess.run([sys.executable, '-c', {inner!r}])"
    outer = f"import subprocess, sys, threading; threading.Thread(target=lambda: {run}).start()"
    assert peak_bytes(start(outer)) >= 60 * _MIB


def test_nobody_has_nothing():
    done = subprocess.Popen(["true"])
    done.wait()
    assert peak_bytes(done.pid) == 0


def test_looking_takes_a_small_part_of_the_time(monkeypatch):
    looked = []

    def slow(pid):
        looked.append(pid)
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass
        return 0

    monkeypatch.setattr(peaks, "peak_bytes", slow)
    now = [0.0]
    monkeypatch.setattr(peaks.clock, "monotonic", lambda: now[0])
    attempt = SimpleNamespace(is_unmetered=True, pgid=7, seen_bytes=0)
    ours = Peaks()
    for second in range(60):
        now[0] = float(second)
        ours.look([attempt])
    assert 1 < len(looked) <= 60 * 0.002 / 0.01 + 1
