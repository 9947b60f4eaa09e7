"""The files a command writes to, and the folder it runs in: used again where nobody could tell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.work import Claim
from fleet.outputs import Folders, OutputFiles, Outputs, WorkingFolders

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
    assert not [path for path in folders.output.iterdir() if path.stat().st_size == 0]


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
    assert {path.name for path in folders.output.iterdir()} == {"b.7.out", "b.7.err"}
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
    assert {path.name for path in folders.output.iterdir()} == {"b.7.out", "b.7.err"}
    outputs.close(files)


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
