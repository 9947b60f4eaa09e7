"""Samples that workers took (`fleet/series.py`), added up over the time of a report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fleet import series

if TYPE_CHECKING:
    from sqlite3 import Connection

#: seconds between two samples of a host that is still the same line; a worker may be busy, or be replaced
_GAP_SECONDS = 60.0
#: points of a job's own line
_POINTS = 60


class Mean(NamedTuple):
    """A sum of so many."""

    sum: float = 0.0
    number: int = 0

    def plus(self, total: float | None, number: int) -> Mean:
        """With more of them."""
        return Mean(self.sum + (total or 0.0), self.number + number)

    @property
    def value(self) -> float | None:
        """None of nothing."""
        return self.sum / self.number if self.number else None


@dataclass
class HostUse:
    """What one host used: CPUs and bytes, on average and at most."""

    name: str
    cpus: int
    memory_bytes: int
    mean_cpus: float = 0.0
    most_cpus: float = 0.0
    mean_memory_bytes: float = 0.0
    most_memory_bytes: int = 0
    #: how busy its GPUs were, 0 to 1; None: it has none that tell
    mean_gpus: float | None = None


@dataclass(frozen=True)
class Fleet:
    """All hosts of which there are samples. Of each interval what they used together, None: not known."""

    hosts: tuple[HostUse, ...]
    #: name of a column of the series -> values
    lines: Mapping[str, tuple[float | None, ...]]
    #: how busy GPUs were, on average, 0 to 1
    gpus: tuple[float | None, ...]
    files: int
    #: files that could not be read, and why
    problems: tuple[str, ...]


#: of the table of hosts
COLUMNS = ("cpus", "memory_bytes", "read_rate", "write_rate", "received_rate", "sent_rate")


@dataclass
class _Sums:
    """By host and interval."""

    intervals: int
    columns: dict[str, dict[tuple[str, int], Mean]] = field(
        default_factory=lambda: {name: defaultdict(Mean) for name in COLUMNS}
    )
    gpus: dict[tuple[str, int], Mean] = field(default_factory=lambda: defaultdict(Mean))


def read(
    files: Iterable[Path], began: float, ended: float, intervals: int, jobs: Iterable[str]
) -> tuple[Fleet | None, dict[str, tuple[int, ...]]]:
    """What was sampled in that time, None where nothing was; and the memory of `jobs` over theirs."""
    sums, hosts, problems = _Sums(intervals), dict[str, HostUse](), list[str]()
    points: dict[str, list[tuple[float, int]]] = defaultdict(list)
    count = 0
    for path in {path.name: path for path in files}.values():  # a copy of what is here, too, counts once
        try:
            with series.opened(path) as database:
                about = dict(database.execute("SELECT name, value FROM about"))
                host = str(about["host"])
                use = hosts.setdefault(host, HostUse(host, int(about["cpus"]), int(about["memory_bytes"])))
                _add_host(database, sums, use, began, ended)
                for job, at, memory in _memory_of(database, list(jobs)):
                    points[job].append((at, memory))
            count += 1
        except (OSError, LookupError, TypeError, ValueError) as exc:
            problems.append(str(exc))
    lines = {job: _thinned(found) for job, found in points.items()}
    seen = [use for use in hosts.values() if _summed(use, sums)]
    if not count and not problems:
        return None, lines
    width = (ended - began) / intervals
    return _fleet(sorted(seen, key=lambda use: use.name), sums, width, count, problems), lines


def _add_host(database: Connection, sums: _Sums, use: HostUse, began: float, ended: float) -> None:
    width = max((ended - began) / sums.intervals, 1e-9)
    names = ", ".join(f"sum({name}), count({name})" for name in COLUMNS)
    query = f"SELECT min(CAST((at - ?) / ? AS INTEGER), ?), max(cpus), max(memory_bytes), {names} FROM hosts"
    span = " WHERE at BETWEEN ? AND ? GROUP BY 1"
    values = (began, width, sums.intervals - 1, began, ended)
    for interval, cpus, memory, *columns in database.execute(query + span, values):
        use.most_cpus = max(use.most_cpus, cpus or 0.0)
        use.most_memory_bytes = max(use.most_memory_bytes, memory or 0)
        for name, total, number in zip(COLUMNS, columns[::2], columns[1::2], strict=True):
            cells = sums.columns[name]
            cells[use.name, interval] = cells[use.name, interval].plus(total, number)
    query = "SELECT min(CAST((at - ?) / ? AS INTEGER), ?), sum(use), count(use) FROM gpus"
    for interval, total, number in database.execute(query + span, values):
        sums.gpus[use.name, interval] = sums.gpus[use.name, interval].plus(total, number)


def _summed(use: HostUse, sums: _Sums) -> bool:
    """Whether there is anything of that host; its means are filled in."""
    means = {name: _mean_of(sums.columns[name], use.name) for name in ("cpus", "memory_bytes")}
    use.mean_cpus, use.mean_memory_bytes = means["cpus"] or 0.0, means["memory_bytes"] or 0.0
    use.mean_gpus = _mean_of(sums.gpus, use.name)
    return means["cpus"] is not None


def _mean_of(cells: Mapping[tuple[str, int], Mean], host: str) -> float | None:
    whole = Mean()
    for (name, _), cell in cells.items():
        if name == host:
            whole = whole.plus(*cell)
    return whole.value


def _fleet(hosts: Sequence[HostUse], sums: _Sums, width: float, files: int, problems: Sequence[str]) -> Fleet:
    names, most = [use.name for use in hosts], max(1, math.ceil(_GAP_SECONDS / width))
    lines = {
        column: _together(_rows(cells, names, sums.intervals, most)) for column, cells in sums.columns.items()
    }
    gpus = _rows(sums.gpus, names, sums.intervals, most)
    return Fleet(tuple(hosts), lines, tuple(map(_mean, zip(*gpus, strict=True))), files, tuple(problems))


_Line = list[float | None]


def _rows(
    cells: Mapping[tuple[str, int], Mean], hosts: Iterable[str], intervals: int, most: int
) -> list[_Line]:
    """The line of each host."""
    empty = Mean()
    return [
        _filled([cells.get((host, interval), empty).value for interval in range(intervals)], most)
        for host in hosts
    ]


def _filled(line: _Line, most: int) -> _Line:
    """Between two samples it was as the later one says, which tells of the time before it."""
    last: int | None = None
    for index, value in enumerate(line):
        if value is None:
            continue
        if last is not None and index - last <= most:
            line[last + 1 : index] = [value] * (index - last - 1)
        last = index
    return line


def _together(lines: Sequence[_Line]) -> tuple[float | None, ...]:
    """What all hosts used, of those that are known then."""
    known = ([value for value in column if value is not None] for column in zip(*lines, strict=True))
    return tuple(sum(values) if values else None for values in known)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _memory_of(database: Connection, jobs: Sequence[str]) -> Iterator[tuple[str, float, int]]:
    marks = ", ".join("?" * len(jobs))
    query = f"SELECT job, at, memory_bytes FROM jobs JOIN attempts ON id = attempt WHERE job IN ({marks})"
    yield from database.execute(query, jobs)


def _thinned(points: list[tuple[float, int]]) -> tuple[int, ...]:
    """The highest of each part of its time."""
    points.sort()
    step = max(1, -(-len(points) // _POINTS))
    return tuple(
        max(memory for _, memory in points[start : start + step]) for start in range(0, len(points), step)
    )
