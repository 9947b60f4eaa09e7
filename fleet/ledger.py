"""What the workers of this user have promised of this host, so that none of it is promised twice.

One file for each host and user, below the state folder, which hosts may share: so its name holds what
two hosts, or two containers, do not have in common. It is changed under a lock, and holds a row for
each worker; the row of one that died counts no more, for its process is gone.

A cgroup's limit holds for all that is in it together, the machine's for everybody. So each row names
the cgroups in which its worker is: what two allocations of a batch system have of their own, neither
takes from the other.

Who gets less than it wanted, for others came first, looks again now and then: `Promise.grow`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fleet import resources
from fleet.logs import about
from fleet.process import began, boot_id
from fleet.resources import Gpu, Resources

log = logging.getLogger("fleet.worker")


@dataclass(frozen=True)
class Share:
    """What one worker has of its host for jobs; its GPUs by their numbers there.

    `cpu_ids`: the CPUs that jobs may be bound to; none where they are not its own.
    """

    total: Resources
    cpu_ids: tuple[int, ...] = ()

    @property
    def gpu_ids(self) -> list[int]:
        """The numbers of its GPUs."""
        return [gpu.index for gpu in self.total.gpus]


#: what a worker has that has not begun
NOTHING = Share(Resources(0, 0))


@dataclass(frozen=True)
class Wish:
    """What a worker wants: what it is said to have (None: what can be had), as one of so many equals."""

    cpus: int | None = None
    memory_bytes: int | None = None
    num_gpus: int | None = None
    #: what it is said to have is the most it takes of what is left
    is_modest: bool = False
    #: it is the one of this number (from 0), of so many that divide the host; of 1: it takes what is left
    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class _Host:
    """What this process may use, whoever else does, and the cgroups that limit it."""

    cpu_ids: tuple[int, ...]
    cpus: int
    cpu_quotas: Mapping[str, float]
    memory_limits: Mapping[str, int]
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class _Row:
    """One worker's promises. `cpu_pools` and `memory_pools`: the cgroups in which it is."""

    worker: str
    pid: int
    began: int
    cpus: int
    cpu_ids: Sequence[int]
    cpu_pools: Sequence[str]
    memory_bytes: int
    memory_pools: Sequence[str]
    gpus: Sequence[int]


def path(state: Path) -> Path:
    """The ledger of this host, in the user's state folder (rq-fleet)."""
    return state / "ledger" / f"{boot_id()}-{_namespace()}.json"


def _namespace() -> int:
    """Numbers of processes mean the same where this is the same."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


@dataclass(frozen=True)
class Elsewhere:
    """What a worker would have of its host, were it not promised to others; the names of these."""

    cpus: int
    memory_bytes: int
    gpus: int
    workers: tuple[str, ...]


class Promise:
    """What this process has of its host. For one thread, but others may look at what it has.

    It never becomes less, so that what jobs were given holds; it becomes more where others leave who have
    some of what it wanted. `elsewhere` is that, None where it has all.
    """

    def __init__(self, file: Path, worker: str, wish: Wish) -> None:
        """Enter this process for what it wants and others were not promised; what it is said to have it gets.

        Where there can be no ledger it gets what it would have alone. Warnings tell of that, and of what
        others have.
        """
        self._file, self._worker = file, worker
        self._host = _look(wish)
        # what it is said to have it has already
        self._wish = replace(wish, is_modest=True)
        others: Sequence[_Row] = ()
        try:
            with _opened(file) as rows:
                others = tuple(rows)
                self.share = _share(self._host, wish, others)
                rows.append(_row(worker, self.share, self._host))
        except OSError as exc:
            log.warning(
                "no ledger of this host's resources: %s; other workers here may promise the same",
                exc,
                extra=about("ledger"),
            )
            self.share = _share(self._host, wish, [])
        self.elsewhere = self._missing(others)
        if self.elsewhere:
            self._warn(others)

    def grow(self) -> bool:
        """Take what has become free of what it wanted; says whether that is anything. Waits for nobody."""
        if not self.elsewhere:
            return False
        had, others = self.share, tuple(_of_others(self._file))
        if self._more(others) != had:
            try:
                with _opened(self._file, wait=False) as rows:
                    others = tuple(rows)
                    more = self._more(others)
                    rows.append(_row(self._worker, more, self._host))
            except OSError:  # others are at it: the next time
                return False
            self.share = more
        self.elsewhere = self._missing(others)
        return self.share != had

    def _more(self, others: Sequence[_Row]) -> Share:
        """What it can have beside these, and no less than it has."""
        had, found = self.share, _share(self._host, self._wish, others, self.share)
        gpus = sorted(found.total.gpus, key=lambda gpu: gpu.index)
        total = Resources(
            max(had.total.cpus, found.total.cpus),
            max(had.total.memory_bytes, found.total.memory_bytes),
            tuple(gpus) if set(gpus) > set(had.total.gpus) else had.total.gpus,
        )
        return Share(total, found.cpu_ids if found.total.cpus > had.total.cpus else had.cpu_ids)

    def _missing(self, others: Sequence[_Row]) -> Elsewhere | None:
        """Of what it would have without these."""
        has, alone = self.share.total, _share(self._host, self._wish, ()).total
        cpus, memory_bytes = alone.cpus - has.cpus, alone.memory_bytes - has.memory_bytes
        gpus = len(alone.gpus) - len(has.gpus)
        if cpus <= 0 and memory_bytes <= 0 and gpus <= 0:
            return None
        workers = tuple(row.worker for row in others if row.cpus or row.memory_bytes or row.gpus)
        return Elsewhere(max(0, cpus), max(0, memory_bytes), max(0, gpus), workers)

    def _warn(self, others: Sequence[_Row]) -> None:
        has, alone = self.share.total, _share(self._host, self._wish, ()).total
        log.warning(
            "it has %d of %d CPUs, %d of %d MiB and %d of %d GPUs, and gets what becomes free: the rest of "
            "this host is promised to %s",
            *(has.cpus, alone.cpus, has.memory_bytes >> 20, alone.memory_bytes >> 20),
            *(len(has.gpus), len(alone.gpus)),
            ", ".join(f"{row.worker} (process {row.pid})" for row in others),
            extra=about("resources"),
        )


def look(file: Path) -> Share:
    """What a worker would have now that took all that is left. Raises OSError."""
    host = _look(Wish())
    with _opened(file) as rows:
        return _share(host, Wish(), rows)


def release(file: Path) -> None:
    """Strike this process's row. Never raises: the row of a process that is gone counts for nothing."""
    with suppress(OSError), _opened(file) as rows:
        rows[:] = [row for row in rows if row.pid != os.getpid()]


# --- the file ----------------------------------------------------------------------------------------


@contextmanager
def _opened(file: Path, *, wait: bool = True) -> Iterator[list[_Row]]:
    """The rows of others that live, to be changed; written when the block is left. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(file.with_suffix(".lock"), "a") as lock:  # replaced is the other one
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        rows = _of_others(file)
        yield rows
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(row) for row in rows]))
        temporary.replace(file)


def _of_others(file: Path) -> list[_Row]:
    """The rows of other workers that live."""
    return [row for row in _read(file) if row.pid != os.getpid() and began(row.pid) == row.began]


def _read(file: Path) -> list[_Row]:
    try:
        return [_Row(**row) for row in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):  # none yet, or somebody's damage
        return []


def _row(worker: str, share: Share, host: _Host) -> _Row:
    total, pid = share.total, os.getpid()
    return _Row(
        worker,
        pid,
        began(pid) or 0,
        total.cpus,
        share.cpu_ids,
        sorted(host.cpu_quotas),
        total.memory_bytes,
        sorted(host.memory_limits),
        [gpu.index for gpu in total.gpus],
    )


# --- dividing ----------------------------------------------------------------------------------------


def _look(wish: Wish) -> _Host:
    return _Host(
        resources.cpu_ids(),
        resources.find_cpus(),
        resources.cpu_quotas(),
        resources.memory_limits(),
        resources.find_gpus() if wish.num_gpus != 0 else (),
    )


def _share(host: _Host, wish: Wish, others: Sequence[_Row], had: Share = NOTHING) -> Share:
    """`had`: what it has comes first."""
    cpus, ids = _cpus(host, wish, others, had.cpu_ids)
    gpus = _gpus(host, wish, others, had.total.gpus)
    return Share(Resources(cpus, _memory(host, wish, others), gpus), ids)


def _cpus(host: _Host, wish: Wish, others: Sequence[_Row], had: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """How many, and which: none where others may have some of them."""
    bound = {cpu for row in others for cpu in row.cpu_ids}
    unbound = sorted(set(host.cpu_ids) - bound, key=lambda cpu: (cpu not in had, cpu))
    # of workers without CPUs of their own nobody knows where they run: on those that are nobody's
    adrift = sum(row.cpus for row in others if not row.cpu_ids)
    room = [len(unbound or range(0 if host.cpu_ids else host.cpus)) - adrift]
    for pool, quota in host.cpu_quotas.items():
        room.append(int(quota) - sum(row.cpus for row in others if pool in row.cpu_pools))
    left = max(0, min([host.cpus, *room]))
    cpus = _settled("CPUs", wish.cpus, host.cpus, left, wish)
    return cpus, tuple(sorted(unbound[:cpus])) if cpus <= min(left, len(unbound)) else ()


def _memory(host: _Host, wish: Wish, others: Sequence[_Row]) -> int:
    total = min(host.memory_limits.values())
    room = (
        limit - sum(row.memory_bytes for row in others if pool in row.memory_pools)
        for pool, limit in host.memory_limits.items()
    )
    return _settled("bytes of memory", wish.memory_bytes, total, max(0, min(room)), wish)


def _gpus(host: _Host, wish: Wish, others: Sequence[_Row], had: Sequence[Gpu]) -> tuple[Gpu, ...]:
    taken = {index for row in others for index in row.gpus}
    left = tuple(gpu for gpu in host.gpus if gpu.index not in taken)
    left = tuple(sorted(left, key=lambda gpu: (gpu not in had, gpu.index)))
    number = _settled("GPUs", wish.num_gpus, len(host.gpus), len(left), wish)
    # what it is said to have beyond what is left are others', or such as nothing is known of
    rest = tuple(gpu for gpu in host.gpus if gpu.index in taken)
    return resources.so_many(left + rest, number)


def _settled(what: str, said: int | None, total: int, left: int, wish: Wish) -> int:
    """How much of one kind a worker gets."""
    if said is not None and wish.is_modest:
        return min(left, said)
    if said is not None:
        if said > left:
            log.warning(
                "said to have %d %s, of which %d are left on this host: jobs may get in each other's way",
                *(said, what, left),
                extra=about("resources"),
            )
        return said
    return min(left, part(total, wish.number, wish.of))


def part(total: int, number: int, of: int) -> int:
    """What the one of that number has where so many divide `total`: the first ones have what is odd."""
    return total // of + (number < total % of)
