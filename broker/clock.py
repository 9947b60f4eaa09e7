"""Three clocks by their names: what is stored, what is measured, and what runs on in suspend."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def wall() -> datetime:
    """Now, for what is stored and shown; never for deadlines."""
    return datetime.now(UTC)


#: seconds for deadlines and durations within a process; asked several times for each job
monotonic = time.monotonic


def boottime() -> float:
    """Seconds on a clock that runs on while the machine is suspended: the one leases are watched by."""
    # macOS has no CLOCK_BOOTTIME; its CLOCK_MONOTONIC runs on in sleep, time.monotonic() does not
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def from_iso(text: str | bytes | None) -> datetime | None:
    """A time as RQ and our scripts write it, in UTC, or None for nothing or nonsense."""
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text.decode() if isinstance(text, bytes) else text)
        if found.tzinfo is UTC:  # as nearly all are, and there may be tens of thousands
            return found
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, TypeError, OverflowError):
        return None
