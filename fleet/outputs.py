"""Where a job runs and writes at its host, and the tail of it that goes to Redis.

    OUTPUT_DIR/jobs/JOB/              its working directory, the same for every attempt on this host
    OUTPUT_DIR/output/JOB.FENCE.out   stdout of one attempt; .err for stderr
    OUTPUT_DIR/log/WORKER.log         what the worker itself says
    OUTPUT_DIR/run/WORKER.*           its lock, its process, its configuration (0600)
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from broker.work import Claim, Tails
from fleet.process import host_error


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
        for folder in (self.jobs, self.output, self.log):
            folder.mkdir(parents=True, exist_ok=True)
        self.run.mkdir(mode=0o700, exist_ok=True)

    def free_bytes(self) -> int:
        """Bytes this user may still write here."""
        room = os.statvfs(self.root)
        return room.f_bavail * room.f_frsize

    def prune(self, older_than_seconds: float) -> int:
        """Remove what jobs left that ended so long ago; returns how many entries went."""
        limit, removed = time.time() - older_than_seconds, 0
        for folder in (self.jobs, self.output):
            for entry in os.scandir(folder):
                removed += _prune_entry(entry, limit)
        return removed


def _prune_entry(entry: os.DirEntry[str], limit: float) -> int:
    try:
        if entry.stat(follow_symlinks=False).st_mtime > limit:
            return 0
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink()
    except OSError:
        return 0  # a job's own mischief (another's file, a mount): the next prune looks again
    return 1


@dataclass
class OutputFiles:
    """The two files of an attempt, open for as long as it runs."""

    stdout_path: Path
    stderr_path: Path
    stdout: int
    stderr: int

    @classmethod
    def create(cls, folders: Folders, claim: Claim) -> OutputFiles:
        """Open both; raises fleet.process.CannotStart."""
        paths = output_paths(folders, claim)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        opened: list[int] = []
        try:
            for path in paths:
                opened.append(os.open(path, flags, 0o644))
        except OSError as exc:
            for fd in opened:
                os.close(fd)
            raise host_error(exc, f"cannot write output to {folders.output}") from exc
        return cls(*paths, *opened)

    def tails(self, limit: int) -> Tails:
        """The last `limit` bytes of each, and how long they are."""
        (out, out_end), (err, err_end) = _tail(self.stdout, limit), _tail(self.stderr, limit)
        return Tails(out, err, out_end, err_end)

    def ends(self) -> tuple[int, int]:
        """How long they are: whether there is anything new to tell."""
        return os.fstat(self.stdout).st_size, os.fstat(self.stderr).st_size

    def close(self) -> None:
        """Close both, and remove those that nothing was written to: most jobs say nothing."""
        for fd, path in ((self.stdout, self.stdout_path), (self.stderr, self.stderr_path)):
            if os.fstat(fd).st_size == 0:
                path.unlink(missing_ok=True)
            os.close(fd)


def output_paths(folders: Folders, claim: Claim) -> tuple[Path, Path]:
    """Where stdout and stderr of an attempt go: each attempt has files of its own."""
    stem = f"{claim.job_id}.{claim.fence}"
    return folders.output / f"{stem}.out", folders.output / f"{stem}.err"


def file_end(path: Path) -> int:
    """How many bytes a file has; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def tail_of(path: Path, limit: int) -> tuple[bytes, int]:
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
    if size == 0 or limit == 0:
        return b"", size
    return os.pread(fd, limit, max(0, size - limit)), size


def job_folder(folders: Folders, job_id: str) -> str:
    """The working directory of a job, made if it is not there. Raises CannotStart."""
    path = f"{folders.jobs}/{job_id}"
    try:
        os.mkdir(path)  # noqa: PTH102  # once a job: Path would cost three times as much
    except FileExistsError:
        return path
    except OSError as exc:
        raise host_error(exc, f"cannot make a working directory in {folders.jobs}") from exc
    return path


def leave_folder(path: str) -> None:
    """Remove a working directory that nothing was put into."""
    try:
        os.rmdir(path)  # noqa: PTH106  # as above
    except OSError:
        return
