"""The lines of a job's `fleet_attempts`: what became of each of its attempts that is over.

Each is a JSON object, but of one that finished: `FENCE BEGAN ENDED WORKER`, times in seconds since 1970.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any


def rows(text: str) -> Iterator[dict[str, Any]]:
    """The rows: `fence`, `worker`, `started_at`, `ended_at`, `outcome`, `reason`.

    Lines that somebody damaged are passed over.
    """
    for line in text.splitlines():
        try:
            row = json.loads(line) if line.startswith("{") else _finished(line)
        except (ValueError, ArithmeticError, OSError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _finished(line: str) -> dict[str, Any]:
    fence, began, ended, worker = line.split(" ", 3)
    times = {"started_at": _iso(began), "ended_at": _iso(ended)}
    return {"fence": fence, "worker": worker, "outcome": "finished", **times}


def _iso(seconds: str) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).isoformat()
