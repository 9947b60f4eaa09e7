"""The lines of a job's `fleet_attempts`: what became of each of its attempts that is over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any


def rows(text: Callable[[str], str]) -> Iterator[dict[str, Any]]:
    """The rows, as the scripts wrote them: `fence`, `worker`, `started_at`, `ended_at`, `outcome`, `reason`.

    `text(field)` is a field of the job's hash. Of a job that finished at its first attempt the row has the
    fence alone, and the rest is the job's own. Lines that somebody damaged are passed over.
    """
    for line in text("fleet_attempts").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row if "worker" in row else _own(text) | row


def _own(text: Callable[[str], str]) -> dict[str, Any]:
    times = {name: text(name) for name in ("started_at", "ended_at")}
    return {"worker": text("worker_name"), "outcome": "finished", **times}
