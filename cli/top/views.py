"""The views of `fleet top`: their rows, how these are sorted, and what a filter finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

from broker.running import RunningJob
from broker.status import WorkerStatus
from cli import fleet_rows, tables
from cli.glyphs import Glyphs
from cli.tables import Cell, Column
from cli.top.reader import Seen

_DIGITS = re.compile(r"(\d+)")


@lru_cache(maxsize=1 << 16)
def natural(name: str) -> tuple[Any, ...]:
    """A key by which gpu2 comes before gpu10."""
    return tuple(int(part) if part.isdigit() else part for part in _DIGITS.split(name))


@dataclass(frozen=True)
class Order:
    """How rows may be sorted: by the column of that title, from the least, unless `descends`, on."""

    key: Callable[[Any], Any]
    descends: bool = False


@dataclass(frozen=True)
class View:
    """One kind of rows. `orders` are by titles of columns; the first one is where it begins."""

    name: str
    columns: Sequence[Column]
    rows: Callable[[Seen], Sequence[Any]]
    cells: Callable[[Any, Glyphs, Seen], list[Cell]]
    identity: Callable[[Any], str]
    words: Callable[[Any], str]
    orders: dict[str, Order]


def _worker_words(worker: WorkerStatus) -> str:
    labels = (f"{name}={value}" for name, value in worker.labels.items())
    return " ".join(
        (worker.name, worker.host, worker.state, *worker.queues, worker.version, worker.notice, *labels)
    )


def _urgency(worker: WorkerStatus) -> tuple[Any, ...]:
    return not worker.notice, fleet_rows.URGENCY.index(worker.state), natural(worker.name)


def _free(worker: WorkerStatus, what: str) -> float:
    return float(getattr(worker.free, what)) if worker.free else 0.0


WORKERS = View(
    "Workers",
    fleet_rows.WORKER_COLUMNS,
    lambda seen: seen.status.workers,
    lambda worker, glyphs, _seen: fleet_rows.worker_row(worker, glyphs),
    lambda worker: worker.name,
    _worker_words,
    {
        "STATE": Order(_urgency),
        "WORKER": Order(lambda worker: natural(worker.name)),
        "HOST": Order(lambda worker: natural(worker.host)),
        "SLOTS": Order(lambda worker: len(worker.running), descends=True),
        "CPUS": Order(lambda worker: worker.cpus - _free(worker, "cpus"), descends=True),
        "MEMORY": Order(lambda worker: worker.memory_bytes - _free(worker, "memory_bytes"), descends=True),
        "GPUS": Order(
            lambda worker: len(worker.gpus) - sum(worker.free.gpus if worker.free else ()), descends=True
        ),
        "BEAT": Order(lambda worker: worker.heartbeat_age_seconds or 0.0, descends=True),
        "QUEUES": Order(lambda worker: worker.queues),
        "RUNNING": Order(lambda worker: len(worker.running), descends=True),
        "DONE": Order(lambda worker: worker.finished, descends=True),
        "FAILED": Order(lambda worker: worker.failed, descends=True),
        "VERSION": Order(lambda worker: natural(worker.version)),
    },
)

QUEUES = View(
    "Queues",
    fleet_rows.QUEUE_COLUMNS,
    lambda seen: seen.status.queues,
    lambda queue, glyphs, seen: fleet_rows.queue_row(queue, glyphs, seen.courses),
    lambda queue: queue.name,
    lambda queue: f"{queue.name} {queue.requirements} {'paused' if queue.paused else ''}",
    {
        "OLDEST": Order(lambda queue: queue.oldest_age_seconds or -1.0, descends=True),
        "QUEUE": Order(lambda queue: natural(queue.name)),
        **{
            title: Order(attrgetter(title.lower()), descends=True)
            for title in ("QUEUED", "RUNNING", "SCHEDULED", "DEFERRED", "FINISHED", "FAILED")
        },
        "STATE": Order(lambda queue: not queue.paused),
        "ASKS FOR": Order(lambda queue: queue.requirements),
    },
)

_JOB_COLUMNS = (
    Column("JOB", least=12),
    Column("FOR", right=True),
    Column("QUEUE", rank=1, least=8, in_middle=True),
    Column("WORKER", least=16, in_middle=True),
    Column("NAME", rank=1, least=16),
)


def _job_row(job: RunningJob, _glyphs: Glyphs, seen: Seen) -> list[Cell]:
    if job.details is None:
        return [job.id, "…", "…", job.worker, "…"]
    name, queue, started = job.details
    seconds = (seen.status.at - started).total_seconds() if started else None
    return [job.id, tables.age(seconds), queue, job.worker, name]


def _runs_for(job: RunningJob) -> tuple[bool, float]:
    """The longer the greater; least of all where it is not known."""
    started = job.details.started_at if job.details else None
    return started is not None, -started.timestamp() if started else 0.0


def _job_words(job: RunningJob) -> str:
    name, queue, _ = job.details or ("", "", None)
    return f"{job.id} {job.worker} {job.host} {queue} {name}"


JOBS = View(
    "Jobs",
    _JOB_COLUMNS,
    lambda seen: seen.jobs,
    _job_row,
    lambda job: job.id,
    lambda job: (
        f"{job.id} {job.worker} {job.host} " + (f"{job.details[0]} {job.details[1]}" if job.details else "")
    ),
    {
        "FOR": Order(_runs_for, descends=True),
        "JOB": Order(lambda job: job.id),
        "QUEUE": Order(lambda job: job.details.queue if job.details else ""),
        "WORKER": Order(lambda job: natural(job.worker)),
        "NAME": Order(lambda job: job.details.name if job.details else ""),
    },
)

FAILURES = View(
    "Failures",
    fleet_rows.FAILURE_COLUMNS,
    lambda seen: seen.failures,
    lambda failure, _glyphs, seen: fleet_rows.failure_row(failure, seen.status.at),
    lambda failure: failure.job_id,
    lambda failure: f"{failure.job_id} {failure.queue} {failure.worker} {failure.reason}",
    {
        "FAILED": Order(lambda failure: failure.at.timestamp() if failure.at else 0.0, descends=True),
        "JOB": Order(attrgetter("job_id")),
        "QUEUE": Order(lambda failure: natural(failure.queue)),
        "WORKER": Order(lambda failure: natural(failure.worker)),
        "REASON": Order(attrgetter("reason")),
    },
)

VIEWS = (WORKERS, QUEUES, JOBS, FAILURES)


@dataclass(frozen=True)
class Chosen:
    """How one view is looked at: by which column it is sorted, which way, and what is left of it."""

    view: View
    title: str
    reverse: bool = False
    filter: str = ""

    def sorted_by(self, title: str) -> Chosen:
        """By that column; once more: the other way round."""
        return replace(self, title=title, reverse=title == self.title and not self.reverse)

    def sorted_by_next(self, step: int) -> Chosen:
        """By the column that comes so many after this one."""
        titles = [column.title for column in self.view.columns if column.title in self.view.orders]
        return replace(self, title=titles[(titles.index(self.title) + step) % len(titles)], reverse=False)

    def rows(self, seen: Seen) -> list[Any]:
        """The rows of it, in order; all words of the filter must be found, whatever their case."""
        found = list(self.view.rows(seen))
        for word in self.filter.casefold().split():
            found = [row for row in found if word in self.view.words(row).casefold()]
        order = self.view.orders[self.title]
        found.sort(key=order.key, reverse=order.descends != self.reverse)
        return found

    def titles(self) -> list[str]:
        """Those of the columns, the one that it is sorted by with an arrow."""
        descends = self.view.orders[self.title].descends != self.reverse
        arrow = "↓" if descends else "↑"
        return [
            f"{column.title}{arrow}" if column.title == self.title else column.title
            for column in self.view.columns
        ]


def counts(seen: Seen) -> dict[str, int]:
    """How many rows each view has, by its name."""
    return {view.name: len(view.rows(seen)) for view in VIEWS}
