"""The worker's loop: one thread, one selector, no thread per job.

Each turn waits for whatever comes first - a child's end, an executor's answer, a token, a
message, a heartbeat's news, a time - and then reports all ends and claims the next jobs in one
round trip. A lost connection stops claims and reports, never the jobs that run.
"""

from __future__ import annotations

import logging
import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from broker import clock
from broker.connection import is_denied
from broker.session import Session
from broker.work import Beat, End, Round
from fleet.asides import Asides
from fleet.beater import Beater, Denied
from fleet.chores import ChoreThread
from fleet.executors import ExecutorPool
from fleet.guard import Guard
from fleet.links import Links
from fleet.mailbox import Mailbox
from fleet.outputs import Folders
from fleet.slots import Slots
from fleet.worker_config import WorkerConfig

log = logging.getLogger("fleet.worker")

#: seconds between looks at what running jobs have written
_OUTPUT_SECONDS = 1.0
#: seconds between looks at the disk
_DISK_SECONDS = 1.0
#: longest a turn waits, seconds
_LONGEST_WAIT = 5.0


@dataclass(frozen=True)
class Parts:
    """What the loop works with; built, and taken down, by `fleet.worker`."""

    session: Session
    selector: selectors.BaseSelector
    links: Links
    slots: Slots
    pool: ExecutorPool
    guard: Guard
    mail: Mailbox
    folders: Folders


class WorkerLoop:
    """Runs jobs until told to stop. `run` returns the exit code."""

    def __init__(self, config: WorkerConfig, parts: Parts) -> None:
        self._config = config
        self._session = parts.session
        self._settings = parts.session.settings
        self._selector = parts.selector
        self._links = parts.links
        self._slots = parts.slots
        self._pool = parts.pool
        self._guard = parts.guard
        self._mail = parts.mail
        self._folders = parts.folders
        self._shown: dict[str, tuple[int, int]] = {}
        self._asides = Asides(parts.pool, parts.selector)
        self._foreign: tuple[tuple[str, str], ...] = ()
        self._claim_due = True
        self._taken = 0
        self._found_nothing = False
        self._outputs_at = 0.0
        self._disk_at = 0.0
        self._disk = ""
        self._stop_at: float | None = None
        self._said_stopping = False
        self._exit_code = 0
        self._fleet_size = 1
        #: shown in `fleet status`: why it takes no jobs
        self.notice = ""
        self.beater: Beater | None = None
        self.chores: ChoreThread | None = None

    def request_stop(self) -> None:
        """Finish what runs, within the grace; asked a second time, at once. Safe in a signal handler."""
        now = clock.monotonic()
        self._stop_at = now if self._stop_at is not None else now + self._settings.stop_grace_seconds

    def run(self) -> int:
        """Work until told to stop or nothing is left to do; returns the exit code."""
        self._selector.register(self._mail, selectors.EVENT_READ, self._on_mail)
        self._guard.watch(self._selector, lambda: None)  # what it says is heard when ends are collected
        while not self._is_done():
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._turn()
        return self._exit_code

    def _turn(self) -> None:
        self._guard.keep_alive()
        self._claim_due |= self._slots.collect(redis_is_away=not self._is_beating())
        self._slots.start_waiting()
        self._slots.enforce_times()
        self._asides.enforce_times()
        self._enforce_stop()
        self._reconnect()
        self._give_up_foreign()
        self._exchange()
        self._listen()
        self._show_outputs()

    def _is_beating(self) -> bool:
        return self.beater is None or self.beater.connected

    def _patience(self) -> float:
        """Seconds until something is due without being told."""
        if self._links.up and (self._slots.ends or (self._claim_due and self._wanted())):
            return 0.0
        now = clock.monotonic()
        times = [now + _LONGEST_WAIT, self._slots.next_time()]
        if not self._links.up:
            times.append(self._links.retry_at)
        elif len(self._slots):
            times.append(self._outputs_at)
        # what is over and has been acted upon is nothing to wait for
        if self._stop_at is not None and self._stop_at > now:
            times.append(self._stop_at)
        if self._config.idle_timeout_seconds is not None and not self._is_working():
            times.append(self._slots.busy_at + self._config.idle_timeout_seconds)
        return max(0.0, min(times) - now)

    def _is_working(self) -> bool:
        return bool(len(self._slots) or len(self._asides) or self._slots.ends)

    def _is_done(self) -> bool:
        if len(self._slots) or len(self._asides):
            return False
        if self._stop_at is not None:
            # ends that cannot be told within the grace: recovery will find the leases
            is_over = clock.monotonic() >= self._stop_at
            return not self._slots.ends or (is_over and not self._links.up)
        if self._slots.ends:
            return False
        return self._has_reached_a_limit()

    def _has_reached_a_limit(self) -> bool:
        if self._config.max_jobs is not None and self._taken >= self._config.max_jobs:
            return True
        if self._config.burst and self._found_nothing:
            return True
        limit = self._config.idle_timeout_seconds
        return limit is not None and clock.monotonic() - self._slots.busy_at >= limit

    def _enforce_stop(self) -> None:
        if self._stop_at is None:
            return
        if not self._said_stopping:
            self._said_stopping = True
            left = max(0.0, self._stop_at - clock.monotonic())
            log.info("stopping: %d jobs have %.0f s to end", len(self._slots), left)
        self._slots.hand_back_waiting()
        if clock.monotonic() >= self._stop_at:
            self._slots.kill_all("hand-back")
            self._asides.kill_all()

    def _give_up(self, reason: str, exit_code: int) -> None:
        """Nothing more can be told to Redis: end all jobs, and say why."""
        log.error("%s; stopping", reason)
        self._exit_code = exit_code
        self._stop_at = clock.monotonic()
        self._slots.kill_all("lost")
        self._slots.drop_ends()

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

    def _give_up_foreign(self) -> None:
        """What an earlier life of this worker held is lost: the lock on our name says that it is over."""
        if self._foreign and self._links.up:
            with self._linked():
                self._session.lose_foreign(self._links.client, self._foreign)
                self._foreign = ()

    def _exchange(self) -> None:
        """Report all ends and claim for all free slots, in one round trip."""
        ends = self._slots.ends
        wanted = self._wanted() if ends or self._claim_due else 0
        if not self._links.up or not (ends or wanted):
            return
        with self._linked():
            done = self._session.round(self._links.line, ends, wanted, self._ahead())
            for end, accepted in zip(ends, done.accepted, strict=True):
                self._settle(end, accepted)
            self._admit(done, wanted)

    def _settle(self, end: End, accepted: bool) -> None:
        self._slots.settled(end)
        self._shown.pop(end.claim.lease, None)
        if accepted:
            self._asides.follow(end)
        else:
            log.warning("job %s: its lease was no longer ours, %s dropped", end.claim.job_id, end.outcome)

    def _admit(self, done: Round, wanted: int) -> None:
        """Make new claims known to the heartbeat first, then start them."""
        self._slots.admit(done.claims)
        self._session.settle(done)
        if not done.registered and self.beater:
            self.beater.beat_now()
        self._taken += len(done.claims)
        self._found_nothing = wanted > 0 and not done.claims and done.registered
        # fewer than asked for: the queues are empty, wait for a token
        self._claim_due = wanted > 0 and len(done.claims) >= wanted
        self._slots.take(done.claims)

    def _wanted(self) -> int:
        """How many jobs to claim now."""
        if self._stop_at is not None or not self._is_fit():
            return 0
        if self._config.max_jobs is not None:
            return max(0, min(self._slots.free, self._config.max_jobs - self._taken))
        return self._slots.free

    def _ahead(self) -> int:
        """How many jobs to claim ahead: none by a worker that counts them, or may not claim at all."""
        if self._config.max_jobs is not None or self._stop_at is not None or not self._is_fit():
            return 0
        return self._slots.ahead()

    def _is_fit(self) -> bool:
        """Whether this host can run jobs: one must not fail because of us, another host may be fit."""
        if self._guard.is_late():
            return False
        fault = self._slots.fault if clock.monotonic() < self._slots.fault_until else self._disk_fault()
        if fault and not self.notice:
            log.warning("%s; no jobs are taken", fault)
        self.notice = fault
        return not fault

    def _disk_fault(self) -> str:
        """What is wrong with the disk; looked at once a second."""
        now = clock.monotonic()
        if now >= self._disk_at:
            self._disk_at = now + _DISK_SECONDS
            self._disk = self._look_at_disk()
        return self._disk

    def _look_at_disk(self) -> str:
        try:
            room = self._folders.free_bytes()
        except OSError as exc:
            return f"disk: {exc.strerror} at {self._folders.root}"
        if room >= self._settings.min_free_disk_bytes:
            return ""
        return f"disk full: {room >> 20} MiB free at {self._folders.root}"

    def _listen(self) -> None:
        """Wait for tokens exactly while a slot is free."""
        if self._links.up:
            with self._linked():
                wants = self._wanted() > 0
                if wants and not self._claim_due:
                    self._links.waiter.nudge(self._links.client)
                self._links.waiter.listen(wants_jobs=wants)

    def _show_outputs(self) -> None:
        """Let `fleet logs` see what running jobs have written so far."""
        now = clock.monotonic()
        if now < self._outputs_at or not self._links.up:
            return
        self._outputs_at = now + _OUTPUT_SECONDS
        with self._linked():
            for attempt in self._slots:
                ends = attempt.output_ends()
                if ends != self._shown.get(attempt.claim.lease, (0, 0)):
                    tails = attempt.tails(self._settings.output_tail_bytes)
                    self._session.save_output(self._links.client, attempt.claim, tails)
                    self._shown[attempt.claim.lease] = ends

    # -- what arrives ----------------------------------------------------------------------

    def _on_wake(self) -> None:
        if not self._links.up:
            return  # both were cut at once, and the other was heard first
        with self._linked():
            news = self._links.waiter.receive()
            if isinstance(news, dict):
                self._slots.stop_job(news.get("stop"))
            elif news and self._wanted():
                self._claim_due = True
            elif news:
                self._links.waiter.pass_on(self._links.client)

    def _on_rq_command(self) -> None:
        if not self._links.up:
            return
        with self._linked():
            for message in self._links.rq.receive():
                self._obey(message)

    def _obey(self, message: dict[str, object]) -> None:
        """One of RQ's commands: rq.command."""
        if message.get("command") == "shutdown":
            self.request_stop()
        elif message.get("command") == "stop-job":
            self._slots.stop_job(message.get("job_id"))
        elif message.get("command") == "kill-horse":
            self._slots.kill_all("kill")

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
            attempt, is_lost = self._slots.get(lease), lease in beat.lost
            if attempt:
                self._slots.end(attempt, "lost" if is_lost else "stop")
            else:
                self._slots.drop_waiting(lease, "lost" if is_lost else "stopped", "unwanted before it began")
        self._foreign = beat.foreign
