"""The worker's end of its sidecar: what keeps a dead worker's jobs from running on.

`sidecar_main.py` is the process; it knows the worker's process groups and the time by which its
leases must have been renewed, and kills the groups when the worker dies or lets that pass.

The worker must `renew` before it adds a group after a deadline was missed (see `is_late`), and
`remove` a group before it reaps its leader, while the number cannot be another's yet.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from broker import clock
from fleet import sidecar_main

#: the variable that every process of a worker carries, and its sidecar and itself do not
INCARNATION = "FLEET_INCARNATION"

_COMMAND = (sys.executable, "-I", "-S", "-c", sidecar_main.START, sidecar_main.__file__)


class SidecarGone(Exception):
    """The sidecar is dead or does not listen: start its `successor`."""


class Sidecar:
    """A running sidecar. Nothing here waits, but for `close`."""

    def __init__(self, token: str, lock_fd: int | None = None) -> None:
        self.groups: set[int] = set()
        #: on `broker.clock.boottime`; infinite: no lease is held
        self.deadline = float("inf")
        self._token, self._lock_fd = token, lock_fd
        self._process, self._commands, self._reports = _launch(token, lock_fd)
        self._poll = select.poll()
        self._poll.register(self._reports, select.POLLIN)
        self._rest = b""
        self._said: list[str] = []
        self._at_end = False

    @classmethod
    def start(cls, token: str, lock_fd: int | None = None) -> Sidecar:
        """Start one. Raises OSError.

        `token` is the value of FLEET_INCARNATION that every process of this worker's jobs carries,
        and the worker itself does not. `lock_fd` stays open until the last of them is dead.
        """
        return cls(token, lock_fd)

    def successor(self) -> Sidecar:
        """Another one in place of this, with the same groups and deadline. Raises OSError, SidecarGone."""
        self._process.kill()  # before its pipe is closed: it would take that for the worker's end
        self.close()
        other = Sidecar(self._token, self._lock_fd)
        try:
            other.renew(self.deadline)
            for group in self.groups:
                other.add(group)
        except SidecarGone:
            other.close()
            raise
        return other

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def add(self, pgid: int) -> None:
        """Watch a process group whose leader is a child of this process. Raises SidecarGone."""
        self.groups.add(pgid)
        self._write(b"+%d\n" % pgid)

    def remove(self, pgid: int) -> None:
        """Forget a group: all of it is dead, and its leader is about to be reaped. Raises SidecarGone."""
        self.groups.discard(pgid)
        self._write(b"-%d\n" % pgid)

    def renew(self, deadline: float) -> None:
        """Kill all groups unless renewed by `deadline`, seconds on `broker.clock.boottime`.

        Infinite where no lease is held. Raises SidecarGone.
        """
        self.deadline = deadline
        self._write(b"=%r\n" % deadline)

    def is_late(self) -> bool:
        """Whether the deadline has passed: what is added now is killed at once, `renew` first."""
        return clock.boottime() >= self.deadline

    def has_spoken(self) -> bool:
        """Whether `killed` would find anything new; cheaper than to find nothing."""
        return bool(self._poll.poll(0))

    def killed(self) -> set[int]:
        """Groups killed since the last call because a deadline had passed. Never raises.

        Also such as this process never added: it had no time to.
        """
        lines = self._read().split(b"\n")
        self._rest = lines.pop()
        self._said += [line.decode(errors="replace") for line in lines if line and not line.isdigit()]
        return {int(line) for line in lines if line.isdigit()}

    def said(self) -> list[str]:
        """The lines that came on its stderr and were not told yet, as of the last `killed`."""
        said, self._said = self._said, []
        return said

    def fileno(self) -> int:
        """Readable when there is something for `killed`, or when the sidecar died."""
        return self._reports.fileno()

    def alive(self) -> bool:
        """Whether it still watched when `killed` was last asked, or it was last written to."""
        return not self._at_end

    def close(self, timeout_seconds: float = 5.0) -> None:
        """End it: it kills what is left of this worker's jobs and leaves.

        If it does not within `timeout_seconds` it is killed.
        """
        self._commands.close()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reports.close()

    def _write(self, line: bytes) -> None:
        try:
            os.write(self._commands.fileno(), line)
        except (OSError, ValueError) as exc:  # dead, stopped for so long that the pipe is full, or closed
            self._at_end = True  # its books are not ours any more: it is to be replaced
            raise SidecarGone(f"the sidecar does not listen: {exc}") from exc

    def _read(self) -> bytes:
        data = self._rest
        if self._reports.closed:
            return data
        with suppress(BlockingIOError):
            while chunk := os.read(self._reports.fileno(), 1 << 12):
                data += chunk
            self._at_end = True
        return data


def _launch(token: str, lock_fd: int | None) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
    """The process, where to write commands, where to read reports. Raises OSError."""
    their_commands, our_commands = _pipe()
    our_reports, their_reports = _pipe()
    os.set_blocking(our_commands.fileno(), False)
    os.set_blocking(our_reports.fileno(), False)
    theirs = [their_commands.fileno(), their_reports.fileno()]
    with their_commands, their_reports:
        try:
            process = subprocess.Popen(
                [*_COMMAND, *map(str, [*theirs, os.getpid()]), token],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # what it has to say in trouble is for the worker to log
                stderr=their_reports,
                pass_fds=theirs if lock_fd is None else [*theirs, lock_fd],
                env=_environment(os.environ),
                start_new_session=True,
            )
        except OSError:
            our_commands.close()
            our_reports.close()
            raise
    return process, our_commands, our_reports


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe()
    return open(reader, "rb", 0), open(writer, "wb", 0)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the interpreter may need, less what is ours: no secret, and no other worker's token."""
    return {name: value for name, value in environ.items() if not name.startswith("FLEET_")}
