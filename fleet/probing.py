"""`fleet status --probe`: what the kept hosts say of their workers, beside what Redis knows.

Redis knows who beats, a host which processes there are; only both together tell a worker that
stopped from one that hangs, and from one at a host that nobody can reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from broker.errors import FleetError
from broker.status import FleetStatus, WorkerStatus
from fleet.fan_out import FanOut
from fleet.hosts import Host
from fleet.journey import Opener
from fleet.launchers import base

#: running: it beats and its process is there; stale: its process is there, and does not beat;
#: stopped: its process is not there; unreachable: the host could not be asked
Word = Literal["running", "stale", "stopped", "unreachable"]


@dataclass(frozen=True)
class Answer:
    """What a host said: the workers that left a trace there, or why it could not be asked."""

    host: Host
    seen: tuple[base.Seen, ...] = ()
    error: FleetError | None = None


@dataclass(frozen=True)
class ProbedWorker(WorkerStatus):
    """A worker; `probe` is None where no kept host knows of it."""

    probe: Word | None = None


@dataclass(frozen=True)
class ProbedHost:
    """A kept host, its workers that beat or have a process, and the best that is true of one of them."""

    name: str
    probe: Word
    workers: tuple[str, ...]
    error: FleetError | None = None


async def ask(hosts: Sequence[Host], *, opener: Opener, max_parallel: int) -> tuple[Answer, ...]:
    """Ask all hosts, over one connection each. Raises KeyboardInterrupt, UsageError."""
    fan_out: FanOut[Answer] = FanOut(max_parallel)
    answers = await fan_out.run(hosts, lambda host: _ask(host, opener))
    if fan_out.interrupted:
        raise KeyboardInterrupt
    return tuple(answer for answer in answers if answer)


async def _ask(host: Host, opener: Opener) -> Answer:
    """Never raises: what went wrong with one host is its own answer."""
    try:
        launcher = await opener(host)
        try:
            return Answer(host, await launcher.inspect(host.options.output_dir, host.worker_base))
        finally:
            await launcher.close()
    except FleetError as exc:
        return Answer(host, error=exc)
    except Exception as exc:
        return Answer(host, error=base.HostError(f"unexpected: {exc!r}", "This is a bug."))


def merged(found: FleetStatus, answers: Sequence[Answer]) -> tuple[FleetStatus, tuple[ProbedHost, ...]]:
    """`found` with a probe for each worker, processes that Redis does not know among them; and the hosts."""
    by_host = {answer.host.key: answer for answer in answers}
    known = [_probed(worker, by_host.get(_key(worker))) for worker in found.workers]
    names = {worker.name for worker in known}
    strays = [stray for answer in answers for stray in _strays(answer, names)]
    workers = sorted([*known, *strays], key=lambda worker: worker.name)
    hosts = tuple(_host(answer, [w for w in workers if _key(w) == answer.host.key]) for answer in answers)
    return replace(found, workers=tuple(workers)), hosts


def _key(worker: WorkerStatus) -> str:
    """The key of the worker's host, which it has from the hosts file."""
    return Host(worker.host).key


def _probed(worker: WorkerStatus, answer: Answer | None) -> ProbedWorker:
    return ProbedWorker(**vars(worker), probe=_word(worker, answer) if answer else None)


def _word(worker: WorkerStatus, answer: Answer) -> Word | None:
    if answer.error:
        return "unreachable"
    seen = next((one for one in answer.seen if one.name == worker.name), None)
    if seen is None:  # where it runs nobody looked: it writes elsewhere, or `fleet up` did not start it
        return None
    if seen.alive:
        return "stale" if worker.state == "offline" else "running"
    return "stopped"


def _strays(answer: Answer, known: set[str]) -> Iterator[ProbedWorker]:
    """Processes of workers that Redis knows no more."""
    for seen in answer.seen:
        if seen.alive and seen.name not in known:
            yield ProbedWorker(
                name=seen.name,
                host=answer.host.name,
                pid=seen.pid or 0,
                state="offline",
                queues=(),
                slots=0,
                running=(),
                labels={},
                version=seen.version or "",
                cpus=0,
                memory_bytes=0,
                gpus=(),
                started_at=None,
                last_heartbeat=None,
                heartbeat_age_seconds=None,
                finished=0,
                failed=0,
                probe="stale",
            )


def _host(answer: Answer, workers: Sequence[ProbedWorker]) -> ProbedHost:
    there = tuple(worker.name for worker in workers if worker.state != "offline" or worker.probe == "stale")
    if answer.error:
        return ProbedHost(answer.host.name, "unreachable", there, answer.error)
    words = {worker.probe for worker in workers}
    word: Word = "running" if "running" in words else "stale" if "stale" in words else "stopped"
    return ProbedHost(answer.host.name, word, there)
