"""`fleet report --html`: one page that needs nothing but itself - no script, no font, no address.

Charts are SVG that is as wide as the window: its x axis is stretched to that, its y axis is in pixels, and
all words stand beside it as text. `templates/report.html` has the words; here are numbers, paths and labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from broker import __version__
from fleet import rendering
from fleet.report import Bar, Report, Row, Slow
from fleet.report_figures import Distribution
from fleet.usage_series import HostUse

#: units of the x axis; pixels of a chart, of a row of the Gantt chart, and of a lane of bars in it
_WIDTH, _HEIGHT, _ROW_HEIGHT, _LANE = 1000.0, 96.0, 26.0, 9.0
#: of a bar, that one can see it
_LEAST_WIDTH = 1.5
#: intervals that have one tooltip
_TIP = 4
#: ticks of a time axis
_MOST_TICKS = 6
_STEPS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 10800.0, 21600.0, 43200.0),
    *(86400.0, 172800.0, 604800.0, 1209600.0, 2592000.0, 7776000.0),
)
#: how an attempt ended -> how its bar looks; the words stand in the legend
_LOOKS = {"finished": "finished", "failed": "failed", "stopped": "stopped", None: "running"}


class Tick(NamedTuple):
    """A label at so many percent of an axis."""

    at: float
    label: str


class Tip(NamedTuple):
    """Words for a part of the x axis, in its units."""

    x: float
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A quantity over time: the outline of its area, and its axis from `top` over `middle` to 0."""

    title: str
    unit: str
    path: str
    top: str
    middle: str
    tips: tuple[Tip, ...]
    #: what of it is said in words
    summary: str
    #: of a line that shows what there is in all; None: nothing to show
    limit_y: float | None = None
    height: float = _HEIGHT


class BarView(NamedTuple):
    """A bar of the Gantt chart, in units and pixels."""

    x: float
    y: float
    width: float
    height: float
    look: str
    text: str


@dataclass(frozen=True)
class RowView:
    """A row of the Gantt chart: bars; or the outline of an area, and marks where attempts did not finish."""

    name: str
    note: str
    height: float
    #: what the height of an area is
    most: str = ""
    bars: tuple[BarView, ...] = ()
    path: str = ""
    marks: tuple[BarView, ...] = ()
    tips: tuple[Tip, ...] = ()


class Column(NamedTuple):
    """A bar of a histogram: its height in percent, its number, its label, and all in words."""

    percent: float
    amount: str
    label: str
    text: str


@dataclass(frozen=True)
class Histogram:
    """How long things took."""

    title: str
    unit: str
    columns: tuple[Column, ...]
    summary: str


def render(report: Report, source: str) -> str:
    """The page. `source`: the address of Redis."""
    return rendering.html("report.html", _view(report, source))


def _view(report: Report, source: str) -> dict[str, Any]:
    return {
        "report": report,
        "source": source,
        "version": __version__,
        "made_at": moment(report.at),
        "span": f"{moment(report.began)} to {moment(report.ended)}",
        "length": duration(report.ended - report.began),
        "facts": _facts(report),
        "ticks": ticks(report.began, report.ended),
        "rows": [_row(row, report) for row in report.rows],
        "charts": list(_charts(report)),
        "histograms": list(_histograms(report)),
        "sparks": {job.job: _spark(job) for job in report.slowest if len(job.memory) > 1},
        "most_failures": max((group.count for group in report.failures), default=1),
        "slowest_seconds": max((job.seconds for job in report.slowest), default=1.0) or 1.0,
        "gpus": report.fleet is not None and any(host.mean_gpus is not None for host in report.fleet.hosts),
        "duration": duration,
        "size": size,
        "number": number,
        "counted": counted,
        "share": _host_share,
    }


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """Title, number, words."""
    length = report.ended - report.began
    states = report.states
    failed = states.get("failed", 0)
    ended = sum(states.get(name, 0) for name in ("finished", "failed", "stopped", "canceled"))
    facts = [
        ("Jobs that ran", number(sum(states.values())), _in_words(states)),
        (
            "Failed",
            f"{failed / ended:.1%}" if ended else "none",
            f"{number(failed)} of {number(ended)} that ended",
        ),
        (
            "Attempts",
            number(sum(report.outcomes.values())),
            _in_words(report.outcomes),
        ),
        (
            "Jobs at once",
            f"{report.busy_seconds / length:.1f}" if report.outcomes else "0",
            f"on average; on {counted(report.workers, 'worker')} of {counted(report.hosts, 'host')}",
        ),
        (
            "CPU time",
            duration(report.cpu_seconds),
            f"of {duration(report.busy_seconds)} that jobs ran",
        ),
    ]
    if report.waiting:
        facts.append(
            (
                "Waited",
                duration(report.waiting.p50),
                f"half of them less; 99 % less than {duration(report.waiting.p99)}",
            )
        )
    return facts


def _in_words(counts: Any) -> str:
    return ", ".join(f"{number(count)} {name}" for name, count in sorted(counts.items(), key=lambda x: -x[1]))


# --- over time ---------------------------------------------------------------------------------------


def _charts(report: Report) -> Iterator[Chart]:
    span = report.began, report.ended
    yield chart("Jobs running", "jobs", report.running_jobs, span, number)
    yield chart("Jobs waiting", "jobs", report.waiting_jobs, span, number)
    fleet = report.fleet
    if fleet is None or not fleet.hosts:
        return
    hosts = counted(len(fleet.hosts), "host")
    cpus, memory = (sum(getattr(host, name) for host in fleet.hosts) for name in ("cpus", "memory_bytes"))
    lines = fleet.lines
    yield chart("CPUs busy", f"CPUs of {number(cpus)}, {hosts}", lines["cpus"], span, number, cpus)
    yield chart("Memory taken", f"of {size(memory)}, {hosts}", lines["memory_bytes"], span, size, memory)
    for title, name in (
        ("Read from disks", "read_rate"),
        ("Written to disks", "write_rate"),
        ("Received by network", "received_rate"),
        ("Sent by network", "sent_rate"),
    ):
        yield chart(title, "a second", lines[name], span, size)
    if any(value is not None for value in fleet.gpus):
        yield chart(
            "GPUs busy",
            "%, mean of all",
            [None if v is None else v * 100 for v in fleet.gpus],
            span,
            number,
            100,
        )


def chart(
    title: str,
    unit: str,
    values: Sequence[float | None],
    span: tuple[float, float],
    say: Callable[[float], str],
    limit: float | None = None,
) -> Chart:
    """`say` puts a value into words; `limit`: all that there is."""
    known = [value for value in values if value is not None]
    most = max([*known, limit or 0.0])
    top = _round_size(most) if say is size else _round_up(most)
    summary = f"most {say(max(known))}, mean {say(sum(known) / len(known))}" if known else "no samples"
    return Chart(
        title=title,
        unit=unit,
        path=outline(values, top, _HEIGHT),
        top=say(top),
        middle=say(top / 2),
        tips=tuple(_tips(values, span, lambda value: f"{title}: {say(value)}")),
        summary=summary,
        limit_y=None if limit is None else _HEIGHT * (1 - limit / top),
    )


def outline(values: Sequence[float | None], top: float, height: float) -> str:
    """An area of steps from the bottom; where nothing is known it is interrupted."""
    parts, step, last = [], _WIDTH / max(len(values), 1), None
    for index, value in enumerate(values):
        y = None if value is None else height * (1 - value / top)
        x = f"{index * step:.4g}"
        if y is None or last is None:
            if last is not None:
                parts.append(f"H{x}V{height:g}Z")
            if y is not None:
                parts.append(f"M{x},{height:g}V{y:.4g}")
        elif abs(y - last) > 0.05:
            parts.append(f"H{x}V{y:.4g}")
        else:
            continue
        last = y
    if last is not None:
        parts.append(f"H{_WIDTH:g}V{height:g}Z")
    return "".join(parts)


def _tips(
    values: Sequence[float | None], span: tuple[float, float], say: Callable[[float], str]
) -> Iterator[Tip]:
    step, length = _WIDTH / max(len(values), 1), (span[1] - span[0]) / max(len(values), 1)
    for start in range(0, len(values), _TIP):
        some = [value for value in values[start : start + _TIP] if value is not None]
        if some:
            at = span[0] + start * length
            text = f"{clock_time(at, length * _TIP)}: {say(sum(some) / len(some))}"
            yield Tip(round(start * step, 2), round(step * _TIP, 2), text)


def ticks(began: float, ended: float) -> list[Tick]:
    """Round times, as many as fit."""
    length = max(ended - began, 1e-6)
    step = next((step for step in _STEPS if length / step <= _MOST_TICKS), _STEPS[-1])
    first = math.ceil(began / step)
    found = []
    for count in range(_MOST_TICKS + 1):
        at = (first + count) * step
        if at <= ended:
            found.append(Tick(round((at - began) / length * 100, 3), _tick(at, step)))
    return found


def _tick(at: float, step: float) -> str:
    when = datetime.fromtimestamp(round(at, 3), UTC)
    if step >= 86400:
        return f"{when:%b} {when.day}"
    if step >= 60:
        return f"{when:%H:%M}" if when.hour or when.minute else f"{when:%b} {when.day}"
    if step >= 1:
        return f"{when:%H:%M:%S}"
    return f"{when:%S}.{when.microsecond // 1000:03} s"


# --- the Gantt chart ---------------------------------------------------------------------------------


def _row(row: Row, report: Report) -> RowView:
    note = f"{counted(row.attempts, 'attempt')}, {duration(row.busy_seconds)}"
    if row.unfinished:
        note += f", {number(row.unfinished)} not finished"
    if report.has_bars:
        height = max(1, row.most_at_once) * _LANE + 4
        return RowView(row.name, note, height, bars=tuple(_bar(bar, report) for bar in row.bars))
    top = max(1.0, float(row.most_at_once))
    span = report.began, report.ended
    area = _ROW_HEIGHT - 6
    return RowView(
        row.name,
        f"{note}; at most {number(row.most_at_once)} at once",
        _ROW_HEIGHT,
        most=number(row.most_at_once),
        path=outline(row.running, top, area),
        marks=tuple(_marks(row.failures, span, area)),
        tips=tuple(_tips(row.running, span, lambda value: f"{row.name}: {number(value)} jobs at once")),
    )


def _bar(bar: Bar, report: Report) -> BarView:
    length = report.ended - report.began
    ended = report.at if bar.ended is None else bar.ended
    x = max(0.0, (bar.started - report.began) / length * _WIDTH)
    width = max(_LEAST_WIDTH, min(_WIDTH, (ended - report.began) / length * _WIDTH) - x)
    took = duration(ended - bar.started)
    text = (
        f"{bar.name} ({bar.job})\n{bar.outcome or 'running'} on {bar.worker}\n{moment(bar.started)}, {took}"
    )
    look = _LOOKS.get(bar.outcome, "lost")
    return BarView(round(x, 2), bar.lane * _LANE + 2, round(width, 2), _LANE - 2, look, text)


def _marks(failures: Sequence[int], span: tuple[float, float], top: float) -> Iterator[BarView]:
    step, length = _WIDTH / max(len(failures), 1), (span[1] - span[0]) / max(len(failures), 1)
    for index, count in enumerate(failures):
        if count:
            text = f"{clock_time(span[0] + index * length, length)}: {number(count)} did not finish"
            yield BarView(round(index * step, 2), top + 1, round(step, 2), 5.0, "failed", text)


# --- how long things took ----------------------------------------------------------------------------


def _histograms(report: Report) -> Iterator[Histogram]:
    for title, unit, found in (("Waiting", "jobs", report.waiting), ("Running", "attempts", report.running)):
        if found:
            yield _histogram(title, unit, found)


def _histogram(title: str, unit: str, found: Distribution) -> Histogram:
    most, before = max(found.counts), "0"
    columns = []
    for edge, count in zip(found.edges, found.counts, strict=True):
        label = "more" if math.isinf(edge) else f"< {duration(edge)}"
        text = f"{before} to {duration(edge)}" if not math.isinf(edge) else f"more than {before}"
        words = f"{text}: {number(count)} ({count / found.count:.1%})"
        columns.append(Column(100 * count / most, number(count), label, words))
        before = duration(edge)
    quantiles = ((50, found.p50), (90, found.p90), (99, found.p99))
    summary = ", ".join(f"{share} % within {duration(value)}" for share, value in quantiles)
    return Histogram(title, unit, tuple(columns), f"{summary}; longest {duration(found.longest)}")


def _spark(job: Slow) -> str:
    """The outline of a job's memory over its time, 100 x 20."""
    top = max(job.memory) or 1
    step = 100 / len(job.memory)
    points = "".join(f"L{i * step:.3g},{20 * (1 - value / top):.3g}" for i, value in enumerate(job.memory))
    return f"M0,20{points}H100V20Z"


def _host_share(host: HostUse) -> float:
    """Percent of its CPUs that were busy on average."""
    return min(100.0, 100 * host.mean_cpus / max(host.cpus, 1))


# --- words -------------------------------------------------------------------------------------------


def moment(at: float) -> str:
    """`2026-11-21 19:48:07 UTC`."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def clock_time(at: float, step: float) -> str:
    """As exact as intervals of that length deserve."""
    when = datetime.fromtimestamp(at, UTC)
    if step < 1:
        return f"{when:%H:%M:%S}.{when.microsecond // 1000:03}"
    return f"{when:%b} {when.day} {when:%H:%M}" if step >= 3600 else f"{when:%H:%M:%S}"


def duration(seconds: float) -> str:
    """`3 ms`, `1.5 s`, `12 min`, `3.5 h`, `4 d`."""
    for least, unit, name in (
        (86400.0, 86400.0, "d"),
        (3600.0, 3600.0, "h"),
        (60.0, 60.0, "min"),
        (1.0, 1.0, "s"),
    ):
        if seconds >= least:
            return f"{_three(seconds / unit)} {name}"
    return f"{_three(seconds * 1000)} ms" if seconds > 0 else "0 s"


def number(value: float) -> str:
    """`1,234`, `0.25`."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else _three(value)


def counted(count: int, what: str) -> str:
    """`1 host`, `12 hosts`."""
    return f"{number(count)} {what}{'s' * (count != 1)}"


def size(count: float) -> str:
    """`512 B`, `1.5 GiB`."""
    power = min(int(math.log(count, 1024)), 5) if count >= 1 else 0
    return f"{_three(count / 1024**power)} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def _three(value: float) -> str:
    """Three digits, or as many as a whole number has."""
    if value >= 100:
        return f"{value:,.0f}"
    if 0 < value < 0.01:
        return "< 0.01"
    return f"{value:.2g}" if value < 10 else f"{value:.3g}"


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 10, 20 and so on."""
    if value <= 1:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return float(next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value - 1e-9))


def _round_size(value: float) -> float:
    if value <= 1024:
        return 1024.0
    power = 2 ** math.floor(math.log2(value))
    return float(next(step * power for step in (1, 1.25, 1.5, 1.75, 2) if step * power >= value))
