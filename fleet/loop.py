"""The worker's loop: one thread, one selector, no thread per job.

Each turn waits for whatever comes first - a child's end, an executor's answer, a token, a
message, a heartbeat's news, a time - and then reports all ends and claims the next jobs in one
round trip. A lost connection stops claims and reports, never the jobs that run.
"""

from __future__ import annotations

import logging
import selectors
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from broker import clock, sets
from broker.connection import is_denied
from broker.session import Session
from broker.work import Beat, End, Exchange, Round
from broker.worker_settings import WorkerSettings
from fleet.asides import Asides
from fleet.beater import Beater, Denied
from fleet.chores import AllDone
from fleet.executors import ExecutorPool
from fleet.guard import Guard
from fleet.links import Links
from fleet.logs import about
from fleet.mailbox import Mailbox
from fleet.offer import Offering
from fleet.outputs import Folders
from fleet.placement import Placement
from fleet.rounds import Rounds
from fleet.sampler import Sampler, TooLarge
from fleet.signals import leave_within
from fleet.slots import Slots
from fleet.worker_config import WorkerConfig

log = logging.getLogger("fleet.worker")

#: seconds between looks at what running jobs have written
_OUTPUT_SECONDS = 1.0
#: seconds between looks at the disk
_DISK_SECONDS = 1.0
#: seconds that a worker told twice to stop has, though the network be silent
_HURRY_SECONDS = 10.0
#: longest a turn waits, seconds
_LONGEST_WAIT = 5.0


@dataclass(frozen=True)
class Parts:
    """What the loop works with; built, and taken down, by `fleet.assembly`."""

    session: Session
    selector: selectors.BaseSelector
    links: Links
    slots: Slots
    pool: ExecutorPool
    guard: Guard
    mail: Mailbox
    folders: Folders
    offering: Offering
    placement: Placement
    sampler: Sampler


@dataclass(frozen=True)
class _LastCall:
    """From when a worker with a time limit takes no more jobs, and until when those that run may end.

    Monotonic seconds; without a limit both never come.
    """

    at: float
    until: float


def _last_call(offering: Offering, settings: WorkerSettings) -> _LastCall:
    """Jobs get the grace that they get at any stop, but no more than half of what is left."""
    if offering.ends_at is None:
        return _LastCall(float("inf"), float("inf"))
    left = max(0.0, offering.ends_at - clock.wall().timestamp())
    until = clock.monotonic() + left
    return _LastCall(until - min(settings.stop_grace_seconds, left / 2), until)


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
        self._offering = parts.offering
        self._placement = parts.placement
        self._rounds = Rounds(parts.session, parts.links.line, parts.slots)
        self._shown: dict[str, tuple[int, int]] = {}
        self._asides = Asides(parts.pool)
        self._foreign: tuple[tuple[str, str], ...] = ()
        self._claim_due = True
        #: told of jobs while a round was under way
        self._rung = False
        #: lists of which tokens were taken since the last claim
        self._popped: set[str] = set()
        #: sublists that are new to it
        self._unseen: set[str] = set()
        self._taken = 0
        self._found_nothing = False
        #: whether it has asked for jobs, or could have
        self._has_looked = False
        #: what the worker has heard, and no claim since has belied
        self._all_done = False
        self._outputs_at = 0.0
        self._disk_at = 0.0
        self._disk = ""
        self._stop_at: float | None = None
        #: when jobs that still run are asked to save what they have, and end
        self._save_at = float("inf")
        self._was_told = False
        #: Slurm is ending all processes of the allocation
        self._is_dying = False
        self._last_call = _last_call(self._offering, self._settings)
        self._said_stopping = False
        self._exit_code = 0
        self._fleet_size = 1
        self._draining = False
        #: shown in `fleet status`: why it takes no jobs
        self.notice = ""
        self.beater: Beater | None = None

    def request_stop(self) -> None:
        """Finish what runs, within the grace; asked a second time, at once. Safe in a signal handler."""
        now = clock.monotonic()
        self._stop_by(now if self._was_told else now + self._settings.stop_grace_seconds)
        if self._was_told:
            leave_within(_HURRY_SECONDS)
        self._was_told = True

    def end_with_allocation(self) -> None:
        """As `request_stop`, where whoever asks has told the jobs, too: they have the grace to save what
        they have, and go back to their queues. To be told twice is no hurry: several may tell. Safe in a
        signal handler."""
        if not self._is_dying:
            self.request_stop()
            self._is_dying, self._save_at = True, clock.monotonic()

    def warn(self) -> None:
        """The end of its allocation is near: take nothing new. Safe in a signal handler."""
        grace_over = clock.monotonic() + self._settings.stop_grace_seconds
        self._stop_by(grace_over if self._last_call.until == float("inf") else self._last_call.until)

    def _stop_by(self, at: float) -> None:
        """Stop at that time, or earlier if that was said. Before the end of its life it lets jobs save."""
        self._stop_at = at if self._stop_at is None else min(at, self._stop_at)
        if not self._is_dying and (self._config.in_slurm or self._offering.ends_at is not None):
            left = max(0.0, self._stop_at - clock.monotonic())
            self._save_at = self._stop_at - min(self._settings.kill_grace_seconds, left / 2)

    @property
    def free(self) -> Mapping[str, object]:
        """What is left of it for jobs, for its record. Safe in other threads."""
        return self._placement.free()

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stop_at is not None

    @property
    def was_done(self) -> bool:
        """Whether no work was left when it looked last, and nobody told it to stop."""
        return self._all_done and not self._is_leaving()

    def run(self) -> int:
        """Work until told to stop or nothing is left to do; returns the exit code."""
        self._selector.register(self._mail, selectors.EVENT_READ, self._on_mail)
        self._guard.watch(self._selector)
        while not self._is_done():
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._turn()
        return self._exit_code

    def _turn(self) -> None:
        self._guard.keep_alive()
        self._claim_due |= self._slots.collect(redis_is_away=not self._is_beating())
        if self._is_leaving():  # also what a round under way has brought since
            self._slots.hand_back_waiting()
        self._enforce_stop()
        self._slots.start_waiting()
        self._slots.enforce_limits()
        self._asides.collect()
        self._reconnect()
        self._give_up_foreign()
        self._listen()
        self._exchange()
        self._show_outputs()
        if not self._rounds.under_way:
            self._slots.look_at_memory()
        self._has_looked = True

    def _is_leaving(self) -> bool:
        """Whether it takes nothing new."""
        return self._stop_at is not None or self._draining

    def _is_beating(self) -> bool:
        return self.beater is None or self.beater.connected

    def _patience(self) -> float:
        """Seconds until something is due without being told."""
        now = clock.monotonic()
        times = [now + _LONGEST_WAIT, self._slots.next_time()]
        if not self._links.up:
            times.append(self._links.retry_at)
        else:
            times.append(self._rounds.next_time())
            if len(self._slots):
                times.append(self._outputs_at)
        # what is over and has been acted upon is nothing to wait for
        if self._stop_at is None:
            times.append(self._last_call.at)
        else:
            times += [at for at in (self._save_at, self._stop_at) if at > now]
        if self._config.idle_timeout_seconds is not None and not self._is_working():
            times.append(self._slots.busy_at + self._config.idle_timeout_seconds)
        return max(0.0, min(times) - now)

    def _is_working(self) -> bool:
        return bool(len(self._slots) or len(self._asides) or self._slots.ends or self._rounds.under_way)

    def _is_done(self) -> bool:
        if len(self._slots) or len(self._asides) or self._slots.has_doubts:
            return False
        if self._rounds.under_way and self._links.up:
            return False  # its answer may bring claims, and a lease must not be left behind
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
        if self._all_done or (self._config.ephemeral and self._draining):
            return True
        if self._placement.is_useless:
            log.warning("it was started for jobs that ask for more than it has", extra=about("useless"))
            return True
        limit = self._config.idle_timeout_seconds
        if limit is None or not self._has_looked:
            return False
        return clock.monotonic() - self._slots.busy_at >= limit

    def _enforce_stop(self) -> None:
        if self._stop_at is None and clock.monotonic() >= self._last_call.at:
            log.info("the time limit is near: no more jobs are taken", extra=about("time_limit"))
            self._stop_by(self._last_call.until)
        if self._stop_at is None:
            return
        if not self._said_stopping:
            self._said_stopping = True
            left = max(0.0, self._stop_at - clock.monotonic())
            log.info("stopping: %d jobs have %.0f s to end", len(self._slots), left, extra=about("stopping"))
            if self.beater:  # whoever looks shall see it
                self.beater.beat_now()
        left = self._stop_at - clock.monotonic()
        if clock.monotonic() >= self._save_at:
            self._slots.let_save(left, are_dying=self._is_dying)
        if left <= 0:
            self._slots.kill_all("hand-back")
            self._asides.kill_all()

    def _give_up(self, reason: str, exit_code: int) -> None:
        """Nothing more can be told to Redis: end all jobs, and say why."""
        log.error("%s; stopping", reason, extra=about("gave_up"))
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
            self._rounds.abandon(exc)
            self._links.lost(exc, self._fleet_size)

    def _reconnect(self) -> None:
        if self._links.up or clock.monotonic() < self._links.retry_at:
            return
        with self._linked():
            self._links.connect(self._on_answer, self._on_wake, self._on_message)
            self._popped.clear()
            self._learn_sets()
            self._claim_due = True

    def _learn_sets(self) -> None:
        """Read all sets of requirements; news tell of those to come.

        The next claim looks at their sublists as if there were tokens: who pushed may not have told.
        """
        self._placement.learn(sets.known(self._links.client, self._session.identity.queues))
        self._unseen.update(self._placement.sublists())

    def _give_up_foreign(self) -> None:
        """What an earlier life of this worker held is lost: the lock on our name says that it is over."""
        if self._foreign and self._links.up:
            with self._linked():
                self._session.lose_foreign(self._links.client, self._foreign)
                self._foreign = ()

    def _exchange(self) -> None:
        """Report what ended and claim what there is room for, if it is time."""
        if not self._links.up:
            return
        with self._linked():
            self._links.line.check()
            if self._rounds.under_way:
                return
            wanted, ahead = self._room()
            # jobs are claimed ahead along with ends alone: where none end, none will be begun soon
            if self._rounds.is_due(wants_jobs=self._claim_due and wanted > 0):
                self._send(wanted, ahead)

    def _send(self, wanted: int, ahead: int) -> None:
        self._placement.count(len(self._slots))
        is_deaf = self._links.waiter.is_deaf(self._placement.lists())
        places = self._placement.places(self._popped | self._unseen)
        self._rounds.send(wanted, ahead, is_deaf=is_deaf, places=places)
        if wanted + ahead:
            self._popped.clear()
            self._unseen.clear()

    def _on_answer(self) -> None:
        if not self._links.up:
            return
        with self._linked():
            answer = self._rounds.receive()
            if answer is None:
                return
            exchange, done = answer
            for end, accepted in zip(exchange.ends, done.accepted, strict=True):
                self._settle(end, accepted)
            self._admit(exchange, done)
        if not self._is_leaving():  # else what it brought goes back first: it was behind what we had
            self._exchange()  # Redis has work while we start what it gave us

    def _settle(self, end: End, accepted: bool) -> None:
        self._slots.settled(end)
        self._shown.pop(end.claim.lease, None)
        if accepted:
            self._asides.follow(end)
        else:
            said = "job %s: its lease was no longer ours, %s dropped"
            log.warning(said, end.claim.job_id, end.outcome, extra=about("lease_lost", end.claim))

    def _admit(self, exchange: Exchange, done: Round) -> None:
        """Make new claims known to the heartbeat first; the turn starts them."""
        self._slots.admit(done.claims)
        self._session.settle(exchange)
        if not done.registered and self.beater:
            self.beater.beat_now()
        self._taken += len(done.claims)
        self._all_done = self._all_done and not done.claims
        self._found_nothing = exchange.wanted > 0 and not done.claims and done.registered
        # fewer than asked for: the queues are empty, wait for a token
        asked = exchange.wanted + exchange.ahead
        if asked:
            self._claim_due = len(done.claims) >= asked or done.more
            self._claim_due |= self._placement.hold(done.held)
        self._slots.take(done.claims)
        self._heed_ring()

    def _heed_ring(self) -> None:
        """Somebody rang while the round was under way: for us, or for others if that left us no room."""
        if self._rung and self._room()[0]:
            self._claim_due = True
        elif self._rung:
            self._pass_on()
        self._rung = False

    def _pass_on(self) -> None:
        """Tokens that are of no use here are for others."""
        self._links.waiter.pass_on(self._links.client, self._popped)
        self._popped.clear()

    def _room(self) -> tuple[int, int]:
        """How many jobs to claim now, and how many ahead of that: none, where jobs are counted."""
        if self._is_leaving() or not self._is_fit():
            return 0, 0
        if self._config.max_jobs is not None:
            return max(0, min(self._slots.free, self._config.max_jobs - self._taken)), 0
        return self._slots.free, self._slots.ahead()

    def _heed_drain(self, draining: bool) -> None:
        """An operator's wish, which holds until it is undone, also for a worker that starts."""
        if draining and not self._draining:
            name = self._session.identity.name
            said = "draining: no jobs are taken until 'fleet undrain %s'"
            log.info(said, name, extra=about("draining"))
        elif self._draining and not draining:
            log.info("no longer draining", extra=about("undrained"))
        self._draining = draining

    def _heed_labels(self, labels: Mapping[str, str] | None) -> None:
        """What operators say of this worker, which Redis may have lost: then we know it."""
        if labels is None and self._offering.operators:
            if self._links.up:
                with self._linked():
                    self._session.restore_labels(self._links.client, self._offering.operators)
        elif self._offering.heard(labels or {}):
            words = ",".join(f"{k}={v}" for k, v in self._offering.labels.items())
            log.info("labels: %s", words, extra=about("labels"))
            self._offer_anew()

    def _grow(self) -> None:
        """Take what others of this host have left, if it wanted that."""
        if self._is_leaving() or not self._offering.grown():
            return
        share = self._offering.share
        self._placement.room.hold(share.total, share.cpu_ids, share.gpu_ids)
        has = share.total.cpus, share.total.memory_bytes >> 20, len(share.total.gpus)
        said = "others of this host have left: it has %d CPUs, %d MiB and %d GPUs now"
        log.info(said, *has, extra=about("resources"))
        self._offer_anew()

    def _offer_anew(self) -> None:
        """It may serve other sublists now, which may hold jobs."""
        self._placement.offer(self._offering.offer())
        self._unseen.update(self._placement.sublists())
        if self.beater:  # whoever looks shall see it
            self.beater.beat_now()

    def _is_fit(self) -> bool:
        """Whether this host can run jobs: one must not fail because of us, another host may be fit."""
        if self._guard.is_late():
            return False
        fault = self._slots.fault if clock.monotonic() < self._slots.fault_until else self._disk_fault()
        if fault and not self.notice:
            log.warning("%s; no jobs are taken", fault, extra=about("unfit"))
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
        """Wait for tokens exactly while a slot is free and the queues are known to be empty.

        Only of lists whose jobs would fit: who took one of no use, and passed it on, might take it again.
        """
        if not self._links.up or self._rounds.under_way:
            return
        wants = self._slots.free > 0 and self._room()[0] > 0
        if wants and self._claim_due:
            return
        self._placement.count(len(self._slots))
        lists = self._placement.lists() if wants else ()
        with self._linked():
            self._links.waiter.nudge(self._links.client, lists)
            self._links.waiter.listen(lists)

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
                if ("drain" in news or "labels" in news) and self.beater:
                    self.beater.beat_now()
            elif news:
                self._popped.add(news)
                if self._room()[0]:
                    self._claim_again()
                else:
                    self._pass_on()

    def _claim_again(self) -> None:
        """There may be jobs, whatever a round that is under way finds."""
        self._claim_due, self._rung = True, self._rounds.under_way

    def _on_message(self) -> None:
        if not self._links.up:
            return
        with self._linked():
            for message in self._links.channels.receive():
                if isinstance(message, dict):
                    self._obey(message)
                elif not self._placement.hear(message):
                    self._learn_sets()

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
            elif isinstance(news, AllDone):
                self._all_done = True
            elif isinstance(news, TooLarge):
                self._slots.kill_too_large(news.lease)
            elif news.state == "taken":
                self._give_up("another worker has our name now", 1)
            else:
                self._on_beat(news)

    def _on_beat(self, beat: Beat) -> None:
        self._claim_again()  # once a beat for safety: a token may have been lost
        if beat.state == "ok":
            self._heed_drain(beat.draining)
            self._heed_labels(beat.labels)
            self._catch_up(beat.sets_version)
        elif self._links.up:  # Redis has lost our record, and maybe more
            with self._linked():
                self._learn_sets()
        self._grow()
        self._pool.reap()
        self._fleet_size = max(1, beat.workers)
        for lease in beat.lost | beat.stop:
            attempt, is_lost = self._slots.get(lease), lease in beat.lost
            if attempt:
                self._slots.end(attempt, "lost" if is_lost else "stop")
            else:
                self._slots.drop_waiting(lease, "lost" if is_lost else "stopped", "unwanted before it began")
        self._foreign = beat.foreign

    def _catch_up(self, sets_version: int) -> None:
        """Messages may have been lost."""
        if self._links.up and sets_version != self._placement.version:
            with self._linked():
                self._learn_sets()
