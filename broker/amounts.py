"""Durations, sizes and counts as people write them, and back: `2h`, `4G`, `0.5`."""

from __future__ import annotations

import math
import re
from typing import Any

from broker.errors import UsageError

_DURATION = re.compile(r"(-?\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h|d)?", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
#: about what a Redis hash field of RQ's can hold, and longer than anyone waits: a hundred years
_LONGEST_SECONDS = 100 * 365 * 86400
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGTP])(?:i?B)?", re.ASCII | re.IGNORECASE)
_BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_LARGEST_BYTES = 2**60


def duration(value: str | float, *, zero: bool = False) -> float:
    """Seconds of `90`, `90s`, `5m`, `1.5h`, `2d`; more than 0 unless `zero`. Raises UsageError."""
    found = _DURATION.fullmatch(str(value).strip())
    if not found or isinstance(value, bool):
        raise UsageError(f"{value!r} is no duration: use seconds, or 90s, 5m, 2h, 1d.")
    seconds = float(found[1]) * _SECONDS[found[2] or "s"]
    if seconds < 0 or (seconds == 0 and not zero):
        raise UsageError(f"{value!r}: must be {'0 or ' * zero}more than 0.")
    if not math.isfinite(seconds) or seconds > _LONGEST_SECONDS:
        raise UsageError(f"{value!r} is longer than a hundred years.")
    return seconds


def size(value: str | int) -> int:
    """Bytes of `512M`, `4G`, `1.5T`; G, GB and GiB all mean 2**30. A number is bytes already.

    Raises UsageError, also for digits without a unit, of which nobody knows what they mean.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    else:
        match = _SIZE.fullmatch(str(value).strip())
        if not match:
            raise UsageError(f"{value!r} is no size: use a number and its unit, as 512M, 4G or 1.5T.")
        found = math.ceil(min(float(match[1]) * _BYTES[match[2].upper()], _LARGEST_BYTES + 1))
    if not 0 < found <= _LARGEST_BYTES:
        raise UsageError(f"{value!r}: a size must be more than 0, and at most 1024P.")
    return found


def number(value: Any) -> float:
    """A number of 0 or more, as `2` or `0.5`. Raises UsageError."""
    try:
        found = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise UsageError(f"{value!r} is no number: use one such as 2 or 0.5.") from None
    if not (math.isfinite(found) and found >= 0):
        raise UsageError(f"{value!r}: must be 0 or more.")
    return found


def readable_size(size_bytes: int) -> str:
    """As `size` reads it, exact where it is of whole MiB: `4G`, `1.5G`, `100M`."""
    for unit in "PTG":
        text = f"{size_bytes / _BYTES[unit]:.3f}".rstrip("0").rstrip(".")
        if float(text) >= 1 and float(text) * _BYTES[unit] == size_bytes:
            return text + unit
    return f"{-(-size_bytes // _BYTES['M'])}M"


def readable_duration(seconds: float) -> str:
    """As `duration` reads it, to the millisecond: `2h`, `90m`, `45s`."""
    for unit in "dhm":
        if seconds >= _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{seconds / _SECONDS[unit]:.0f}{unit}"
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"


def rough_size(size_bytes: float) -> str:
    """For people: `39.9G`, never more than there is."""
    for unit in "PTG":
        if size_bytes >= _BYTES[unit]:
            return f"{math.floor(size_bytes / _BYTES[unit] * 10) / 10:g}{unit}"
    return f"{size_bytes // _BYTES['M']:.0f}M"


def rough_duration(seconds: float) -> str:
    """For people: `2h05m`, `12m`, `45s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 60}m" if whole >= 120 else f"{whole}s"
