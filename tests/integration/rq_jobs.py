"""Functions that tests enqueue with plain RQ; workers import this file by `paths`."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import rq


def add(x: int, y: int) -> int:
    return x + y


def return_bytes(size: int) -> bytes:
    return bytes(size)


def fail() -> None:
    raise ValueError("as asked")


def note(path: str, word: str) -> str:
    with open(path, "a") as file:
        file.write(word + "\n")
    return word


def note_and_wait(path: str, word: str, gate: str) -> str:
    """Say that it runs, then run until the file `gate` is there."""
    note(path, word)
    while not Path(gate).exists():
        time.sleep(0.02)
    return word


def say(text: str) -> None:
    print(text)
    sys.stdout.flush()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_process(path: str) -> None:
    """SIGTERM to the process whose number is, or will be, in that file."""
    while not Path(path).exists() or not Path(path).read_text():
        time.sleep(0.01)
    os.kill(int(Path(path).read_text()), signal.SIGTERM)


def ask_again(path: str) -> Any:
    note(path, "asked")
    if len(Path(path).read_text().split()) < 3:
        return rq.Retry(max=5, interval=0)
    return "done"


def fail_until(path: str, times: int) -> str:
    note(path, "tried")
    if len(Path(path).read_text().split()) < times:
        raise ValueError("not yet")
    return "done"


def keep_meta() -> None:
    job = rq.get_current_job()
    job.meta["seen"] = True
    job.save_meta()


def on_success(job: Any, connection: Any, result: Any) -> None:
    connection.set(f"test:success:{job.id}", str(result))


def on_failure(job: Any, connection: Any, kind: Any, value: Any, traceback: Any) -> None:
    connection.set(f"test:failure:{job.id}", str(value))


def on_stopped(job: Any, connection: Any) -> None:
    connection.set(f"test:stopped:{job.id}", "1")


def nap(seconds: float) -> None:
    time.sleep(seconds)


def nap_after_stop(job: Any, connection: Any) -> None:
    on_stopped(job, connection)
    time.sleep(90)


def save_in_callback(job: Any, connection: Any, result: Any) -> None:
    job.meta["seen"] = True
    job.save()


def save_in_failure(job: Any, connection: Any, kind: Any, value: Any, traceback: Any) -> None:
    job.save()


def fill_memory(size: int) -> None:
    block = bytearray(size)
    for page in range(0, size, 4096):
        block[page] = 1


def be_refused_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    bytearray(1 << 30)


def use(size: int, cpu_seconds: float, number: int = 0) -> None:
    """Take so much memory and CPU time, then perhaps end by a signal."""
    import time

    block = bytearray(size)
    until = time.process_time() + cpu_seconds
    while time.process_time() < until:
        block[0] = 1
    if number:
        os.kill(os.getpid(), number)


def hoard(mebibytes: int) -> None:
    """Take so much memory, a little at a time, and live on."""
    held = []
    for _ in range(mebibytes // 5):
        held.append(b"x" * (5 * 2**20))
        time.sleep(0.02)
    time.sleep(60)


def where_am_i() -> dict[str, Any]:
    """The process, the CPUs that it may run on, how nice it is, and what it was given."""
    cpus = sorted(os.sched_getaffinity(0))
    return {"pid": os.getpid(), "cpus": cpus, "nice": os.nice(0), "FLEET_CPUS": os.environ.get("FLEET_CPUS")}
