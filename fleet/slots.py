"""What runs in a worker's slots: attempts from their start to the end that is to be reported.

An attempt leaves its slot when its process is gone; its lease stays known until Redis has
accepted, or refused, its end. Where jobs are short, a few are claimed ahead of the slots, so that
the next starts while the end of the last is reported; what is not started at once goes back.
"""

from __future__ import annotations

import logging
import selectors
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from broker import clock, command
from broker.settings import WorkerSettings
from broker.work import Claim, End, Outcome
from fleet import resources
from fleet.attempt import Attempt, Cause, CommandAttempt, CommandContext, never_started
from fleet.executors import ExecutorPool
from fleet.function_attempt import FunctionAttempt
from fleet.guard import Guard
from fleet.process import CannotStart, host_error

log = logging.getLogger("fleet.worker")

#: seconds without claims after this host could not start a job
_HOST_FAULT_SECONDS = 10.0
#: seconds of work, by the time that jobs took lately, that may be claimed ahead of the slots; and for
#: how long at most: a worker with nothing to do must not wait for what another hoards
AHEAD_SECONDS = 0.05


class Slots:
    """Starts attempts, watches their times, collects their ends. For the loop's thread, but for `leases`."""

    def __init__(
        self,
        count: int,
        settings: WorkerSettings,
        context: CommandContext,
        pool: ExecutorPool,
        guard: Guard,
        selector: selectors.BaseSelector,
    ) -> None:
        self._count = count
        self._cpus = resources.cpus()
        self._settings = settings
        self._context = context
        self._pool = pool
        self._guard = guard
        self._selector = selector
        #: by lease: what runs, what ended and is not reported yet, and the jobs of both
        self._attempts: dict[str, Attempt] = {}
        self._ends: dict[str, End] = {}
        self._leases: dict[str, str] = {}
        #: claimed ahead, in order, and until when they may wait
        self._waiting: deque[Claim] = deque()
        self._waiting_until = 0.0
        #: seconds that jobs took lately; nothing is known yet
        self._pace = float("inf")
        #: why this host cannot run jobs at the moment, and when it may be tried again
        self.fault = ""
        self.fault_until = 0.0
        #: when something last started or ended, monotonic seconds
        self.busy_at = clock.monotonic()

    def __len__(self) -> int:
        """How many attempts run or are about to."""
        return len(self._attempts) + len(self._waiting)

    def __iter__(self) -> Iterator[Attempt]:
        """What runs."""
        return iter(list(self._attempts.values()))

    def get(self, lease: str) -> Attempt | None:
        """The attempt under that lease, if it runs."""
        return self._attempts.get(lease)

    @property
    def ends(self) -> list[End]:
        """What ended and is not reported yet."""
        return list(self._ends.values())

    def leases(self) -> dict[str, str]:
        """Lease -> job of all that runs or is not reported yet; also called from the heartbeat's thread."""
        return self._leases.copy()

    # -- claims and ends -------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slots with nothing to do."""
        return max(0, self._count - len(self))

    def ahead(self) -> int:
        """How many jobs to claim beyond the free slots: one for each slot, if jobs are short.

        None where there is a core for each slot: the next job would only take from Redis the core on
        which it answers for the last (benchmarks/commands.py, two slots on two cores: 8 % slower).
        """
        if self._count <= self._cpus:
            return 0
        room = 2 * self._count - max(self._count, len(self))
        return min(room, int(AHEAD_SECONDS * self._count / max(self._pace, 1e-3)))

    def take(self, claims: Sequence[Claim]) -> None:
        """Start what there is a slot for; the rest waits for the next that is free."""
        self._waiting.extend(claims)
        self._waiting_until = clock.monotonic() + AHEAD_SECONDS
        self.start_waiting()

    def start_waiting(self) -> None:
        """Start what waits, if a slot is free; hand back what waited too long, or until we were late."""
        if self._waiting and (clock.monotonic() > self._waiting_until or self._guard.is_late()):
            self._pace = float("inf")  # jobs are not as short as they were
            self.hand_back_waiting()
        while self._waiting and len(self._attempts) < self._count:
            self.start(self._waiting.popleft())

    def hand_back_waiting(self) -> None:
        """Give back what was claimed and not started."""
        while self._waiting:
            claim = self._waiting.pop()  # the last first: each goes to the front of its queue
            self._ends[claim.lease] = End(claim, "handed-back", "claimed ahead and not started")

    def admit(self, claims: Iterable[Claim]) -> None:
        """Make claims known to the heartbeat. They are started after that."""
        for claim in claims:
            self._leases[claim.lease] = claim.job_id

    def start(self, claim: Claim) -> None:
        """Start an attempt; one that cannot be started ends at once."""
        try:
            what = command.from_data(claim.fields.get(b"data"))
            if what is None:
                self._run(FunctionAttempt.start(claim, self._pool, self._context.folders))
            else:
                attempt = CommandAttempt.start(claim, what, self._context)
                self._guard.add(attempt.pgid)
                self._run(attempt)
        except command.Damaged as exc:
            self._end(never_started(claim, f"DamagedJob: {exc}"))
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

    def drop_ends(self) -> None:
        """Nothing can be reported any more."""
        self._ends.clear()

    def drop_waiting(self, lease: str, outcome: Outcome, reason: str) -> None:
        """One that waits is lost, or unwanted."""
        for claim in [one for one in self._waiting if one.lease == lease]:
            self._waiting.remove(claim)
            self._ends[lease] = never_started(claim, reason, outcome=outcome)

    def collect(self, *, redis_is_away: bool) -> bool:
        """Turn attempts that ended into ends to report; says whether there were any.

        What the sidecar killed when the leases were about to end is lost, and did not fail; if
        Redis was away it is lost through nobody's fault.
        """
        ended = [(lease, attempt) for lease, attempt in self._attempts.items() if attempt.has_ended()]
        if ended:
            self._mark_killed(uncounted=redis_is_away)
        for lease, attempt in ended:
            self._finish(lease, attempt)
        return bool(ended)

    def _run(self, attempt: Attempt) -> None:
        self._attempts[attempt.claim.lease] = attempt
        self.busy_at = clock.monotonic()
        if isinstance(attempt, FunctionAttempt):
            self._selector.register(attempt.execution, attempt.events(), partial(self._on_execution, attempt))

    def _on_execution(self, attempt: FunctionAttempt) -> None:
        attempt.execution.flush()
        if not attempt.has_ended():
            self._selector.modify(attempt.execution, attempt.events(), partial(self._on_execution, attempt))

    def _could_not_start(self, claim: Claim, exc: CannotStart) -> None:
        outcome: Outcome = "handed-back" if exc.host_fault else "failed"
        self._end(never_started(claim, exc.reason, outcome=outcome))

    def _end(self, end: End) -> None:
        """Note an end; one that never began for this host's fault keeps claims away for a while."""
        if end.outcome == "handed-back" and end.duration_seconds is None:
            self.fault, self.fault_until = end.reason, clock.monotonic() + _HOST_FAULT_SECONDS
        self._ends[end.claim.lease] = end

    def _finish(self, lease: str, attempt: Attempt) -> None:
        if isinstance(attempt, FunctionAttempt):
            self._selector.unregister(attempt.execution)
        else:
            self._guard.remove(attempt.pgid)
        self._end(attempt.collect(self._settings.output_tail_bytes))
        del self._attempts[lease]
        took = attempt.duration()
        self._pace = took if self._pace == float("inf") else 0.8 * self._pace + 0.2 * took
        self.busy_at = clock.monotonic()

    # -- interruptions ---------------------------------------------------------------------

    def next_time(self) -> float:
        """When an attempt has run too long, or its grace ends; monotonic seconds."""
        times = [at for attempt in self for at in (attempt.timeout_at, attempt.kill_at) if at is not None]
        if self._waiting:
            times.append(self._waiting_until)
        return min(times, default=float("inf"))

    def enforce_times(self) -> None:
        """Interrupt what ran too long, kill what was given its grace."""
        now = clock.monotonic()
        for attempt in self:
            if attempt.timeout_at is not None and now >= attempt.timeout_at:
                attempt.interrupt("timeout", self._settings.kill_grace_seconds)
            if attempt.kill_at is not None and now >= attempt.kill_at:
                attempt.kill()

    def stop_job(self, job_id: object) -> None:
        """An operator, or RQ's stop-job, wants it ended."""
        for attempt in self:
            if attempt.claim.job_id == job_id:
                self.end(attempt, "stop")
        for claim in list(self._waiting):
            if claim.job_id == job_id:
                self.drop_waiting(claim.lease, "stopped", "stopped before it began")

    def end(self, attempt: Attempt, cause: Cause) -> None:
        """End one attempt: a command gets a grace to stop in, a function is killed, as RQ does."""
        log.info("job %s: %s", attempt.claim.job_id, cause)
        if cause == "stop" and isinstance(attempt, CommandAttempt):
            attempt.interrupt(cause, self._settings.kill_grace_seconds)
        else:
            attempt.kill(cause)

    def kill_all(self, cause: Cause) -> None:
        """End everything now."""
        for attempt in self:
            attempt.kill(cause)

    def _mark_killed(self, *, uncounted: bool) -> None:
        killed = self._guard.killed()
        for attempt in self if killed else ():
            if attempt.pgid in killed:
                attempt.cause, attempt.uncounted = "lost", uncounted
