"""Functions that tests of this folder enqueue; workers, ours and RQ's, import this file by its name."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rq
import rq.timeouts

# --- plain -----------------------------------------------------------------------------------------


def add(x: int, y: int) -> int:
    return x + y


def nap(seconds: float) -> None:
    time.sleep(seconds)


def note(path: str, word: str) -> str:
    with open(path, "a") as file:
        file.write(word + "\n")
    return word


def fail() -> None:
    raise ValueError("as asked")


def fail_until(path: str, times: int) -> str:
    note(path, "tried")
    if len(Path(path).read_text().split()) < times:
        raise ValueError("not yet")
    return "done"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """Called through an instance, through the class, and as a class."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def up(self, by: int) -> int:
        return self.start + by

    @staticmethod
    def double(number: int) -> int:
        return 2 * number

    @classmethod
    def named(cls, name: str) -> str:
        return f"{cls.__name__} {name}"

    def __call__(self, by: int) -> int:
        return self.up(by)


class Picky:
    def __reduce__(self) -> Any:
        raise TypeError("not me")


async def add_later(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


def greet(greeting: str, *, name: str = "Stranger") -> str:
    return f"{greeting}, {name}!"


def wait_for(gate: str) -> None:
    while not Path(gate).exists():
        time.sleep(0.01)


def begin_and_wait_for(begun: str, gate: str) -> None:
    """Say that it runs: "started" says that a worker was given it."""
    Path(begun).touch()
    wait_for(gate)


def picky() -> Picky:
    return Picky()


def echo(value: Any) -> Any:
    return value


def fail_with(text: str) -> None:
    raise ValueError(text)


def leave(status: Any) -> None:
    sys.exit(status)


def interrupt() -> None:
    raise KeyboardInterrupt


def exit_at_once(status: int) -> None:
    os._exit(status)


def add_elsewhere(method: str, x: int, y: int) -> int:
    with multiprocessing.get_context(method).Pool(1) as pool:
        return int(pool.apply(add, (x, y)))


_RUNS: list[None] = []


def count_runs() -> int:
    _RUNS.append(None)
    return len(_RUNS)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RQ_")}


def know_thyself() -> dict[str, Any]:
    job = rq.get_current_job()
    (execution,) = job.get_executions()
    return {
        "id": job.id,
        "status": job.get_status().value,
        "origin": job.origin,
        "worker": job.worker_name,
        "started": job.started_at is not None,
        "ended": job.ended_at is not None,
        "meta": job.meta,
        "timeout": job.timeout,
        "execution_worker": execution.worker_name,
        "in_registry": job in job.started_job_registry,
        "enqueued": len(rq.Queue(job.origin, connection=job.connection)),
    }


def is_a_job_current() -> bool:
    return rq.get_current_job() is not None


def enqueue_another(function: str, *args: Any) -> str:
    job = rq.get_current_job()
    return rq.Queue("low", connection=job.connection).enqueue(function, *args).id


def update_meta(changes: dict[str, Any]) -> None:
    job = rq.get_current_job()
    job.meta.update(changes)
    job.save_meta()


def update_meta_and_fail(changes: dict[str, Any]) -> None:
    update_meta(changes)
    raise ValueError("after meta")


def meta_unsaved() -> None:
    rq.get_current_job().meta["unsaved"] = True


def change_job(changes: dict[str, Any], save: bool) -> None:
    job = rq.get_current_job()
    for name, value in changes.items():
        setattr(job, name, value)
    if save:
        job.save()


def change_job_and_fail(changes: dict[str, Any], save: bool, path: str = os.devnull) -> None:
    note(path, "tried")
    change_job(changes, save)
    raise ValueError("changed")


def refresh_and_save() -> None:
    job = rq.get_current_job()
    job.refresh()
    job.meta["refreshed"] = job.get_status().value
    job.save()


def again(times: int, interval: Any = 0) -> rq.Retry:
    return rq.Retry(max=times, interval=interval)


def again_unless(path: str) -> Any:
    return "done" if Path(path).exists() else rq.Retry(max=1_000_000)


def die_until(path: str, times: int) -> str:
    note(path, "tried")
    if len(Path(path).read_text().split()) < times:
        die()
    return "done"


def swallow_timeout() -> str:
    try:
        time.sleep(10)
    except rq.timeouts.JobTimeoutException:
        return "swallowed"
    return "slept"


def nap_and_note(seconds: float, path: str) -> None:
    """Sleep the first time only."""
    first = not Path(path).exists()
    note(path, "tried")
    time.sleep(seconds if first else 0)


def clean_up_on_timeout(path: str) -> None:
    try:
        time.sleep(10)
    finally:
        note(path, "cleaned up")


def tell_success(job: Any, connection: Any, result: Any) -> None:
    _tell(job, connection, "success", {"result": result})


def tell_failure(job: Any, connection: Any, kind: Any, value: Any, traceback: Any) -> None:
    _tell(
        job, connection, "failure", {"kind": kind.__name__, "value": str(value), "traceback": bool(traceback)}
    )
    connection.incr(f"test:failures:{job.id}")


def tell_stopped(job: Any, connection: Any) -> None:
    _tell(job, connection, "stopped", {})


def _tell(job: Any, connection: Any, what: str, facts: dict[str, Any]) -> None:
    known = {
        "id": job.id,
        "status": job.get_status(refresh=False).value,
        "stored": job.get_status().value,
        "ended": job.ended_at is not None,
        "meta": job.meta,
        "current": rq.get_current_job() is not None,
    }
    connection.set(f"test:{what}:{job.id}", json.dumps(known | facts))


def broken_callback(*arguments: Any) -> None:
    raise LookupError("broken callback")


def slow_callback(*arguments: Any) -> None:
    time.sleep(10)


def note_time_and_nap(job: Any, connection: Any, *arguments: Any) -> None:
    connection.set(f"test:time:{job.id}", time.time())
    time.sleep(2)


def mark_in_callback(job: Any, *arguments: Any) -> None:
    job.meta["callback"] = True
    job.save_meta()


def refresh_in_callback(job: Any, *arguments: Any) -> None:
    job.refresh()
    mark_in_callback(job)


def no_more_retries(job: Any, *arguments: Any) -> None:
    job.retries_left = 0


def start_a_child(path: str) -> None:
    child = subprocess.Popen(["sleep", "100"])
    note(path, str(child.pid))
    child.wait()
