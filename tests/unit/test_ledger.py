"""The ledger: what one worker of a host was promised no other is, and what the dead held is free."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleet import ledger, resources
from fleet.ledger import Elsewhere, Share, Wish, part
from fleet.process import began
from fleet.resources import Gpu, Resources

_GIB = 2**30
_GPUS = tuple(Gpu("A100", 40 * _GIB, index) for index in range(4))


@pytest.fixture
def host(monkeypatch):
    """Eight CPUs, 64 GiB, four GPUs."""
    monkeypatch.setattr(resources, "cpu_ids", lambda: tuple(range(8)))
    monkeypatch.setattr(resources, "find_cpus", lambda: 8)
    monkeypatch.setattr(resources, "cpu_quotas", dict)
    monkeypatch.setattr(resources, "memory_limits", lambda: {"": 64 * _GIB})
    monkeypatch.setattr(resources, "find_gpus", lambda: _GPUS)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "ledger" / "this.json"


@pytest.fixture
def other(file, host):
    """`other(Wish(...))`: another process has its promise, until `.kill()`."""
    started = []

    def promise(wish: Wish) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "600"])
        started.append(process)
        before = ledger._read(file)
        ledger.Promise(file, f"w{process.pid}", wish)
        (mine,) = [row for row in ledger._read(file) if row.pid == os.getpid()]
        theirs = {
            **vars(mine),
            "pid": process.pid,
            "began": began(process.pid),
        }
        file.write_text(json.dumps([*map(vars, before), theirs]))
        return process

    yield promise
    for process in started:
        process.kill()
        process.wait()


def mine(file: Path, **wish: int) -> Share:
    return ledger.Promise(file, "w0", Wish(**wish)).share


@pytest.mark.usefixtures("host")
def test_the_first_gets_all_there_is(file):
    assert mine(file) == Share(Resources(8, 64 * _GIB, _GPUS), tuple(range(8)))
    assert mine(file).total.cpus == 8, "its own row counts for nothing"


def test_the_second_gets_what_is_left(file, other):
    other(Wish(cpus=3, memory_bytes=24 * _GIB, num_gpus=1))
    assert mine(file) == Share(Resources(5, 40 * _GIB, _GPUS[1:]), (3, 4, 5, 6, 7))


def test_what_nobody_left_is_nothing(file, other):
    other(Wish())
    assert mine(file) == Share(Resources(0, 0, ()), ())


def test_what_the_dead_held_is_free(file, other):
    process = other(Wish())
    process.kill()
    process.wait()
    assert mine(file).total == Resources(8, 64 * _GIB, _GPUS)


def test_the_row_of_a_number_that_is_anothers_by_now_counts_for_nothing(file, other):
    other(Wish())
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{**row, "began": row["began"] - 1} for row in rows]))
    assert mine(file).total.cpus == 8


def test_siblings_divide_the_host_whatever_their_order(file, other):
    for number in (2, 0):
        other(Wish(number=number, of=3))
    share = mine(file, number=1, of=3)
    assert share == Share(Resources(3, part(64 * _GIB, 1, 3), (_GPUS[3],)), (5, 6, 7))
    rows = ledger._read(file)
    assert sorted(cpu for row in rows for cpu in row.cpu_ids) == list(range(8))
    assert sorted(gpu for row in rows for gpu in row.gpus) == [0, 1, 2, 3]
    assert sum(row.memory_bytes for row in rows) == 64 * _GIB


def test_what_is_said_is_had_with_a_warning_where_it_is_too_much(file, other, caplog):
    other(Wish(cpus=6, num_gpus=4, memory_bytes=_GIB))
    share = mine(file, cpus=4, num_gpus=5, memory_bytes=2 * _GIB)
    assert (share.total.cpus, share.cpu_ids, share.total.memory_bytes) == (4, (), 2 * _GIB)
    assert share.total.gpus == (*_GPUS, Gpu("unknown", 0, 4))
    assert [record.args[1:] for record in caplog.records] == [("CPUs", 2), ("GPUs", 0)]


def test_a_modest_one_takes_no_more_than_is_left(file, other):
    other(Wish(cpus=7))
    assert ledger.look(file).total.cpus == 1
    assert mine(file, cpus=2, memory_bytes=_GIB, is_modest=True) == Share(Resources(1, 0, ()), (7,))


def test_of_those_that_run_anywhere_the_others_leave_as_many_cpus(file, other):
    other(Wish(cpus=12))
    assert mine(file).total.cpus == 0


def test_a_quota_is_of_all_in_its_cgroup_and_of_nobody_else(file, other, monkeypatch):
    monkeypatch.setattr(resources, "cpu_quotas", lambda: {"/a": 4.5, "/": 7.0})
    monkeypatch.setattr(resources, "find_cpus", lambda: 4)
    monkeypatch.setattr(resources, "memory_limits", lambda: {"": 64 * _GIB, "/a": 16 * _GIB})
    other(Wish(cpus=3, memory_bytes=6 * _GIB))
    assert (mine(file).total.cpus, mine(file).total.memory_bytes) == (1, 10 * _GIB)
    monkeypatch.setattr(resources, "cpu_quotas", lambda: {"/b": 4.5, "/": 7.0})
    monkeypatch.setattr(resources, "memory_limits", lambda: {"": 64 * _GIB, "/b": 16 * _GIB})
    assert (mine(file).total.cpus, mine(file).total.memory_bytes) == (4, 16 * _GIB)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"pid": 1}]', "null"])
def test_a_damaged_file_is_begun_anew(file, text):
    file.parent.mkdir()
    file.write_text(text)
    assert mine(file).total.cpus == 8
    assert len(json.loads(file.read_text())) == 1


@pytest.mark.usefixtures("host")
def test_where_there_can_be_no_file_it_gets_what_it_would_have_alone(tmp_path, caplog):
    (tmp_path / "ledger").write_text("no folder")
    assert mine(tmp_path / "ledger" / "this.json").total.cpus == 8
    assert "no ledger" in caplog.text
    ledger.release(tmp_path / "ledger" / "this.json")


@pytest.mark.usefixtures("host")
def test_who_leaves_leaves_no_row(file):
    mine(file)
    ledger.release(file)
    assert json.loads(file.read_text()) == []


_MANY = """
import sys
from pathlib import Path
from fleet import ledger, resources
from fleet.ledger import Wish
resources.cpu_ids, resources.find_cpus, resources.cpu_quotas = lambda: tuple(range(8)), lambda: 8, dict
has = ledger.Promise(Path(sys.argv[1]), "w", Wish(number=int(sys.argv[2]), of=8))
print(*has.share.cpu_ids, flush=True)
sys.stdin.read()
"""


def test_many_at_once_get_each_a_cpu_of_its_own(file):
    argv = [sys.executable, "-c", _MANY, str(file)]
    started = [
        subprocess.Popen([*argv, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(8)
    ]
    try:
        found = [process.stdout.readline().split() for process in started if process.stdout]
    finally:
        for process in started:
            process.communicate("")
    assert sorted(found) == [[str(cpu)] for cpu in range(8)]


def ends(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_who_got_less_takes_what_the_dead_had(file, other, caplog):
    greedy, small = (
        other(Wish(cpus=6, memory_bytes=60 * _GIB, num_gpus=3)),
        other(Wish(cpus=1, memory_bytes=0, num_gpus=0)),
    )
    ours = ledger.Promise(file, "w0", Wish())
    assert ours.share == Share(Resources(1, 4 * _GIB, _GPUS[3:]), (7,))
    assert ours.elsewhere == Elsewhere(7, 60 * _GIB, 3, (f"w{greedy.pid}", f"w{small.pid}"))
    assert f"w{greedy.pid} (process {greedy.pid}), w{small.pid}" in caplog.text
    assert not ours.grow(), "both live"
    ends(greedy)
    assert ours.grow()
    assert ours.share == Share(Resources(7, 64 * _GIB, _GPUS), (0, 1, 2, 3, 4, 5, 7))
    assert ours.elsewhere == Elsewhere(1, 0, 0, (f"w{small.pid}",))
    (row,) = [row for row in ledger._read(file) if row.pid == os.getpid()]
    assert (list(row.cpu_ids), row.memory_bytes, row.gpus) == ([0, 1, 2, 3, 4, 5, 7], 64 * _GIB, [0, 1, 2, 3])
    ends(small)
    assert ours.grow()
    assert (ours.share.total.cpus, ours.elsewhere) == (8, None)


def test_what_it_has_is_never_less_whatever_others_say_they_have(file, other):
    first = other(Wish(cpus=4))
    ours = ledger.Promise(file, "w0", Wish())
    had = ours.share
    other(Wish(cpus=8, num_gpus=4, memory_bytes=64 * _GIB))
    ends(first)
    assert not ours.grow()
    assert ours.share == had


@pytest.mark.parametrize("wish", [Wish(cpus=2, memory_bytes=_GIB, num_gpus=1), Wish(number=0, of=2)])
def test_who_has_what_it_wanted_takes_no_more(file, other, wish, caplog):
    neighbour = other(Wish(cpus=2, memory_bytes=_GIB, num_gpus=1))
    ours = ledger.Promise(file, "w0", wish)
    had = ours.share
    ends(neighbour)
    assert not ours.grow()
    assert (ours.share, ours.elsewhere, caplog.text) == (had, None, "")


def test_it_waits_for_nobody_who_is_at_the_ledger(file, other):
    neighbour = other(Wish(cpus=4))
    ours = ledger.Promise(file, "w0", Wish())
    ends(neighbour)
    with file.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not ours.grow()
    assert ours.grow()
    assert ours.share.total.cpus == 8
