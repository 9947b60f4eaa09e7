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

import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fleet.executions import Execution, Outcome
from fleet.executor_process import Channel, Executor, ExecutorConfig

__all__ = ["Execution", "ExecutorConfig", "ExecutorPool", "Outcome"]

#: beyond its timeout a job gets this many seconds to report that itself, as RQ grants its horse
BACKSTOP_SECONDS = 60
#: rq's own, in seconds
DEFAULT_TIMEOUT_SECONDS = 180
CALLBACK_TIMEOUT_SECONDS = 60
#: seconds an executor without work gets to leave by itself
LEAVE_SECONDS = 5.0


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
        """Run a job whose hash is `fields`. Does not wait.

        What it writes is in `stdout_path` and `stderr_path` when its outcome is there, behind what
        these hold already; if it wrote nothing they are not made. None drops it. Where no executor
        could be started the outcome says so. Raises OSError only where there are no descriptors left.
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
