"""What became of jobs, queue by queue: totals since the queue's first job, and their course.

The scripts count in the step that moves a job, so the totals are exact whoever dies; sublists count with
their base. They lie in Redis, and outlive everything but it. `fleet:history:BASE` has a field for each count
that is not 0: `lost`, `handed_back`, `stale`, `failed:REASON`, `retried:REASON`; and of each histogram
`NAME:MS`, how many took up to MS but longer than the bound below, and `NAME:us`, microseconds in all. More
follows from these: each claim is in `waited`, each job that finished in `ran`, each that was lost and
queued again in `recovered`.

A chore writes the totals down every 15 seconds and keeps that for four hours: a queue's course.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import redis

from broker import keys
from broker.connection import replies

#: bounds of all histograms, seconds; as `observe` in scripts/_lib.lua has them
BOUNDS_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0)
_BUCKETS = (*(f"{bound * 1000:.0f}" for bound in BOUNDS_SECONDS), "inf")

#: why an attempt failed: `kind_of_failure` in scripts/_lib.lua tells them apart. `other`: it could not be
#: started, or its result could not be kept
REASONS = (
    *("exit_code", "exception", "signal", "timeout", "out_of_memory"),
    *("worker_lost", "stopped", "dependency", "other"),
)
#: of queues beyond the first hundred, together; no queue's name
OTHER = "(other)"

#: seconds between two samples, and for which they are kept; and for which a queue is known that is not used
SAMPLE_SECONDS = 15.0
SERIES_SECONDS = 4 * 3600
_RECORD_SECONDS = 30 * 86400
_MOST_SAMPLES = int(SERIES_SECONDS / SAMPLE_SECONDS)


@dataclass(frozen=True)
class Times:
    """A histogram: how many took up to each of BOUNDS_SECONDS, or longer than all; and all their seconds."""

    counts: tuple[int, ...] = (0,) * len(_BUCKETS)
    total_seconds: float = 0.0

    @property
    def count(self) -> int:
        """How many there are in all."""
        return sum(self.counts)

    def __add__(self, other: Times) -> Times:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Times(counts, self.total_seconds + other.total_seconds)


@dataclass(frozen=True)
class Totals:
    """Of one queue. `failed` and `retried` are by reason: jobs that failed for good, attempts that did not.

    `waited`: from when a job was queued to each of its claims; `ran`: attempts that finished; `ran_in_vain`:
    those that failed or were stopped; `recovered`: from the end of a lease to when its job was queued again.
    """

    waited: Times = Times()
    ran: Times = Times()
    ran_in_vain: Times = Times()
    recovered: Times = Times()
    failed: Mapping[str, int] = field(default_factory=dict)
    retried: Mapping[str, int] = field(default_factory=dict)
    #: attempts whose worker was lost; claimed jobs that came back unbegun; reports that came too late
    lost: int = 0
    handed_back: int = 0
    stale: int = 0

    @property
    def claims(self) -> int:
        return self.waited.count

    @property
    def finished(self) -> int:
        return self.ran.count

    def __add__(self, other: Totals) -> Totals:
        mine, its = vars(self), vars(other)
        return Totals(**{one.name: _sum(mine[one.name], its[one.name]) for one in fields(Totals)})


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping):
        return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
    return one + other


def read(client: redis.Redis) -> dict[str, Totals]:
    """The totals of each queue (base), the one used first in front, OTHER at the end if there is any.

    Two round trips; raises what redis-py raises.
    """
    bases = listed(client)
    with client.pipeline(transaction=False) as pipe:
        for base in bases:
            pipe.hgetall(keys.history(base))
        return {base: totals(row) for base, row in zip(bases, replies(pipe), strict=True) if row}


def listed(client: redis.Redis) -> dict[str, float]:
    """The queues that have a record, the one used first in front, with when that was, Unix seconds; OTHER."""
    with client.pipeline(transaction=False) as pipe:
        pipe.zrange(keys.HISTORIES, 0, -1, withscores=True)
        [found] = replies(pipe)
    rows = found if isinstance(found, list) else []
    return {base.decode("utf-8", "replace"): ms / 1000 for base, ms in rows} | {OTHER: 0.0}


def totals(row: Any) -> Totals:
    """What a record says; nothing, where somebody keeps something else there."""
    counts = numbers(row)
    return Totals(
        waited=times(counts, "waited"),
        ran=times(counts, "ran"),
        ran_in_vain=times(counts, "ran_in_vain"),
        recovered=times(counts, "recovered"),
        failed=_by_reason(counts, "failed"),
        retried=_by_reason(counts, "retried"),
        lost=counts.get("lost", 0),
        handed_back=counts.get("handed_back", 0),
        stale=counts.get("stale", 0),
    )


def _by_reason(counts: Mapping[str, int], what: str) -> dict[str, int]:
    return {reason: n for reason in REASONS if (n := counts.get(f"{what}:{reason}", 0))}


def times(counts: Mapping[str, int], name: str) -> Times:
    """A histogram that lies in the fields `NAME:BOUND` and `NAME:us` of a hash."""
    buckets = tuple(counts.get(f"{name}:{bucket}", 0) for bucket in _BUCKETS)
    return Times(buckets, counts.get(f"{name}:us", 0) / 1e6)


def numbers(row: Any) -> dict[str, int]:
    """The fields of a hash of counts; of anything else none."""
    rows = row.items() if isinstance(row, dict) else ()
    return {name.decode("utf-8", "replace"): _number(n) for name, n in rows}


def bucket_of(seconds: float) -> str:
    """The name of the bucket to which something belongs that took so long."""
    return _BUCKETS[bisect.bisect_left(BOUNDS_SECONDS, seconds)]


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        return 0


@dataclass(frozen=True)
class Counts:
    """Some totals of a queue, or how much they grew in a time."""

    claims: float = 0
    finished: float = 0
    failed: float = 0
    retried: float = 0
    lost: float = 0

    @classmethod
    def of(cls, found: Totals) -> Counts:
        failed, retried = sum(found.failed.values()), sum(found.retried.values())
        return cls(found.claims, found.finished, failed, retried, found.lost)

    def minus(self, other: Counts) -> Counts:
        """The growth since `other`; where counts began anew in between, there is none."""
        mine, its = vars(self), vars(other)
        return Counts(**{name: max(0.0, mine[name] - its[name]) for name in mine})

    def between(self, other: Counts, share: float) -> Counts:
        """What they were when `share` (0 to 1) of the time from here to `other` had passed."""
        mine, its = vars(self), vars(other)
        return Counts(**{name: mine[name] + share * (its[name] - mine[name]) for name in mine})


def courses(client: redis.Redis, *, step_seconds: float, steps: int) -> dict[str, list[Counts]]:
    """What happened in each queue (base) in each of the last `steps`, the oldest first; the last ends now.

    For a rate divide by `step_seconds`. What happened between two samples is spread evenly over the time
    between them, so that a short step may have a fraction; before the first sample there is nothing. Reaches
    back SERIES_SECONDS. Two round trips; raises what redis-py raises.
    """
    bases = listed(client)
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        for base in bases:
            pipe.hgetall(keys.history(base))
            pipe.lrange(keys.series(base), 0, -1)
        (seconds, micros), *rows = replies(pipe)
    now = seconds + micros / 1e6
    edges = [now - step_seconds * left for left in range(steps, -1, -1)]
    found = {}
    for (base, began), record, series in zip(bases.items(), rows[::2], rows[1::2], strict=True):
        if record:
            samples = [*_samples(series), (now, Counts.of(totals(record)))]
            if edges[0] < began < samples[0][0]:
                samples.insert(0, (began, Counts()))
            at_edges = [_at(samples, edge) for edge in edges]
            found[base] = [after.minus(before) for before, after in pairwise(at_edges)]
    return found


def _samples(series: Any) -> Iterator[tuple[float, Counts]]:
    """When, and what had been counted by then."""
    for line in series if isinstance(series, list) else ():
        words = line.split()
        if len(words) == 1 + len(fields(Counts)):
            yield float(words[0]), Counts(*map(float, words[1:]))


def _at(samples: Sequence[tuple[float, Counts]], when: float) -> Counts:
    """What had been counted by then."""
    index = bisect.bisect_right(samples, when, key=lambda sample: sample[0])
    if index == 0:
        return samples[0][1]
    if index == len(samples):
        return samples[-1][1]
    (begin, before), (end, after) = samples[index - 1], samples[index]
    if after.claims < before.claims:  # they began anew
        return before if when - begin < end - when else after
    return before.between(after, (when - begin) / (end - begin))


def sample(client: redis.Redis) -> int:
    """Write the totals down, for `courses`; returns how many queues there are. For the chore."""
    bases = listed(client)
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        for base in bases:
            pipe.hgetall(keys.history(base))
            pipe.lrange(keys.series(base), -2, -1)
        (seconds, _), *rows = replies(pipe)
    with client.pipeline(transaction=False) as pipe:
        for base, record, last in zip(bases, rows[::2], rows[1::2], strict=True):
            if record:
                _write(pipe, base, seconds, Counts.of(totals(record)), last)
            else:
                pipe.zrem(keys.HISTORIES, base)
        replies(pipe)
    return len(bases)


def _write(pipe: Any, base: str, now: int, counts: Counts, last: Any) -> None:
    """Add a sample; where nothing happened for long, the last one is only made younger."""
    line, series = " ".join(f"{n:.0f}" for n in (now, *vars(counts).values())), keys.series(base)
    if not isinstance(last, list):
        pipe.delete(series)  # ours alone, and damaged
        last = []
    same = [entry.split()[1:] == line.encode().split()[1:] for entry in last]
    if same == [True, True]:
        pipe.lset(series, -1, line)
    else:
        pipe.rpush(series, line)
        pipe.ltrim(series, -_MOST_SAMPLES, -1)
    if not any(same):
        pipe.expire(keys.history(base), _RECORD_SECONDS)
    pipe.expire(series, SERIES_SECONDS)
