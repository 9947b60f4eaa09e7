"""What ran where, when and at what cost: added up for `fleet report`, in memory that does not grow with time.

Of jobs only their attempts' times are kept while all are gone through; what is shown of them is picked,
grouped or counted in intervals of time. Times are seconds since 1970: those of jobs on Redis's clock, those
of samples on the hosts' own.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from broker.past import Attempt, Past, PastJob
from fleet import series, usage_series
from fleet.report_figures import INTERVALS, Distribution, Intervals, Memory, Peaks, distribution, memory_of
from fleet.usage_series import Fleet
from fleet.worker_config import default_output_dir

#: rows of the Gantt chart; attempts up to which each is a bar of its own, and how many at once in one row
_MOST_ROWS, _MOST_BARS, _MOST_LANES = 40, 1500, 16
#: jobs, groups and ids that are listed
_MOST_LISTED, _MOST_IDS = 20, 3
#: characters of a name or a reason that are shown
_MOST_CHARACTERS = 200
#: seconds for which a job may be claimed and not begun, at most
_AHEAD_SECONDS = 1.0


class Bar(NamedTuple):
    """An attempt in a row of the chart. `ended` None: it runs."""

    job: str
    name: str
    worker: str
    started: float
    ended: float | None
    outcome: str | None
    lane: int


@dataclass
class Row:
    """A worker, or a host, in the chart: its bars, or how many jobs it ran on average in each interval."""

    name: str
    attempts: int = 0
    busy_seconds: float = 0.0
    unfinished: int = 0
    most_at_once: int = 0
    bars: list[Bar] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    #: of attempts that did not finish, by interval
    failures: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Slow:
    """One of the jobs that ran longest."""

    job: str
    name: str
    queue: str
    worker: str
    state: str
    seconds: float
    cpu_seconds: float | None
    memory_bytes: int | None
    #: its memory over its time, where it was sampled and that is here
    memory: tuple[int, ...] = ()


@dataclass
class Failures:
    """The jobs that failed for one reason; numbers in it are told as `N`."""

    reason: str
    count: int = 0
    #: the newest ones
    jobs: list[str] = field(default_factory=list)
    workers: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Report:
    """All of it. `began` and `ended` span what ran; intervals divide that evenly."""

    at: float
    began: float
    ended: float
    #: of each state, all that Redis keeps
    kept: Mapping[str, int]
    #: of those that are in the report
    states: Mapping[str, int]
    outcomes: Mapping[str, int]
    left_out: int
    workers: int
    hosts: int
    busy_seconds: float
    cpu_seconds: float
    waiting: Distribution | None
    running: Distribution | None
    running_jobs: tuple[float, ...]
    waiting_jobs: tuple[float, ...]
    rows: tuple[Row, ...]
    #: what a row is, how many there are beyond those, and whether they show single attempts
    row_kind: str
    more_rows: int
    has_bars: bool
    slowest: tuple[Slow, ...]
    failures: tuple[Failures, ...]
    more_failures: int
    memory: tuple[Memory, ...]
    more_memory: int
    #: None: there are no samples of that time
    fleet: Fleet | None = None


def make(past: Past, samples: Iterable[Path], at: float, since: float | None = None) -> Report:
    """Of what ran, and the samples in these files. `at`: now; what ended before `since` is left out."""
    found = _Gathering(since)
    for job in past.jobs:
        found.take(job)
    report = found.report(past, at)
    fleet, memory = usage_series.read(
        samples, report.began, report.ended, INTERVALS, [job.job for job in report.slowest]
    )
    slowest = tuple(replace(job, memory=memory.get(job.job, ())) for job in report.slowest)
    return replace(report, fleet=fleet, slowest=slowest)


def series_files(folders: Iterable[Path]) -> Iterator[Path]:
    """The files of samples below these folders, and those of workers on this host."""
    for folder in (*folders, default_output_dir() / "log"):
        yield from series.files(folder)


class _Ran(NamedTuple):
    """An attempt, as much as is kept of each."""

    started: float
    ended: float | None
    worker: str
    outcome: str | None
    job: str
    name: str


class _Gathering:
    """Goes through jobs once."""

    def __init__(self, since: float | None) -> None:
        self._since = since or 0.0
        self._ran: list[_Ran] = []
        self._waits: list[tuple[float, float]] = []
        self._states: Counter[str] = Counter()
        self._slowest: list[tuple[float, int, PastJob]] = []
        self._failures: dict[str, Failures] = {}
        self._peaks: dict[tuple[str, str, int | None], Peaks] = defaultdict(Peaks)
        self._cpu_seconds = 0.0
        # one text for each worker and each program, however many jobs have it
        self._texts: dict[str, str] = {}

    def take(self, job: PastJob) -> None:
        attempts = [one for one in job.attempts if self._counts(one)]
        if not attempts and not (self._never_ran(job)):
            return
        self._states[job.state] += 1
        name = self._same(_short(job.name))
        for one in attempts:
            outcome = None if one.outcome is None else self._same(one.outcome)
            self._ran.append(_Ran(one.started, one.ended, self._same(one.worker), outcome, job.id, name))
        if attempts:
            self._take_times(job, attempts)
        if job.state == "failed":
            self._take_failure(job)
        if job.usage:
            self._cpu_seconds += job.usage.cpu_seconds or 0.0
        self._peaks[_program(job.name), job.queue, job.need.memory_bytes if job.need else None].take(job)

    def _counts(self, attempt: Attempt) -> bool:
        """Whether it is of that time, and was begun: what is claimed ahead goes back soon."""
        if attempt.ended is None:
            return True
        is_back = attempt.outcome == "handed-back" and attempt.ended - attempt.started < _AHEAD_SECONDS
        return attempt.ended >= self._since and not is_back

    def _never_ran(self, job: PastJob) -> bool:
        """What failed at once, as for a job that it waited for."""
        return job.state == "failed" and not job.attempts and (job.submitted or 0.0) >= self._since

    def _same(self, text: str) -> str:
        return self._texts.setdefault(text, text)

    def _take_times(self, job: PastJob, attempts: Sequence[Attempt]) -> None:
        waited = _wait_of(job)
        if waited:
            self._waits.append(waited)
        last = attempts[-1]
        if last.ended is not None:
            entry = (last.ended - last.started, len(self._ran), job)
            if len(self._slowest) < _MOST_LISTED:
                heapq.heappush(self._slowest, entry)
            elif entry > self._slowest[0]:
                heapq.heapreplace(self._slowest, entry)

    def _take_failure(self, job: PastJob) -> None:
        reason = grouped(job.reason)
        group = self._failures.setdefault(reason, Failures(reason))
        group.count += 1
        if len(group.jobs) < _MOST_IDS:
            group.jobs.append(job.id)
        if len(group.workers) < _MOST_ROWS and job.attempts:
            group.workers.add(job.attempts[-1].worker)
        if len(group.names) < _MOST_IDS:
            group.names.add(_short(job.name))

    def report(self, past: Past, at: float) -> Report:
        starts = [one.started for one in self._ran]
        began = max(min(starts, default=self._since or at), self._since)
        ends = [at if one.ended is None else one.ended for one in self._ran]
        ended = max(began + 1e-3, max(ends, default=at))
        rows, kind, more, has_bars = self._rows(began, ended, at)
        running, waiting = Intervals(began, ended), Intervals(began, ended)
        for one in self._ran:
            running.add(one.started, at if one.ended is None else one.ended)
        for queued, started in self._waits:
            waiting.add(queued, started)
        failures = sorted(self._failures.values(), key=lambda group: -group.count)
        memory = sorted(
            memory_of(self._peaks), key=lambda one: -one.jobs * (one.asked_bytes or one.p99_bytes)
        )
        workers = {one.worker for one in self._ran}
        return Report(
            at=at,
            began=began,
            ended=ended,
            kept=past.kept,
            states=dict(self._states),
            outcomes=dict(Counter(one.outcome or "running" for one in self._ran)),
            left_out=past.left_out,
            workers=len(workers),
            hosts=len({host_of(worker) for worker in workers}),
            busy_seconds=sum((at if one.ended is None else one.ended) - one.started for one in self._ran),
            cpu_seconds=self._cpu_seconds,
            waiting=distribution([started - queued for queued, started in self._waits]),
            running=distribution([one.ended - one.started for one in self._ran if one.ended is not None]),
            running_jobs=running.means(),
            waiting_jobs=waiting.means(),
            rows=rows,
            row_kind=kind,
            more_rows=more,
            has_bars=has_bars,
            slowest=tuple(_slow(job, seconds) for seconds, _, job in sorted(self._slowest, reverse=True)),
            failures=tuple(failures[:_MOST_LISTED]),
            more_failures=sum(group.count for group in failures[_MOST_LISTED:]),
            memory=tuple(memory[:_MOST_LISTED]),
            more_memory=max(0, len(memory) - _MOST_LISTED),
        )

    def _rows(self, began: float, ended: float, at: float) -> tuple[tuple[Row, ...], str, int, bool]:
        """The busiest workers, or hosts where these are many, by name."""
        workers = {one.worker for one in self._ran}
        is_by_host = len(workers) > _MOST_ROWS
        row_of = {worker: host_of(worker) if is_by_host else worker for worker in workers}
        rows: dict[str, Row] = {}
        for one in self._ran:
            row = rows.setdefault(row_of[one.worker], Row(row_of[one.worker]))
            row.attempts += 1
            row.busy_seconds += (at if one.ended is None else one.ended) - one.started
            row.unfinished += one.outcome not in (None, "finished")
        busiest = sorted(rows.values(), key=lambda row: -row.busy_seconds)[:_MOST_ROWS]
        chosen = {row.name: row for row in busiest}
        has_bars = len(self._ran) <= _MOST_BARS and self._draw_bars(chosen, row_of, at)
        if not has_bars:
            self._count_rows(chosen, row_of, (began, ended), at)
        shown = tuple(sorted(busiest, key=lambda row: _natural(row.name)))
        return shown, "host" if is_by_host else "worker", len(rows) - len(busiest), has_bars

    def _draw_bars(self, rows: Mapping[str, Row], row_of: Mapping[str, str], at: float) -> bool:
        """False: more at once in a row than could be told apart."""
        lanes: dict[str, list[float]] = defaultdict(list)
        for one in sorted(self._ran):
            row = rows.get(row_of[one.worker])
            if row is None:
                continue
            ends, ended = lanes[row.name], at if one.ended is None else one.ended
            lane = next((i for i, end in enumerate(ends) if end <= one.started), len(ends))
            ends[lane : lane + 1] = [ended]
            row.bars.append(Bar(one.job, one.name, one.worker, one.started, one.ended, one.outcome, lane))
            row.most_at_once = len(ends)
        if max(map(len, lanes.values()), default=0) <= _MOST_LANES:
            return True
        for row in rows.values():
            row.bars.clear()
        return False

    def _count_rows(
        self, rows: Mapping[str, Row], row_of: Mapping[str, str], span: tuple[float, float], at: float
    ) -> None:
        counts = {name: Intervals(*span) for name in rows}
        edges: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for one in self._ran:
            name = row_of[one.worker]
            if name not in rows:
                continue
            ended = at if one.ended is None else one.ended
            counts[name].add(one.started, ended)
            edges[name] += [(one.started, 1), (ended, -1)]
            if one.outcome not in (None, "finished"):
                counts[name].mark(ended)
        for name, row in rows.items():
            row.running = list(counts[name].means())
            row.failures = counts[name].marks
            row.most_at_once = _most_at_once(edges[name])


def _most_at_once(edges: list[tuple[float, int]]) -> int:
    now = most = 0
    for _, step in sorted(edges):
        now += step
        most = max(most, now)
    return most


# --- single things -----------------------------------------------------------------------------------


def _wait_of(job: PastJob) -> tuple[float, float] | None:
    """From when it was queued last, as far as that is known, to when it was begun."""
    for attempt in reversed(job.attempts):
        if job.queued is not None and job.queued <= attempt.started:
            return job.queued, attempt.started
    first = job.attempts[0].started
    return None if job.submitted is None else (min(job.submitted, first), first)


def _slow(job: PastJob, seconds: float) -> Slow:
    used = job.usage
    return Slow(
        job.id,
        _short(job.name),
        job.queue,
        job.attempts[-1].worker,
        job.state,
        seconds,
        used.cpu_seconds if used else None,
        used.memory_bytes if used else None,
    )


def host_of(worker: str) -> str:
    """`gpu7` of `gpu7-0`: as `fleet up` names workers."""
    host, dash, number = worker.rpartition("-")
    return host if dash and number.isdecimal() else worker


def _program(name: str) -> str:
    """The program, or the function, that a job is: the first word, without its folder."""
    first = (name.split(None, 1) or [""])[0]
    return _short(first.partition("(")[0].rpartition("/")[2] or first)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


_DEPENDENCY = re.compile(r"^dependency \S+")
_EXACT = re.compile(r"exit code \d+|killed by \S+")
_NUMBER = re.compile(r"\b(0x)?[0-9a-f]*\d[0-9a-f.]*\b", re.IGNORECASE)


def grouped(reason: str) -> str:
    """A reason without what differs from job to job."""
    text = reason.strip()
    if not text:
        return "no reason is known"
    if _EXACT.fullmatch(text):
        return text
    return _short(_NUMBER.sub("N", _DEPENDENCY.sub("dependency JOB", text)))


def _natural(name: str) -> list[tuple[int, str]]:
    """host2 comes before host10."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
