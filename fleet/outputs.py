"""Where a job runs and writes at its host, and the tail of it that goes to Redis.

OUTPUT_DIR/jobs/JOB/              its working directory, the same for every attempt on this host
OUTPUT_DIR/output/JOB.FENCE.out   stdout of one attempt; .err for stderr
OUTPUT_DIR/log/WORKER.log         what the worker itself says
OUTPUT_DIR/log/WORKER.series.*    what it and its jobs used over time: fleet/series.py
OUTPUT_DIR/run/WORKER.*           its lock, its process, its configuration (0600)

A folder may have been somebody's before it was named to us. `jobs` and `output` that a worker made hold
`.rq-fleet`, with a line for each fleet that works there: from others nothing is ever removed.

`fleet collect-logs` goes by these names (fleet/launchers/agent_files.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from broker.work import Claim, Tails
from fleet.process import host_error

_APPENDING = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
#: jobs asked for in one go when old folders are removed
_PRUNED_AT_ONCE = 500
#: marks a folder as a worker's, and names the fleets that use it; agent_files.py has it, too
MARKER = ".rq-fleet"
_MOST_MARKER_BYTES = 2**16
#: what attempts leave in each; agent_files.py has these, too
_JOB_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_OUTPUT_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}\.\d+\.[\w.-]+", re.ASCII)
#: seconds before the worker's start when its untouched folders say that they were last changed
_UNTOUCHED_SECONDS = 60


class Folders:
    """The folders of one output directory, made when first asked for."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.jobs = self.root / "jobs"
        self.output = self.root / "output"
        self.log = self.root / "log"
        self.run = self.root / "run"

    def create(self) -> None:
        """Make them all; `run` is for this user alone. Raises OSError."""
        for folder in (self.jobs, self.output):
            _make_marked(folder)
        self.log.mkdir(parents=True, exist_ok=True)
        self.run.mkdir(mode=0o700, exist_ok=True)

    def free_bytes(self) -> int:
        """Bytes this user may still write here."""
        room = os.statvfs(self.root)
        return room.f_bavail * room.f_frsize

    def prune(self, fleet: str, older_than_seconds: float, gone: Callable[[list[str]], set[str]]) -> int:
        """Remove what jobs left here that was not touched for so long, if they are gone from Redis.

        Only in folders that workers made and that no fleet but `fleet` uses: what its Redis does not know
        may be another's. `gone(ids)` tells which of these jobs are not kept any more. Returns how many
        entries went.
        """
        limit = time.time() - older_than_seconds
        old = [
            entry
            for folder, name, is_folder in ((self.jobs, _JOB_NAME, True), (self.output, _OUTPUT_NAME, False))
            if _is_of_alone(folder, fleet)
            for entry in os.scandir(folder)
            if name.fullmatch(entry.name)
            and entry.is_dir(follow_symlinks=False) == is_folder
            and _is_old(entry, limit)
        ]
        removed = 0
        for start in range(0, len(old), _PRUNED_AT_ONCE):
            batch = {
                entry.path: entry.name.partition(".")[0] for entry in old[start : start + _PRUNED_AT_ONCE]
            }
            dead = gone(sorted(set(batch.values())))
            removed += sum(_remove(Path(path)) for path, job_id in batch.items() if job_id in dead)
        return removed


def _make_marked(folder: Path) -> None:
    """Make a folder that is known as ours; one that is there stays what it is."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    (folder / MARKER).touch()


def _is_of_alone(folder: Path, fleet: str) -> bool:
    """Whether a worker made `folder`, and `fleet` alone uses it; that it does is noted there."""
    try:
        descriptor = os.open(folder / MARKER, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fleets = set(os.read(descriptor, _MOST_MARKER_BYTES).decode(errors="replace").split())
        if fleet not in fleets:
            os.write(descriptor, f"{fleet}\n".encode())
        return fleets <= {fleet}
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_old(entry: os.DirEntry[str], limit: float) -> bool:
    try:
        return entry.stat(follow_symlinks=False).st_mtime < limit
    except OSError:
        return False


def _remove(path: Path) -> bool:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        return False  # a job's own mischief (another's file, a mount): the next prune looks again
    return True


class WorkingFolders:
    """A working directory for each job, kept if anything was put into it.

    Most jobs leave theirs empty, and making and removing a directory costs a disk more than all
    else we do for a short job: so an empty one is renamed for the next. One for which there is no
    next at once is put aside, under a name that no other worker of this host looks at.
    """

    def __init__(self, folders: Folders, worker: str) -> None:
        self._root = str(folders.jobs)
        self._aside = f"{folders.run}/{worker}.spare"
        self._spare: list[str] = []
        #: empty, and still called by the jobs that left them
        self._left: list[str] = []
        self._serial = 0
        #: when an empty one was last changed, as far as it tells: whatever is put into it changes that
        self._untouched_ns = int(time.time() - _UNTOUCHED_SECONDS) * 10**9
        self._mode = _as_our_umask_has_it(0o777)

    def enter(self, job_id: str) -> str:
        """The directory of a job: that of its last attempt here, or an empty one. Raises CannotStart."""
        path = f"{self._root}/{job_id}"
        try:
            self._rename_or_make(path)
        except OSError as exc:
            raise host_error(exc, f"cannot make a working directory in {self._root}") from exc
        return path

    def leave(self, path: str) -> None:
        """The attempt in it ended. To be followed by `put_aside` before anybody may run its job again."""
        try:
            if self._is_as_made(path):
                self._left.append(path)
        except OSError:
            return  # the job removed it, or took our rights to look

    def put_aside(self) -> None:
        """Let go of the names of the jobs that left theirs empty, if none has begun in it since."""
        while self._left:
            path = self._left.pop()
            self._serial += 1
            spare = f"{self._aside}{self._serial}"
            try:
                os.rename(path, spare)  # noqa: PTH104  # once a job: Path would cost three times as much
                self._spare.append(spare)
            except OSError:
                continue  # somebody removed it, or is busy with it

    def close(self) -> None:
        """Remove those that nobody needs."""
        self.put_aside()
        while self._spare:
            _rmdir(self._spare.pop())

    def _is_as_made(self, path: str) -> bool:
        """Whether it is empty, and the next job may do with it what this one might."""
        found = os.stat(path, follow_symlinks=False)  # noqa: PTH116  # as below
        if found.st_mode & 0o777 != self._mode:
            return False
        if found.st_mtime_ns == self._untouched_ns:
            return True
        with os.scandir(path) as entries:
            if next(entries, None) is not None:
                return False
        self._touch_not(path)
        return True

    def _touch_not(self, path: str) -> None:
        os.utime(path, ns=(self._untouched_ns, self._untouched_ns), follow_symlinks=False)

    def _rename_or_make(self, path: str) -> None:
        spares = self._left or self._spare
        if spares:
            spare = spares.pop()
            try:
                os.rename(spare, path)  # noqa: PTH104  # as above
                return
            except OSError:
                _rmdir(spare)  # an earlier attempt left something at `path`, or somebody took the spare
        try:
            os.mkdir(path)  # noqa: PTH102  # as above
            self._touch_not(path)
        except FileExistsError:
            return


def _rmdir(path: str) -> None:
    try:
        os.rmdir(path)  # noqa: PTH106  # as above
    except OSError:
        return


def _as_our_umask_has_it(mode: int) -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mode & ~mask


class Outputs:
    """The output files of commands, one without content kept for the next: most jobs are silent, and making
    and removing a file costs more than to give it another name.

    What a job left behind may hold its files open still. That is found out by asking the kernel for a
    lease on the file, which nobody gets while others have it open for writing (fcntl(2), F_SETLEASE).
    """

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._spare: list[tuple[int, str]] = []
        self._has_leases = hasattr(fcntl, "F_SETLEASE")
        self._mode = _as_our_umask_has_it(0o644)

    def open(self, claim: Claim) -> OutputFiles:
        """Both files of an attempt. Raises CannotStart."""
        paths = output_paths(self._folders, claim)
        opened: list[int] = []
        try:
            for path in paths:
                opened.append(self._renamed(path) or os.open(path, _APPENDING | os.O_CREAT, self._mode))
        except OSError as exc:
            for fd in opened:
                os.close(fd)
            raise host_error(exc, f"cannot write output to {self._folders.output}") from exc
        return OutputFiles(*paths, *opened)

    def close(self, files: OutputFiles, limit: int = 0) -> Tails:
        """The attempt ended: the last `limit` bytes of each; one without content goes."""
        out, out_end = self._close(files.stdout, files.stdout_path, limit)
        err, err_end = self._close(files.stderr, files.stderr_path, limit)
        return Tails(out, err, out_end, err_end)

    def clear(self) -> None:
        """Remove those that nobody needs."""
        while self._spare:
            fd, path = self._spare.pop()
            _unlink(path)
            os.close(fd)

    def _renamed(self, path: str) -> int | None:
        """A file that was put aside, under the name `path`."""
        while self._spare:
            fd, old = self._spare.pop()
            try:
                os.rename(old, path)  # noqa: PTH104  # as above
                return fd
            except OSError:  # somebody removed it
                os.close(fd)
        return None

    def _close(self, fd: int, path: str, limit: int) -> tuple[bytes, int]:
        """Its last bytes, and its size."""
        found = os.fstat(fd)
        if not found.st_size:
            self._put_aside(fd, path, found)
            return b"", 0
        tail = _last_bytes(fd, found.st_size, limit)
        os.close(fd)
        return tail, found.st_size

    def _put_aside(self, fd: int, path: str, before: os.stat_result) -> None:
        """Keep an empty file, if it is the one that was opened and nobody else can write to it."""
        try:
            again = os.open(path, _APPENDING | os.O_NOFOLLOW) if self._has_leases else None
        except OSError:
            again = None
        os.close(fd)
        if again is not None and self._is_untouched(before, os.fstat(again)) and self._is_ours_alone(again):
            self._spare.append((again, path))
            return
        _unlink(path)
        if again is not None:
            os.close(again)

    def _is_untouched(self, before: os.stat_result, now: os.stat_result) -> bool:
        """Whether it is the same file, with nothing in it, no other name, and its mode left alone."""
        is_same = (before.st_dev, before.st_ino) == (now.st_dev, now.st_ino)
        return is_same and now.st_nlink == 1 and now.st_size == 0 and now.st_mode & 0o7777 == self._mode

    def _is_ours_alone(self, fd: int) -> bool:
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as exc:
            self._has_leases = exc.errno == errno.EAGAIN  # else this file system knows none
            return False
        return True


class OutputFiles(NamedTuple):
    """The two files of an attempt, open for as long as it runs."""

    stdout_path: str
    stderr_path: str
    stdout: int
    stderr: int

    def tails(self, limit: int) -> Tails:
        """The last `limit` bytes of each, and how long they are."""
        (out, out_end), (err, err_end) = _tail(self.stdout, limit), _tail(self.stderr, limit)
        return Tails(out, err, out_end, err_end)

    def ends(self) -> tuple[int, int]:
        """How long they are: whether there is anything new to tell."""
        return os.fstat(self.stdout).st_size, os.fstat(self.stderr).st_size


def _unlink(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108  # as above
    except OSError:
        return


def output_paths(folders: Folders, claim: Claim) -> tuple[str, str]:
    """Where stdout and stderr of an attempt go: each attempt has files of its own."""
    stem = f"{folders.output}/{claim.job_id}.{claim.fence}"
    return f"{stem}.out", f"{stem}.err"


def file_end(path: str | Path) -> int:
    """How many bytes a file has; 0 where there is none."""
    try:
        return os.stat(path).st_size  # noqa: PTH116  # as above
    except OSError:
        return 0


def tail_of(path: str | Path, limit: int) -> tuple[bytes, int]:
    """The last `limit` bytes of a file and its size; nothing where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b"", 0
    try:
        return _tail(fd, limit)
    finally:
        os.close(fd)


def _tail(fd: int, limit: int) -> tuple[bytes, int]:
    size = os.fstat(fd).st_size
    return _last_bytes(fd, size, limit), size


def _last_bytes(fd: int, size: int, limit: int) -> bytes:
    return os.pread(fd, limit, max(0, size - limit)) if size and limit else b""
