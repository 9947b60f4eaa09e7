"""What all rows share: a Redis, processes, rates, alternating rounds.

Machines are noisy, so systems are measured in turns, round after round, and what counts is the
median of the ratios of the same round.
"""

from __future__ import annotations

import compileall
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import redis

from broker.connection import connect
from fleet.embedded import EmbeddedBroker

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parent.parent
#: where our code is
_OURS = ("broker", "fleet", "cli", "benchmarks")
#: where peers find Redis: their modules, and the processes they start, read it when imported
URL_VARIABLE = "FLEET_BENCH_REDIS_URL"
#: seconds between two looks at how far the jobs are
_LOOK_SECONDS = 0.01
#: seconds of a round, at most
_LONGEST_RATE_SECONDS = 6.0


class TookTooLong(Exception):
    """Something did not happen in time."""


@dataclass(frozen=True)
class Site:
    """Where a run takes place: an empty folder and a Redis of its own."""

    folder: Path
    url: str
    client: redis.Redis
    rounds: int
    #: seconds that one measurement is meant to take; counts of jobs follow from it
    seconds: float
    quick: bool

    def fresh(self) -> None:
        """Empty Redis."""
        self.client.flushall()

    def log(self, name: str) -> Path:
        """Where what a process says goes."""
        return self.folder / f"{name}.log"


@contextmanager
def site(*, rounds: int, seconds: float, quick: bool) -> Iterator[Site]:
    """A temporary folder and, in it, our embedded Redis: append-only file on, everysec."""
    for name in _OURS:  # as pip does with what it installs, the peers among it
        compileall.compile_dir(REPOSITORY / name, quiet=2)
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as name:
        broker = EmbeddedBroker(Path(name) / "broker")
        url = broker.start().url
        os.environ[URL_VARIABLE] = url
        client = connect(url, timeout_seconds=120)
        try:
            yield Site(Path(name), url, client, rounds, seconds, quick)
        finally:
            client.close()
            broker.stop(force=True)


def until(condition: Callable[[], object], seconds: float = 60.0, look: float = _LOOK_SECONDS) -> None:
    """Wait until `condition()` holds. Raises TookTooLong."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TookTooLong(f"not within {seconds:.0f} s")
        time.sleep(look)


def python(*arguments: str) -> list[str]:
    """A command of the interpreter that runs the benchmarks."""
    return [sys.executable, *arguments]


@contextmanager
def processes(commands: Sequence[Sequence[str]], log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run `commands`, each in a process group of its own, and end them and all they started."""
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = []
    with log.open("ab") as out:
        for command in commands:
            started.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environ,
                    cwd=REPOSITORY, start_new_session=True,
                )
            )  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # also what it left behind
    except ProcessLookupError:
        pass
    process.wait()


def rate_of(done: Callable[[], int], jobs: int) -> float:
    """Jobs a second from when a tenth of `jobs` is done until all are, or some seconds have passed.

    So start-up is not counted, and a system that is slower than was thought holds nobody up.
    """
    until(lambda: done() >= max(1, jobs // 10))
    begun, started = done(), time.perf_counter()
    while (ended := done()) < jobs and time.perf_counter() - started < _LONGEST_RATE_SECONDS:
        time.sleep(_LOOK_SECONDS)
    if ended == begun:
        raise TookTooLong(f"stuck at {ended} of {jobs} jobs")
    return (ended - begun) / (time.perf_counter() - started)


def alternate(
    measures: Mapping[str, Callable[[], float]], rounds: int, say: Callable[[str], None] = print
) -> dict[str, list[float]]:
    """Run all `measures` in turns; returns their figures, NaN where one failed, which is said."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        for name, measure in measures.items():
            found[name].append(_measured(name, measure))
            say(f"    round {number + 1}/{rounds}  {name:<22} {found[name][-1]:>10.1f}")
    return found


def _measured(name: str, measure: Callable[[], float]) -> float:
    found = tried(name, measure)
    return float("nan") if found is None else found


def tried(name: str, measure: Callable[[], T]) -> T | None:
    """What `measure` returns; None where it failed, which is said: one system must not end the run."""
    try:
        return measure()
    except (TookTooLong, OSError, subprocess.SubprocessError, redis.RedisError) as exc:
        print(f"!!! {name} FAILED: {type(exc).__name__}: {exc}", flush=True)
        return None


def median(samples: Sequence[float]) -> float:
    """The median of the samples that are numbers; NaN if none is."""
    numbers = [sample for sample in samples if sample == sample]
    return statistics.median(numbers) if numbers else float("nan")


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of the same round."""
    return median([a / b for a, b in zip(ours, theirs, strict=True) if a == a and b == b and b])


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` (0 to 1) of them lie, by nearest rank."""
    ranked = sorted(samples)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def number(value: Any, digits: int = 0) -> str:
    """A figure for people: `1,234`, `0.83`, and a dash for none."""
    return "-" if value is None or value != value else f"{value:,.{digits}f}"
