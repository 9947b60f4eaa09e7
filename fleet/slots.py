"""What runs in a worker's slots: attempts from their start to the end that is to be reported.

An attempt leaves its slot when its process is gone; its lease stays known until Redis has
accepted, or refused, its end. Where jobs are short, a few are claimed ahead of the slots, so that
the next starts while the end of the last is reported; functions among them are lined up in the
executors. What is not begun soon goes back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from broker import clock, command, template
from broker.work import Claim, End, Outcome
from broker.worker_settings import WorkerSettings
from fleet import strays
from fleet.attempt import Attempt, Cause, CommandAttempt, CommandContext, handed_back, never_started
from fleet.executors import Execution, ExecutorPool
from fleet.function_attempt import FunctionAttempt
from fleet.guard import Guard
from fleet.logs import about
from fleet.pace import AHEAD_SECONDS, Pace
from fleet.placement import NoRoom, Placement
from fleet.process import CannotStart, host_error
from fleet.room import Grant
from fleet.sampler import Sampler

log = logging.getLogger("fleet.worker")

#: seconds in which this worker hears of the end of its allocation after its jobs did
_DOUBT_SECONDS = 0.5
#: seconds without claims after this host could not start a job
_HOST_FAULT_SECONDS = 10.0


class _Waiting(NamedTuple):
    """A claim that is not begun: what it runs (None: a function), until when it may wait, how many came
    before it, and what it was given of this worker, if it asked for something: then it need not wait."""

    claim: Claim
    what: command.Command | None
    until: float
    before: int
    grant: Grant | None = None

    def waited(self) -> float:
        """Seconds so far."""
        return clock.monotonic() - (self.until - AHEAD_SECONDS)


class Slots:
    """Starts attempts, watches their times, collects their ends. For the loop's thread, but for `leases`."""

    def __init__(
        self,
        count: int,
        settings: WorkerSettings,
        context: CommandContext,
        pool: ExecutorPool,
        guard: Guard,
        placement: Placement,
        sampler: Sampler,
        *,
        may_hear_late: bool = False,
    ) -> None:
        """`may_hear_late`: jobs may be told to end by who ends this worker, and before it is."""
        self._count = count
        self._may_hear_late = may_hear_late
        #: failures that may be the end of this worker's allocation, and when they will not: monotonic seconds
        self._doubtful: list[tuple[float, End]] = []
        self._placement = placement
        self._settings = settings
        self._context = context
        self._pool = pool
        self._guard = guard
        #: by lease: what runs, what ended and is not reported yet, and the jobs of both
        self._attempts: dict[str, Attempt] = {}
        self._ends: dict[str, End] = {}
        self._leases: dict[str, str] = {}
        #: claimed and not begun, in order: those in line for an executor come before those that are not
        self._lined_up: dict[Execution, tuple[_Waiting, FunctionAttempt]] = {}
        self._waiting: deque[_Waiting] = deque()
        self._pace = Pace(count)
        self._sampler = sampler
        #: whether something ended where nobody but `collect` will look
        self._overlooked = False
        self._tells_all = log.isEnabledFor(logging.DEBUG)
        #: why this host cannot run jobs at the moment, and when it may be tried again
        self.fault = ""
        self.fault_until = 0.0
        #: when something last started or ended, monotonic seconds
        self.busy_at = clock.monotonic()
        #: when the first of `ends` was noted, monotonic seconds
        self.oldest_end = float("inf")

    def __len__(self) -> int:
        """How many attempts run or are about to."""
        return len(self._attempts) + self._held

    @property
    def _held(self) -> int:
        """How many claims are not begun."""
        return len(self._lined_up) + len(self._waiting)

    def __iter__(self) -> Iterator[Attempt]:
        """What runs."""
        return iter(list(self._attempts.values()))

    def get(self, lease: str) -> Attempt | None:
        """The attempt under that lease, if it runs; if it is in line it is taken back, to wait here."""
        if any(waiting.claim.lease == lease for waiting, _ in self._lined_up.values()):
            self._withdraw()
        return next((attempt for attempt in self._begun() if attempt.claim.lease == lease), None)

    @property
    def ends(self) -> list[End]:
        """What ended and is not reported yet."""
        return list(self._ends.values())

    @property
    def has_doubts(self) -> bool:
        """Whether ends are kept back, of which it is not known yet how they are to be judged."""
        return bool(self._doubtful)

    @property
    def unreported(self) -> int:
        """How many `ends` there are."""
        return len(self._ends)

    def leases(self) -> dict[str, str]:
        """Lease -> job of all that runs or is not reported yet; also called from the heartbeat's thread."""
        return self._leases.copy()

    # -- claims and ends -------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slots with nothing to do; none beside an exclusive job."""
        return 0 if self._placement.room.is_closed else max(0, self._count - len(self))

    def ahead(self) -> int:
        """How many jobs to claim beyond the free slots, so that as many wait as will be begun soon."""
        if self._placement.held or not self._placement.room.most_plain():
            return 0
        return max(0, self._pace.stock() - self._held)

    def is_stocked(self) -> bool:
        """Whether enough waits for the slots that claiming more may wait, too."""
        return self._held > self._pace.stock() // 2

    def take(self, claims: Iterable[Claim]) -> None:
        """Let these wait for a slot, if only until `start_waiting` is called; they have what they need."""
        until = clock.monotonic() + AHEAD_SECONDS
        self._placement.count(len(self))
        for claim in claims:
            try:
                what = template.command_of(claim.job_id, claim.fields)
                grant = self._placement.take(claim.lease, claim.queue)
                self._waiting.append(_Waiting(claim, what, until, self._held, grant))
            except command.Damaged as exc:
                self._end(never_started(claim, f"DamagedJob: {exc}"))
            except NoRoom as exc:
                log.warning("job %s: %s", claim.job_id, exc, extra=about("no_room", claim))
                self._note(End(claim, "handed-back", str(exc)))

    def start_waiting(self) -> None:
        """Start what waits, if a slot is free; hand back what waits too long, or all if we were late."""
        if self._held and self._guard.is_late():
            self._give_back()
        self._start_granted()
        most = self._placement.room.most_plain() + len(self._placement.room)
        if self._lined_up and len(self._attempts) < most:  # a slot is free: no need to be in line
            self._withdraw()
        while self._waiting and len(self._attempts) < most:
            waiting = self._waiting.popleft()
            self._pace.waited(waiting.waited(), waiting.before)
            self._start(waiting)
        self._context.working.put_aside()  # the ends of their jobs are not reported yet
        if self._held and clock.monotonic() > self._patient_until():
            self._give_back()
        if self._waiting and not any(map(_may_come_first_again, self._attempts.values())):
            while self._waiting and self._line_up(self._waiting[0]):
                self._waiting.popleft()
        self._pool.send()

    def _start_granted(self) -> None:
        """Those that asked for something have it, and wait for nobody."""
        if not len(self._placement.room):
            return
        for waiting in [one for one in self._waiting if one.grant]:
            self._waiting.remove(waiting)
            self._start(waiting)

    def _give_back(self) -> None:
        self._pace.forget()
        self.hand_back_waiting()

    def _patient_until(self) -> float:
        """Until when all that is not begun may wait."""
        for waiting, _ in self._lined_up.values():
            return waiting.until  # it was claimed before those that are not in line
        return self._waiting[0].until if self._waiting else float("inf")

    def hand_back_waiting(self) -> None:
        """Give back what was claimed and not begun."""
        self._withdraw()
        while self._waiting:
            claim = self._waiting.pop().claim  # the last first: each goes to the front of its queue
            self._note(End(claim, "handed-back", "claimed ahead and not started"))

    def _line_up(self, waiting: _Waiting) -> bool:
        """Let it wait in an executor, where it begins as soon as the one before it ends; False: no room."""
        if waiting.what is not None:
            return False
        attempt = FunctionAttempt.line_up(waiting.claim, self._pool, self._context)
        if attempt is None:
            return False
        self._lined_up[attempt.execution] = (waiting, attempt)
        return True

    def _withdraw(self) -> None:
        """Take back what is in line for the executors and not begun, to wait here."""
        self._wait_again(self._pool.withdraw())

    def _begun(self) -> list[Attempt]:
        """What runs and, after `_withdraw`, also what its executor began before we heard that it had."""
        return [*self._attempts.values(), *(attempt for _, attempt in self._lined_up.values())]

    def _wait_again(self, executions: Iterable[Execution]) -> None:
        found = [self._lined_up.pop(execution)[0] for execution in executions if execution in self._lined_up]
        self._waiting.extendleft(reversed(found))

    def _advance(self) -> None:
        """What was lined up and has begun is running; if its executor died before, it waits again."""
        self._wait_again(self._pool.stranded())
        for execution in [one for one in self._lined_up if one.begun_at is not None]:
            waiting, attempt = self._lined_up.pop(execution)
            attempt.started = execution.begun_at or attempt.started
            self._pace.waited(waiting.waited(), waiting.before)
            self._run(attempt)

    def admit(self, claims: Iterable[Claim]) -> None:
        """Make claims known to the heartbeat. They are started after that."""
        for claim in claims:
            self._leases[claim.lease] = claim.job_id

    def _start(self, waiting: _Waiting) -> None:
        """Start an attempt; one that cannot be started ends at once."""
        claim = waiting.claim
        try:
            if waiting.what is None:
                self._run(FunctionAttempt.start(claim, self._pool, self._context, waiting.grant))
            else:
                self._pool.send()  # to start a command takes longer than many a function
                attempt = CommandAttempt.start(claim, waiting.what, self._context, waiting.grant)
                self._guard.add(attempt.pgid)
                self._run(attempt)
        except CannotStart as exc:
            self._could_not_start(claim, exc)
        except OSError as exc:
            self._could_not_start(claim, host_error(exc, "cannot start a job"))
        except ValueError as exc:  # what no system call takes: a NUL byte in an id
            self._end(never_started(claim, f"DamagedJob: {exc}"))

    def settled(self, end: End) -> None:
        """Redis has heard of this end, and accepted or refused it."""
        self._ends.pop(end.claim.lease, None)
        self._leases.pop(end.claim.lease, None)
        self.oldest_end = clock.monotonic() if self._ends else float("inf")

    def replace(self, end: End) -> None:
        """What is to be reported of this attempt instead."""
        self._ends[end.claim.lease] = end

    def drop_ends(self) -> None:
        """Nothing can be reported any more."""
        self._ends.clear()
        self._doubtful.clear()
        self.oldest_end = float("inf")

    def drop_waiting(self, lease: str, outcome: Outcome, reason: str) -> None:
        """One that waits is lost, or unwanted."""
        for waiting in [one for one in self._waiting if one.claim.lease == lease]:
            self._waiting.remove(waiting)
            self._note(never_started(waiting.claim, reason, outcome=outcome))

    def collect(self, *, redis_is_away: bool) -> bool:
        """Turn attempts that ended into ends to report; says whether there were any.

        What the sidecar killed when the leases were about to end is lost, and did not fail; if
        Redis was away it is lost through nobody's fault.
        """
        self._overlooked = False
        self._pool.notice_deaths()
        self._advance()
        ended = [(lease, attempt) for lease, attempt in self._attempts.items() if attempt.has_ended()]
        if ended:
            self._mark_killed(uncounted=redis_is_away)
            self._kill_strays(attempt for _, attempt in ended if attempt.cause)
        for lease, attempt in ended:
            self._finish(lease, attempt)
        return bool(ended)

    def look_at_memory(self) -> None:
        """Once what ended has been collected, and while nobody waits for us: it takes 0.1 ms for each."""
        self._context.memory.look()

    def _run(self, attempt: Attempt) -> None:
        self._attempts[attempt.claim.lease] = attempt
        self._sampler.add(attempt)
        if self._tells_all:
            log.debug("job %s started", attempt.claim.job_id, extra=about("job_started", attempt.claim))
        self.busy_at = clock.monotonic()

    def _could_not_start(self, claim: Claim, exc: CannotStart) -> None:
        outcome: Outcome = "handed-back" if exc.host_fault else "failed"
        self._end(never_started(claim, exc.reason, outcome=outcome))

    def _end(self, end: End) -> None:
        """Note an end; one that never began for this host's fault keeps claims away for a while."""
        if end.outcome == "handed-back" and end.duration_seconds is None:
            self.fault, self.fault_until = end.reason, clock.monotonic() + _HOST_FAULT_SECONDS
        self._note(end)

    def _note(self, end: End) -> None:
        self._placement.give_back(end.claim.lease)
        if end.outcome != "finished" or self._tells_all:
            _tell_of(end)
        if not self._ends:
            self.oldest_end = clock.monotonic()
        self._ends[end.claim.lease] = end

    def _finish(self, lease: str, attempt: Attempt) -> None:
        if isinstance(attempt, CommandAttempt):
            self._guard.remove(attempt.pgid)
        self._sampler.remove(lease)
        end = attempt.collect(self._settings.output_tail_bytes)
        if end.outcome == "failed" and _may_come_first_again(attempt):
            self.hand_back_waiting()
        if self._may_hear_late and end.outcome == "failed" and attempt.cause is None:
            self._doubtful.append((clock.monotonic() + _DOUBT_SECONDS, end))
        else:
            self._end(end)
        del self._attempts[lease]
        if end.duration_seconds is not None:
            self._pace.ran(end.duration_seconds)
        self.busy_at = clock.monotonic()

    # -- interruptions ---------------------------------------------------------------------

    def next_time(self) -> float:
        """When an attempt has run too long, its grace ends or it is to be looked at; monotonic seconds."""
        if self._overlooked:
            return clock.monotonic()
        times = [at for attempt in self for at in _times(attempt) if at is not None]
        if self._doubtful:
            times.append(self._doubtful[0][0])
        return min([*times, self._patient_until()])

    def enforce_limits(self) -> None:
        """Interrupt what ran too long, kill what was given its grace; believe failures after a while."""
        now = clock.monotonic()
        while self._doubtful and now >= self._doubtful[0][0]:
            self._end(self._doubtful.pop(0)[1])
        for attempt in self:
            if attempt.timeout_at is not None and now >= attempt.timeout_at:
                attempt.interrupt("timeout", self._settings.kill_grace_seconds)
                self._overlooked |= attempt.has_ended()
            if attempt.kill_at is not None and now >= attempt.kill_at:
                attempt.kill()
                self._overlooked |= attempt.has_ended()

    def kill_too_large(self, lease: str) -> None:
        """It has more memory than it asked for, if it runs still."""
        attempt = self._attempts.get(lease)
        if attempt:
            attempt.kill("memory")
            self._overlooked |= attempt.has_ended()

    def stop_job(self, job_id: object) -> None:
        """An operator, or RQ's stop-job, wants it ended."""
        if any(waiting.claim.job_id == job_id for waiting, _ in self._lined_up.values()):
            self._withdraw()
        for attempt in self._begun():
            if attempt.claim.job_id == job_id:
                self.end(attempt, "stop")
        for waiting in list(self._waiting):
            if waiting.claim.job_id == job_id:
                self.drop_waiting(waiting.claim.lease, "stopped", "stopped before it began")

    def end(self, attempt: Attempt, cause: Cause) -> None:
        """End one attempt: a command gets a grace to stop in, a function is killed, as RQ does."""
        log.info("job %s: %s", attempt.claim.job_id, cause, extra=about("job_ending", attempt.claim))
        if cause == "stop" and isinstance(attempt, CommandAttempt):
            attempt.interrupt(cause, self._settings.kill_grace_seconds)
        else:
            attempt.kill(cause)
        self._overlooked |= attempt.has_ended()

    def let_save(self, seconds: float, *, are_dying: bool) -> None:
        """Ask what runs to end, and hand it back: commands by SIGTERM, with so long to save what they have.

        `are_dying`: all have been asked already, by whoever ends the allocation, functions too, which end of
        it; what failed just now did so, too.
        """
        for attempt in self:
            if attempt.has_ended() or attempt.cause:
                continue
            if isinstance(attempt, CommandAttempt):
                attempt.interrupt("hand-back", seconds)
            elif are_dying:
                attempt.cause = "hand-back"
        while are_dying and self._doubtful:
            self._note(handed_back(self._doubtful.pop(0)[1]))

    def kill_all(self, cause: Cause) -> None:
        """End everything now."""
        for attempt in self:
            attempt.kill(cause)
            self._overlooked |= attempt.has_ended()

    def _kill_strays(self, interrupted: Iterable[Attempt]) -> None:
        """What these left outside their groups, which are dead by now."""
        commands = [attempt for attempt in interrupted if isinstance(attempt, CommandAttempt)]
        strays.kill([attempt.marks(self._context.environ) for attempt in commands])

    def _mark_killed(self, *, uncounted: bool) -> None:
        killed = self._guard.killed()
        for attempt in self._begun() if killed else ():
            if attempt.pgid in killed:
                attempt.cause, attempt.uncounted = "lost", uncounted


def _times(attempt: Attempt) -> tuple[float | None, ...]:
    return attempt.timeout_at, attempt.kill_at, attempt.look_at


def _tell_of(end: End) -> None:
    """How an attempt ended; whether its job is run again its producer and Redis know."""
    level = logging.INFO if end.outcome in ("failed", "lost") else logging.DEBUG
    event = about(f"job_{end.outcome.replace('-', '_')}", end.claim)
    reason = f": {end.reason}" if end.reason else ""
    log.log(level, "job %s %s%s", end.claim.job_id, end.outcome, reason, extra=event)


def _may_come_first_again(attempt: Attempt) -> bool:
    """Whether, should it fail, its job is to be the next that runs."""
    return attempt.claim.fields.get(b"enqueue_at_front_on_retry") == b"1"
