"""Which processes are a job's, and what they have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from broker import clock
from fleet import processes
from fleet.processes import Process, Table, family, peak_bytes

_MIB = 2**20
_SAYS = "import sys; print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def start():
    """`start(program)`: a Python, leader of a group, that is ready, and ends with the test."""
    started = []

    def run(program: str) -> int:
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(child)
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        return child.pid

    yield run
    for child in started:
        child.communicate()


def _process(parent: int, group: int, started: float = 1.0, size: int = 0) -> Process:
    return Process(parent, group, started, size)


def test_a_jobs_processes_are_its_group_and_what_descends_from_it():
    found = {
        1: _process(0, 1),
        5: _process(1, 5),
        10: _process(5, 10),
        11: _process(10, 10),
        12: _process(11, 12),  # a session of its own
        13: _process(12, 12),
        20: _process(5, 20),
    }
    assert set(family(found, 10, {})) == {10, 11, 12, 13}


def test_one_that_lost_its_parent_stays_known_but_not_its_number():
    found = {10: _process(1, 10), 12: _process(1, 12, 7.0), 13: _process(12, 12), 14: _process(1, 14, 9.0)}
    assert set(family(found, 10, {12: 7.0, 14: 8.0})) == {10, 12, 13}


@pytest.mark.parametrize("look", [processes.processes, processes._processes_without_proc])
def test_it_sees_processes_as_they_are(look, start):
    before = clock.boottime()
    pid = start(f"x = b'x' * (64 * 2**20); {_SAYS}")
    found = look()[pid]
    assert (found.parent, found.group) == (os.getpid(), pid)
    assert 64 * _MIB < found.resident_bytes < 200 * _MIB
    assert before - 1 <= found.started <= clock.boottime() + 1


@pytest.mark.parametrize("is_read", [False, True], ids=["walked", "all read"])
def test_a_child_that_a_thread_started_and_one_that_lost_its_parent_are_found(start, is_read, eventually):
    orphan = "subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=subprocess.DEVNULL)"
    middle = f"import subprocess; print({orphan}.pid, flush=True); input()"
    run = f"child = subprocess.Popen([sys.executable, '-c', {middle!r}], stdin=subprocess.PIPE)"
    program = f"""
import subprocess, sys, threading
def run():
    global child
    {run.replace("stdin=", "stdout=subprocess.PIPE, stdin=")}
    child.stdout.readline()
    threading.Event().wait()
threading.Thread(target=run, daemon=True).start()
while 'child' not in globals(): pass
print('ready', flush=True)
sys.stdin.readline()
child.communicate(b'\\n')
sys.stdin.read()
"""
    leader = start(program)

    def members(known=()) -> dict[int, Process]:
        table = Table()
        if is_read:
            table.read_all()
        return table.family(leader, dict(known))

    found = eventually(lambda: len(now := members()) == 3 and now)
    (last,) = [pid for pid, one in found.items() if one.parent not in (leader, os.getpid())]
    try:
        os.kill(found[last].parent, 9)
        known = {pid: one.started for pid, one in found.items()}
        eventually(lambda: last in members(known) and members(known)[last].parent != found[last].parent)
        assert last not in members({last: known[last] - 1})
    finally:
        os.kill(last, 9)


def test_the_most_that_was_given_back_counts(start):
    had = peak_bytes([start(f"x = bytearray(60 * 2**20); del x; {_SAYS}")])
    assert 60 * _MIB <= had < 100 * _MIB


def test_nobody_has_nothing():
    done = subprocess.Popen(["true"])
    done.wait()
    assert peak_bytes([done.pid]) == 0
    assert Table().family(done.pid, {done.pid: 1.0}) == {}
