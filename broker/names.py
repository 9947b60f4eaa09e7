"""The names that are let in: queues, workers, jobs. Checked at the door, trusted after it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from broker.errors import UsageError

_WORKER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_QUEUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}")
#: what ends in a number, also where that is no weight
_WEIGHTED = re.compile(r"(.+):(-?[0-9.]+)", re.DOTALL)
_WEIGHT = re.compile(r"[0-9]{1,9}")
_LARGEST_WEIGHT = 1_000_000
_JOB = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_LONGEST_LABEL_VALUE = 256
#: the ids that `new_job_id` and `new_uuid` make
_RUNG = re.compile(rb"[0-9a-f]{16}|[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


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


def pool_name(name: str) -> str:
    """Return `name`, of a pool of workers from Slurm. Raises UsageError."""
    return _checked(_QUEUE, name, "pool name", "letters, digits, '_', '.', ':' and '-'")


def weighted_queues(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names of queues a worker serves, and their weights: none, where it serves them in strict order.

    `words` are all NAME, or all NAME:WEIGHT. One alone is a name, whatever it ends in: a weight would mean
    nothing. Raises UsageError.
    """
    found = [_WEIGHTED.fullmatch(word) for word in words]
    if len(words) == 1 or not any(found):
        return tuple(map(queue_name, words)), ()
    pairs = [(queue_name(one[1]), one[2]) for one in found if one]
    if len(pairs) < len(words):
        raise UsageError(
            f"{','.join(words)}: some of these queues have a weight and others none",
            f"Give all of them one (a:3,b:1), or none for strict order (a,b). {_way_out(words, found)}",
        )
    for (name, weight), word in zip(pairs, words, strict=True):
        if not _WEIGHT.fullmatch(weight) or not 0 < int(weight) <= _LARGEST_WEIGHT:
            raise UsageError(
                f"{word}: a weight is a whole number from 1 to {_LARGEST_WEIGHT}", _way_out(words, found)
            )
        if [other for other, _ in pairs].count(name) > 1:
            raise UsageError(f"{','.join(words)}: {name} is there twice", _way_out(words, found))
    return tuple(name for name, _ in pairs), tuple(int(weight) for _, weight in pairs)


def _way_out(words: Sequence[str], found: Sequence[re.Match[str] | None]) -> str:
    """What to write where these are names as they stand."""
    name = next(word for word, one in zip(words, found, strict=True) if one)
    return (
        f"Where a queue is called {name}, it needs a weight too: {','.join(f'{word}:1' for word in words)}."
    )


def job_id(name: str) -> str:
    """Return `name`: what RQ accepts as the id of a job. Raises UsageError."""
    return _checked(_JOB, name, "job id", "letters, digits, '_' and '-'")


def label_name(name: str) -> str:
    """Return `name`, the key of a worker's label. Raises UsageError."""
    if _LABEL.fullmatch(name):
        return name
    raise UsageError(
        f"{name!r} is no name of a label", "Use letters, digits, '_', '.' and '-', at most 63 of them."
    )


def label_value(value: str) -> str:
    """Return `value`, a worker's label. Raises UsageError."""
    if value.isprintable() and len(value) <= _LONGEST_LABEL_VALUE:
        return value
    raise UsageError(
        f"{value[:50]!r} is no value of a label",
        f"Use at most {_LONGEST_LABEL_VALUE} characters, none of them a control character.",
    )


def is_job_id(name: str) -> bool:
    """Whether `job_id` takes it."""
    return _JOB.fullmatch(name) is not None


def new_job_id() -> str:
    """An id for a job whose producer rings for it."""
    return secrets.token_hex(8)


def new_uuid() -> str:
    """The same, as RQ's users know it: a UUID, of version 8 where RQ's own are of version 4 (RFC 9562)."""
    part = secrets.token_hex(16)
    variant = "89ab"[int(part[16], 16) & 3]
    return f"{part[:8]}-{part[8:12]}-8{part[13:16]}-{variant}{part[17:20]}-{part[20:]}"


def is_rung_for(job_id: bytes) -> bool:
    """Whether its producer rings, as far as its id tells: a hint, for ids may be anybody's own."""
    return _RUNG.fullmatch(job_id) is not None


def _checked(pattern: re.Pattern[str], name: str, what: str, allowed: str) -> str:
    if pattern.fullmatch(name):
        return name
    raise UsageError(f"{name!r} is no {what}", f"Use {allowed}, at most 128 of them.")
