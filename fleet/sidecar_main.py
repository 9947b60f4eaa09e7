"""The sidecar: kills a worker's process groups when the worker can no longer answer for them.

The worker starts `PYTHON -I -S -c START sidecar_main.py COMMANDS REPORTS PID TOKEN`: descriptors
of two pipes, and the worker's number. It stands alone, with nothing but what is built into the interpreter,
to be small.

    from the worker     +PGID   a group to watch
                        -PGID   it is gone, its number may soon be another's
                        =SECONDS  kill all unless a later deadline comes by then
    to the worker       PGID    killed, since the deadline had passed
                        TEXT    whatever comes on its stderr, which is the same pipe

The end of the commands means that the worker is dead, however it died: the groups are killed, then
whatever else carries the worker's token in its environment, and this process leaves. With it goes
the last hold on the worker's lock, which it inherited and never looks at.

After a deadline, groups added are killed at once until the next deadline is set: a worker that was
stopped between a claim and the start of its job wakes up without knowing that the lease is lost.
"""

from __future__ import annotations

import select
import sys
import time

TYPE_CHECKING = False  # typing is larger than all of this
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
else:
    import posix as os  # without its layer of Python, which is a tenth of this process

try:  # what signal wraps in enums: they are a fifth of this process
    import _signal as signal  # type: ignore[import-not-found]
except ImportError:
    import signal

#: what Python is told: as a module, this is had from its bytecode; a script would be compiled at each start,
#: and what that takes, a sixth of this process, stays
START = (
    "import sys; sys.path.append(sys.argv[1].rpartition('/')[0]); import sidecar_main; sidecar_main.start()"
)
#: seconds to let commands gather: a short job is added and removed in one look
GATHER_SECONDS = 0.01
#: longest wait in seconds, for poll's clock stands still in suspend and the deadline's does not
LONGEST_WAIT_SECONDS = 1.0
#: seconds to wait for killed processes to be gone
LINGER_SECONDS = 30.0
#: looks that must find nothing: what was being started when the worker died carries its token only
#: a moment after its pipe has told of that death
LAST_LOOKS = 10


def clock() -> float:
    """Seconds on the clock of deadlines, which runs on in suspend."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Process:
    """What /proc tells of a process: who it is (`started` tells two of one number apart)."""

    def __init__(self, pid: int) -> None:
        """Raises OSError, or LookupError where it is just going."""
        with open(f"/proc/{pid}/stat", "rb") as file:
            # the name, in parentheses, may hold anything
            fields = file.read().rpartition(b")")[2].split()
        self.pid = pid
        self.is_zombie = fields[0] in (b"Z", b"X")
        self.parent, self.group, self.started = int(fields[1]), int(fields[2]), fields[19]

    def carries(self, token: bytes) -> bool:
        """Whether it was started with FLEET_INCARNATION=token."""
        try:
            with open(f"/proc/{self.pid}/environ", "rb") as file:
                return b"FLEET_INCARNATION=" + token in file.read().split(b"\0")
        except OSError:
            return False


def look_up(pid: int) -> Process | None:
    """The process of that number, if there is one."""
    try:
        return Process(pid)
    except (OSError, LookupError):
        return None


def processes() -> list[Process]:
    """All processes in our power that are no zombies, this one and its worker left out."""
    own = {os.getpid(), os.getppid()}
    with os.scandir("/proc") as entries:
        found = [look_up(int(entry.name)) for entry in entries if entry.name.isdigit() and _is_ours(entry)]
    return [process for process in found if process and not process.is_zombie and process.pid not in own]


def _is_ours(entry: os.DirEntry[str]) -> bool:
    try:
        return os.geteuid() in (0, entry.stat().st_uid)
    except OSError:
        return False


class Sidecar:
    """Watches one worker until it is gone."""

    def __init__(self, commands: int, reports: int, worker: int, token: str) -> None:
        self.commands, self.reports, self.worker = commands, reports, worker
        self.token = token.encode()
        self.has_proc = look_up(os.getpid()) is not None
        #: group -> when its leader started, for a leader that was seen to be the worker's child
        self.groups: dict[int, bytes | None] = {}
        self.deadline: float | None = None
        self.is_late = False
        self._rest = b""

    def run(self) -> None:
        """Watch until the worker is gone, then kill what it left."""
        poll = select.poll()
        poll.register(self.commands, select.POLLIN)
        while True:
            if poll.poll(self._patience_ms()) and not self._obey():
                break
            if self.deadline is not None and clock() >= self.deadline:
                self._miss()
            time.sleep(GATHER_SECONDS)
        self._finish()

    def _patience_ms(self) -> float | None:
        if self.deadline is None:
            return None
        return 1000 * max(0.0, min(self.deadline - clock(), LONGEST_WAIT_SECONDS))

    def _obey(self) -> bool:
        """Take in the commands that are there; False when there will be no more."""
        data = os.read(self.commands, 1 << 16)
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        fresh: set[int] = set()
        for line in lines:
            self._take(line, fresh)
        for group in fresh & self.groups.keys():
            self.groups[group] = self._leader_started(group)
        if self.is_late and fresh & self.groups.keys():
            self._miss()
        return bool(data)

    def _take(self, line: bytes, fresh: set[int]) -> None:
        verb, value = line[:1], line[1:]
        if verb == b"+":
            self.groups[int(value)] = None
            fresh.add(int(value))
        elif verb == b"-":
            self.groups.pop(int(value), None)
        elif verb == b"=":
            deadline = float(value)
            self.deadline = None if deadline == float("inf") else deadline
            self.is_late = False

    def _leader_started(self, group: int) -> bytes | None:
        leader = look_up(group) if self.has_proc else None
        return leader.started if leader and leader.parent == self.worker else None

    def _miss(self) -> None:
        """The deadline has passed: kill everything, and tell the worker what, for it may come back."""
        self.deadline, self.is_late = None, True
        # told first: a worker that sees a job die must find here why, or takes it for a failure
        told = self._known()
        self._report(told)
        self._report((self._kill_known() | self._kill_found()) - told)

    def _report(self, groups: set[int]) -> None:
        try:
            os.write(self.reports, b"".join(b"%d\n" % group for group in sorted(groups)))
        except OSError:
            pass

    def _finish(self) -> None:
        """The worker is gone: kill everything, and hold the lock until it is dead."""
        until = time.monotonic() + LINGER_SECONDS
        self._kill_known()
        # a worker that ends in order starts nothing meanwhile
        looks = 1 if os.getppid() == self.worker else LAST_LOOKS
        while time.monotonic() < until:
            looks -= not self._kill_found()
            if not looks:
                return
            time.sleep(GATHER_SECONDS)

    def _kill_known(self) -> set[int]:
        """Kill the groups whose leaders are the ones that were added; returns them."""
        return {group for group in self._known() if _kill(os.killpg, group)}

    def _known(self) -> set[int]:
        return {group for group in self.groups if not self.has_proc or self._has_its_leader(group)}

    def _has_its_leader(self, group: int) -> bool:
        """Whether the leader is still the one that was added, if only as a zombie."""
        leader, started = look_up(group), self.groups[group]
        return leader is not None and leader.started == started

    def _kill_found(self) -> set[int]:
        """Kill what is alive, wherever it hides; returns its groups.

        A group without the leader that was added counts only if a member carries the token: since
        its end its number may have gone to another. The token alone counts too: that is what was
        not added yet, or left its group.
        """
        if not self.has_proc:
            return self._kill_known()
        running = processes()
        marked = {process.pid for process in running if process.carries(self.token)}
        ours = {process.group for process in running if process.pid in marked} & self.groups.keys()
        ours |= {group for group in self.groups if self._has_its_leader(group)}
        doomed = [process for process in running if process.pid in marked or process.group in ours]
        for process in doomed:
            _kill(os.kill, process.pid)
        return {process.group for process in doomed}


def _kill(send: Callable[[int, int], None], number: int) -> bool:
    """SIGKILL by os.kill or os.killpg; whether there was anyone."""
    try:
        send(number, signal.SIGKILL)
    except OSError:
        return False
    return True


def main(commands: int, reports: int, worker: int, token: str) -> None:
    """Be a sidecar."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.chdir("/")
    os.set_blocking(reports, False)
    Sidecar(commands, reports, worker, token).run()


def start() -> None:
    """The same, as the command line says."""
    _, _, commands, reports, worker, token = sys.argv
    main(int(commands), int(reports), int(worker), token)
