"""Durations as Slurm writes them."""

from __future__ import annotations

import re

_DAY, _HOUR, _MINUTE = 86_400, 3_600, 60
#: what sbatch takes: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S
FORMATS = "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES[:SECONDS]"
_PARTS = re.compile(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,4}))?(?::(\d{1,4}))?", re.ASCII)


def seconds(text: str) -> int | None:
    """Of a time limit, as sbatch reads it: `30`, `90:00`, `1:30:00`, `2-12`; None where it is none."""
    found = _PARTS.fullmatch(text)
    if not found:
        return None
    days, *rest = (None if part is None else int(part) for part in found.groups())
    first, second, third = rest[0] or 0, rest[1], rest[2]
    if days is not None:
        return days * _DAY + first * _HOUR + (second or 0) * _MINUTE + (third or 0)
    if third is not None:
        return first * _HOUR + (second or 0) * _MINUTE + third
    return first * _MINUTE + (second or 0)


def seconds_left(text: str) -> int | None:
    """Of what squeue says is left: `2:31`, `1:02:31`, `3-01:02:31`; None for INVALID and the like."""
    return seconds(text) if ":" in text else None


def written(total_seconds: float) -> str:
    """`D-HH:MM:SS`, or `H:MM:SS` of less than a day."""
    days, rest = divmod(int(total_seconds), _DAY)
    clock = f"{rest // _HOUR:02}:{rest % _HOUR // _MINUTE:02}:{rest % _MINUTE:02}"
    return f"{days}-{clock}" if days else clock
