"""Which processes are a job's, what they have, and how often one looks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from broker import clock
from fleet import watch
from fleet.limits import Limit
from fleet.room import Grant
from fleet.watch import Process, Watch, Watched, family

_MIB = 2**20


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


@pytest.mark.parametrize("look", [watch.processes, watch._processes_without_proc])
def test_it_sees_processes_as_they_are(look):
    script = "x = b'x' * (64 * 2**20); print(flush=True); input()"
    before = clock.boottime()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as child:
        assert child.stdout
        child.stdout.readline()
        found = look()[child.pid]
        child.kill()
    assert (found.parent, found.group) == (os.getpid(), child.pid)
    assert 64 * _MIB < found.resident_bytes < 200 * _MIB
    assert before - 1 <= found.started <= clock.boottime() + 1


def _limit(grant: Grant) -> Limit:
    return Limit(grant, None, None)


def test_it_rests_where_there_is_nothing_to_look_at():
    one = Watch(lambda _: None)
    assert one.next_time == float("inf")
    one.add("a", Watched(_limit(Grant(cpus=2, cpu_ids=(0, 1))), lambda: 0))
    assert one.next_time == float("inf")
    one.add("b", Watched(_limit(Grant(memory_bytes=_MIB)), lambda: 0))
    assert one.next_time < clock.monotonic() + 1
    one.remove("b")
    assert one.next_time == float("inf")


def test_who_has_too_much_is_named(eventually):
    script = "x = b'x' * (64 * 2**20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as child:
        assert child.stdout
        child.stdout.readline()
        one = Watch(lambda _: None)
        limits = {
            name: _limit(Grant(memory_bytes=size * _MIB)) for name, size in (("low", 32), ("high", 512))
        }
        for name, limit in limits.items():
            one.add(name, Watched(limit, lambda: child.pid))
        eventually(lambda: one.look() == ["low"], timeout_seconds=30)
        child.kill()
    assert limits["low"].ran_out
    assert not limits["high"].ran_out
    assert limits["high"].seen_bytes >= 64 * _MIB


def test_of_a_function_its_executor_and_what_was_there_before_do_not_count():
    limit = _limit(Grant(memory_bytes=_MIB))
    one = Watched(limit, lambda: 10, is_function=True)
    late, early = limit.made_at + 1, limit.made_at - 1
    assert not one.counts(10, _process(1, 10, late))
    assert not one.counts(11, _process(10, 10, early))
    assert one.counts(12, _process(10, 10, late))
