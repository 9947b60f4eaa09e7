"""What the agent does about files: it lists, sends and removes what our layout names in an output folder.

Sent below agent.py with the requests that need it (see `agent.program`). Of an output folder it knows

    log/BASE-N.*           what the workers of this host say; *.series.*.sqlite: what they and jobs used
    output/JOB.FENCE.*     what an attempt printed, and whatever else is kept of it
    jobs/JOB/              the job's working folder, with all that is in it

and nothing else: others may keep files there too. Of `output` and `jobs` it removes nothing unless a
worker made that folder, and left `.rq-fleet` in it (see fleet/outputs.py). `run/`, with its secrets, is
never read. Symbolic links are neither followed nor sent.

Files are sent as frames, between the line `MARK + FRAMES` and the answer of agent.py. A frame is a letter,
the length of what follows in four bytes, big-endian, and so many bytes:

    J  a document of JSON
    D  bytes of the file under way
    H  a hole in it: its length in eight bytes
    .  nothing has come for a while, and we live
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from fleet.launchers import agent

FRAMES = "frames"
#: bytes read, and sent, at once
BLOCK_BYTES = 2**18
#: bytes of a hole told at once: they are hashed, which takes its time
HOLE_BYTES = 2**26
#: seconds without a frame after which one is sent for a sign of life
TICK_SECONDS = 1.0
#: files named in one frame of a list
LISTED_AT_ONCE = 500
#: characters of paths in one frame of a list, before the last
MOST_LISTED = 2**17
#: files that could not be read or removed which are named
MOST_NAMED = 20
#: in a folder that a worker made: the fleets that use it, a line each
MARKER = ".rq-fleet"
MARKED_FOLDERS = ("jobs", "output")
MOST_MARKER_BYTES = 2**16
JOB_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
#: a database that somebody may be writing to; what SQLite puts beside it is no file of its own
SERIES = re.compile(r"log/[\w.-]+\.series\.[\w.-]+\.sqlite", re.ASCII)
JOURNAL = re.compile(rf"{SERIES.pattern}-journal", re.ASCII)
#: seconds to wait for who writes to it
BUSY_SECONDS = 20.0
OUTPUT_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}\.\d+\.[\w.-]+", re.ASCII)


class Frames:
    """Frames on stdout."""

    def __init__(self) -> None:
        self.out = sys.stdout.buffer
        self.flushed = time.monotonic()
        self.out.write(f"\n{agent.MARK}{FRAMES}\n".encode())

    def send(self, kind: bytes, data: bytes = b"") -> None:
        self.out.write(kind + struct.pack(">I", len(data)) + data)
        if self.is_overdue():
            self.out.flush()
            self.flushed = time.monotonic()

    def document(self, value: object) -> None:
        self.send(b"J", json.dumps(value).encode())

    def tick(self) -> None:
        """Give a sign of life if it is time for one."""
        if self.is_overdue():
            self.send(b".")

    def is_overdue(self) -> bool:
        """Whether the other side has heard nothing for long."""
        return time.monotonic() - self.flushed > TICK_SECONDS


# --- what there is ---------------------------------------------------------------------------------


def list_files(request: agent.Json) -> agent.Json:
    """Frames of [path, size, mtime in ns]; answers what was passed over, and what could not be read."""
    frames, rows, listed = Frames(), [], 0
    passed_over, problems = 0, Problems(frames)
    for path, info in named_by_layout(agent.run_dir_of(request).parent, request["base"], problems):
        frames.tick()
        if not stat.S_ISREG(info.st_mode):
            passed_over += not stat.S_ISDIR(info.st_mode)
        # an empty one waits for the next silent job of its worker
        elif (info.st_size or not path.startswith("output/")) and not JOURNAL.fullmatch(path):
            rows.append([path, info.st_size, info.st_mtime_ns])
            listed += len(path)
        if len(rows) >= LISTED_AT_ONCE or listed >= MOST_LISTED:
            frames.document(rows)
            rows, listed = [], 0
    frames.document(rows)
    return {"passed_over": passed_over, **problems.answer()}


def workers_there(request: agent.Json) -> agent.Json:
    """The names of all workers that left a trace in the folder, whether their processes live; its fleets."""
    run_dir = agent.run_dir_of(request)
    workers = [[name, bool(agent.living(run_dir, name))] for name in all_traces(run_dir)]
    marks = [fleets_of(run_dir.parent, folder) for folder in MARKED_FOLDERS]
    return {"workers": workers, "fleets": sorted({fleet for mark in marks for fleet in mark or ()})}


def fleets_of(root: Path, folder: str) -> list[str] | None:
    """The fleets that use a folder which a worker made; None where it is somebody's own."""
    try:
        with parent_of(root, f"{folder}/{MARKER}") as (parent, name):
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except OSError:
        return None
    try:
        return os.read(file, MOST_MARKER_BYTES).decode("ascii", "replace").split()
    finally:
        os.close(file)


def all_traces(run_dir: Path) -> list[str]:
    """The names of all workers that left a note; one folder may serve several hosts."""
    suffixes = re.compile(r"(.+?)(?:\.started|\.config)?\.json")
    found = (suffixes.fullmatch(path.name) for path in run_dir.glob("*.json"))
    return sorted({match[1] for match in found if match})


class Problems:
    """What went wrong with files: [path, reason], the first of them. `frames` tell that we still look."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.named: list[list[str]] = []
        self.count = 0

    def add(self, path: str, exc: OSError) -> None:
        self.count += 1
        if len(self.named) < MOST_NAMED:
            self.named.append([path, exc.strerror or str(exc)])

    def answer(self) -> agent.Json:
        return {"problems": self.named, "failed": self.count}


def named_by_layout(root: Path, base: str, problems: Problems) -> Iterator[tuple[str, os.stat_result]]:
    """(path below `root`, what it is) of all that is ours, folders after what is in them."""
    log_name = re.compile(rf"{re.escape(base)}-\d+\.[\w.-]+", re.ASCII)
    for folder, name in (("log", log_name), ("output", OUTPUT_NAME), ("jobs", JOB_NAME)):
        for path, info in entries(root, folder, problems):
            if not name.fullmatch(path.partition("/")[2]):
                continue
            if stat.S_ISDIR(info.st_mode):
                if folder == "jobs":
                    yield from tree(root, path, problems)
            elif folder != "jobs":
                yield path, info


def entries(root: Path, folder: str, problems: Problems) -> list[tuple[str, os.stat_result]]:
    """What is in a folder, in order of name; nothing of one that is not there, or a symbolic link."""
    try:
        descriptor = opened_folder(root, folder)
    except FileNotFoundError:
        return []
    except OSError as exc:
        linked = exc.errno in (errno.ELOOP, errno.ENOTDIR)
        problems.add(folder, OSError(exc.errno, "is no folder, or a symbolic link") if linked else exc)
        return []
    found = []
    try:
        for name in sorted(os.listdir(descriptor)):  # noqa: PTH208 - there is no path
            problems.frames.tick()
            try:
                found.append((f"{folder}/{name}", os.stat(name, dir_fd=descriptor, follow_symlinks=False)))
            except FileNotFoundError:
                continue  # it went while we looked
    except OSError as exc:
        problems.add(folder, exc)
    finally:
        os.close(descriptor)
    return found


def tree(root: Path, top: str, problems: Problems) -> Iterator[tuple[str, os.stat_result]]:
    """All that is below the folder `top`, and last that folder."""
    todo: list[tuple[str, os.stat_result | None]] = [(top, None)]
    while todo:
        path, info = todo.pop()
        if info is not None:
            yield path, info
            continue
        todo.append((path, os.stat_result((stat.S_IFDIR, *[0] * 9))))
        for inside, what in reversed(entries(root, path, problems)):
            todo.append((inside, None if stat.S_ISDIR(what.st_mode) else what))


def opened_folder(root: Path, folder: str) -> int:
    """A descriptor of a folder below `root`, reached through no symbolic link."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in folder.split("/") if folder else ():
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(part, flags, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = below
    return descriptor


@contextmanager
def parent_of(root: Path, path: str) -> Iterator[tuple[int, str]]:
    """A descriptor of the folder that `path` is in, and its name there."""
    folder, _, name = path.rpartition("/")
    descriptor = opened_folder(root, folder)
    try:
        yield descriptor, name
    finally:
        os.close(descriptor)


# --- sending ---------------------------------------------------------------------------------------


def send_files(request: agent.Json) -> agent.Json:
    """Send each of `files`, [path, offset, SHA-256 of what lies before it].

    Of a file the first frame is {"index", "offset", "size", "mtime_ns"}: it begins at `offset` if what
    lies before is what the other side has, else at 0. The last one has {"size", "sha256"} of the whole, or
    {"error", "gone"}.
    """
    frames = Frames()
    root = agent.run_dir_of(request).parent
    for index, (path, offset, sha256) in enumerate(request["files"]):
        try:
            send_file(frames, root, path, index, offset, sha256)
        except OSError as exc:
            if exc.errno == errno.EPIPE:
                raise
            gone = exc.errno in (errno.ENOENT, errno.ENOTDIR)
            frames.document({"index": index, "error": exc.strerror or str(exc), "gone": gone})
    return {}


def send_file(frames: Frames, root: Path, path: str, index: int, offset: int, sha256: str) -> None:
    """As much of it as there is now: one that grows is not run after."""
    with parent_of(root, path) as (folder, name):
        # O_NONBLOCK: it may have become a pipe, whose writer we would wait for
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(name, flags, dir_fd=folder)
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "is no regular file any more")
        if SERIES.fullmatch(path):
            file, info = held_still(file, root / path)
        digest = hashlib.sha256()
        if not 0 < offset <= info.st_size or not begins_with(frames, file, offset, sha256, digest):
            offset, digest = 0, hashlib.sha256()
        about = {"index": index, "offset": offset, "size": info.st_size, "mtime_ns": info.st_mtime_ns}
        frames.document(about)
        end = send_content(frames, file, offset, info.st_size, digest)
        frames.document({"index": index, "size": end, "sha256": digest.hexdigest()})
    finally:
        os.close(file)


def held_still(file: int, path: Path) -> tuple[int, os.stat_result]:
    """A copy, in place of `file`, of a database between two changes, and what it was then."""
    try:
        import sqlite3
    except ImportError as exc:
        raise OSError(errno.ENOSYS, f"needs SQLite, which this Python lacks: {exc}") from exc
    with tempfile.TemporaryFile() as copy:
        with closing(sqlite3.connect(str(path), timeout=BUSY_SECONDS)) as database:
            with suppress(sqlite3.DatabaseError):  # damaged: it is sent as it is
                try:
                    # what was cut short is undone, and from here on nobody may change it
                    database.execute("BEGIN")
                    database.execute("SELECT count(*) FROM sqlite_master").fetchone()
                except sqlite3.OperationalError as exc:
                    raise OSError(errno.EBUSY, str(exc)) from exc
            info = os.fstat(file)
            with open(file, "rb", closefd=False) as source:
                shutil.copyfileobj(source, copy, BLOCK_BYTES)
        copy.flush()
        descriptor = os.dup(copy.fileno())
    os.close(file)
    return descriptor, info


def begins_with(frames: Frames, file: int, length: int, sha256: str, digest: hashlib._Hash) -> bool:
    """Whether the first `length` bytes have that hash; `digest` is that of these bytes then."""
    at = 0
    while at < length:
        data = os.pread(file, min(BLOCK_BYTES, length - at), at)
        if not data:
            return False
        digest.update(data)
        at += len(data)
        frames.tick()
    return digest.hexdigest() == sha256


def send_content(frames: Frames, file: int, at: int, end: int, digest: hashlib._Hash) -> int:
    """Send and hash what lies between; returns where it ended, earlier if the file was cut meanwhile."""
    zeros = bytes(BLOCK_BYTES)
    while at < end:
        stop, is_hole = extent(file, at, end)
        if is_hole:
            stop = min(stop, at + HOLE_BYTES, os.fstat(file).st_size)
            if stop <= at:
                return at
            for start in range(at, stop, BLOCK_BYTES):
                digest.update(zeros[: stop - start])
            frames.send(b"H", struct.pack(">Q", stop - at))
            at = stop
            continue
        data = os.pread(file, min(BLOCK_BYTES, stop - at), at)
        if not data:
            return at
        digest.update(data)
        frames.send(b"D", data)
        at += len(data)
    return at


def extent(file: int, at: int, end: int) -> tuple[int, bool]:
    """Where the data, or the hole, at `at` ends, and whether it is a hole (lseek(2))."""
    if not hasattr(os, "SEEK_DATA"):
        return end, False
    try:
        data = os.lseek(file, at, os.SEEK_DATA)
        return (min(data, end), True) if data > at else (min(os.lseek(file, at, os.SEEK_HOLE), end), False)
    except OSError as exc:
        return end, exc.errno == errno.ENXIO  # nothing but a hole; or a file system that knows of none


# --- removing --------------------------------------------------------------------------------------


def remove_files(request: agent.Json) -> agent.Json:
    """Remove each of `files`, [path, size, mtime in ns], that is still as it says; nobody starts meanwhile.

    Nothing in a folder that no worker made, and not the log of a worker that lives. Raises Failed if one
    lives that the request does not know of.
    """
    root, removal = agent.run_dir_of(request).parent, Removal(request)
    with nobody_starts(request):
        alive = living_names(request)
        if alive - set(request["alive"]):
            raise agent.Failed("in_use", f"{', '.join(sorted(alive))} started meanwhile")
        for path, size, mtime_ns in request["files"]:
            if any(path.startswith(f"log/{name}.") for name in alive):
                removal.kept += 1
            else:
                removal.file(root, path, (size, mtime_ns))
        for job in sorted({"/".join(path.split("/")[:2]) for path, _, _ in request["files"]}):
            if job.startswith("jobs/") and "jobs" not in removal.not_ours:
                removal.empty_folders(root, job)
    return removal.answer()


def remove_logs(request: agent.Json) -> agent.Json:
    """Remove all that the layout names. Raises Failed where a worker lives, unless `force`."""
    root, removal = agent.run_dir_of(request).parent, Removal(request)
    with nobody_starts(request):
        alive = living_names(request)
        if alive and not request["force"]:
            raise agent.Failed("in_use", f"{', '.join(sorted(alive))} runs there")
        for path, info in named_by_layout(root, request["base"], removal.problems):
            if stat.S_ISDIR(info.st_mode):
                removal.folder(root, path)
            else:
                removal.file(root, path)
    return removal.answer()


@contextmanager
def nobody_starts(request: agent.Json) -> Iterator[None]:
    """No worker of this host is started, or stopped, inside."""
    run_dir = agent.run_dir_of(request)
    if not run_dir.is_dir():
        yield
        return
    with agent.lock(agent.lock_of(run_dir, request), request["time_limit_seconds"]):
        yield


def living_names(request: agent.Json) -> set[str]:
    return {name for name, lives in workers_there(request)["workers"] if lives}


class Removal:
    """Removes, and counts."""

    def __init__(self, request: agent.Json) -> None:
        self.frames = Frames()
        self.problems = Problems(self.frames)
        self.files = self.bytes = self.kept = 0
        root = agent.run_dir_of(request).parent
        self.not_ours = [folder for folder in MARKED_FOLDERS if fleets_of(root, folder) is None]

    def may(self, path: str) -> bool:
        """Whether it lies where workers alone do; if not, that is told."""
        top = path.partition("/")[0]
        if top in self.not_ours:
            self.problems.add(path, OSError(f"{top}/ was not made by a worker (no {MARKER} in it)"))
        return top not in self.not_ours

    def file(self, root: Path, path: str, expected: tuple[int, int] | None = None) -> None:
        """Remove a file if it is as `expected`: its size and mtime in ns. One that is gone is fine."""
        self.frames.tick()
        if not self.may(path):
            return
        try:
            with parent_of(root, path) as (folder, name):
                info = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if expected and (info.st_size, info.st_mtime_ns) != expected:
                    self.kept += 1
                    return
                os.unlink(name, dir_fd=folder)
            self.files += 1
            self.bytes += info.st_size
        except FileNotFoundError:
            return
        except OSError as exc:
            self.problems.add(path, exc)

    def folder(self, root: Path, path: str) -> None:
        """Remove a folder if nothing is in it."""
        self.frames.tick()
        if not self.may(path):
            return
        try:
            with parent_of(root, path) as (folder, name):
                os.rmdir(name, dir_fd=folder)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                self.problems.add(path, exc)

    def empty_folders(self, root: Path, job: str) -> None:
        """Remove the folders of a job in which nothing is left."""
        for path, info in tree(root, job, Problems(self.frames)):
            if stat.S_ISDIR(info.st_mode):
                self.folder(root, path)

    def answer(self) -> agent.Json:
        """What was removed, what was kept for it is in use or has changed, and what could not be removed."""
        return {
            "files": self.files,
            "bytes": self.bytes,
            "kept": self.kept,
            **self.problems.answer(),
        }


agent.VERBS |= {
    "list_files": list_files,
    "workers_there": workers_there,
    "send_files": send_files,
    "remove_files": remove_files,
    "remove_logs": remove_logs,
}
