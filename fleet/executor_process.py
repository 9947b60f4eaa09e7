"""One executor process and the socket that the worker shares with it; nothing here waits for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fleet import executor_main
from fleet.executor_main import TURN, Frames
from fleet.process import peak_bytes

if TYPE_CHECKING:
    from fleet.executor_main import Frame

#: reads and writes of one call, of 256 KiB at most, so that one large value does not hold up the loop
_TURNS = 16
_CHUNK = 1 << 18
#: a read that brought fewer bytes than this took all there was
_SHORT = 1 << 14


#: "warm": many jobs in one process, "fork": each job in a forked process of its own
Mode = Literal["warm", "fork"]


@dataclass(frozen=True)
class ExecutorConfig:
    """What all executors of a worker have in common.

    `environ` is their whole environment and must hold no secret; `live_dir` keeps the output of
    running jobs and is best on the file system of the jobs' own files.
    """

    python: str
    redis_url: str = field(repr=False)
    worker_name: str
    environ: Mapping[str, str] = field(repr=False)
    work_dir: str
    live_dir: Path
    mode: Mode = "warm"
    #: put first on sys.path
    paths: tuple[str, ...] = ()
    #: jobs after which an executor is replaced
    max_jobs: int = 1000
    #: resident bytes above which an executor is replaced after its job
    max_rss_bytes: int = 2 * 1024**3
    #: executors kept without work, and for how many seconds each
    max_idle: int = 1
    max_idle_seconds: float = 300.0


class Channel:
    """Frames over a non-blocking socket, buffered both ways."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.at_end = False
        self._frames = Frames()
        self._outgoing = memoryview(b"")

    def send(self, frames: bytes) -> None:
        """Send as much as the socket takes now, and keep the rest for `flush`."""
        self._outgoing = memoryview(bytes(self._outgoing) + frames if self._outgoing else frames)
        self.flush()

    def flush(self) -> None:
        """Send more of what is kept. A receiver that is gone shows when reading."""
        with suppress(BlockingIOError, ConnectionError):
            for _ in range(_TURNS):
                if not self._outgoing:
                    break
                self._outgoing = self._outgoing[self.socket.send(self._outgoing[:_CHUNK]) :]

    @property
    def wants_write(self) -> bool:
        """Whether something is kept."""
        return bool(self._outgoing) and not self.at_end

    def receive(self) -> Iterator[Frame]:
        """The frames that are there. After noise, as after the end, there are none."""
        self._fill()
        try:
            while frame := self._frames.pop():
                yield frame
        except (ValueError, EOFError, TypeError):
            self.at_end = True

    def _fill(self) -> None:
        """Read what is there, up to a limit."""
        with suppress(BlockingIOError):
            for _ in range(_TURNS):
                chunk = self._read()
                self._frames.feed(chunk)
                if len(chunk) < _SHORT:
                    break

    def _read(self) -> bytes:
        try:
            chunk = self.socket.recv(_CHUNK)
        except ConnectionError:
            chunk = b""
        self.at_end = self.at_end or not chunk
        return chunk

    def has_news(self) -> bool:
        """Whether there is something to receive."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the socket; the other side reads the end of the file."""
        self.socket.close()


class Turns:
    """The numbers of tasks that may be begun, in a pipe whose both ends are ours: see executor_main."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self._reader, self._writer = open(reader, "rb", 0), open(writer, "wb", 0)  # noqa: SIM115

    def fileno(self) -> int:
        """The end that the executor reads."""
        return self._reader.fileno()

    def give(self, numbers: Iterable[int]) -> None:
        """Let these be begun, in this order."""
        self._writer.write(b"".join(map(TURN.pack, numbers)))

    def take_back(self) -> list[int]:
        """The numbers that nobody has taken; those tasks will not be begun."""
        return [number for (number,) in TURN.iter_unpack(self._reader.read(1 << 16) or b"")]

    def close(self) -> None:
        """Let go of both ends; the executor leaves when it has done what it may."""
        self._reader.close()
        self._writer.close()


class Executor:
    """One process of the pool, and what its worker needs to know of it."""

    def __init__(
        self, channel: Channel, live: tuple[Path, Path], on_exit: Callable[[int], None], mode: Mode
    ) -> None:
        self.channel = channel
        self.mode = mode
        self.turns = Turns()
        self.stdout_live_path, self.stderr_live_path = live
        self.ready = False
        self.jobs = 0
        self.rss_bytes = 0
        #: the most it ever had, known once it is buried
        self.peak_rss_bytes = 0
        #: why there is no process at all
        self.start_error = ""
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        #: whether the process and its group are gone for good
        self.buried = False

    @property
    def pid(self) -> int | None:
        """The process's id, also that of its group; None if it could not be started."""
        return self._process.pid if self._process else None

    def launch(self, config: ExecutorConfig, far_end: socket.socket) -> None:
        """Start the process, with the channel's far end as its own. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        files: list[int] = []
        theirs = [far_end.fileno(), self.turns.fileno()]
        try:
            for path in (self.stdout_live_path, self.stderr_live_path):
                files.append(os.open(path, flags, 0o644))
            self._process = subprocess.Popen(
                [config.python, "-I", executor_main.__file__, *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=files[0],
                stderr=files[1],
                pass_fds=theirs,
                env=dict(config.environ),
                start_new_session=True,
            )
        finally:
            for fd in files:
                os.close(fd)

    def receive(self) -> Iterator[Frame]:
        """The frames that are there but for the one that says the process is ready."""
        for frame in self.channel.receive():
            if frame[0]["op"] == "ready":
                self.ready = True
            else:
                yield frame

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and to all in its group."""
        if self.pid is not None and not self.buried:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def has_exited(self) -> bool:
        """Whether the process ended. It stays a zombie, so its group's id cannot be another's yet."""
        if self._process is None or self._status is not None:
            return True
        try:
            if hasattr(os, "waitid"):
                return (
                    os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
                )
            pid, status = os.waitpid(self._process.pid, os.WNOHANG)  # macOS before Python 3.13
        except ChildProcessError:
            return True
        if pid:
            self._status = status
        return bool(pid)

    def bury(self) -> int | None:
        """Kill what is left of the group, reap the process, return its wait status if it is known.

        `on_exit` hears of the group before its id can be another's.
        """
        if self.buried or self._process is None:
            return self._status
        self._wait_briefly()
        self.signal_group(signal.SIGKILL)
        self._on_exit(self._process.pid)
        self.buried = True
        if self._status is None:
            with suppress(ChildProcessError):
                _, self._status, usage = os.wait4(self._process.pid, 0)
                self.peak_rss_bytes = peak_bytes(usage)
        self._process.returncode = self._status or 0
        return self._status

    def _wait_briefly(self) -> None:
        # its sockets close just before it becomes a zombie: do not kill it in between
        deadline = time.monotonic() + 0.05
        while self.channel.at_end and not self.has_exited() and time.monotonic() < deadline:
            time.sleep(0.001)

    def close(self) -> None:
        """Let go of the process, which leaves when it reads that, and of its live files."""
        self.channel.close()
        self.turns.close()
        for path in (self.stdout_live_path, self.stderr_live_path):
            path.unlink(missing_ok=True)
