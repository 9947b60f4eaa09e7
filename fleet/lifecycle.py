"""A worker's claim to its name: on this host by a lock, in the fleet by its record.

The lock is held by the worker and by its sidecar, so whoever gets it knows that the worker
before it is gone and that its jobs' processes are too. Only then may its leases be taken over.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import redis

from broker import __version__, chores, clock, keys
from broker.errors import Conflict, UsageError
from broker.session import Session
from broker.work import Beat
from fleet import process
from fleet.launchers.agent import TOKEN_VARIABLE
from fleet.logs import about
from fleet.outputs import Folders

log = logging.getLogger("fleet.worker")

#: seconds for which an interpreter that could import rq is believed to be still able to
_TRUSTED_SECONDS = 3600
#: seconds to wait for a worker of this name that is just leaving, or whose sidecar is still killing
_LOCK_WAIT_SECONDS = 40.0


class NameLock:
    """An exclusive lock on NAME.lock; `fd` is handed to the sidecar too."""

    def __init__(self, folders: Folders, name: str) -> None:
        self._note = run_file(folders, name)
        self._path = folders.run / f"{name}.lock"
        self._name = name
        self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self) -> None:
        """Take it, waiting for what a dead worker left. Raises Conflict where a live one has it."""
        deadline = clock.monotonic() + _LOCK_WAIT_SECONDS
        while not self._try():
            if clock.monotonic() > deadline or _is_live(self._note):
                raise Conflict(
                    f"a worker named {self._name} runs here already (it holds {self._path})",
                    "Give this one another --name, or stop that one first.",
                )
            time.sleep(0.05)

    def identity(self) -> str:
        """What two processes share only if they would contend for this very file."""
        status = os.fstat(self.fd)
        return f"{process.boot_id()}:{status.st_dev}:{status.st_ino}"

    def release(self) -> None:
        """Let go; a sidecar at work still holds it."""
        os.close(self.fd)

    def _try(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _is_live(note: Path) -> bool:
    """Whether the process that wrote this note is still that process."""
    try:
        fields = json.loads(note.read_text())
        return process.is_running(fields["pid"], fields["start_time"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(folders: Folders) -> None:
    """Make the worker's folders. Raises UsageError."""
    try:
        folders.create()
    except OSError as exc:
        raise UsageError(
            f"cannot write to {folders.root}: {exc.strerror}", "Name another folder with --output-dir."
        ) from exc


def check_executor(python: str, folders: Folders) -> None:
    """Refuse an interpreter that could run no function. Raises UsageError.

    Better now than with the first job: a worker that fails every job it claims empties a queue. What
    was found good is remembered for a while: the workers of a host start together, and again and again.
    """
    if python == sys.executable:
        return
    note = folders.run / f"executor-{zlib.crc32(python.encode()):08x}.json"
    found = _interpreter(python)
    if not _is_noted(note, found):
        _try_executor(python)
        _write(note, found)


def _interpreter(python: str) -> list[Any]:
    """What is another when the interpreter, or its virtual environment, was made anew. Raises UsageError."""
    try:
        path = Path(shutil.which(python) or python)
        there = [path, path.parent.parent / "pyvenv.cfg"]
        return [python, *(file.stat().st_mtime_ns for file in there if file.exists())]
    except OSError as exc:
        raise UsageError(f"--executor-python {python} cannot be run: {exc}") from exc


def _is_noted(note: Path, found: list[Any]) -> bool:
    try:
        is_fresh = abs(time.time() - note.stat().st_mtime) < _TRUSTED_SECONDS
        return is_fresh and bool(json.loads(note.read_text()) == found)
    except (OSError, ValueError):
        return False


def _try_executor(python: str) -> None:
    try:
        command = [python, "-I", "-c", "import rq"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise UsageError(f"--executor-python {python} cannot be run: {exc}") from exc
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"--executor-python {python} cannot import rq: {said}", "Install rq for it.")


def run_file(folders: Folders, name: str) -> Path:
    """Where a worker leaves a note of its process."""
    return folders.run / f"{name}.json"


def write_run_file(folders: Folders, name: str, incarnation: str) -> Path:
    """Leave a note of this process for `fleet down`: it is ours if pid, start time and token agree."""
    path = run_file(folders, name)
    started = psutil.Process().create_time()
    note = {"pid": os.getpid(), "start_time": started, "incarnation": incarnation, "version": __version__}
    if token := os.environ.get(TOKEN_VARIABLE):  # a worker that somebody runs by hand has none
        note["token"] = token
    _write(path, note)
    return path


def _write(path: Path, document: Any) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(document))
    temporary.replace(path)


def enter(
    session: Session, client: redis.Redis, record: str, lock: NameLock, sleep: Callable[[float], None]
) -> None:
    """Register in the fleet, in place of an earlier life where that is surely over.

    Waits with `sleep`. Raises Conflict where a live worker elsewhere has the name, and what redis-py raises.
    """
    taken = session.register(client, record)
    if not taken:
        return
    other = _fields(taken)
    if other.get("lock") == lock.identity():
        log.info("taking over from pid %s, which is gone", other.get("pid"), extra=about("taking_over"))
        session.register(client, record, replaces=str(other.get("incarnation")))
        return
    _outwait(session, client, record, other, sleep)


def _outwait(
    session: Session, client: redis.Redis, record: str, other: dict[str, Any], sleep: Callable[[float], None]
) -> None:
    """A worker we cannot see has the name: dead ones stop beating, live ones do not."""
    name = session.identity.name
    said = "a worker named %s was on host %s: waiting whether it still beats"
    log.info(said, name, other.get("host"), extra=about("taking_over"))
    while taken := session.register(client, record):
        now = _fields(taken)
        if (now.get("incarnation"), now.get("at")) != (other.get("incarnation"), other.get("at")):
            raise Conflict(
                f"a worker named {name} is alive on host {now.get('host')} (pid {now.get('pid')})",
                "Give this one another --name, or stop that one first.",
            )
        ttl = client.pttl(keys.worker_beat(name))
        sleep(min(0.5, max(ttl, 50) / 1000))


def inherit(session: Session, client: redis.Redis, record: str, *, uncounted: bool = False) -> Beat:
    """The first heartbeat, and what it brought: what earlier lives held is lost, and goes on at once.

    They are over: `enter` has seen to it, and their jobs were killed with them or before their leases
    ran out. It must be done before the first look at the queues, which would seem empty without those jobs.
    `uncounted`: they ended through no fault of a job. That Redis was started anew since, nobody may have
    noticed yet: with its host the last of the fleet may have ended.
    """
    beat = session.beat(client, record, {}, session.claims_settled)
    if beat.foreign:
        chores.elect(client, session.identity.incarnation, session.settings, troubled=False)
        session.lose_foreign(client, beat.foreign, uncounted=uncounted)
    return beat


def _fields(record: str) -> dict[str, Any]:
    try:
        fields = json.loads(record)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
