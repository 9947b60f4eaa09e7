"""One executor process and the socket that the worker shares with it; nothing here waits for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fleet import executor_main
from fleet.executor_main import pack, unpack

#: reads and writes of one call, of 256 KiB at most, so that one large value does not hold up the loop
_TURNS = 16
_CHUNK = 1 << 18
#: a read that brought fewer bytes than this took all there was
_SHORT = 1 << 14

Frame = tuple[dict[str, Any], Mapping[bytes, bytes]]


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
    #: "warm": many jobs in one process, "fork": each job in a forked process of its own
    mode: Literal["warm", "fork"] = "warm"
    #: put first on sys.path
    paths: tuple[str, ...] = ()
    #: jobs after which an executor is replaced
    max_jobs: int = 1000
    #: resident bytes above which an executor is replaced after its job
    max_rss_bytes: int = 2 * 1024**3
    #: executors kept without work
    max_idle: int = 1


class Channel:
    """Frames over a non-blocking socket, buffered both ways."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.at_end = False
        #: whether the last look at the socket found something
        self.progressed = False
        self._incoming = bytearray()
        self._outgoing = memoryview(b"")

    def send(self, header: Mapping[str, Any], blobs: Mapping[bytes, bytes] | None = None) -> None:
        """Send as much as the socket takes now, and keep the rest for `flush`."""
        frame = pack(header, blobs)
        self._outgoing = memoryview(bytes(self._outgoing) + frame if self._outgoing else frame)
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

    def receive(self) -> Frame | None:
        """The next frame, if it is all there. After noise, as after the end, there is none."""
        try:
            return unpack(self._incoming) or (unpack(self._incoming) if self._fill() else None)
        except (ValueError, KeyError, TypeError):
            self.at_end = True
            return None

    def _fill(self) -> bool:
        """Read some of what is there; False if that was nothing."""
        before = len(self._incoming)
        with suppress(BlockingIOError):
            for _ in range(_TURNS):
                chunk = self._read()
                self._incoming += chunk
                if len(chunk) < _SHORT:
                    break
        self.progressed = len(self._incoming) > before
        return self.progressed

    def _read(self) -> bytes:
        try:
            chunk = self.socket.recv(_CHUNK)
        except ConnectionError:
            chunk = b""
        self.at_end = self.at_end or not chunk
        return chunk

    def close(self) -> None:
        """Let go of the socket; the other side reads the end of the file."""
        self.socket.close()


class Executor:
    """One process of the pool, and what its worker needs to know of it."""

    def __init__(self, channel: Channel, live: tuple[Path, Path], on_exit: Callable[[int], None]) -> None:
        self.channel = channel
        self.stdout_live_path, self.stderr_live_path = live
        self.ready = False
        self.jobs = 0
        self.rss_bytes = 0
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
        try:
            for path in (self.stdout_live_path, self.stderr_live_path):
                files.append(os.open(path, flags, 0o644))
            self._process = subprocess.Popen(
                [config.python, "-I", executor_main.__file__, str(far_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=files[0],
                stderr=files[1],
                pass_fds=[far_end.fileno()],
                env=dict(config.environ),
                start_new_session=True,
            )
        finally:
            for fd in files:
                os.close(fd)

    def receive(self) -> Frame | None:
        """The next frame but for the one that says the process is ready."""
        frame = self.channel.receive()
        if frame and frame[0]["op"] == "ready":
            self.ready = True
            frame = self.channel.receive()
        return frame

    def is_alive(self) -> bool:
        """Whether it can be given work. Only for one that is idle: what it says is dropped."""
        while self.receive():
            pass
        return not self.channel.at_end

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
                self._status = os.waitpid(self._process.pid, 0)[1]
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
        for path in (self.stdout_live_path, self.stderr_live_path):
            path.unlink(missing_ok=True)
