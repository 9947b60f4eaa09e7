"""The worker's loop: one thread, one selector, no thread per job.

Each turn waits for whatever comes first - a child's end, an executor's answer, a token, a
message, a heartbeat's news, a time - and then reports all ends and claims the next jobs in one
round trip. A lost connection stops claims and reports, never the jobs that run.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue

import redis

from broker import clock, command, failures
from broker.connection import is_denied
from broker.session import Session
from broker.work import Beat, Claim, End, Outcome, Round
from fleet.attempt import Attempt, Cause, CommandAttempt, CommandContext, never_started
from fleet.beater import Beater, Denied
from fleet.chores import ChoreThread
from fleet.executors import Execution, ExecutorPool
from fleet.function_attempt import FunctionAttempt
from fleet.guard import Guard
from fleet.links import Links
from fleet.process import CannotStart
from fleet.worker_config import WorkerConfig

log = logging.getLogger("fleet.worker")

#: seconds between looks at what running jobs have written
_OUTPUT_SECONDS = 1.0
#: seconds without claims after this host could not start a job
_HOST_FAULT_SECONDS = 10.0
#: longest a turn waits, seconds
_LONGEST_WAIT = 5.0


class WorkerLoop:
    """Runs jobs until told to stop. `run` returns the exit code."""

    def __init__(
        self,
        config: WorkerConfig,
        session: Session,
        links: Links,
        selector: selectors.BaseSelector,
        context: CommandContext,
        pool: ExecutorPool,
        guard: Guard,
        mail: Mailbox,
    ) -> None:
        self._config = config
        self._session = session
        self._settings = session.settings
        self._links = links
        self._selector = selector
        self._context = context
        self._pool = pool
        self._guard = guard
        self._mail = mail
        #: by lease: what runs, what ended and is not reported yet, and both for the heartbeat
        self._attempts: dict[str, Attempt] = {}
        self._ends: dict[str, End] = {}
        self._leases: dict[str, str] = {}
        self._shown: dict[str, tuple[int, int]] = {}
        self._asides: set[Execution] = set()
        self._claim_due = True
        self._taken = 0
        self._found_nothing = False
        self._no_claims_before = 0.0
        self._outputs_at = 0.0
        self._busy_at = clock.monotonic()
        self._stop_at: float | None = None
        self._said_stopping = False
        self._exit_code = 0
        self._fleet_size = 1
        #: shown in `fleet status`: why it takes no jobs
        self.notice = ""
        self.beater: Beater | None = None
        self.chores: ChoreThread | None = None

    # -- what others ask -------------------------------------------------------------------

    def leases(self) -> dict[str, str]:
        """Lease -> job of all that runs or is not reported yet; called from the heartbeat's thread."""
        return self._leases.copy()

    def request_stop(self) -> None:
        """Finish what runs, within the grace; asked a second time, at once. Safe in a signal handler."""
        now = clock.monotonic()
        self._stop_at = now if self._stop_at is not None else now + self._settings.stop_grace_seconds

    # -- the loop --------------------------------------------------------------------------

    def run(self) -> int:
        """Work until told to stop or nothing is left to do; returns the exit code."""
        self._selector.register(self._mail, selectors.EVENT_READ, self._on_mail)
        self._guard.watch(self._selector, self._on_guard)
        while not self._is_done():
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._turn()
        return self._exit_code

    def _turn(self) -> None:
        self._guard.keep_alive()
        self._collect()
        self._enforce_times()
        self._reconnect()
        self._exchange()
        self._listen()
        self._show_outputs()

    def _patience(self) -> float:
        """Seconds until something is due without being told."""
        if self._links.up and (self._ends or (self._claim_due and self._wanted())):
            return 0.0
        times = [clock.monotonic() + _LONGEST_WAIT]
        for attempt in self._attempts.values():
            times += [at for at in (attempt.timeout_at, attempt.kill_at) if at is not None]
        if self._attempts:
            times.append(self._outputs_at)
        if not self._links.up:
            times.append(self._links.retry_at)
        if self._stop_at is not None:
            times.append(self._stop_at)
        if self._config.idle_timeout_seconds is not None:
            times.append(self._busy_at + self._config.idle_timeout_seconds)
        return max(0.0, min(times) - clock.monotonic())

    def _is_done(self) -> bool:
        if self._attempts or self._asides:
            return False
        if self._stop_at is not None:
            # ends that cannot be told: recovery will find the leases
            return not self._ends or not self._links.up
        if self._ends:
            return False
        if self._config.max_jobs is not None and self._taken >= self._config.max_jobs:
            return True
        if self._config.burst and self._found_nothing:
            return True
        limit = self._config.idle_timeout_seconds
        return limit is not None and clock.monotonic() - self._busy_at >= limit

    # -- Redis -----------------------------------------------------------------------------

    @contextmanager
    def _linked(self) -> Iterator[None]:
        """What is done here may fail with the connection; then it is done again after the next one."""
        try:
            yield
        except (redis.RedisError, OSError) as exc:
            if is_denied(exc):
                self._give_up(f"Redis refused us: {exc}", 6)
            self._links.lost(exc, self._fleet_size)

    def _reconnect(self) -> None:
        if self._links.up or clock.monotonic() < self._links.retry_at:
            return
        with self._linked():
            self._links.connect(self._on_wake, self._on_rq_command)
            self._claim_due = True

    def _exchange(self) -> None:
        """Report all ends and claim for all free slots, in one round trip."""
        ends = list(self._ends.values())
        wanted = self._wanted() if ends or self._claim_due else 0
        if not self._links.up or not (ends or wanted):
            return
        with self._linked():
            done = self._session.round(self._links.client, ends, wanted)
            self._settled(ends, done)
            self._admit(done, wanted)

    def _settled(self, ends: list[End], done: Round) -> None:
        for end, accepted in zip(ends, done.accepted, strict=True):
            self._ends.pop(end.claim.lease, None)
            self._leases.pop(end.claim.lease, None)
            if accepted:
                self._follow_up(end)
            else:
                log.warning("job %s: its lease was no longer ours, %s dropped", end.claim.job_id, end.outcome)

    def _follow_up(self, end: End) -> None:
        """What RQ does once the end of a function is stored: its stopped callback, its webhooks."""
        job_id, fields = end.claim.job_id, end.claim.fields
        if end.outcome == "stopped":
            self._run_aside(self._pool.stopped_callback(job_id, fields))
        elif end.outcome in ("finished", "failed") and fields.get(b"webhooks"):
            now = clock.wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
            text = failures.decoded(end.exc_string or "")
            self._run_aside(self._pool.webhooks(job_id, {**fields, b"ended_at": now}, end.outcome, text))

    def _run_aside(self, execution: Execution | None) -> None:
        """Watch an execution that is no attempt at a job, and take its executor back."""
        if execution is None:
            return
        self._asides.add(execution)
        self._selector.register(execution, selectors.EVENT_READ, partial(self._on_aside, execution))

    def _on_aside(self, execution: Execution) -> None:
        execution.flush()
        if execution.receive() is not None:
            self._selector.unregister(execution)
            self._asides.discard(execution)
            self._pool.release(execution)

    def _admit(self, done: Round, wanted: int) -> None:
        """Make new claims known to the heartbeat first, then start them."""
        for claim in done.claims:
            self._leases[claim.lease] = claim.job_id
        self._session.settle(done)
        if not done.registered and self.beater:
            self.beater.beat_now()
        self._taken += len(done.claims)
        self._found_nothing = wanted > 0 and not done.claims
        # fewer than asked for: the queues are empty, wait for a token
        self._claim_due = wanted > 0 and len(done.claims) == wanted
        for claim in done.claims:
            self._start(claim)

    def _wanted(self) -> int:
        """How many jobs to claim now."""
        if self._stop_at is not None or clock.monotonic() < self._no_claims_before:
            return 0
        if self._guard.is_late() or self._is_disk_full():
            return 0
        free = self._config.slots - len(self._attempts)
        if self._config.max_jobs is not None:
            free = min(free, self._config.max_jobs - self._taken)
        return max(0, free)

    def _is_disk_full(self) -> bool:
        """A job must not fail because this host has no room: another's may have."""
        try:
            room = self._context.folders.free_bytes()
        except OSError:
            room = 0
        if room >= self._settings.min_free_disk_bytes:
            if self.notice.startswith("disk full"):
                self.notice = ""
            return False
        if not self.notice:
            self.notice = f"disk full: {room >> 20} MiB free at {self._context.folders.root}"
            log.warning("%s; no jobs are taken", self.notice)
        return True

    def _listen(self) -> None:
        """Wait for tokens exactly while a slot is free."""
        if self._links.up:
            with self._linked():
                wants = self._wanted() > 0
                if wants and not self._claim_due:
                    self._links.waiter.nudge(self._links.client)
                self._links.waiter.listen(wants_jobs=wants)

    # -- attempts --------------------------------------------------------------------------

    def _start(self, claim: Claim) -> None:
        try:
            what = command.from_data(claim.fields.get(b"data"))
            if what is None:
                self._started(FunctionAttempt.start(claim, self._pool, self._context.folders))
            else:
                attempt = CommandAttempt.start(claim, what, self._context)
                self._guard.add(attempt.pgid)
                self._started(attempt)
        except command.Damaged as exc:
            self._ends[claim.lease] = never_started(claim, f"DamagedJob: {exc}")
        except CannotStart as exc:
            self._could_not_start(claim, exc)

    def _started(self, attempt: Attempt) -> None:
        self._attempts[attempt.claim.lease] = attempt
        self._busy_at = clock.monotonic()
        if isinstance(attempt, FunctionAttempt):
            handler = partial(self._on_execution, attempt)
            self._selector.register(attempt.execution, attempt.events(), handler)

    def _could_not_start(self, claim: Claim, exc: CannotStart) -> None:
        if exc.host_fault:
            self.notice = exc.reason
            self._no_claims_before = clock.monotonic() + _HOST_FAULT_SECONDS
            log.warning("this host cannot start jobs: %s", exc.reason)
        outcome: Outcome = "handed-back" if exc.host_fault else "failed"
        self._ends[claim.lease] = never_started(claim, exc.reason, outcome=outcome)

    def _collect(self) -> None:
        """Turn attempts that ended into ends to report."""
        for lease, attempt in list(self._attempts.items()):
            if attempt.has_ended():
                self._mark_killed()
                self._finish(lease, attempt)

    def _finish(self, lease: str, attempt: Attempt) -> None:
        if isinstance(attempt, FunctionAttempt):
            self._selector.unregister(attempt.execution)
            self._ends[lease] = attempt.collect(self._settings.output_tail_bytes)
        else:
            self._guard.remove(attempt.pgid)
            self._ends[lease] = attempt.collect(self._settings.output_tail_bytes)
        del self._attempts[lease]
        self._shown.pop(lease, None)
        self._busy_at = clock.monotonic()
        self._claim_due = True

    def _enforce_times(self) -> None:
        now = clock.monotonic()
        for attempt in list(self._attempts.values()):
            if attempt.timeout_at is not None and now >= attempt.timeout_at:
                attempt.interrupt("timeout", self._settings.kill_grace_seconds)
            if attempt.kill_at is not None and now >= attempt.kill_at:
                attempt.kill()
        if self._stop_at is None:
            return
        if not self._said_stopping:
            self._said_stopping = True
            log.info("stopping: %d jobs have %.0f s to end", len(self._attempts), self._stop_at - now)
        if now >= self._stop_at:
            for attempt in self._attempts.values():
                attempt.kill("hand-back")

    def _stop(self, attempt: Attempt, cause: Cause) -> None:
        """End one attempt from outside: a command gets a grace, a function is killed, as RQ does."""
        log.info("job %s: %s", attempt.claim.job_id, cause)
        if isinstance(attempt, FunctionAttempt) or cause == "kill":
            attempt.kill(cause)
        else:
            attempt.interrupt(cause, self._settings.kill_grace_seconds)

    def _show_outputs(self) -> None:
        """Let `fleet logs` see what running jobs have written so far."""
        now = clock.monotonic()
        if now < self._outputs_at or not self._links.up:
            return
        self._outputs_at = now + _OUTPUT_SECONDS
        with self._linked():
            for lease, attempt in self._attempts.items():
                ends = attempt.output_ends()
                if ends != self._shown.get(lease, (0, 0)):
                    tails = attempt.tails(self._settings.output_tail_bytes)
                    self._session.save_output(self._links.client, attempt.claim, tails)
                    self._shown[lease] = ends

    # -- what arrives ----------------------------------------------------------------------

    def _on_wake(self) -> None:
        with self._linked():
            news = self._links.waiter.receive()
            if isinstance(news, dict):
                self._on_message(news)
            elif news and self._wanted():
                self._claim_due = True
            elif news:
                self._links.waiter.pass_on(self._links.client)

    def _on_message(self, message: dict[str, object]) -> None:
        for attempt in self._attempts.values():
            if attempt.claim.job_id == message.get("stop"):
                self._stop(attempt, "stop")

    def _on_rq_command(self) -> None:
        with self._linked():
            for message in self._links.rq.receive():
                self._obey(message)

    def _obey(self, message: dict[str, object]) -> None:
        """One of RQ's commands: rq.command."""
        if message.get("command") == "shutdown":
            self.request_stop()
        elif message.get("command") == "stop-job":
            self._on_message({"stop": message.get("job_id")})
        elif message.get("command") == "kill-horse":
            for attempt in self._attempts.values():
                self._stop(attempt, "kill")

    def _on_execution(self, attempt: FunctionAttempt) -> None:
        attempt.execution.flush()
        if not attempt.has_ended():
            handler = partial(self._on_execution, attempt)
            self._selector.modify(attempt.execution, attempt.events(), handler)

    def _on_guard(self) -> None:
        self._mark_killed()

    def _mark_killed(self) -> None:
        """The sidecar killed them when their leases were about to end: that is no failure of theirs."""
        killed = self._guard.killed()
        for attempt in self._attempts.values() if killed else ():
            if attempt.pgid in killed:
                attempt.cause = "lost"
                attempt.uncounted = not (self.beater and self.beater.connected)

    def _on_mail(self) -> None:
        for news in self._mail.open():
            if isinstance(news, Denied):
                self._give_up(f"Redis refused us: {news.reason}", 6)
            elif news.state == "taken":
                self._give_up("another worker has our name now", 1)
            else:
                self._on_beat(news)

    def _on_beat(self, beat: Beat) -> None:
        self._claim_due = True  # once a beat for safety: a token may have been lost
        self._pool.reap()
        self._fleet_size = max(1, beat.workers)
        if self.chores:
            self.chores.fleet_size = self._fleet_size
        for lease in beat.lost | beat.stop:
            attempt = self._attempts.get(lease)
            if attempt and lease in beat.lost:
                log.warning("job %s: its lease is gone, killing it", attempt.claim.job_id)
                attempt.kill("lost")
            elif attempt:
                self._stop(attempt, "stop")
        if beat.foreign and self._links.up:
            with self._linked():
                self._session.lose_foreign(self._links.client, beat.foreign)

    def _give_up(self, reason: str, exit_code: int) -> None:
        """Nothing more can be told to Redis: end all jobs, and say why."""
        log.error("%s; stopping", reason)
        self._exit_code = exit_code
        self._stop_at = clock.monotonic()
        for attempt in self._attempts.values():
            attempt.kill("lost")
        self._ends.clear()


class Mailbox:
    """Letters from other threads, and a file number that becomes readable with them."""

    def __init__(self) -> None:
        self._letters: SimpleQueue[Beat | Denied] = SimpleQueue()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """For the selector."""
        return self._read

    @property
    def wake_fd(self) -> int:
        """For signal.set_wakeup_fd: signals wake the loop too."""
        return self._write

    def post(self, letter: Beat | Denied) -> None:
        """Leave a letter; from any thread."""
        self._letters.put(letter)
        try:
            os.write(self._write, b"\0")
        except BlockingIOError:
            return  # full: it is readable already

    def open(self) -> Iterator[Beat | Denied]:
        """All letters there are."""
        try:
            while os.read(self._read, 4096):
                continue
        except BlockingIOError:
            pass
        try:
            while True:
                yield self._letters.get_nowait()
        except Empty:
            return


def install_signals(mail: Mailbox, stop: Callable[[], None]) -> None:
    """SIGTERM, SIGINT and SIGHUP stop the worker; the end of a child wakes it."""
    signal.set_wakeup_fd(mail.wake_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop())
    signal.signal(signal.SIGCHLD, lambda *_: None)
