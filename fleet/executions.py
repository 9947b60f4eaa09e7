"""One job in one executor: what the worker watches, and how it ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fleet.executor_main import hand_over
from fleet.executor_process import Executor, Frame

#: lines of an executor's standard error that explain why it did not start
_TAIL_LINES = 20


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
