"""Executors as the worker sees them: a pool of processes that run Python jobs, never waited for.

    execution = pool.start(job_id, fields, execution_id, stdout_path, stderr_path)
    pool.send()
    execution.outcome          # there when the pool's selector has called back, and it is over
    pool.release(execution)    # after the outcome has been handled

The process is `executor_main.py`, run by the interpreter that the user names. It leads a session
and a process group of its own, so one signal reaches all that a job started.

The worker must not reap executors: no `waitpid(-1)`.
"""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from broker import sentinel
from fleet.executions import Execution, Lane, Outcome
from fleet.executor_main import pack
from fleet.executor_process import Channel, Executor, ExecutorConfig, Mode

__all__ = ["Execution", "ExecutorConfig", "ExecutorPool", "Outcome"]

#: beyond its timeout a job gets this many seconds to report that itself, as RQ grants its horse
BACKSTOP_SECONDS = 60
#: rq's own, in seconds
DEFAULT_TIMEOUT_SECONDS = 180
CALLBACK_TIMEOUT_SECONDS = 60
#: seconds an executor without work gets to leave by itself
LEAVE_SECONDS = 5.0
#: jobs that may wait in line for one executor
LINE = 128


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
        selector: selectors.BaseSelector | None = None,
        on_spawn: Callable[[int], None] = _ignore,
        on_exit: Callable[[int], None] = _ignore,
    ) -> None:
        self._config = config
        self._selector = selector
        self._on_spawn, self._on_exit = on_spawn, on_exit
        #: those without work, by their mode
        self._idle: dict[Mode, list[Lane]] = {"warm": [], "fork": []}
        self._busy: set[Lane] = set()
        #: what was lined up in lanes that are busy no more
        self._stranded: list[Execution] = []
        #: (executor, when to kill it)
        self._leaving: list[tuple[Executor, float]] = []
        self._serial = 0
        config.live_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def start(
        self,
        job_id: str,
        fields: Mapping[bytes, bytes],
        execution_id: str,
        stdout_path: str | Path | None = None,
        stderr_path: str | Path | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> Execution:
        """Run a job whose hash is `fields`; within `limits`, in a process forked for it. Does not wait.

        `send` lets the executor have it, along with what is lined up behind it: to wake it costs more than
        a short job.
        What it writes is in `stdout_path` and `stderr_path` when its outcome is there, behind what
        these hold already; if it wrote nothing they are not made. None drops it. Where no executor
        could be started the outcome says so. Raises OSError only where there are no descriptors left.
        """
        timeout = _seconds(fields.get(b"timeout"), DEFAULT_TIMEOUT_SECONDS)
        task: dict[str, Any] = {"op": "job", "execution_id": execution_id}
        if limits:
            task["limits"] = dict(limits)
        mode: Mode = "fork" if limits else self._config.mode
        return self._give(self._take(mode), job_id, fields, task, (stdout_path, stderr_path), timeout)

    def line_up(
        self,
        job_id: str,
        fields: Mapping[bytes, bytes],
        execution_id: str,
        stdout_path: str | Path | None = None,
        stderr_path: str | Path | None = None,
    ) -> Execution | None:
        """As `start`, behind a job that runs; None where no executor has room.

        It may be taken back, with `withdraw`, until its turn has come.
        """
        lane = self._shortest()
        if lane is None:
            return None
        timeout = _seconds(fields.get(b"timeout"), DEFAULT_TIMEOUT_SECONDS)
        task = {"op": "job", "execution_id": execution_id}
        return self._give(lane, job_id, fields, task, (stdout_path, stderr_path), timeout)

    def send(self) -> None:
        """Send the executors what was started and lined up."""
        for lane in self._busy:
            self._send(lane)

    def notice_deaths(self) -> None:
        """Look at executors that died while a process they left behind keeps their socket open."""
        for lane in self._busy:
            if lane.executor.has_exited():
                lane.look()

    def withdraw(self) -> list[Execution]:
        """Take back all that was lined up and is not begun."""
        return [execution for lane in self._busy if len(lane) > 1 for execution in lane.withdraw()]

    def stranded(self) -> list[Execution]:
        """What was lined up in executors that died or were killed since: it was not begun."""
        for lane in self._busy:
            self._take_stranded(lane)
        found, self._stranded = self._stranded, []
        return found

    def _take_stranded(self, lane: Lane) -> None:
        self._stranded += lane.stranded
        lane.stranded = []

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
        lane = execution.lane
        if lane not in self._busy:
            return
        if self._is_worn(lane.executor):
            lane.stranded += lane.withdraw()
        if len(lane) and execution.outcome:
            return
        self._take_stranded(lane)
        self._busy.remove(lane)
        self._unwatch(lane)
        if execution.outcome is None or lane.executor.buried:
            self._bury(lane.executor)
        elif self._is_worn(lane.executor) or self._has_enough(lane.executor.mode):
            self._dismiss(lane.executor)
        else:
            lane.idle_since = time.monotonic()
            self._idle[lane.executor.mode].append(lane)
        if self._leaving:
            self.reap()

    def reap(self) -> None:
        """Let go of executors that have been idle for long, bury those that left, kill those that should
        have. Call it now and then, as on each beat."""
        now = time.monotonic()
        for lanes in self._idle.values():
            for lane in [one for one in lanes if now - one.idle_since >= self._config.max_idle_seconds]:
                lanes.remove(lane)
                self._dismiss(lane.executor)
        leaving, self._leaving = self._leaving, []
        for executor, deadline in leaving:
            if executor.has_exited() or now >= deadline:
                self._bury(executor)
            else:
                self._leaving.append((executor, deadline))

    def close(self, grace_seconds: float = 2.0) -> None:
        """End all executors: those with work at once, the others within `grace_seconds`."""
        for lane in self._busy:
            self._unwatch(lane)
            self._bury(lane.executor)
        for lanes in self._idle.values():
            for lane in lanes:
                self._dismiss(lane.executor, grace_seconds)
            lanes.clear()
        self._busy.clear()
        while self._leaving:
            self.reap()
            time.sleep(0.005)

    def _run(
        self,
        job_id: str,
        fields: Mapping[bytes, bytes],
        task: dict[str, Any],
        targets: tuple[str | Path | None, str | Path | None],
        timeout_seconds: float | None,
    ) -> Execution:
        lane = self._take(self._config.mode)
        execution = self._give(lane, job_id, fields, task, targets, timeout_seconds)
        self._send(execution.lane)
        return execution

    def _give(
        self,
        lane: Lane,
        job_id: str,
        fields: Mapping[bytes, bytes],
        task: dict[str, Any],
        targets: tuple[str | Path | None, str | Path | None],
        timeout_seconds: float | None,
    ) -> Execution:
        out, err = targets
        stdout, stderr = None if out is None else str(out), None if err is None else str(err)
        limit = None if timeout_seconds is None else timeout_seconds + BACKSTOP_SECONDS
        execution = Execution(lane, job_id, (stdout, stderr), limit)
        task["id"], task["stdout"], task["stderr"] = job_id, stdout, stderr
        lane.add(execution, task, fields)
        return execution

    def _take(self, mode: Mode) -> Lane:
        """An executor that waits for work and lives, else a new one."""
        while self._idle[mode]:
            lane = self._idle[mode].pop()
            lane.look()
            if not lane.executor.channel.at_end:
                break
            self._bury(lane.executor)
        else:
            lane = Lane(self._spawn(mode))
        self._busy.add(lane)
        self._watch(lane)
        return lane

    # -- the selector ----------------------------------------------------------------------

    def _watch(self, lane: Lane) -> None:
        if self._selector:
            handler = partial(self._attend, lane)
            self._selector.register(lane.executor.channel.socket, selectors.EVENT_READ, handler)

    def _unwatch(self, lane: Lane) -> None:
        if self._selector:
            self._selector.unregister(lane.executor.channel.socket)

    def _send(self, lane: Lane) -> None:
        lane.send()
        if self._selector and lane.executor.channel.wants_write:
            self._await(lane, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _attend(self, lane: Lane) -> None:
        """Its socket is ready."""
        channel = lane.executor.channel
        if channel.wants_write:
            channel.flush()
            if not channel.wants_write:
                self._await(lane, selectors.EVENT_READ)
        lane.look()

    def _await(self, lane: Lane, events: int) -> None:
        if self._selector:
            handler = partial(self._attend, lane)
            self._selector.modify(lane.executor.channel.socket, events, handler)

    # -- executors -------------------------------------------------------------------------

    def _shortest(self) -> Lane | None:
        """The executor to line up behind: one that is running short jobs, and has a place left."""
        shortest = min(self._busy, key=len, default=None)
        if shortest is None or self._may_line_up(shortest):  # nearly always
            return shortest
        return min(filter(self._may_line_up, self._busy), key=len, default=None)

    def _may_line_up(self, lane: Lane) -> bool:
        executor, length = lane.executor, len(lane)
        if executor.mode != "warm" or length > LINE or lane.is_slow():
            return False
        if not executor.ready or executor.channel.wants_write:
            return False
        return not self._is_worn(executor, length)

    def _has_enough(self, mode: Mode) -> bool:
        """Whether as many wait without work as may."""
        return len(self._idle[mode]) >= self._config.max_idle

    def _spawn(self, mode: Mode) -> Executor:
        near, far = socket.socketpair()
        executor = Executor(Channel(near), self._live_paths(), self._on_exit, mode)
        try:
            executor.launch(self._config, far)
        except OSError as exc:
            executor.start_error = str(exc)
        finally:
            far.close()
        if executor.pid is not None:
            self._on_spawn(executor.pid)
        executor.channel.send(pack(self._hello(executor)))
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
            "mode": executor.mode,
            "redis_url": config.redis_url,
            "sentinel": _service(config.redis_url),
            "worker_name": config.worker_name,
            "paths": list(config.paths),
            "work_dir": config.work_dir,
            "stdout": str(executor.stdout_live_path),
            "stderr": str(executor.stderr_live_path),
        }

    def _is_worn(self, executor: Executor, more: int = 0) -> bool:
        """Whether it is to be replaced, once it has run so many more."""
        jobs = executor.jobs + more
        return jobs >= self._config.max_jobs or executor.rss_bytes >= self._config.max_rss_bytes

    def _dismiss(self, executor: Executor, grace_seconds: float = LEAVE_SECONDS) -> None:
        """Let it leave by itself: what its jobs registered for the end of the process shall run."""
        executor.close()
        self._leaving.append((executor, time.monotonic() + grace_seconds))

    def _bury(self, executor: Executor) -> None:
        executor.signal_group(signal.SIGKILL)
        executor.bury()
        executor.close()


def _service(redis_url: str) -> dict[str, Any] | None:
    """What a URL of Sentinel names, read here: the executor's file stands alone."""
    return asdict(sentinel.parse(redis_url)) if sentinel.is_sentinel(redis_url) else None


def _seconds(value: bytes | None, default: int) -> int | None:
    """A timeout of a job's hash: what is not set or 0 is `default`, what is negative is none."""
    try:
        seconds = int(value or 0) or default
    except ValueError:
        return default
    return None if seconds < 0 else seconds
