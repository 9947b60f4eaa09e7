"""The files a command writes to, and the folder it runs in: used again where nobody could tell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.work import Claim
from fleet.outputs import MARKER, Folders, OutputFiles, Outputs, WorkingFolders

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="leases on files are Linux's")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    folders = Folders(str(tmp_path))
    folders.create()
    return folders


@pytest.fixture
def outputs(folders: Folders) -> Iterator[Outputs]:
    outputs = Outputs(folders)
    yield outputs
    outputs.clear()
    assert not [path for path in folders.output.glob("[!.]*") if path.stat().st_size == 0]


def claim(job_id: str) -> Claim:
    return Claim(job_id, "default", "7:x", {})


def inodes(files: OutputFiles) -> set[int]:
    return {os.fstat(files.stdout).st_ino, os.fstat(files.stderr).st_ino}


def test_empty_files_serve_the_next_job_under_its_name(outputs, folders):
    first = outputs.open(claim("a"))
    known = inodes(first)
    outputs.close(first)
    second = outputs.open(claim("b"))
    assert inodes(second) == known
    assert {path.name for path in folders.output.glob("[!.]*")} == {"b.7.out", "b.7.err"}
    os.write(second.stdout, b"out\n")
    os.write(second.stderr, b"err\n")
    assert (folders.output / "b.7.out").read_text() == "out\n"
    assert (folders.output / "b.7.err").read_text() == "err\n"
    tails = outputs.close(second, 100)
    assert (tails.stdout, tails.stderr) == (b"out\n", b"err\n")


def test_a_file_that_something_of_the_job_holds_open_is_never_anothers(outputs, folders):
    files = outputs.open(claim("a"))
    known = inodes(files)
    with subprocess.Popen(
        ["sh", "-c", "read line; echo late"], stdin=subprocess.PIPE, stdout=files.stdout, stderr=files.stderr
    ) as stray:
        outputs.close(files)
        next_files = outputs.open(claim("b"))
        assert not inodes(next_files) & known
        stray.communicate(b"\n")
    assert outputs.close(next_files, 100).stdout == b""


@pytest.mark.parametrize("what", ["link", "chmod", "replace", "remove"])
def test_a_file_that_the_job_did_something_to_is_not_used_again(outputs, folders, what):
    files = outputs.open(claim("a"))
    known, path = inodes(files), Path(files.stdout_path)
    err = os.fstat(files.stderr).st_ino
    held = os.open(path, os.O_PATH)  # lest its number be given to the next file
    {
        "link": lambda: os.link(path, folders.root / "kept"),
        "chmod": lambda: path.chmod(0o600),
        "replace": lambda: (path.rename(folders.root / "kept"), path.touch()),
        "remove": path.unlink,
    }[what]()
    outputs.close(files)
    again = outputs.open(claim("b"))
    assert inodes(again) & known == {err}
    os.close(held)
    outputs.close(again)


def test_a_spare_that_somebody_removed_is_no_loss(outputs, folders):
    outputs.close(outputs.open(claim("a")))
    for path in folders.output.iterdir():
        path.unlink()
    files = outputs.open(claim("b"))
    assert {path.name for path in folders.output.glob("[!.]*")} == {"b.7.out", "b.7.err"}
    outputs.close(files)


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_folder_whose_rights_the_job_took_is_not_given_to_the_next(folders, mode):
    working = WorkingFolders(folders, "w-0")
    first = Path(working.enter("a"))
    first.chmod(mode)
    working.leave(str(first))
    second = Path(working.enter("b"))
    assert first.exists()
    assert second.stat().st_mode & 0o777 != mode
    (second / "result").touch()
    first.chmod(0o755)


def test_a_folder_left_empty_serves_the_next_job_and_one_with_something_in_it_is_kept(folders):
    working = WorkingFolders(folders, "w-0")
    first = Path(working.enter("a"))
    known = first.stat().st_ino
    working.leave(str(first))
    second = Path(working.enter("b"))
    assert second.stat().st_ino == known
    (second / "result").write_text("kept")
    working.leave(str(second))
    third = Path(working.enter("c"))
    assert (second / "result").read_text() == "kept"
    (third / "gone").touch()
    (third / "gone").unlink()
    inode = third.stat().st_ino
    working.leave(str(third))
    fourth = Path(working.enter("d"))
    assert (fourth.stat().st_ino, list(fourth.iterdir())) == (inode, [])
    (fourth / "quick").touch()
    working.leave(str(fourth))
    assert (fourth / "quick").exists()
    working.close()
    assert not [path for path in folders.run.iterdir() if "spare" in path.name]


def test_a_folder_that_is_put_aside_is_nobodys_and_serves_a_later_job(folders):
    working, another = WorkingFolders(folders, "w-0"), WorkingFolders(folders, "w-1")
    first = Path(working.enter("a"))
    known = first.stat().st_ino
    working.leave(str(first))
    working.put_aside()
    assert not first.exists()
    again = Path(another.enter("a"))  # the job runs again, with another worker of this host
    assert Path(working.enter("b")).stat().st_ino == known
    assert again.exists()
    another.leave(str(again))
    for each in (working, another):
        each.close()
    assert sorted(path.name for path in folders.jobs.glob("[!.]*")) == ["b"]
    assert not [path for path in folders.run.iterdir() if "spare" in path.name]


# --- what is removed when it is old ----------------------------------------------------------------

WEEK_SECONDS = 7 * 86400


def leave_old(root: Path) -> list[Path]:
    """What two jobs left, and what somebody else keeps there: untouched for long, all of it."""
    for name in ("jobs/j1/x", "jobs/letters.d/x", "jobs/file", "output/j1.7.out", "output/photo.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "jobs/link").unlink(missing_ok=True)
    (root / "jobs/link").symlink_to(root)
    left = [path for name in ("jobs", "output") for path in (root / name).iterdir() if path.name != MARKER]
    for path in left:
        os.utime(path, (0, 0), follow_symlinks=False)
    return left


def prune(folders: Folders, fleet: str = "f1") -> int:
    return folders.prune(fleet, WEEK_SECONDS, set)


def test_what_jobs_left_is_pruned_and_nothing_else(folders):
    left = leave_old(folders.root)
    assert prune(folders) == 2
    gone = {folders.jobs / "j1", folders.output / "j1.7.out"}
    assert {path for path in left if not os.path.lexists(path)} == gone
    leave_old(folders.root)
    assert folders.prune("f1", WEEK_SECONDS, lambda ids: set(ids) - {"j1"}) == 0, "Redis keeps it"
    os.utime(folders.jobs / "j1")
    assert prune(folders) == 1


def test_nothing_is_pruned_in_a_folder_that_was_there_before(tmp_path):
    left = leave_old(tmp_path)
    folders = Folders(str(tmp_path))
    folders.create()
    assert prune(folders) == 0
    assert all(map(os.path.lexists, left))


def test_nothing_is_pruned_where_two_fleets_are_at_work(folders):
    assert (prune(folders, "f1"), prune(folders, "f2")) == (0, 0)
    left = leave_old(folders.root)
    assert (prune(folders, "f1"), prune(folders, "f2")) == (0, 0)
    assert all(map(os.path.lexists, left))
