"""Cgroups for jobs: which are made, and how, where the files are those of version 1 or 2."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fleet import cgroup
from fleet.process import began

_V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
_V2 = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
_FILES = {
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    2: ("memory.max", "memory.swap.max", "memory.oom.group"),
}


@pytest.fixture
def machine(tmp_path):
    """`machine(2, "/unit")`: a root, and our cgroup there; as the kernel, it has files in each new one."""

    def make(version: int, own: str, **files: str) -> tuple[Path, Path]:
        number, mount, name = ("0:", _V2, "cgroup") if version == 2 else ("4:memory", _V1, "cgroup/memory")
        folder = tmp_path / "sys/fs" / name / own.strip("/")
        folder.mkdir(parents=True)
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{number}:{own}\n")
        (tmp_path / "proc/self/mountinfo").write_text(f"{mount}\n")
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return tmp_path, folder

    return make


@pytest.fixture
def kernel(monkeypatch):
    """Whoever makes a folder finds the files of a cgroup in it; they go with it."""
    mkdir, rmdir = Path.mkdir, Path.rmdir

    def make(self: Path, *args: object, **how: object) -> None:
        mkdir(self, *args, **how)  # type: ignore[arg-type]
        for name in ("cgroup.procs", *_FILES[1], *_FILES[2]):
            (self / name).touch()

    def remove(self: Path) -> None:
        if not (self / "cgroup.procs").read_text().strip():
            for name in ("cgroup.procs", *_FILES[1], *_FILES[2]):
                (self / name).unlink()
        rmdir(self)

    monkeypatch.setattr(Path, "mkdir", make)
    monkeypatch.setattr(Path, "rmdir", remove)


def _delegated(own: Path, pids: str, controllers: str = "cpu memory pids") -> None:
    (own / "cgroup.controllers").write_text(controllers)
    (own / "cgroup.subtree_control").write_text("")
    (own / "cgroup.procs").write_text(pids)


@pytest.mark.usefixtures("kernel")
def test_of_version_1_a_job_has_one_below_ours(machine):
    root, own = machine(1, "/jobs/7")
    groups = cgroup.prepared(root)
    assert groups
    group = groups.make("j1.5", 2**28)
    (folder,) = own.glob("rq-fleet.*/j1.5")
    assert {name: (folder / name).read_text() for name in _FILES[1]} == dict.fromkeys(_FILES[1], str(2**28))
    assert group.entrance == str(folder / "cgroup.procs")
    groups.remove(group)
    assert not folder.exists()
    groups.close()
    assert not list(own.glob("rq-fleet.*"))


@pytest.mark.usefixtures("kernel")
def test_of_version_2_our_processes_move_aside_and_a_job_has_one_beside_them(machine, monkeypatch):
    root, own = machine(2, "/unit")
    _delegated(own, f"{os.getpid()}\n")
    write = Path.write_text

    def move(self: Path, text: str, *args: object) -> int:
        if self.name == "cgroup.procs" and self.parent != own:
            write(own / "cgroup.procs", "")  # who enters one leaves the other
        return write(self, text)

    monkeypatch.setattr(Path, "write_text", move)
    groups = cgroup.prepared(root)
    assert groups
    (leaf,) = own.glob("rq-fleet.*")
    assert (leaf / "cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+memory"
    group = groups.make("j1.5", 2**28)
    (folder,) = own.glob("rq-fleet.*j1.5")
    assert [(folder / name).read_text() for name in _FILES[2]] == [str(2**28), "0", "1"]
    (folder / "memory.events").write_text("low 0\noom 1\noom_kill 2\noom_group_kill 1\n")
    (folder / "memory.peak").write_text("12345\n")
    assert (group.kills(), group.peak_bytes()) == (2, 12345)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("why", ["a stranger", "no controller", "may not be written"])
def test_where_it_is_not_ours_alone_there_is_none(machine, why):
    root, own = machine(2, "/session")
    _delegated(own, "1\n" if why == "a stranger" else "", "" if why == "no controller" else "memory")
    if why == "may not be written":
        (own / "cgroup.subtree_control").unlink()
        (own / "cgroup.subtree_control").mkdir(exist_ok=True)
    assert cgroup.prepared(root) is None
    assert not list(own.glob("rq-fleet.*"))


@pytest.mark.usefixtures("kernel")
def test_without_cgroups_there_is_none(tmp_path):
    assert cgroup.prepared(tmp_path) is None


@pytest.mark.usefixtures("kernel")
def test_what_the_dead_left_is_removed_and_nothing_else(machine):
    root, own = machine(1, "/")
    alive = os.getppid()
    kept = [f"rq-fleet.{alive}.{began(alive)}", "rq-fleet.x", "rq-fleet", "others"]
    for name in (*kept, f"rq-fleet.{alive}.1", f"rq-fleet.{alive}.1.j1.5"):
        (own / name).mkdir()
        (own / name / "j1.5").mkdir()
    groups = cgroup.prepared(root)
    assert groups
    groups.close()
    assert sorted(folder.name for folder in own.iterdir() if folder.is_dir()) == sorted(kept)
    assert all((own / name / "j1.5").exists() for name in kept)


@pytest.mark.usefixtures("kernel")
def test_what_a_job_left_running_is_killed_with_its_group(machine):
    root, _ = machine(1, "/")
    groups = cgroup.prepared(root)
    assert groups
    group = groups.make("j1.5", 2**28)
    with subprocess.Popen(["sleep", "600"]) as left:
        Path(group.entrance).write_text(f"{left.pid}\n")
        groups.remove(group)
        assert left.wait(30) == -signal.SIGKILL
    assert Path(group.entrance).exists(), "its process was still there"
    Path(group.entrance).write_text("")
    groups.sweep()
    assert not Path(group.entrance).exists()
