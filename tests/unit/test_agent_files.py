"""The agent's part about files, as it is sent: what it may not do, whatever it is asked for."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleet.copies import Copies
from fleet.launchers import agent, agent_files, base
from fleet.launchers.local import LocalLauncher
from fleet.launchers.remote_files import RemoteFile, RemoteFolder, Removed, Users, Wanted, _file
from fleet.outputs import Folders
from fleet.series import About, JobSample, Series, opened
from fleet.series import files as files_of_series

EMPTY = hashlib.sha256().hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Folders(str(tmp_path / "work")).create()
    (tmp_path / "work/jobs/j").mkdir()
    return tmp_path / "work"


def at(root: Path, work: Callable[[RemoteFolder], Awaitable[Any]]) -> Any:
    """Do `work` with the files below `root`, of workers host1-0, host1-1 ..."""

    async def run() -> Any:
        return await work(LocalLauncher().files(str(root), "host1"))

    return asyncio.run(run())


def fetched(root: Path, here: Path, *wanted: Wanted) -> Copies:
    copies = Copies(here, durable=False, on_bytes=lambda _: None)
    here.mkdir(exist_ok=True)
    at(root, lambda files: files.fetch(wanted, copies))
    return copies


def is_as_it_is(path: Path, root: Path) -> RemoteFile:
    info = path.lstat()
    return RemoteFile(str(path.relative_to(root)), info.st_size, info.st_mtime_ns)


def test_its_parts_define_no_name_twice():
    """They are one program there: what defines a name again would replace it for both."""
    text = agent.program({"verb": "list_files"})
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names))
    assert "def send_files" not in agent.program({"verb": "start"}), "it is not sent in vain"
    assert set(agent.FILE_VERBS) <= set(agent.VERBS)


def test_no_symbolic_link_is_followed_wherever_it_came_in(root, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("hush")
    (root / "jobs/j/folder").symlink_to(tmp_path / "outside")
    (root / "jobs/j/file").symlink_to(tmp_path / "outside/secret")
    os.mkfifo(root / "jobs/j/pipe")
    paths = ["jobs/j/folder/secret", "jobs/j/file", "jobs/j/pipe"]
    copies = fetched(root, tmp_path / "here", *(Wanted(RemoteFile(p, 4, 0), 0, EMPTY) for p in paths))
    assert copies.fetched_bytes == 0
    assert "jobs/j/file" in [problem.path for problem in copies.problems]
    files = [RemoteFile("jobs/j/folder/secret", 4, (tmp_path / "outside/secret").stat().st_mtime_ns)]
    assert at(root, lambda remote: remote.remove(files, [])).files == 0
    at(root, lambda remote: remote.clear(force=False))
    assert (tmp_path / "outside/secret").read_text() == "hush"
    assert not (root / "jobs/j").exists()


def test_a_file_is_removed_only_as_it_was_when_it_was_fetched(root):
    for name in ("same", "longer", "rewritten", "gone"):
        (root / "jobs/j" / name).write_text(name)
    known = [is_as_it_is(path, root) for path in sorted((root / "jobs/j").iterdir())]
    (root / "jobs/j/longer").write_text("longer than it was")
    (root / "jobs/j/rewritten").unlink()
    (root / "jobs/j/rewritten").write_text("rewritteN")
    (root / "jobs/j/gone").unlink()
    removed = at(root, lambda files: files.remove(known, []))
    assert removed == Removed(files=1, total_bytes=4, kept=2)
    assert sorted(path.name for path in (root / "jobs/j").iterdir()) == ["longer", "rewritten"]


def live_worker(root: Path, name: str) -> None:
    started = psutil.Process().create_time()
    (root / f"run/{name}.json").write_text(json.dumps({"pid": os.getpid(), "start_time": started}))


def test_nothing_is_removed_under_a_worker_that_started_meanwhile(root):
    (root / "jobs/j/x").write_text("x")
    (root / "log/host1-0.log").write_text("log")
    known = [is_as_it_is(root / path, root) for path in ("jobs/j/x", "log/host1-0.log")]
    live_worker(root, "host1-0")
    for work in (lambda files: files.remove(known, []), lambda files: files.clear(force=False)):
        with pytest.raises(base.InUse, match="host1-0"):
            at(root, work)
    assert at(root, lambda files: files.users()) == Users({"host1-0": True}, frozenset())
    assert at(root, lambda files: files.remove(known, ["host1-0"])) == Removed(1, 1, kept=1)
    assert (root / "log/host1-0.log").exists(), "what it writes stays even where it is known to live"


def test_what_begins_otherwise_is_sent_from_its_start(root, tmp_path):
    (root / "jobs/j/x").write_text("hello world")
    (tmp_path / "here/jobs/j").mkdir(parents=True)
    (tmp_path / "here/jobs/j/x").write_text("HELLO")
    copies = Copies(tmp_path / "here", durable=True, on_bytes=lambda _: None)
    wanted = copies.wanted([is_as_it_is(root / "jobs/j/x", root)])
    assert wanted[0].offset == 5
    at(root, lambda files: files.fetch(wanted, copies))
    assert (tmp_path / "here/jobs/j/x").read_text() == "hello world"
    assert (tmp_path / "here/jobs/j/x.~1~").read_text() == "HELLO"
    assert copies.whole == [], "it may not be on the disk yet"
    copies.make_safe()
    assert [file.path for file in copies.whole] == ["jobs/j/x"]


def test_what_arrives_damaged_is_no_copy(tmp_path):
    (tmp_path / "jobs/j").mkdir(parents=True)
    (tmp_path / "jobs/j/x").write_text("hello")
    copies = Copies(tmp_path, durable=True, on_bytes=lambda _: None)
    (want,) = copies.wanted([RemoteFile("jobs/j/x", 11, 1)])
    copies.begin(want, 5, want.file)
    copies.data(b" world")
    copies.end(11, hashlib.sha256(b"hello w0rld").hexdigest())
    copies.make_safe()
    assert (tmp_path / "jobs/j/x").read_text() == "hello", "what had come before is kept"
    assert (copies.whole, copies.problems[0].reason) == ([], "arrived damaged")


def test_whatever_is_in_the_way_here_is_put_aside(tmp_path, root):
    here = tmp_path / "here"
    here.mkdir()
    (here / "jobs").write_text("a file where a folder is to be")
    (root / "jobs/j/x").write_text("x")
    (root / "jobs/j/y").write_text("y")
    copies = fetched(root, here, *(Wanted(is_as_it_is(root / f"jobs/j/{n}", root), 0, EMPTY) for n in "x"))
    (here / "jobs/j/y").symlink_to(tmp_path / "elsewhere")
    fetched(root, here, Wanted(is_as_it_is(root / "jobs/j/y", root), 0, EMPTY))
    assert (here / "jobs/j/x").read_text() == "x"
    assert (here / "jobs/j/y").read_text() == "y"
    assert not (tmp_path / "elsewhere").exists()
    assert (here / "jobs.~1~").read_text() == "a file where a folder is to be"
    assert copies.aside == 1


@pytest.mark.parametrize(
    "path",
    ["../x", "jobs/../../x", "/etc/passwd", "jobs//x", "jobs/./x", "", "jobs/a\0b", ".lock", "jobs", "run/x"],
)
def test_a_path_that_leads_out_of_the_folder_is_refused(path):
    with pytest.raises(base.CommandFailed):
        _file(path, 1, 1)


# --- what a host may say ---------------------------------------------------------------------------


def frame(**document: object) -> tuple[bytes, bytes]:
    return b"J", json.dumps({"index": 0, **document}).encode()


BEGIN = frame(offset=0, size=4, mtime_ns=1)


@pytest.mark.parametrize(
    "said",
    [
        [frame(offset=3, size=11, mtime_ns=1)],
        [frame(offset=2**70, size=11, mtime_ns=1)],
        [frame(offset=0, size=-1, mtime_ns=1)],
        [frame(offset=0, size=4, mtime_ns="now")],
        [frame(index=-1, offset=0, size=4, mtime_ns=1)],
        [frame(index=1, offset=0, size=4, mtime_ns=1)],
        [(b"J", b"[" * 100000)],
        [(b"D", b"x")],
        [BEGIN, (b"D", b"xxxxx")],
        [BEGIN, (b"H", (2**62).to_bytes(8, "big"))],
        [frame(offset=0, size=2**62, mtime_ns=1), (b"H", (2**62).to_bytes(8, "big"))],
        [BEGIN, (b"H", b"x")],
        [BEGIN, (b"J", b'{"index": 0, "sha256": ""}')],
    ],
)
def test_a_host_that_lies_destroys_nothing_that_came_earlier(tmp_path, said):
    (tmp_path / "jobs/j").mkdir(parents=True)
    (tmp_path / "jobs/j/x").write_text("hello")

    async def lie(_: Any) -> AsyncGenerator[tuple[bytes, bytes], None]:
        for one in said:
            yield one

    copies = Copies(tmp_path, durable=True, on_bytes=lambda _: None)
    wanted = copies.wanted([RemoteFile("jobs/j/x", 11, 1)])
    with pytest.raises(base.CommandFailed):
        asyncio.run(RemoteFolder(lie, None, "host1").fetch(wanted, copies))
    copies.close()
    assert "hello" in [path.read_text() for path in (tmp_path / "jobs/j").glob("x*")]


def test_what_counts_as_safe_is_on_the_disk_with_its_folders(root, tmp_path, monkeypatch):
    """And not by the loop, which others wait for."""
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        loops = threading.current_thread() is threading.main_thread()
        synced.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), loops))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    (root / "jobs/j/deep").mkdir()
    for name in ("x", "deep/y"):
        (root / "jobs/j" / name).write_text(name)
    top = tmp_path / "new/logs"
    copies = Copies(top / "host1", durable=True, on_bytes=lambda _: None)

    async def run() -> None:
        remote = LocalLauncher().files(str(root), "host1")
        listing = await remote.listing()
        with copies.alone():
            await remote.fetch(copies.wanted(listing.files), copies)
            assert (synced, copies.whole) == ([], [])
            await asyncio.to_thread(copies.make_safe)

    asyncio.run(run())
    assert len(copies.whole) == 2
    folders = ["", "host1", "host1/jobs", "host1/jobs/j", "host1/jobs/j/deep"]
    files = ["host1/jobs/j/x", "host1/jobs/j/deep/y"]
    wanted = {*(str(top / name) for name in (*folders, *files)), str(tmp_path), str(tmp_path / "new")}
    assert {path for path, _ in synced} == wanted
    assert len(synced) == len(wanted), "each once"
    assert not any(by_the_loop for _, by_the_loop in synced)


def test_a_long_list_gives_signs_of_life_before_it_says_anything(root, monkeypatch, capfdbinary):
    for number in range(50):
        (root / f"jobs/j/{number}").write_text("x")
    monkeypatch.setattr(agent_files, "TICK_SECONDS", -1.0)
    agent_files.list_files({"output_dir": str(root), "base": "host1"})
    before, _, _ = capfdbinary.readouterr().out.partition(b"J")
    assert before.count(b".\0\0\0\0") >= 50 + len(["j", ".rq-fleet"])


# --- series: databases under way -------------------------------------------------------------------


def _note(root: Path, count: int) -> tuple[Series, Path]:
    one = Series(root / "log", About("host1", "host1-0", 1, 1), 2**30, 1000.0)
    for at in range(count):
        one.note_job(float(at), f"j{at}", 7, JobSample(1.0, 1, 1))
    one.close()
    return one, next(files_of_series(root))


def _is_whole(path: Path) -> int:
    """How many jobs it knows, if nothing is wrong with it."""
    with opened(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (count,) = database.execute("SELECT count(*) FROM jobs").fetchone()
        return int(count)


def test_a_series_comes_whole_while_it_is_written_to(root, tmp_path):
    _, path = _note(root, 10)
    is_over, counts = threading.Event(), []
    (tmp_path / "here").mkdir()

    def write() -> None:
        while not is_over.is_set():
            with opened(path) as database:
                database.executemany("INSERT INTO jobs (at, attempt) VALUES (?, 1)", [(1.0,)] * 500)
                database.execute("UPDATE jobs SET cpus = cpus + 1 WHERE rowid % 50 = 0")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(8):
            copies = Copies(tmp_path / "here", durable=False, on_bytes=lambda _: None)
            wanted = copies.wanted(at(root, lambda files: files.listing()).files)
            at(root, lambda files, wanted=wanted, copies=copies: files.fetch(wanted, copies))
            assert copies.problems == []
            counts.append(_is_whole(tmp_path / "here" / path.relative_to(root)))
    finally:
        is_over.set()
        writer.join()
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert [file.name for file in (tmp_path / "here/log").iterdir()] == [path.name], (
        "an older copy is replaced"
    )
    known = at(root, lambda files: files.listing()).files
    assert at(root, lambda files: files.remove(known, [])).files == 1


def test_what_a_killed_writer_left_is_undone_first(root, tmp_path):
    _, path = _note(root, 10)
    program = f"""
import os, sqlite3
database = sqlite3.connect({str(path)!r})
database.execute("PRAGMA cache_size = 1")
database.executemany("INSERT INTO jobs (at) VALUES (?)", [(1.0,)] * 20000)
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    assert path.with_name(f"{path.name}-journal").exists()
    (file,) = at(root, lambda files: files.listing()).files
    copies = fetched(root, tmp_path / "here", Wanted(file, 0, EMPTY))
    assert copies.problems == []
    assert _is_whole(tmp_path / "here" / file.path) == 10


def test_what_is_no_database_comes_as_it_is(root, tmp_path):
    (root / "log/host1-0.series.1.sqlite").write_text("no database")
    (root / "jobs/j/x.sqlite-journal").write_text("a job's")
    files = at(root, lambda files: files.listing()).files
    fetched(root, tmp_path / "here", *(Wanted(file, 0, EMPTY) for file in files))
    assert (tmp_path / "here/log/host1-0.series.1.sqlite").read_text() == "no database"
    assert (tmp_path / "here/jobs/j/x.sqlite-journal").read_text() == "a job's"
