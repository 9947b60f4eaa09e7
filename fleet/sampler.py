"""Looks, now and then, at what running jobs' processes have: one thread of a worker, for all who ask.

- Memory limits that nobody else enforces (`fleet/limits.py`): who has too much is told to the loop, which
  ends it. So often that nothing grows far beyond its limit.
- Peaks: the kernel tells them in the end of large processes alone (`fleet.process.peak_bytes`), so those of
  commands are looked up while they run.
- Samples: what jobs, and the host, use at this moment. They make a summary for each job, and a series
  (`fleet/series.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from broker import clock
from fleet import processes
from fleet.attempt import Attempt
from fleet.limits import Limit
from fleet.logs import about
from fleet.meters import HostMeter, JobMeter
from fleet.processes import Process, Table
from fleet.resources import GpuUse
from fleet.series import Series

log = logging.getLogger("fleet.worker")

#: how GPUs of these numbers, or (None) all, are used, of those that tell
GpuUses = Callable[[Iterable[int] | None], Sequence[GpuUse]]

#: seconds: what has not run for so long is over at once, most often
_YOUNG_SECONDS = 0.5
#: samples that are written at once
_WRITTEN_AT_ONCE = 6


@dataclass(frozen=True)
class TooLarge:
    """The attempt under this lease has more memory than its job asked for."""

    lease: str


@dataclass(frozen=True)
class Sampling:
    """How often samples are taken, and where they go."""

    seconds: float
    series: Series
    host: HostMeter


class Rhythm:
    """When to look again: every `shortest` seconds, but longer, up to `longest`, where looking would take
    more than one part in `share` of one CPU's time."""

    def __init__(self, shortest: float, share: int, longest: float = float("inf")) -> None:
        self._shortest, self._share, self._longest = shortest, share, longest
        #: monotonic seconds
        self.next_time = 0.0

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether it is time; what is done inside is what looking takes."""
        if clock.monotonic() < self.next_time:
            yield False
            return
        began = time.thread_time()
        try:
            yield True
        finally:
            rest = max(self._shortest, self._share * (time.thread_time() - began))
            self.next_time = clock.monotonic() + min(self._longest, rest)


class Sampler:
    """The thread. `add` and `remove` are for the loop."""

    def __init__(
        self, gpus: GpuUses, post: Callable[[TooLarge], None], sampling: Sampling | None = None
    ) -> None:
        """`post` is told, more than once maybe, of who has too much. No `sampling`: no samples are taken."""
        self._gpus = gpus
        self._post = post
        self._sampling = sampling
        self._attempts: dict[str, Attempt] = {}
        self._limits = Rhythm(0.2, 20, longest=1.0)
        self._peaks = Rhythm(1.0, 500)
        self._samples = Rhythm(sampling.seconds if sampling else 0.0, 200)
        self._unwritten = 0
        self._told: set[str] = set()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def add(self, attempt: Attempt) -> None:
        """It runs."""
        self._attempts[attempt.claim.lease] = attempt
        if attempt.limit and attempt.limit.memory_bytes is not None:
            self._wake.set()

    def remove(self, lease: str) -> None:
        """It has ended."""
        self._attempts.pop(lease, None)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=20)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.look()
            except Exception as exc:  # whatever it is: jobs run on, and limits must be looked at
                self._tell(exc)
            self._wake.wait(self._patience())
            self._wake.clear()
        if self._sampling:
            self._sampling.series.close()
            self._sampling.host.close()

    def _tell(self, exc: Exception) -> None:
        """Once: it may come again with each look."""
        if repr(exc) not in self._told:
            self._told.add(repr(exc))
            log.warning("looking at what jobs use failed", exc_info=exc, extra=about("sampling"))

    def _patience(self) -> float:
        times = [self._peaks.next_time]
        if any(_holds_memory(attempt) for attempt in self._running()):
            times.append(self._limits.next_time)
        if self._sampling:
            times.append(self._samples.next_time)
        return max(0.01, min(times) - clock.monotonic())

    def _running(self) -> tuple[Attempt, ...]:
        """A copy in one step: the loop adds and removes."""
        return tuple(self._attempts.values())

    def look(self) -> None:
        """Look at what it is time for."""
        attempts, table = self._running(), Table()
        with self._limits.turn() as is_time:
            if is_time:
                self._look_at_limits(attempts, table)
        with self._peaks.turn() as is_time:
            if is_time:
                self._look_at_peaks(attempts, table)
        if self._sampling:
            with self._samples.turn() as is_time:
                if is_time:
                    self._sample(self._sampling, attempts, table)

    def _look_at_limits(self, attempts: Iterable[Attempt], table: Table) -> None:
        for attempt in attempts:
            limit = attempt.limit
            if limit is None or limit.memory_bytes is None:
                continue
            if limit.is_watched:
                table.read_all()
                limit.seen_bytes = max(limit.seen_bytes, _size(_members(attempt, table), limit.memory_bytes))
            if limit.ran_out:
                self._post(TooLarge(attempt.claim.lease))

    def _look_at_peaks(self, attempts: Iterable[Attempt], table: Table) -> None:
        for attempt in attempts:
            if attempt.is_unmetered:
                attempt.seen_bytes = max(attempt.seen_bytes, processes.peak_bytes(_members(attempt, table)))
            if attempt.limit and attempt.limit.has_gpus:
                self._look_at_gpus(attempt.limit)

    def _look_at_gpus(self, limit: Limit) -> None:
        used = sum(gpu.memory_bytes for gpu in self._gpus(limit.grant.gpu_ids))
        if used:
            limit.seen_gpu_bytes = max(limit.seen_gpu_bytes or 0, used)

    def _sample(self, sampling: Sampling, attempts: Iterable[Attempt], table: Table) -> None:
        at, now, gpus = clock.wall().timestamp(), clock.monotonic(), self._gpus(None)
        host = sampling.host.read(now)
        if host:
            sampling.series.note_host(at, host, gpus)
        for attempt in attempts:
            members = _members(attempt, table) if now - attempt.started > _YOUNG_SECONDS else {}
            if members:
                attempt.meter = meter = attempt.meter or _meter(attempt)
                sample = meter.read(now, members, _own_gpus(attempt.limit, gpus))
                sampling.series.note_job(at, attempt.claim.job_id, int(attempt.claim.fence), sample)
        self._unwritten += 1
        if self._unwritten >= _WRITTEN_AT_ONCE:
            self._unwritten = 0
            sampling.series.write()


def _meter(attempt: Attempt) -> JobMeter:
    return JobMeter(attempt.started if attempt.has_own_processes else None)


def _own_gpus(limit: Limit | None, gpus: Iterable[GpuUse]) -> list[GpuUse]:
    """Those that a job has to itself; what it takes of one that it shares nobody tells."""
    own = limit.grant.gpu_ids if limit and limit.has_gpus else ()
    return [gpu for gpu in gpus if gpu.index in own]


def _holds_memory(attempt: Attempt) -> bool:
    return attempt.limit is not None and attempt.limit.memory_bytes is not None


def _members(attempt: Attempt, table: Table) -> dict[int, Process]:
    """Its processes, which stay known."""
    if not attempt.pgid:  # an executor that could not be started
        return {}
    members = table.family(attempt.pgid, attempt.known)
    attempt.known = {pid: process.started for pid, process in members.items()}
    return {pid: process for pid, process in members.items() if attempt.counts(pid, process)}


def _size(members: Mapping[int, Process], limit_bytes: int) -> int:
    """Bytes that all have; what several share counts once, where that makes the difference."""
    size = sum(process.resident_bytes for process in members.values())
    if size > limit_bytes:
        size = sum(
            processes.proportional_bytes(pid, process.resident_bytes) for pid, process in members.items()
        )
    return size
