"""The ledger: what one worker of a host was promised no other is, and what the dead held is free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleet import ledger, resources
from fleet.ledger import Share, Wish, part
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
        ledger.promise(file, f"w{process.pid}", wish)
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
    return ledger.promise(file, "w0", Wish(**wish))


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
share = ledger.promise(Path(sys.argv[1]), "w", Wish(number=int(sys.argv[2]), of=8))
print(*share.cpu_ids, flush=True)
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
