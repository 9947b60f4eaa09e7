"""The folder of the embedded Redis: its files, its locks, and whether a broker lives in it.

~/.local/state/rq-fleet/broker/       0700, the files 0600
    data/             what Redis keeps: the append-only file
    data.before-restore-TIME/         what `restore` replaced
    data.incoming/    a restore under way
    data.restored/    a restore cut off between its last two steps; the next command finishes it
    password          made on first start
    broker.conf       written anew by each start: keeps the password out of the process list
    broker.json       where the broker listens or did last, and which program wrote the data
    broker.pid        written by the server
    broker.log        of the last start; broker.log.1 of the one before
    server.lock       locked by the server for as long as it lives: the truth about "running"
    commands.lock     locked by whoever starts, stops, backs up or restores
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from broker.errors import Conflict, FleetError
from fleet.listening import LOOPBACK, bracketed
from fleet.redis_server import ANSWER_SECONDS, ServerProgram, tail, try_lock, wait_until

Say = Callable[[str], None]

#: seconds to wait for another command of the same user, which may be copying a large backup
COMMAND_SECONDS = 600.0
#: seconds after which a wait is explained
PATIENCE_SECONDS = 1.0
FOLDER_HINT = (
    "The folder must be yours, on a disk with free space and file locks; "
    "XDG_STATE_HOME names another place for it."
)


@dataclass(frozen=True)
class RunningBroker:
    """A broker that lives. `hosts` are the addresses it is bound to."""

    pid: int
    port: int
    hosts: tuple[str, ...]
    program: ServerProgram
    data_dir: Path
    password: str = field(repr=False)

    @property
    def address(self) -> str:
        """Where this machine reaches it, fit to be printed."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def url(self) -> str:
        """Its URL on this machine, with the password. `fleet broker url` alone prints it."""
        return self.url_for(LOOPBACK)

    def url_for(self, host: str) -> str:
        """Its URL for those who reach this machine as `host`, with the password. Never print it."""
        return f"redis://:{self.password}@{bracketed(host)}:{self.port}/0"


@dataclass(frozen=True)
class Record:
    """broker.json: where the broker listens or did last (port 0: nowhere yet), and will again."""

    machine: str
    port: int
    hosts: tuple[str, ...]
    program: ServerProgram


class BrokerFolder:
    """The files in `path`. Methods raise OSError for what `explained` makes a FleetError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data_dir = path / "data"
        self.restored_dir = path / "data.restored"
        self.incoming_dir = path / "data.incoming"
        self.password_file = path / "password"
        self.configuration_file = path / "broker.conf"
        self.log = path / "broker.log"
        self.pid_file = path / "broker.pid"
        self._record_file = path / "broker.json"
        self._server_lock = path / "server.lock"
        self._commands_lock = path / "commands.lock"

    # --- who lives here ---

    def running(self) -> RunningBroker | None:
        """The broker if it lives (it may still be reading its data), without asking it.

        Raises Conflict when it lives on another machine that shares the folder.
        """
        with self.explained("read"):
            if not self.is_locked():
                return None
            record, pid = self.read_record(), self.read_pid()
            if record and record.machine != socket.gethostname():
                raise self._elsewhere(record)
            if record is None or pid is None or not _exists(pid):
                return None  # it is only just starting, or the last child of a killed one still ends
            password = self.read_password()
            return RunningBroker(pid, record.port, record.hosts, record.program, self.data_dir, password)

    def is_locked(self) -> bool:
        """Whether a server holds server.lock. Looking shares it, so lookers do not disturb each other."""
        try:
            with self._server_lock.open("rb") as file:
                return not try_lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    @contextmanager
    def lock_for_server(self) -> Iterator[IO[bytes]]:
        """server.lock, held; whoever inherits the open file holds it on. Raises Conflict."""
        with open(self._server_lock, "ab", opener=_private) as lock:
            # Others hold it only for the moment they look at it, or are children of a killed
            # server, which end when they find it gone.
            if not wait_until(lambda: try_lock(lock, fcntl.LOCK_EX), ANSWER_SECONDS):
                raise Conflict(
                    f"a process that belongs to the last embedded Redis still holds {self._server_lock}",
                    "It writes its data and ends by itself; try again.",
                )
            yield lock

    @contextmanager
    def one_command(self, doing: str, say: Say) -> Iterator[None]:
        """One command of this user at a time, errors of files explained. Makes the folder."""
        with self.explained(doing):
            self._make()
            with open(self._commands_lock, "ab", opener=_private) as file:
                if not wait_until(lambda: try_lock(file, fcntl.LOCK_EX), PATIENCE_SECONDS):
                    say("Waiting for another 'fleet broker' command to end ...")
                if not wait_until(lambda: try_lock(file, fcntl.LOCK_EX), COMMAND_SECONDS):
                    raise Conflict(
                        f"another command has held {self._commands_lock} for {COMMAND_SECONDS:.0f} s"
                    )
                yield

    # --- files ---

    def _make(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.path.stat()
        if found.st_uid != os.geteuid():
            raise FleetError(f"{self.path} belongs to another user (uid {found.st_uid})", FOLDER_HINT)
        if found.st_mode & 0o077:
            self.path.chmod(0o700)

    def prepare(self, say: Say) -> None:
        """Make what a start needs: the data folder, the password, an empty log."""
        self.finish_restore(say)
        self.data_dir.mkdir(mode=0o700, exist_ok=True)
        if not self._has_password():
            self._write(self.password_file, secrets.token_hex(32) + "\n")
        if self.log.exists():
            self.log.replace(self.path / "broker.log.1")
        self.log.touch(mode=0o600)

    def finish_restore(self, say: Say) -> None:
        """Put in place what a restore that was killed had got ready; the old data is aside already."""
        if self.restored_dir.exists() and not self.data_dir.exists():
            self.restored_dir.rename(self.data_dir)
            say(f"Finished a restore that was cut off (data in {self.data_dir}).")

    def read_password(self) -> str:
        """The password of the broker."""
        return self.password_file.read_text().strip()

    def _has_password(self) -> bool:
        try:
            self.password_file.chmod(0o600)
            return bool(self.read_password())
        except FileNotFoundError:
            return False

    def write_configuration(self, content: bytes) -> None:
        """Write broker.conf."""
        with atomic_file(self.configuration_file) as file:
            file.write(content)

    def read_record(self) -> Record | None:
        """broker.json, or None: the defaults serve as well where a power cut left something unreadable."""
        try:
            fields = json.loads(self._record_file.read_bytes())
            program = ServerProgram(**fields["program"])
            # fields that other versions write are passed over: the port must not be forgotten for them
            return Record(fields["machine"], fields["port"], tuple(fields["hosts"]), program)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def write_record(self, record: Record | None) -> None:
        """Write broker.json; None removes it."""
        if record is None:
            self._record_file.unlink(missing_ok=True)
        else:
            self._write(self._record_file, json.dumps(dataclasses.asdict(record)))

    def read_pid(self) -> int | None:
        """What the server wrote into broker.pid. Means something only while server.lock is held."""
        try:
            return int(self.pid_file.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _write(self, path: Path, text: str) -> None:
        with atomic_file(path) as file:
            file.write(text.encode())

    # --- what goes wrong ---

    @contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Errors of files become FleetError: a full disk, a folder that cannot be written."""
        try:
            yield
        except OSError as exc:
            where = os.fsdecode(exc.filename) if exc.filename else str(self.path)
            raise FleetError(
                f"cannot {doing} the embedded broker: {where}: {exc.strerror or exc}", FOLDER_HINT
            ) from exc

    def _elsewhere(self, record: Record) -> Conflict:
        return Conflict(
            f"the embedded broker of this user runs on {record.machine} (port {record.port}), "
            f"which shares {self.path} with this machine",
            f"Work on {record.machine}, or name a Redis with --redis, "
            "or let XDG_STATE_HOME name a folder of this machine's own.",
        )

    def log_tail(self) -> str:
        """The last lines of the server's log."""
        return tail(self.log)


@contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `target` (0600) at the end, whole and on disk, or not at all."""
    number, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 reaches nobody: it asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _private(path: str, flags: int) -> int:
    """An opener that makes files for the user alone."""
    return os.open(path, flags, 0o600)
