"""Workers and queues as rows of a table, for `fleet status` and `fleet top`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from cli import tables
from cli.glyphs import Glyphs
from cli.tables import Cell, Column

if TYPE_CHECKING:
    import redis
    from rich.text import Text

    from broker.errors import FleetError
    from broker.failed import Failure
    from broker.fitting import Free
    from broker.status import QueueStatus, WorkerStatus

_BAR = "steel_blue3"
#: what a narrow terminal gives up first has the highest rank; bars are columns without a title
WORKER_COLUMNS = (
    Column("WORKER", least=16, in_middle=True),
    Column("HOST", rank=9, least=16, in_middle=True),
    Column("STATE"),
    Column("PROBE", rank=1),
    Column("SLOTS", right=True),
    Column("", rank=3),
    Column("CPUS", rank=2, right=True),
    Column("", rank=6),
    Column("MEMORY", rank=2, right=True),
    Column("", rank=6),
    Column("GPUS", rank=4, least=12),
    Column("", rank=6),
    Column("BEAT", rank=1, right=True),
    Column("QUEUES", rank=7, least=12, separator=","),
    Column("RUNNING", rank=5, least=22, separator=" "),
    Column("DONE", rank=8, right=True),
    Column("FAILED", rank=8, right=True),
    Column("TUNNEL", rank=5),
    Column("VERSION", rank=10),
    Column("LABELS", rank=11, least=48, separator=","),
)
#: states of workers, those first that want to be looked at
URGENCY = ("offline", "connecting", "draining", "busy", "idle")
_MIB = 2**20


def no_news(error: FleetError, seen_at: datetime | None) -> str:
    """The headline of a view that goes on though Redis does not answer; `seen_at`: of what it shows."""
    since = f"since {seen_at:%H:%M:%SZ}" if seen_at else "yet"
    return f"No news {since}, trying again: {error.message.rstrip('.')}"


def state_of(worker: WorkerStatus) -> str:
    """What is known of it: for one that is offline, what its host says."""
    return (worker.state == "offline" and probe_of(worker)) or worker.state


def probe_of(worker: WorkerStatus) -> str:
    """What its host says of its process, where it was asked."""
    return getattr(worker, "probe", None) or ""


def worst_first(workers: Iterable[WorkerStatus]) -> list[WorkerStatus]:
    """Those in trouble first, of these the longest silent ones."""

    def rank(worker: WorkerStatus) -> tuple[bool, int, float]:
        age = worker.heartbeat_age_seconds or 0.0
        urgency = URGENCY.index(worker.state)
        return not worker.notice, urgency, -age if urgency < 2 else 0.0

    return sorted(workers, key=rank)


def workers(count: int) -> str:
    """`1 worker`, `10,000 workers`."""
    return f"{count:,} worker{'s' * (count != 1)}"


def by_state(workers: Iterable[WorkerStatus]) -> str:
    """`3 busy, 1 idle`."""
    counts = Counter(map(state_of, workers))
    return ", ".join(f"{counts[state]:,} {state}" for state in sorted(counts))


def worker_row(worker: WorkerStatus, glyphs: Glyphs) -> list[Cell]:
    """The cells of one worker, in the order of WORKER_COLUMNS."""
    offline, state, running = worker.state == "offline", state_of(worker), len(worker.running)
    bar = _no_bar if offline else glyphs.bar
    cpus, memory = _of_cpus(worker), _of_memory(worker)
    return [
        worker.name,
        worker.host,
        tables.state(state, glyphs.marked(state)),
        tables.state(probe_of(worker)),
        f"{running}/{worker.slots}",
        (bar(running, worker.slots), _BAR),
        _cpus(worker, *cpus),
        (bar(*cpus), _BAR),
        _memory(worker, *memory),
        (bar(*memory), _BAR),
        _gpus(worker),
        (bar(*_of_gpus(worker)) if worker.gpus else "", _BAR),
        (tables.age(worker.heartbeat_age_seconds), "bold red" if offline else ""),
        ",".join(worker.queues),
        " ".join(worker.running),
        str(worker.finished),
        (str(worker.failed), "red" if worker.failed else ""),
        tables.state(worker.tunnel or ""),
        worker.version,
        ",".join(f"{name}={value}" for name, value in worker.labels.items()),
    ]


def _no_bar(used: float, total: float) -> str:
    del used, total
    return ""


def _left(worker: WorkerStatus) -> Free | None:
    """What it has free; None of one that does not say, or said so before it went."""
    return None if worker.state == "offline" else worker.free


def _of_cpus(worker: WorkerStatus) -> tuple[float, float]:
    """How many are promised to jobs, of how many."""
    left = _left(worker)
    return (worker.cpus - left.cpus if left else 0.0), worker.cpus


def _of_memory(worker: WorkerStatus) -> tuple[int, int]:
    left = _left(worker)
    used = worker.memory_bytes - left.memory_bytes if left else 0
    # what is less than the MiB that memory is promised in is nobody's
    return (used if used >= _MIB else 0), worker.memory_bytes


def _of_gpus(worker: WorkerStatus) -> tuple[float, float]:
    found = _left(worker)
    left = found.gpus if found else ()
    return sum(1 - share for share in left), len(worker.gpus)


def _cpus(worker: WorkerStatus, used: float, total: float) -> str:
    """`1.5/8`: promised, of how many."""
    if not total or _left(worker) is None:
        return f"{total:g}" if total else ""
    return f"{used:g}/{total:g}"


def _memory(worker: WorkerStatus, used: int, total: int) -> str:
    """`2.0/64.0 GiB`; what was promised to jobs, not what they have."""
    if not total or _left(worker) is None:
        return tables.size(total) if total else ""
    return tables.size_of(used, total)


def _gpus(worker: WorkerStatus) -> str:
    """`1/2x A100`, by kind: how many are used, and in part, of how many."""
    if not worker.gpus:
        return ""
    names = [str(gpu.get("name", "GPU")).removeprefix("NVIDIA ") for gpu in worker.gpus]
    found, left = _left(worker), dict[str, float]()
    for name, share in zip(names, found.gpus if found else (), strict=False):
        left[name] = left.get(name, 0) + share
    return ", ".join(
        (f"{names.count(name) - left[name]:g}/" if name in left else "") + f"{names.count(name)}x {name}"
        for name in dict.fromkeys(names)
    )


#: in words, how much of a thing is in use or promised, and how much there is of it
Total = tuple[str, float, float]


def totals(workers: Sequence[WorkerStatus]) -> list[Total]:
    """What all that live have together, of each kind that there is."""
    return [(words, used, total) for words, (used, total) in _totals(workers) if total]


def totals_line(rows: Sequence[Total], glyphs: Glyphs, width: int | None) -> Text:
    """The same as a line, without bars where that would be wider than `width`."""
    text = _joined(rows, glyphs)
    if width is not None and text.cell_len > width:
        return _joined(rows, Glyphs(plain=True))
    return text


def _joined(rows: Sequence[Total], glyphs: Glyphs) -> Text:
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ellipsis")
    for words, used, total in rows:
        text.append("   " if text else "").append(words)
        bar = glyphs.bar(used, total, 8)
        text.append(f" {bar}" if bar else "", style=_BAR)
    return text


def _totals(workers: Sequence[WorkerStatus]) -> Iterator[tuple[str, tuple[float, float]]]:
    alive = [worker for worker in workers if worker.state != "offline"]
    slots = sum(min(len(worker.running), worker.slots) for worker in alive), sum(one.slots for one in alive)
    cpus, memory, gpus = (_sum(map(of, alive)) for of in (_of_cpus, _of_memory, _of_gpus))
    yield f"slots {slots[0]:,}/{slots[1]:,}", slots
    yield f"CPUs {_number(cpus[0])}/{cpus[1]:,}", cpus
    yield f"memory {tables.size_of(int(memory[0]), int(memory[1]))}", memory
    yield f"GPUs {_number(gpus[0])}/{gpus[1]:,}", gpus


def _number(amount: float) -> str:
    """`1,234.5`, `12`."""
    return f"{amount:,.{0 if amount >= 1000 else 1}f}".removesuffix(".0")


def _sum(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    found = list(pairs)
    return round(sum(used for used, _ in found), 3), sum(total for _, total in found)


QUEUE_COLUMNS = (
    Column("QUEUE", least=8, in_middle=True),
    Column("QUEUED", right=True),
    Column("RUNNING", right=True),
    Column("OLDEST", right=True),
    Column("PER MIN", rank=1, right=True),
    Column("", rank=2),
    Column("FAILED", rank=1, right=True),
    Column("STATE", rank=1),
    Column("FINISHED", rank=3, right=True),
    Column("SCHEDULED", rank=4, right=True),
    Column("DEFERRED", rank=4, right=True),
    Column("ASKS FOR", rank=5, least=12),
)
#: minutes that a sparkline shows
_COURSE_MINUTES = 12
#: jobs that finished in each of the last minutes, the oldest first, by queue
Courses = Mapping[str, Sequence[float]]


def courses(client: redis.Redis) -> Courses:
    """Of all queues that have a record. Two round trips; raises what redis-py raises."""
    from broker import history

    found = history.courses(client, step_seconds=60.0, steps=_COURSE_MINUTES)
    return {base: [counts.finished for counts in steps] for base, steps in found.items()}


def per_minute(course: Sequence[float]) -> float | None:
    """How many finished in the last minute; None where nobody counted."""
    return round(course[-1], 1) if course else None


def longest_waiting_first(queues: Iterable[QueueStatus]) -> list[QueueStatus]:
    """Those with the oldest first job."""
    return sorted(queues, key=lambda queue: (-(queue.oldest_age_seconds or -1.0), -queue.queued))


def queue_row(queue: QueueStatus, glyphs: Glyphs, found: Courses) -> list[Cell]:
    """The cells of one queue, in the order of QUEUE_COLUMNS. Sublists are counted with their queue."""
    course = found.get(queue.name, ())
    rate = per_minute(course)
    failed: Cell = (str(queue.failed), "bold red" if queue.failed else "")
    held = tables.state("paused", glyphs.marked("paused")) if queue.paused else ""
    return [
        queue.name,
        str(queue.queued),
        str(queue.running),
        tables.age(queue.oldest_age_seconds),
        "" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:g}",
        (glyphs.spark(course), _BAR),
        failed,
        held,
        str(queue.finished),
        str(queue.scheduled),
        str(queue.deferred),
        queue.requirements,
    ]


FAILURE_COLUMNS = (
    Column("FAILED", right=True),
    Column("JOB", least=12),
    Column("QUEUE", rank=2, least=8, in_middle=True),
    Column("WORKER", rank=1, least=16, in_middle=True),
    Column("REASON", least=16),
)


def failure_row(failure: Failure, now: datetime) -> list[Cell]:
    """The cells of one job that failed, in the order of FAILURE_COLUMNS."""
    seconds = (now - failure.at).total_seconds() if failure.at else None
    ago = tables.age(seconds)
    return [f"{ago} ago" if ago else "", failure.job_id, failure.queue, failure.worker, failure.reason]
