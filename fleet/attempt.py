"""One attempt at a job while it runs here: a command's process, or a function in an executor.

The loop starts it, watches it, may interrupt it, and in the end collects an `End` from it.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from broker import clock, failures, tasks
from broker.command import Command
from broker.usage import Usage
from broker.work import Claim, End, Outcome, Tails
from fleet import process
from fleet.limits import Limit, Limits
from fleet.memory import Memory
from fleet.meters import JobMeter
from fleet.outputs import Folders, OutputFiles, Outputs, WorkingFolders
from fleet.processes import Process
from fleet.room import Grant
from fleet.sidecar import INCARNATION
from fleet.strays import Marks

#: why an attempt was interrupted: its time ran out, an operator or RQ's stop-job, RQ's kill-horse,
#: it has more memory than it asked for, its lease is gone, or this worker leaves
Cause = Literal["timeout", "stop", "kill", "memory", "lost", "hand-back"]

_OUTCOMES: Mapping[Cause, Outcome] = {
    "timeout": "failed",
    "stop": "stopped",
    "kill": "failed",
    "memory": "failed",
    "lost": "lost",
    "hand-back": "handed-back",
}
#: signals by which the kernel enforces limits that the job, or whoever started the worker, has set
_LIMITS: Mapping[int, str] = {
    signal.SIGXCPU: " (over its limit of CPU time, ulimit -t)",
    signal.SIGXFSZ: " (over its limit of file size, ulimit -f)",
}
_HANDED_BACK = "the worker stopped before the job ended"
#: bytes of output shown with a failure
_SHOWN_BYTES = 2000
#: variables that no two attempts have in common
_MARKS = (os.fsencode(INCARNATION), b"FLEET_JOB_ID", b"FLEET_FENCE")
#: seconds between looks at what an interrupted command's group still does, once its first process is gone
_LOOK_SECONDS = 0.05


@dataclass
class Attempt(ABC):
    """What both kinds have in common. Times are seconds on the monotonic clock."""

    claim: Claim
    pgid: int
    timeout_seconds: float | None
    started: float = field(default_factory=clock.monotonic)
    cause: Cause | None = None
    kill_at: float | None = None
    #: when `has_ended` may have another answer, though no child of this process ended
    look_at: float | None = None
    #: lost while Redis was away: nobody's fault
    uncounted: bool = False
    #: what it is held to, if it asked for something of its worker
    limit: Limit | None = None
    #: the most memory that one of its processes was seen to have had, and number -> start (seconds on the
    #: boot clock) of those that there were: fleet/sampler.py
    seen_bytes: int = 0
    known: Mapping[int, float] = field(default_factory=dict)
    #: what samples told, once there was one
    meter: JobMeter | None = None

    @property
    def timeout_at(self) -> float | None:
        """When it has run for too long, unless it is being ended already."""
        if self.timeout_seconds is None or self.cause:
            return None
        return self.started + self.timeout_seconds

    def interrupt(self, cause: Cause, grace_seconds: float) -> None:
        """Ask it to end: SIGTERM to all of its processes, SIGKILL after the grace."""
        if self.cause is None:
            self.cause = cause
            self.kill_at = clock.monotonic() + grace_seconds
            self.signal(signal.SIGTERM)

    def kill(self, cause: Cause | None = None) -> None:
        """End it now. A cause given before stays, but for a lease that is gone: that outranks all."""
        if cause == "lost" or self.cause is None:
            self.cause = cause or self.cause
        self.kill_at = None
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        process.signal_group(self.pgid, number)

    def duration(self) -> float:
        """Seconds since it started."""
        return clock.monotonic() - self.started

    def interrupted_end(self, cause: Cause, tails: Tails, usage: Usage | None = None) -> End:
        """The end of an attempt that was interrupted."""
        reason = self._reason(cause, usage)
        text = failures.encoded(self._told(reason, tails)) if cause != "hand-back" else None
        return End(
            self.claim,
            _OUTCOMES[cause],
            reason,
            self.duration(),
            exc_string=text,
            uncounted=self.uncounted,
            tails=tails,
            usage=usage,
        )

    def used(self, cpu_seconds: float | None, largest_bytes: int) -> Usage:
        """What it used, by what was measured of its processes; asked once, for its limit ends here."""
        if self.limit is None:
            usage = Usage(cpu_seconds, largest_bytes or None)
        else:
            usage = self.limit.usage(cpu_seconds, largest_bytes)
            if self.limit.ran_out:
                self.cause = self.cause or "memory"
            self.limit.close()
        return self.meter.added(usage) if self.meter else usage

    def _reason(self, cause: Cause, usage: Usage | None) -> str:
        if cause == "memory" and self.limit:
            return self.limit.verdict(usage or Usage())
        return {
            "timeout": f"Timeout: ran longer than {self.timeout_seconds or 0:g} s",
            "stop": "Job stopped by user, work-horse terminated.",  # rq's own words
            "kill": "Killed: rq's kill-horse command",
            "lost": "WorkerLost: the worker was paused or cut off for longer than its lease",
            "hand-back": _HANDED_BACK,
        }[cause]

    def _told(self, reason: str, tails: Tails) -> str:
        """The text of the error."""
        return reason

    @property
    def is_unmetered(self) -> bool:
        """Whether its processes must be looked at while they run, for nobody else tells what they had."""
        return False

    @property
    def has_own_processes(self) -> bool:
        """Whether these began with it."""
        return True

    def counts(self, pid: int, found: Process) -> bool:
        """Whether that process of its group, or of what descends from it, is the job's."""
        return True

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether its process is gone; cheap, asked whenever a child ended."""

    @abstractmethod
    def collect(self, tail_bytes: int) -> End:
        """Reap what is left, close its files, and say how it ended. Once, after `has_ended`."""

    @abstractmethod
    def output_ends(self) -> tuple[int, int]:
        """How many bytes it has written to stdout and stderr."""

    @abstractmethod
    def tails(self, limit: int) -> Tails:
        """The last bytes of its output so far."""


@dataclass(frozen=True)
class CommandContext:
    """What all attempts of a worker share: folders, environment, and two open files."""

    folders: Folders
    outputs: Outputs
    working: WorkingFolders
    #: as the system has it: a worker's own is not encoded anew for each of its jobs
    environ: Mapping[bytes, bytes]
    #: /dev/null, and the directory this process lives in
    null: int
    home: int
    memory: Memory
    limits: Limits
    #: of a function's return value, or traceback
    max_result_bytes: int


@dataclass
class CommandAttempt(Attempt):
    """A command, as a process group of its own."""

    files: OutputFiles = field(kw_only=True)
    folder: str | None = field(kw_only=True)
    outputs: Outputs = field(kw_only=True)
    working: WorkingFolders = field(kw_only=True)
    memory: Memory = field(kw_only=True)
    #: one of its group that lived when that was looked at last; 0: none
    _member: int = field(default=0, init=False)

    @classmethod
    def start(
        cls, claim: Claim, command: Command, context: CommandContext, grant: Grant | None = None
    ) -> CommandAttempt:
        """Start it, held to what it was given. Raises fleet.process.CannotStart."""
        files = context.outputs.open(claim)
        folder: str | None = None
        limit = context.limits.of(claim, grant)
        try:
            folder = None if command.cwd else context.working.enter(claim.job_id)
            env = {**context.environ, **_encoded({**job_variables(claim), **command.env})}
            cwd, stdio = command.cwd or folder or "", (context.null, files.stdout, files.stderr)
            argv, cpu_ids = _limited(command.argv, env, cwd, limit)
            with process.bound_to(cpu_ids):
                pid = process.spawn(argv, env, cwd, stdio, context.home)
        except BaseException:
            context.outputs.close(files)
            context.working.leave(folder or "")
            if limit:
                limit.close()
            raise
        return cls(
            claim,
            pid,
            timeout_of(claim),
            files=files,
            folder=folder,
            outputs=context.outputs,
            working=context.working,
            memory=context.memory,
            limit=limit,
        )

    @property
    def is_unmetered(self) -> bool:
        return self.limit is None or self.limit.memory_bytes is None

    def has_ended(self) -> bool:
        return process.has_exited(self.pgid) and not self._is_saving()

    def _is_saving(self) -> bool:
        """Whether others of its group have been asked to end, have not, and have time left for that."""
        now = clock.monotonic()
        if self.kill_at is None or now >= self.kill_at:
            return False
        if self.look_at is None or now >= self.look_at:
            self._member = process.member_of(self.pgid, self._member)
            self.look_at = now + _LOOK_SECONDS if self._member else None
        return self._member != 0

    def marks(self, environ: Mapping[bytes, bytes]) -> Marks:
        """What its processes carry, and those of no other attempt; `environ`: of all jobs of this worker."""
        carried = {**environ, **_encoded(job_variables(self.claim))}
        return frozenset(b"%b=%b" % (name, carried[name]) for name in _MARKS)

    def collect(self, tail_bytes: int) -> End:
        # what it left in the background goes with it; the zombie keeps the group's number ours
        process.signal_group(self.pgid, signal.SIGKILL)
        duration, ended = self.duration(), process.reap(self.pgid)
        tails = self.outputs.close(self.files, tail_bytes)
        if self.folder:
            self.working.leave(self.folder)
        usage = self.used(ended.cpu_seconds, max(ended.max_rss_bytes, self.seen_bytes))
        if self.cause:
            return self.interrupted_end(self.cause, tails, usage)
        if ended.code == 0:
            return End(self.claim, "finished", "", duration, 0, tails=tails, usage=usage)
        return self._failure(ended, duration, tails, usage)

    def _failure(self, ended: process.Exit, duration: float, tails: Tails, usage: Usage) -> End:
        reason = self.memory.verdict(ended, tails)
        if reason and self.limit:
            reason = self.limit.explained(reason, usage)
        reason = reason or _how(ended)
        text = failures.encoded(self._told(reason, tails))
        code = ended.code if ended.signal is None else 128 + ended.signal
        return End(self.claim, "failed", reason, duration, code, exc_string=text, tails=tails, usage=usage)

    def _told(self, reason: str, tails: Tails) -> str:
        shown = (tails.stderr or tails.stdout)[-_SHOWN_BYTES:].decode("utf-8", "replace").strip()
        return f"{reason}\n\nIts last output:\n{shown}" if shown else reason

    def output_ends(self) -> tuple[int, int]:
        return self.files.ends()

    def tails(self, limit: int) -> Tails:
        return self.files.tails(limit)


def _limited(
    argv: tuple[str, ...], env: dict[bytes, bytes], cwd: str, limit: Limit | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What to run on which CPUs; `env` gets the variables. Raises CannotStart for what is no program."""
    if limit is None:
        return argv, ()
    env |= _encoded(limit.variables())
    if "/" not in argv[0]:
        process.resolve(argv[0], os.fsdecode(env.get(b"PATH", os.fsencode(os.defpath))))
    elif not os.access(os.path.join(cwd, argv[0]), os.X_OK):  # noqa: PTH118  # takes what Path does not
        return argv, ()  # it cannot be run, and why is told best where that is tried
    return limit.command(argv), limit.cpu_ids


def _how(ended: process.Exit) -> str:
    if ended.signal is None:
        return f"exit code {ended.code}"
    return f"killed by {process.signal_name(ended.signal)}{_LIMITS.get(ended.signal, '')}"


def timeout_of(claim: Claim) -> float | None:
    """Seconds the job may run; RQ writes -1 for no limit, and anything else is somebody's damage."""
    try:
        seconds = float(claim.fields.get(b"timeout", b"180"))
    except ValueError:
        return None
    return seconds if seconds > 0 else None


def _encoded(variables: Mapping[str, str]) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.fsencode(value) for name, value in variables.items()}


def job_variables(claim: Claim) -> dict[str, str]:
    """What a job finds about itself in its environment."""
    own = {"FLEET_JOB_ID": claim.job_id, "FLEET_QUEUE": claim.queue, "FLEET_FENCE": claim.fence}
    return own | tasks.variables(claim.job_id, claim.fields)


def handed_back(end: End) -> End:
    """The end of the same attempt, for which the job is not to blame."""
    return end._replace(outcome="handed-back", reason=_HANDED_BACK, exit_code=None, exc_string=None)


def never_started(claim: Claim, reason: str, *, outcome: Outcome = "failed") -> End:
    """The end of an attempt that could not be begun."""
    return End(claim, outcome, reason, exc_string=failures.encoded(reason))
