"""Figures of `fleet report`: how many there were over time, how long things took, what memory to ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from broker.past import PastJob

#: intervals of a report's time
INTERVALS = 240
#: seconds: three steps in ten where people count so, else what they would say
_EDGES: tuple[float, ...] = (
    *(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    *(60.0, 180.0, 600.0, 1800.0, 3600.0, 10800.0, 36000.0, 86400.0, 259200.0, 604800.0, math.inf),
)
#: of a group of jobs, for its memory to be judged by
_MOST_PEAKS = 10_000
#: what is suggested is so much above what nearly all jobs had, and a round number
_MARGIN = 1.2
_MIB = 2**20
_STEPS = (1, 1.5, 2, 3, 4, 6, 8)
#: bytes that nobody need ask for
_LITTLE = 64 * _MIB


class Intervals:
    """A time divided into equal parts, and how many things were there in each, on average."""

    def __init__(self, began: float, ended: float, count: int = INTERVALS) -> None:
        self._began, self._count = began, count
        self._width = max((ended - began) / count, 1e-9)
        self._parts = [0.0] * (count + 1)
        # by how much the number of those that fill an interval changes with it
        self._steps = [0] * (count + 2)
        self.marks = [0] * count

    def add(self, began: float, ended: float) -> None:
        """One more that was there from then to then."""
        first, last = self._place(began), self._place(ended)
        if last < 0 or first >= self._count:
            return
        first_at, last_at = math.floor(first), math.floor(last)
        if first_at == last_at:
            self._parts[first_at] += last - first
            return
        self._parts[first_at] += first_at + 1 - first
        self._parts[last_at] += last - last_at
        self._steps[first_at + 1] += 1
        self._steps[last_at] -= 1

    def mark(self, at: float) -> None:
        """Something happened then."""
        self.marks[min(math.floor(self._place(at)), self._count - 1)] += 1

    def _place(self, at: float) -> float:
        return min(max((at - self._began) / self._width, 0.0), float(self._count))

    def means(self) -> tuple[float, ...]:
        """How many there were in each interval."""
        full, found = 0, []
        for part, step in zip(self._parts[: self._count], self._steps, strict=False):
            full += step
            found.append(full + part)
        return tuple(found)


# --- distributions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distribution:
    """Seconds: how many there are, those below which half, 90 % and 99 % lie, and `counts` below each of
    `edges`, the last of them above all."""

    count: int
    p50: float
    p90: float
    p99: float
    longest: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


def distribution(seconds: Sequence[float]) -> Distribution | None:
    """None of nothing."""
    if not seconds:
        return None
    ordered = sorted(max(0.0, one) for one in seconds)
    counts, at = [], 0
    for edge in _EDGES:
        start = at
        while at < len(ordered) and ordered[at] < edge:
            at += 1
        counts.append(at - start)
    used = [index for index, count in enumerate(counts) if count]
    shown = slice(used[0], used[-1] + 1)
    p50, p90, p99 = (quantile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Distribution(len(ordered), p50, p90, p99, ordered[-1], tuple(_EDGES[shown]), tuple(counts[shown]))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest that is no less than that share of them."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# --- memory ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """The jobs of one program that asked for as much: what they had at most, and what to ask for instead.

    `asked_bytes`, `suggested_bytes` None: nothing was asked for; it is right as it is.
    """

    program: str
    queue: str
    asked_bytes: int | None
    jobs: int
    ran_out: int
    p50_bytes: int
    p99_bytes: int
    most_bytes: int
    suggested_bytes: int | None
    verdict: str


class Peaks:
    """What the jobs of one kind had at most."""

    def __init__(self) -> None:
        self.jobs = self.ran_out = 0
        self.bytes: list[int] = []

    def take(self, job: PastJob) -> None:
        self.jobs += 1
        self.ran_out += job.state == "failed" and "OutOfMemory" in job.reason
        if job.usage and job.usage.memory_bytes and len(self.bytes) < _MOST_PEAKS:
            self.bytes.append(job.usage.memory_bytes)


def memory_of(peaks: Mapping[tuple[str, str, int | None], Peaks]) -> Iterator[Memory]:
    """Of jobs by program, queue and the bytes that they asked for; nothing of those that nobody looked at."""
    for (program, queue, asked), found in peaks.items():
        if not found.bytes:
            continue
        ordered = sorted(found.bytes)
        p50, p99 = int(quantile(ordered, 0.5)), int(quantile(ordered, 0.99))
        suggested, verdict = suggestion(asked, p99, found.ran_out)
        yield Memory(
            program, queue, asked, found.jobs, found.ran_out, p50, p99, ordered[-1], suggested, verdict
        )


def suggestion(asked: int | None, p99: int, ran_out: int) -> tuple[int | None, str]:
    """What to ask for, None: it is right as it is; and why."""
    wanted = round_bytes(max(p99, asked or 0 if ran_out else 0) * _MARGIN)
    if asked is None and wanted <= _LITTLE:
        return None, "needs next to nothing"
    if asked is None:
        return wanted, "asked for nothing: nothing limits it, or keeps room for it"
    if ran_out:
        return wanted, f"{ran_out} ran out of memory"
    if wanted < asked:
        return wanted, f"{p99 / asked:.0%} of what it asked for is used"
    if p99 * 1.05 > asked:
        return wanted, "has next to no room left"
    return None, "asks for what it needs"


def round_bytes(size: float) -> int:
    """The next of 64, 96, 128, 192, 256, 384, 512 MiB, 768 MiB, 1 GiB, 1.5 GiB and so on."""
    unit = _LITTLE
    while True:
        for step in _STEPS:
            if step * unit >= size:
                return int(step * unit)
        unit *= 8
