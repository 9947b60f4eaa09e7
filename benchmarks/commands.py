"""Commands per second: a worker with all its promises on, beside `xargs -P` on the same machine.

    python -m benchmarks.commands [--jobs 3000] [--rounds 5]

Both run `true`, N times, with as many at once. Ours captures output, holds leases, and writes
every end to a Redis with the append-only file on (everysec); its backlog is filled, and its
worker registered, before the clock starts. Rounds alternate, since machines are noisy; the
ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from broker import __version__, keys
from broker.command import Command
from broker.connection import connect
from broker.submit import Options, submit_commands
from fleet.embedded import EmbeddedBroker
from fleet.worker_config import WorkerConfig


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"rq-fleet {__version__}, {arguments.jobs} x true, {arguments.rounds} rounds"
    )
    print(f"{'slots':>5} {'fleet/s':>9} {'xargs/s':>9} {'ratio':>6}  ratios of the rounds")
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, _redis(Path(folder)) as url:
        for slots in (2, 4):
            rows = [
                (_fleet(url, Path(folder), arguments.jobs, slots), _xargs(arguments.jobs, slots))
                for _ in range(arguments.rounds)
            ]
            _report(slots, rows)


def _report(slots: int, rows: list[tuple[float, float]]) -> None:
    ratios = [ours / theirs for ours, theirs in rows]
    ours, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
    shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{slots:>5} {ours:>9.0f} {theirs:>9.0f} {statistics.median(ratios):>6.2f}  {shown}")


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    broker = EmbeddedBroker(folder / "broker")
    running = broker.start()
    try:
        yield running.url
    finally:
        broker.stop(force=True)


def _fleet(url: str, folder: Path, jobs: int, slots: int) -> float:
    """Jobs per second of one worker."""
    client = connect(url)
    client.flushall()
    client.set(keys.SUSPENDED, 1)
    submit_commands(client, "default", [(None, Command(("true",)))] * jobs, Options())
    with _worker(url, folder, slots):
        _until(lambda: client.exists(keys.worker_beat("bench")))
        started = time.perf_counter()
        client.delete(keys.SUSPENDED)
        client.lpush(keys.worker_signals("bench"), "{}")
        client.lpush(keys.wake("default"), "1")
        _until(lambda: _finished(client) == jobs)
        seconds = time.perf_counter() - started
    client.close()
    return jobs / seconds


def _finished(client: redis.Redis) -> int:
    return int(client.zcard(keys.of("finished", "default")))


@contextmanager
def _worker(url: str, folder: Path, slots: int) -> Iterator[None]:
    config = WorkerConfig("bench", "here", url, str(folder / "work"), slots=slots)
    file = folder / "worker.json"
    file.touch(mode=0o600)
    file.write_text(config.to_json())
    command = [sys.executable, "-I", "-m", "fleet.worker", "--config", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _xargs(jobs: int, slots: int) -> float:
    """Jobs per second of `xargs -P`."""
    numbers = "".join(f"{number}\n" for number in range(jobs))
    started = time.perf_counter()
    subprocess.run(["xargs", f"-P{slots}", "-n1", "true"], input=numbers, text=True, check=True)
    return jobs / (time.perf_counter() - started)


def _until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.005)


if __name__ == "__main__":
    main()
