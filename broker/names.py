"""The names that are let in: queues, workers, jobs. Checked at the door, trusted after it."""

from __future__ import annotations

import re

from broker.errors import UsageError

_WORKER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_QUEUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}")
_JOB = re.compile(r"[A-Za-z0-9_-]{1,128}")


def worker_name(name: str) -> str:
    """Return `name`; it becomes part of keys, so no colon: no name is another's prefix.

    Raises UsageError.
    """
    return _checked(_WORKER, name, "worker name", "letters, digits, '.', '_' and '-'")


def queue_name(name: str) -> str:
    """Return `name`; '@' is kept for sets of requirements, ',' separates lists of queues.

    Raises UsageError.
    """
    return _checked(_QUEUE, name, "queue name", "letters, digits, '_', '.', ':' and '-'")


def job_id(name: str) -> str:
    """Return `name`: what RQ accepts as the id of a job. Raises UsageError."""
    return _checked(_JOB, name, "job id", "letters, digits, '_' and '-'")


def _checked(pattern: re.Pattern[str], name: str, what: str, allowed: str) -> str:
    if pattern.fullmatch(name):
        return name
    raise UsageError(f"{name!r} is no {what}", f"Use {allowed}, at most 128 of them.")
