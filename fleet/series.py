"""What hosts and jobs used over time, in SQLite files beside the worker's log.

OUTPUT_DIR/log/WORKER.series.TIME.sqlite: a worker begins one when it has something to write, and another
when that is large, so that old ones can go as wholes; what was written is never changed. `fleet collect-logs`
brings a consistent copy (fleet/launchers/agent_files.py).

No write-ahead log: it does not work on network file systems, where homes often are. A file is open while it
is written to, and no longer: some samples at once, twice a minute. A thread writes, and nobody waits for it:
a file system may hang. What was written is not synced: a crash of the machine may cost the last file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, NamedTuple

from broker import clock
from fleet.logs import about
from fleet.resources import GpuUse

if TYPE_CHECKING:
    import sqlite3

log = logging.getLogger("fleet.worker")

#: a worker's files: this many make up what it may keep
_PARTS = 8
#: bytes; small, for most workers write little
_PAGE_BYTES = 1024
#: seconds to wait for whoever reads
_BUSY_SECONDS = 10.0
#: lots that wait to be written; and seconds to wait for them in the end
_MOST_WAITING = 10
_CLOSING_SECONDS = 5.0
_GLOB = "*.series.*.sqlite"
_SCHEMA = """
    PRAGMA page_size = {page_bytes};
    CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE attempts (id INTEGER PRIMARY KEY, job TEXT, fence INTEGER, UNIQUE (job, fence));
    -- times are seconds of the host's clock, rates bytes a second, use of CPUs in CPUs, of GPUs from 0 to 1
    CREATE TABLE jobs (at REAL, attempt INTEGER, cpus REAL, memory_bytes INTEGER, processes INTEGER,
                       read_rate REAL, write_rate REAL, gpu_use REAL, gpu_memory_bytes INTEGER);
    CREATE TABLE hosts (at REAL, cpus REAL, memory_bytes INTEGER, read_rate REAL, write_rate REAL,
                        received_rate REAL, sent_rate REAL);
    CREATE TABLE gpus (at REAL, gpu INTEGER, use REAL, memory_bytes INTEGER);
"""


class HostSample(NamedTuple):
    """A host since its last sample: CPUs busy, memory taken, bytes a second of its disks and its network."""

    cpus: float
    memory_bytes: int
    read_rate: float | None
    write_rate: float | None
    received_rate: float | None
    sent_rate: float | None


class JobSample(NamedTuple):
    """A job's processes: CPUs busy and bytes a second since its last sample (None: not known), memory and
    number now; the GPUs that it has to itself, how busy they are on average, and what is taken on them."""

    cpus: float | None
    memory_bytes: int
    processes: int
    read_rate: float | None = None
    write_rate: float | None = None
    gpu_use: float | None = None
    gpu_memory_bytes: int | None = None


class Damaged(OSError):
    """What is there is no such file, or not any more."""


class About(NamedTuple):
    """Whose series it is; what its host has in all."""

    host: str
    worker: str
    cpus: int
    memory_bytes: int


@dataclass(frozen=True)
class _Rows:
    """Samples that are written at once: rows of tables."""

    hosts: list[tuple[object, ...]] = field(default_factory=list)
    gpus: list[tuple[object, ...]] = field(default_factory=list)
    jobs: list[tuple[object, ...]] = field(default_factory=list)
    attempts: set[tuple[str, int]] = field(default_factory=set)


class Series:
    """What one worker notes, and a thread that writes it. For one other thread."""

    def __init__(self, folder: Path, about: About, most_bytes: int, most_seconds: float) -> None:
        """`most_bytes`, `most_seconds`: of all that workers of this name keep; the oldest goes first."""
        self._files = _Files(folder, about, most_bytes, most_seconds)
        self._rows = _Rows()
        self._queue: Queue[_Rows | None] = Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None

    def note_host(self, at: float, sample: HostSample, gpus: Sequence[GpuUse] = ()) -> None:
        """One more; `at` is in seconds of the wall clock."""
        self._rows.hosts.append((at, *sample))
        self._rows.gpus.extend((at, gpu.index, gpu.busy, gpu.memory_bytes) for gpu in gpus)

    def note_job(self, at: float, job_id: str, fence: int, sample: JobSample) -> None:
        """Likewise, of an attempt."""
        self._rows.attempts.add((job_id, fence))
        self._rows.jobs.append((at, *sample, job_id, fence))

    def write(self) -> None:
        """Have written what was noted; where the disk hangs it is dropped."""
        rows, self._rows = self._rows, _Rows()
        if not (rows.hosts or rows.jobs):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="series", daemon=True)
            self._thread.start()
        with suppress(Full):
            self._queue.put_nowait(rows)

    def close(self) -> None:
        """Have all written, if that can be soon."""
        self.write()
        if self._thread:
            with suppress(Full):
                self._queue.put_nowait(None)
            self._thread.join(timeout=_CLOSING_SECONDS)

    def _run(self) -> None:
        while (rows := self._queue.get()) is not None:
            self._files.write(rows)


class _Files:
    """The files of workers of one name."""

    def __init__(self, folder: Path, about: About, most_bytes: int, most_seconds: float) -> None:
        self._folder = folder
        self._about = about
        self._most_bytes = most_bytes
        self._most_seconds = most_seconds
        self._path: Path | None = None
        self._has_failed = False

    def write(self, rows: _Rows) -> None:
        """Write them. Where that cannot be they are dropped, and the log says so once."""
        try:
            self._write(rows)
            self._has_failed = False
        except OSError as exc:
            if not self._has_failed:
                said = "what hosts and jobs use cannot be kept; jobs run on without: %s"
                log.warning(said, exc, extra=about("sampling"))
            self._has_failed = True
            if isinstance(exc, Damaged):
                self._path = None  # another file may do

    def _write(self, rows: _Rows) -> None:
        if self._path is None or not self._path.exists():  # none yet, or somebody removed it
            self._path = self._begun()
        with opened(self._path) as database:
            database.executemany("INSERT INTO hosts VALUES (?, ?, ?, ?, ?, ?, ?)", rows.hosts)
            database.executemany("INSERT INTO gpus VALUES (?, ?, ?, ?)", rows.gpus)
            database.executemany("INSERT OR IGNORE INTO attempts (job, fence) VALUES (?, ?)", rows.attempts)
            database.executemany(_INSERT_JOB, rows.jobs)
        if self._path.stat().st_size > self._most_bytes / _PARTS:
            self._path = None

    def _begun(self) -> Path:
        """A new file; old ones make room for it."""
        self._make_room()
        self._folder.mkdir(parents=True, exist_ok=True)
        stamp = clock.wall().strftime("%Y%m%dT%H%M%S.%f")
        path = self._folder / f"{self._about.worker}.series.{stamp}.sqlite"
        part = path.with_name(f".{path.name}")  # nobody shall see half of it
        try:
            part.touch(0o600)  # as the log is
            with opened(part) as database:
                database.executescript(_SCHEMA.format(page_bytes=_PAGE_BYTES))
                database.executemany("INSERT INTO about VALUES (?, ?)", self._about._asdict().items())
            return part.rename(path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self) -> None:
        room = self._most_bytes * (_PARTS - 1) / _PARTS
        oldest = clock.wall().timestamp() - self._most_seconds
        # names end with times: the newest first
        for path in sorted(self._folder.glob(f"{self._about.worker}.series.*.sqlite"), reverse=True):
            info = path.stat()
            room -= info.st_size
            if room < 0 or info.st_mtime < oldest:
                for file in (path, _journal(path)):
                    file.unlink(missing_ok=True)


_INSERT_JOB = """
    INSERT INTO jobs SELECT ?, id, ?, ?, ?, ?, ?, ?, ? FROM attempts WHERE job = ? AND fence = ?
"""


def files(folder: Path) -> Iterator[Path]:
    """The series of an output folder, or of copies of some; what jobs left there is not looked through."""
    for place in (folder, folder / "log", *sorted(folder.glob("*/log"))):
        # what begins with a dot is not begun yet
        yield from sorted(path for path in place.glob(_GLOB) if path.name[0] != ".")


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, for one transaction. Raises Damaged, and OSError for what else SQLite has against it."""
    try:
        import sqlite3  # some builds of Python have none
    except ImportError as exc:
        raise OSError(f"this Python has no SQLite: {exc}") from exc
    try:
        uri = f"{path.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS)) as database, database:
            database.execute("PRAGMA synchronous = OFF")
            yield database
    except sqlite3.OperationalError as exc:
        raise OSError(f"{path}: {exc}") from exc
    except sqlite3.Error as exc:
        raise Damaged(f"{path}: {exc}") from exc


def _journal(path: Path) -> Path:
    """What SQLite leaves of a change that was cut short: it belongs to that file alone."""
    return path.with_name(f"{path.name}-journal")
