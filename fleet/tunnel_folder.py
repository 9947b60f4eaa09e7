"""The folder of a tunnel process: what it is to do, what became of that, and whether it lives.

~/.local/state/rq-fleet/tunnels/FLEET/     0700, the files 0600
    tunnel.json    where Redis is, password and all; each `fleet up` writes it anew
    HOST.wish      a host that is to hang on it: `up` writes it, `down` removes it
    HOST.path      where it listens at that host, from the first time on: the workers know it by that
    HOST.state     what became of the wish; written by the forwarder, void when that has died
    tunnel.lock    locked by the supervisor for as long as it lives: the truth about "running"
    launch.lock    locked by whoever starts a supervisor
    tunnel.log     of both processes; tunnel.log.1 is what it was before it grew too long

FLEET is the name that the fleet has in Redis, so there is one for each operator and Redis.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from broker import clock
from broker.errors import FleetError
from fleet.embedded_folder import atomic_file
from fleet.launchers.base import HostError
from fleet.redis_server import tail, try_lock, wait_until
from fleet.worker_config import default_output_dir

Record = TypeVar("Record")
#: seconds that a supervisor gets to take its lock
_START_SECONDS = 10.0
_LONGEST_LOG_BYTES = 2**20
#: seconds for which files are believed to be what they were; a clock's tick may hide a change
_TRUSTED_SECONDS = 2.0


@dataclass(frozen=True)
class Settings:
    """tunnel.json, as whoever ran `fleet up` last has it.

    `max_parallel`: how many hosts are connected to at once; `auth_sock`: the ssh-agent's.
    """

    redis_url: str = field(repr=False)
    lease_seconds: float
    max_parallel: int = 10
    auth_sock: str | None = None


@dataclass(frozen=True)
class Wish:
    """HOST.wish: a host that is to find Redis through the tunnel `tunnel_id`.

    `token` is another with each `fleet up`, which waits for a state with it.
    """

    host: str
    tunnel_id: str
    user: str | None = None
    port: int | None = None
    ssh_config: str | None = None
    #: those of SshOptions
    timeouts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    token: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)


@dataclass(frozen=True)
class State:
    """HOST.state: what became of the wish with that token; `error` where it is down."""

    token: str
    state: Literal["up", "down"]
    path: str = ""
    error: Mapping[str, str] = field(default_factory=dict)

    def explained(self) -> HostError:
        """The error as it was where it was raised: its code, message and hint."""
        found = HostError(self.error.get("message", ""), self.error.get("hint", ""))
        found.code = self.error.get("code", found.code)
        return found


class TunnelFolder:
    """The files in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "tunnel.log"
        self._settings = path / "tunnel.json"
        self._lock = path / "tunnel.lock"
        self._launch_lock = path / "launch.lock"
        self._seen: tuple[int, float] = (0, 0.0)

    # --- who lives here ---

    def is_running(self) -> bool:
        """Whether a supervisor lives. Looking shares the lock, so lookers do not disturb each other."""
        try:
            with self._lock.open("rb") as file:
                return not try_lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """The supervisor's lock; false where another has it."""
        with open(self._lock, "ab", opener=_private) as file:
            yield wait_until(lambda: try_lock(file, fcntl.LOCK_EX), 2.0)  # others look at it for a moment

    def launch(self, settings: Settings) -> None:
        """Start a supervisor, detached, where none lives. Raises FleetError."""
        with self._explained(), open(self._launch_lock, "ab", opener=_private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self.is_running():
                self._write_settings(settings)
                self._launch()

    def _launch(self) -> None:
        process = self.start_detached()
        settled = wait_until(lambda: self.is_running() or process.poll() is not None, _START_SECONDS)
        if not settled or (process.poll() and not self.is_running()):
            raise FleetError(f"the tunnel process does not start:\n{tail(self.log)}", f"Log: {self.log}.")

    def start_detached(self) -> subprocess.Popen[bytes]:
        """A supervisor in a session of its own, which no terminal and no Ctrl-C reaches."""
        if self.log.exists() and self.log.stat().st_size > _LONGEST_LOG_BYTES:
            self.log.replace(self.path / "tunnel.log.1")
        with open(self.log, "ab", opener=_private) as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-m", "fleet.tunnel_main", str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.path,
                env={name: value for name, value in os.environ.items() if not name.startswith("FLEET_")},
                start_new_session=True,
            )

    # --- what is wished, and what became of it ---

    def has_changed(self) -> bool:
        """Whether the files may be others than when this was asked last; now and then for safety's sake."""
        changed_at, now = self.path.stat().st_mtime_ns, clock.monotonic()
        if changed_at == self._seen[0] and now - self._seen[1] < _TRUSTED_SECONDS:
            return False
        self._seen = changed_at, now
        return True

    def settings(self) -> Settings | None:
        return _read(Settings, self._settings)

    def ask(self, key: str, wish: Wish, settings: Settings) -> None:
        """Write down what is wished; makes the folder. Raises FleetError."""
        with self._explained():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write_settings(settings)
            _write(self._file(key, "wish"), json.dumps(asdict(wish)))

    def _write_settings(self, settings: Settings) -> None:
        """Write tunnel.json where it says otherwise."""
        text = json.dumps(asdict(settings))
        if _text(self._settings) != text:
            _write(self._settings, text)

    def wishes(self) -> dict[str, Wish]:
        """All wishes, by the key of the host; one that cannot be read is none."""
        keys = [path.name.removesuffix(".wish") for path in self.path.glob("*.wish")]
        return {key: wish for key in keys if (wish := self.wish(key))}

    def wish(self, key: str) -> Wish | None:
        return _read(Wish, self._file(key, "wish"))

    def remove_wish(self, key: str) -> None:
        """Whoever carries it out does the rest; where nobody does, `sweep` must."""
        self._file(key, "wish").unlink(missing_ok=True)

    def state(self, key: str) -> State | None:
        return _read(State, self._file(key, "state"))

    def write_state(self, key: str, state: State) -> None:
        _write(self._file(key, "state"), json.dumps(asdict(state)))

    def socket_path(self, key: str) -> str | None:
        """Where the host listens, or did last."""
        return _text(self._file(key, "path"))

    def write_socket_path(self, key: str, path: str) -> None:
        _write(self._file(key, "path"), path)

    def forget(self, key: str) -> None:
        """A host that hangs on it no more."""
        for kind in ("state", "path"):
            self._file(key, kind).unlink(missing_ok=True)

    def forget_states(self) -> None:
        """Whoever wrote them is no more. For the supervisor alone: another's would be lost."""
        for path in self.path.glob("*.state"):
            path.unlink(missing_ok=True)

    def sweep_unused(self) -> None:
        """Sweep where no wish is left, and nobody lives here who would."""
        if not self.is_running() and not self.wishes():
            self.sweep()

    def sweep(self) -> None:
        """Remove what only a tunnel needs, the password above all. For when no wish is left."""
        for path in (self._settings, *self.path.glob("*.state"), *self.path.glob("*.path")):
            path.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of files become FleetError."""
        try:
            yield
        except OSError as exc:
            raise FleetError(
                f"cannot keep a tunnel: {self.path}: {exc.strerror or exc}",
                "The folder must be yours, on a disk with free space; XDG_STATE_HOME names another place.",
            ) from exc

    def _file(self, key: str, kind: str) -> Path:
        return self.path / f"{key}.{kind}"


def folder_of(fleet: str) -> TunnelFolder:
    """This user's folder for the fleet of that name."""
    return TunnelFolder(default_output_dir().parent / "tunnels" / fleet)


def key_of(host_key: str) -> str:
    """A host's key as the name of a file."""
    return quote(host_key, safe="")[:200]


def _read(kind: type[Record], path: Path) -> Record | None:
    """What a file holds; None where there is none, or another version wrote something else."""
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _private(path: str, flags: int) -> int:
    """An opener that makes files for the user alone."""
    return os.open(path, flags, 0o600)
