"""Jobs that write down when they run. Executors import this file by itself: it knows nothing of ours."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

#: seconds between signs of life of a job that takes a while
_TICK_SECONDS = 0.1


def note(event: str) -> None:
    """One event of the running job, see tests/chaos/history.py."""
    line = {
        "at": time.clock_gettime(time.CLOCK_BOOTTIME),
        "event": event,
        "who": "job",
        "job": os.environ["RQ_JOB_ID"],
        "execution": os.environ.get("RQ_EXECUTION_ID") or f"process {os.getpid()}",
        "worker": os.environ.get("FLEET_WORKER", ""),
        "pid": os.getpid(),
    }
    fd = os.open(os.environ["CHAOS_HISTORY"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    os.write(fd, json.dumps(line).encode() + b"\n")
    os.close(fd)


def work(seconds: float = 0.0) -> str:
    """Run for a while, giving signs of life."""
    note("start")
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _TICK_SECONDS))
        note("tick")
    note("end")
    return os.environ["RQ_JOB_ID"]


def work_until(gate: str) -> str:
    """Run until the file GATE.0 is there, giving signs of life; in a second run GATE.1."""
    number = int(Path(f"{gate}.began").exists())
    Path(f"{gate}.began").touch()
    note("start")
    while not Path(f"{gate}.{number}").exists():
        time.sleep(_TICK_SECONDS)
        note("tick")
    note("end")
    return os.environ["RQ_JOB_ID"]


def fail_at_first() -> str:
    """Fail in the first run, as told by a file beside the history."""
    note("start")
    mark = f"{os.environ['CHAOS_HISTORY']}.{os.environ['RQ_JOB_ID']}"
    first = not Path(mark).exists()
    os.close(os.open(mark, os.O_CREAT | os.O_WRONLY))
    note("end")
    if first:
        raise ValueError("as asked")
    return "done"
