"""Executors as the worker sees them: a pool of processes that run Python jobs, never waited for.

    execution = pool.start(job_id, fields, execution_id=..., stdout_path=..., stderr_path=...)
    selector.register(execution, EVENT_READ)      # and EVENT_WRITE while execution.wants_write()
    outcome = execution.receive()                 # when readable; None: not yet
    pool.release(execution)                       # after the outcome has been handled

The process is `executor_main.py`, run by the interpreter that the user names. It leads a session
and a process group of its own, so one signal reaches all that a job started.

The worker must not reap executors: no `waitpid(-1)`.
"""

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
from fleet.executor_main import hand_over, pack, unpack

#: beyond its timeout a job gets this many seconds to report that itself, as RQ grants its horse
BACKSTOP_SECONDS = 60
#: rq's own, in seconds
DEFAULT_TIMEOUT_SECONDS = 180
CALLBACK_TIMEOUT_SECONDS = 60
#: seconds an executor without work gets to leave by itself
LEAVE_SECONDS = 5.0
#: reads and writes of one call, of 256 KiB at most, so that one large value does not hold up the loop
_TURNS = 16
_CHUNK = 1 << 18
#: a read that brought fewer bytes than this took all there was
_SHORT = 1 << 14
#: lines of an executor's standard error that explain why it did not start
_TAIL_LINES = 20


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


@dataclass(frozen=True)
class Outcome:
    """How an execution ended.

    `return_value_b64` and `exc_string` are what RQ stores and shows: base64 of the serialised value
    (None for None, and for a `Retry` the Retry), and the traceback as text, or why it died.
    `duration_seconds` is of the function, without callbacks. `retry` is (max, intervals in
    seconds). `exit_status` or `signal` is set for "died"; `could_not_start` says that the job was
    never begun. `output_error` tells why output may be missing.
    """

    kind: Literal["finished", "failed", "retry", "died"]
    duration_seconds: float = 0.0
    return_value_b64: str | None = None
    exc_string: str | None = None
    retry: tuple[int, list[int]] | None = None
    exit_status: int | None = None
    signal: int | None = None
    could_not_start: bool = False
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    output_error: str | None = None


Frame = tuple[dict[str, Any], Mapping[bytes, bytes]]


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


class Execution:
    """One job, or one callback, in one executor."""

    def __init__(
        self,
        executor: Executor,
        job_id: str,
        targets: tuple[str | None, str | None],
        limit_seconds: float | None,
    ) -> None:
        self.job_id = job_id
        #: from the start, when the worker itself should kill it: it has failed to time itself out
        self.kill_after_seconds = limit_seconds
        self.executor = executor
        self.outcome: Outcome | None = None
        self._targets = targets
        self._started = time.monotonic()

    def fileno(self) -> int:
        """The socket to watch."""
        return self.executor.channel.socket.fileno()

    @property
    def pid(self) -> int | None:
        """The executor's process; None if it could not be started."""
        return self.executor.pid

    @property
    def pgid(self) -> int | None:
        """The executor's process group, which has the number of its process."""
        return self.executor.pid

    @property
    def stdout_live_path(self) -> Path:
        """Where standard output goes while the job runs."""
        return self.executor.stdout_live_path

    @property
    def stderr_live_path(self) -> Path:
        """Where standard error goes while the job runs."""
        return self.executor.stderr_live_path

    def wants_write(self) -> bool:
        """Whether the socket is to be watched for writing, and `flush` called then."""
        return self.executor.channel.wants_write

    def flush(self) -> None:
        """Send more of the job."""
        self.executor.channel.flush()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the executor and all it started; its outcome arrives as "died"."""
        self.executor.signal_group(number)

    def receive(self) -> Outcome | None:
        """The outcome, once it is all there.

        Call it when the socket is readable; and now and then anyway, for an executor that is dead
        while a process it left behind keeps its socket open.
        """
        if self.outcome is None:
            frame = self.executor.receive()
            if frame is None and self._is_gone():
                frame = self._last_words()
                self.outcome = self._told(*frame) if frame else self._died()
            elif frame is not None:
                self.outcome = self._told(*frame)
        return self.outcome

    def _is_gone(self) -> bool:
        return self.executor.channel.at_end or self.executor.has_exited()

    def _last_words(self) -> Frame | None:
        """What came between our last look and its death."""
        frame = self.executor.receive()
        while frame is None and self.executor.channel.progressed and not self.executor.channel.at_end:
            frame = self.executor.receive()
        return frame

    def _told(self, end: Mapping[str, Any], blobs: Mapping[bytes, bytes]) -> Outcome:
        self.executor.jobs += 1
        self.executor.rss_bytes = end["rss"]
        value, exc_string, retry = blobs.get(b"return_value"), blobs.get(b"exc_string"), end.get("retry")
        death = _death(end["status"]) if end["kind"] == "died" else {}
        return Outcome(
            kind=end["kind"],
            duration_seconds=end["seconds"],
            return_value_b64=value.decode() if value else None,
            retry=(retry[0], retry[1]) if retry else None,
            stdout_bytes=end.get("stdout", 0),
            stderr_bytes=end.get("stderr", 0),
            output_error=end.get("output_error"),
            **({"exc_string": exc_string.decode() if exc_string else None} | death),
        )

    def _died(self) -> Outcome:
        """The outcome where the executor is gone, and with it its process group."""
        status = self.executor.bury()
        if not self.executor.ready:
            return Outcome("died", could_not_start=True, **(_death(status) | {"exc_string": self._why()}))
        sizes, error = self._collect()
        return Outcome(
            "died",
            time.monotonic() - self._started,
            stdout_bytes=sizes[0],
            stderr_bytes=sizes[1],
            output_error=error,
            **_death(status),
        )

    def _collect(self) -> tuple[list[int], str | None]:
        """Give the job the output of its dead executor: sizes in bytes, and what went wrong with it."""
        sizes, error = [0, 0], None
        for index, path in enumerate((self.stdout_live_path, self.stderr_live_path)):
            try:
                sizes[index] = hand_over(str(path), self._targets[index])
            except FileNotFoundError:
                pass
            except OSError as exc:
                error = str(exc)
        return sizes, error

    def _why(self) -> str:
        """Why there never was an executor, in its own last words where it left any."""
        lines = [line for line in self._last_lines() if line.strip()]
        reason = self.executor.start_error or (lines[-1].strip() if lines else "it said nothing")
        more = "".join(f"\n{line}" for line in lines) if len(lines) > 1 else ""
        return f"executor could not start: {reason}{more}"

    def _last_lines(self) -> list[str]:
        try:
            text = self.stderr_live_path.read_text(encoding="utf-8", errors="backslashreplace")
        except OSError:
            return []
        return text.splitlines()[-_TAIL_LINES:]


def _death(status: int | None) -> dict[str, Any]:
    """The fields of an Outcome that say how a process ended; `status` is waitpid's."""
    if status is None:
        return {"exc_string": "executor died: nobody knows how"}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return {"signal": number, "exc_string": f"executor died: signal {number}{_signal_name(number)}"}
    code = os.waitstatus_to_exitcode(status)
    return {"exit_status": code, "exc_string": f"executor exited with status {code}"}


def _signal_name(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:
        return ""


def _ignore(pgid: int) -> None:
    """Nobody wants to hear of process groups."""


class ExecutorPool:
    """Gives each job an executor: one that waits for work, or a new one.

    `on_spawn(pgid)` is called as soon as a process exists, `on_exit(pgid)` when all of its group was
    killed and before the number can be another's; neither may raise. The pool sets no limit to how many
    run at once.
    """

    def __init__(
        self,
        config: ExecutorConfig,
        *,
        on_spawn: Callable[[int], None] = _ignore,
        on_exit: Callable[[int], None] = _ignore,
    ) -> None:
        self._config = config
        self._on_spawn, self._on_exit = on_spawn, on_exit
        self._idle: list[Executor] = []
        self._busy: set[Executor] = set()
        #: (executor, when to kill it)
        self._leaving: list[tuple[Executor, float]] = []
        self._serial = 0
        config.live_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def prestart(self, count: int) -> None:
        """Start executors until `count` wait for work, so that first jobs find them ready."""
        while len(self._idle) < count:
            self._idle.append(self._spawn())

    def start(
        self,
        job_id: str,
        fields: Mapping[bytes, bytes],
        *,
        execution_id: str,
        stdout_path: str | Path | None = None,
        stderr_path: str | Path | None = None,
    ) -> Execution:
        """Run a job whose hash is `fields`. Does not wait and does not raise.

        What it writes is in `stdout_path` and `stderr_path` when its outcome is there, behind what
        these hold already; if it wrote nothing they are not made. None drops it. Where no executor
        could be started the outcome says so.
        """
        timeout = _seconds(fields.get(b"timeout"), DEFAULT_TIMEOUT_SECONDS)
        task = {"op": "job", "execution_id": execution_id}
        return self._run(job_id, fields, task, (stdout_path, stderr_path), timeout)

    def stopped_callback(
        self,
        job_id: str,
        fields: Mapping[bytes, bytes],
        *,
        stdout_path: str | Path | None = None,
        stderr_path: str | Path | None = None,
    ) -> Execution | None:
        """Run the job's stopped callback, as RQ does after it killed one; None if it has none."""
        if not fields.get(b"stopped_callback_name"):
            return None
        timeout = _seconds(fields.get(b"stopped_callback_timeout"), CALLBACK_TIMEOUT_SECONDS)
        return self._run(job_id, fields, {"op": "stopped"}, (stdout_path, stderr_path), timeout)

    def webhooks(
        self, job_id: str, fields: Mapping[bytes, bytes], status: str, exc_string: str | None = None
    ) -> Execution | None:
        """Tell the job's webhooks that it ended as `status`; None if it has none.

        `fields` is the job's hash with `ended_at` as it was stored. What goes wrong is not raised
        and not told: an address that does not answer is no failure.
        """
        if not fields.get(b"webhooks"):
            return None
        task = {"op": "webhooks", "status": status, "exc_string": exc_string}
        return self._run(job_id, fields, task, (None, None), CALLBACK_TIMEOUT_SECONDS)

    def release(self, execution: Execution) -> None:
        """Take the executor back; kills it if it still runs the job."""
        executor = execution.executor
        if executor not in self._busy:
            return
        self._busy.remove(executor)
        if execution.outcome is None or executor.buried:
            self._bury(executor)
        elif self._is_worn(executor) or len(self._idle) >= self._config.max_idle:
            self._dismiss(executor)
        else:
            self._idle.append(executor)
        if self._leaving:
            self.reap()

    def reap(self) -> None:
        """Bury executors that left, kill those that should have. Call it now and then, as on each beat."""
        now = time.monotonic()
        leaving, self._leaving = self._leaving, []
        for executor, deadline in leaving:
            if executor.has_exited() or now >= deadline:
                self._bury(executor)
            else:
                self._leaving.append((executor, deadline))

    def close(self, grace_seconds: float = 2.0) -> None:
        """End all executors: those with work at once, the others within `grace_seconds`."""
        for executor in self._busy:
            self._bury(executor)
        for executor in self._idle:
            self._dismiss(executor, grace_seconds)
        self._busy.clear()
        self._idle.clear()
        while self._leaving:
            self.reap()
            time.sleep(0.005)

    def _run(
        self,
        job_id: str,
        fields: Mapping[bytes, bytes],
        task: Mapping[str, Any],
        targets: tuple[str | Path | None, str | Path | None],
        timeout_seconds: float | None,
    ) -> Execution:
        stdout, stderr = (None if path is None else str(path) for path in targets)
        executor = self._take()
        executor.channel.send({**task, "id": job_id, "stdout": stdout, "stderr": stderr}, fields)
        limit = None if timeout_seconds is None else timeout_seconds + BACKSTOP_SECONDS
        return Execution(executor, job_id, (stdout, stderr), limit)

    def _take(self) -> Executor:
        """An executor that waits for work and lives, else a new one."""
        while self._idle:
            executor = self._idle.pop()
            if executor.is_alive():
                break
            self._bury(executor)
        else:
            executor = self._spawn()
        self._busy.add(executor)
        return executor

    def _spawn(self) -> Executor:
        near, far = socket.socketpair()
        executor = Executor(Channel(near), self._live_paths(), self._on_exit)
        try:
            executor.launch(self._config, far)
        except OSError as exc:
            executor.start_error = str(exc)
        finally:
            far.close()
        if executor.pid is not None:
            self._on_spawn(executor.pid)
        executor.channel.send(self._hello(executor))
        return executor

    def _live_paths(self) -> tuple[Path, Path]:
        # named by worker and count: what a killed worker left is overwritten by its successor
        self._serial += 1
        stem = f"{self._config.worker_name}-{self._serial}"
        return self._config.live_dir / f"{stem}.stdout", self._config.live_dir / f"{stem}.stderr"

    def _hello(self, executor: Executor) -> dict[str, Any]:
        config = self._config
        return {
            "op": "hello",
            "mode": config.mode,
            "redis_url": config.redis_url,
            "worker_name": config.worker_name,
            "paths": list(config.paths),
            "work_dir": config.work_dir,
            "stdout": str(executor.stdout_live_path),
            "stderr": str(executor.stderr_live_path),
        }

    def _is_worn(self, executor: Executor) -> bool:
        return executor.jobs >= self._config.max_jobs or executor.rss_bytes >= self._config.max_rss_bytes

    def _dismiss(self, executor: Executor, grace_seconds: float = LEAVE_SECONDS) -> None:
        """Let it leave by itself: what its jobs registered for the end of the process shall run."""
        executor.close()
        self._leaving.append((executor, time.monotonic() + grace_seconds))

    def _bury(self, executor: Executor) -> None:
        executor.signal_group(signal.SIGKILL)
        executor.bury()
        executor.close()


def _seconds(value: bytes | None, default: int) -> int | None:
    """A timeout of a job's hash: what is not set or 0 is `default`, what is negative is none."""
    try:
        seconds = int(value or 0) or default
    except ValueError:
        return default
    return None if seconds < 0 else seconds
