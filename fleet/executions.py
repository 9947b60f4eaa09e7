"""What an executor was given to run: one job at a time, and a few that wait for their turn."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fleet.executor_main import hand_over, pack
from fleet.executor_process import Executor

#: lines of an executor's standard error that explain why it did not start
_TAIL_LINES = 20
#: seconds that what is no short job has run
_SLOW_SECONDS = 0.05


class Outcome(NamedTuple):
    """How an execution ended.

    `return_value_b64` and `exc_string` are what RQ stores and shows: base64 of the serialised value
    (None for None, and for a `Retry` the Retry), and the traceback as text, or why it died.
    `duration_seconds` is of the function, `callback_seconds` of its callbacks. `retry` is (max, intervals in
    seconds). `exit_status` or `signal` is set for "died"; `could_not_start` says that there never was an
    executor, `unbegun` that it died before it began this job. `output_error` tells why output may be missing.
    `cpu_seconds` and `peak_bytes` are what the job used as far as its executor can tell: 0 bytes where an
    earlier job of that process had as many.
    """

    kind: Literal["finished", "failed", "retry", "died"]
    duration_seconds: float = 0.0
    callback_seconds: float = 0.0
    return_value_b64: str | None = None
    exc_string: str | None = None
    retry: tuple[int, list[int]] | None = None
    cpu_seconds: float | None = None
    peak_bytes: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    output_error: str | None = None
    exit_status: int | None = None
    signal: int | None = None
    could_not_start: bool = False
    unbegun: bool = False


class Execution:
    """One job, or one callback, in one executor."""

    def __init__(
        self, lane: Lane, job_id: str, targets: tuple[str | None, str | None], limit_seconds: float | None
    ) -> None:
        self.job_id = job_id
        self.targets = targets
        #: from its beginning, when the worker itself should kill it: it has failed to time itself out
        self.kill_after_seconds = limit_seconds
        self.lane = lane
        self.number = 0
        #: when its turn came, seconds on the monotonic clock; None: it waits behind others
        self.begun_at: float | None = None
        self.outcome: Outcome | None = None

    def fileno(self) -> int:
        """The socket to watch."""
        return self.lane.executor.channel.socket.fileno()

    @property
    def pid(self) -> int | None:
        """The executor's process; None if it could not be started."""
        return self.lane.executor.pid

    @property
    def pgid(self) -> int | None:
        """The executor's process group, which has the number of its process."""
        return self.lane.executor.pid

    @property
    def stdout_live_path(self) -> Path:
        """Where standard output goes while the job runs."""
        return self.lane.executor.stdout_live_path

    @property
    def stderr_live_path(self) -> Path:
        """Where standard error goes while the job runs."""
        return self.lane.executor.stderr_live_path

    def wants_write(self) -> bool:
        """Whether the socket is to be watched for writing, and `flush` called then."""
        return self.lane.executor.channel.wants_write

    def flush(self) -> None:
        """Send more of the job."""
        self.lane.executor.channel.flush()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal what runs it and all it started, unless it is over; its outcome arrives as "died"."""
        self.lane.kill(self, number)

    def receive(self) -> Outcome | None:
        """The outcome, once it is all there.

        Call it when the socket is readable; and now and then anyway, for an executor that is dead
        while a process it left behind keeps its socket open.
        """
        if self.outcome is None:
            self.lane.look()
        return self.outcome


class Lane:
    """What one executor was given: the first is being run, the others wait for their turn."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._line: deque[Execution] = deque()
        self._number = 0
        self._unsent: list[tuple[int, bytes]] = []
        #: since when it has had nothing to run, once it had; monotonic seconds
        self.idle_since = 0.0
        #: what was in line, was not begun, and will not be, for its executor died or was killed
        self.stranded: list[Execution] = []

    def __len__(self) -> int:
        """How many it has that are not over."""
        return len(self._line)

    def is_slow(self) -> bool:
        """Whether what it runs has taken long enough to let nothing wait behind it."""
        return bool(self._line) and time.monotonic() - (self._line[0].begun_at or 0.0) > _SLOW_SECONDS

    def add(self, execution: Execution, task: dict[str, Any], fields: Mapping[bytes, bytes]) -> None:
        """One more, behind what is there; `send` lets the executor have it. `task` gets its number."""
        self._number += 1
        execution.number = task["number"] = self._number
        self._unsent.append((self._number, pack(task, fields)))
        self._line.append(execution)
        if len(self._line) == 1:
            execution.begun_at = time.monotonic()

    def send(self) -> None:
        """Send what was added."""
        if self._unsent:
            numbers, frames = zip(*self._unsent, strict=True)
            self._unsent.clear()
            self.executor.channel.send(b"".join(frames))
            self.executor.turns.give(numbers)

    def withdraw(self) -> list[Execution]:
        """Take back what the executor has not begun; it will not. What has its turn stays."""
        numbers = set(self.executor.turns.take_back())
        if self._line and self._line[0].number in numbers:  # it is just about to be begun
            numbers.remove(self._line[0].number)
            self.executor.turns.give([self._line[0].number])
        withdrawn = [execution for execution in self._line if execution.number in numbers]
        for execution in withdrawn:
            self._line.remove(execution)
        return withdrawn

    def kill(self, execution: Execution, number: int) -> None:
        """Signal the executor if that is what it runs, and not what it has begun since."""
        self.stranded += self.withdraw()
        self.look()
        if execution in self._line:
            self.executor.signal_group(number)

    def look(self) -> None:
        """Take in what the executor says, and notice if it is gone."""
        heard = False
        for end, blobs in self.executor.receive():
            heard = True
            if not self._line:  # who speaks unasked is not to be trusted
                self.executor.channel.at_end = True
                return
            self._end_first(_told(end, blobs))
            self.executor.jobs += 1
            self.executor.rss_bytes = end["rss"]
        if self._line and (self.executor.channel.at_end or (not heard and self.executor.has_exited())):
            self._take_leave()

    def _take_leave(self) -> None:
        """The executor is gone: so is what it began. What came between our last look and that counts."""
        for end, blobs in self.executor.receive():
            if self._line:
                self._end_first(_told(end, blobs))
        if self._line:
            self._divide(self.executor.bury())

    def _divide(self, status: int | None) -> None:
        """Tell what a dead executor had begun from what another may run."""
        numbers = set(self.executor.turns.take_back())
        line, now = list(self._line), time.monotonic()
        self._line.clear()
        begun = [one for one in line if one.number not in numbers]
        for one in begun:  # but for the last of them they have ended, and we could not hear of it
            one.begun_at = one.begun_at or now
            one.outcome = self._died(one, status, is_last=one is begun[-1])
        for one in line[len(begun) :]:
            if one.begun_at is None:
                self.stranded.append(one)
            elif self.executor.ready:
                one.outcome = Outcome("died", unbegun=True, **_death(status))
            else:
                one.outcome = self._not_started(status)

    def _end_first(self, outcome: Outcome) -> None:
        """The first is over, and the next has its turn."""
        self._line.popleft().outcome = outcome
        if self._line:
            self._line[0].begun_at = time.monotonic()

    def _not_started(self, status: int | None) -> Outcome:
        """The outcome where there never was an executor."""
        return Outcome("died", could_not_start=True, **(_death(status) | {"exc_string": self._why()}))

    def _died(self, execution: Execution, status: int | None, *, is_last: bool) -> Outcome:
        """The outcome where the executor is gone, and with it its process group."""
        sizes, error = self._collect(execution.targets) if is_last else ([0, 0], None)
        return Outcome(
            "died",
            time.monotonic() - (execution.begun_at or 0.0),
            stdout_bytes=sizes[0],
            stderr_bytes=sizes[1],
            output_error=error,
            peak_bytes=self.executor.peak_rss_bytes,
            **_death(status),
        )

    def _collect(self, targets: tuple[str | None, str | None]) -> tuple[list[int], str | None]:
        """Give the job the output of its dead executor: sizes in bytes, and what went wrong with it."""
        sizes, error = [0, 0], None
        live = (self.executor.stdout_live_path, self.executor.stderr_live_path)
        for index, path in enumerate(live):
            try:
                sizes[index] = hand_over(str(path), targets[index])
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
            text = self.executor.stderr_live_path.read_text(encoding="utf-8", errors="backslashreplace")
        except OSError:
            return []
        return text.splitlines()[-_TAIL_LINES:]


def _told(end: Mapping[str, Any], blobs: Mapping[bytes, bytes]) -> Outcome:
    """The outcome in an executor's own words."""
    value, exc_string, retry = blobs.get(b"return_value"), blobs.get(b"exc_string"), end.get("retry")
    cpu_seconds, peak_bytes = end.get("used", (None, 0))
    outcome = Outcome(  # by position: it is made for each job, and names take twice as long
        end["kind"],
        end["seconds"],
        end.get("callback_seconds", 0.0),
        value.decode() if value else None,
        exc_string.decode() if exc_string else None,
        (retry[0], retry[1]) if retry else None,
        cpu_seconds,
        peak_bytes,
        end.get("stdout", 0),
        end.get("stderr", 0),
        end.get("output_error"),
    )
    return outcome._replace(**_death(end["status"])) if outcome.kind == "died" else outcome


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
