"""The history: what every participant saw, one JSON object a line, in one file.

Each event goes in by one write to a file opened with O_APPEND, so that lines of many processes do not
mix and one that is killed leaves whole lines behind. `at` is seconds on the boot clock, which all
processes of a machine share; `who` is the participant.

    event           who          fields
    intent          submitter    job, retries, after (ids), queue, labels; array, max_parallel (of its tasks):
                                 about to be submitted
    ack             submitter    jobs: Redis has said that these are in
    refused         submitter    jobs: Redis has said that these are not in
    registered      worker       incarnation, queues, labels
    claimed         worker       job, lease, queue
    reported        worker       job, lease, outcome, accepted: the answer to the end of an attempt
    giving-up       worker       job, lease: it is about to say itself that it has lost it
    start, tick, end  job        job, execution or fence, worker, pid
    killed          harness      target (worker, executor, job, sidecar, redis), worker, wall
    died            harness      worker, wall, status: its process has ended, whatever of
    stopped         harness      worker, seconds, frozen (whether its whole tree was): SIGSTOP for so long
    deleted         harness      job: by a client of RQ
    requeued        harness      job: by a client of RQ, so that it is a new submission
    rq-info         harness      before, after: what is in Redis before and after `rq info` was run
    counted         harness      rq, ours: what `rq info` and we say of the queues, at the same moment
    drained         harness      all jobs have ended, all workers have left
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: the variable that tells the path of the history to every process
VARIABLE = "CHAOS_HISTORY"

Event = dict[str, Any]


class History:
    """Where one participant writes."""

    def __init__(self, path: str | Path, who: str) -> None:
        self._who = who
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def note(self, event: str, **fields: Any) -> None:
        """Append one event."""
        line = {"at": now(), "event": event, "who": self._who, **fields}
        os.write(self._fd, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Write no more."""
        os.close(self._fd)


def now() -> float:
    """Seconds on the clock that all processes share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read(path: str | Path) -> Iterator[Event]:
    """All events, in the order in which they were written. Raises ValueError for a torn line."""
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)
