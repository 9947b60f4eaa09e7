"""Numbers of tasks as people write them: `1-1000:2,2000`; kept as ranges, however many they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from broker.errors import UsageError

#: largest number of a task: one bit is kept for each up to the largest of an array
LARGEST = 99_999_999
#: most tasks of one array
MOST_TASKS = 10_000_000
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?", re.ASCII)


@dataclass(frozen=True)
class Ranges:
    """Numbers from 0 on, each once, in ascending order; `parts` are disjoint and ascending, too."""

    parts: tuple[range, ...]

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[int]:
        return (number for part in self.parts for number in part)

    def __contains__(self, number: object) -> bool:
        return any(number in part for part in self.parts)

    def __str__(self) -> str:
        return ",".join(map(_text, self.parts))

    def __sub__(self, other: Iterable[int]) -> Ranges:
        gone = frozenset(other)
        return of(number for number in self if number not in gone)

    def rows(self) -> list[str]:
        """Each part as the scripts read it: FIRST-LAST:STEP."""
        return [f"{part[0]}-{part[-1]}:{part.step}" for part in self.parts]


def _text(part: range) -> str:
    if len(part) == 1:
        return str(part[0])
    return f"{part[0]}-{part[-1]}" + (f":{part.step}" if part.step > 1 else "")


def of(numbers: Iterable[int]) -> Ranges:
    """The ranges of some numbers, runs of neighbours each one part."""
    ordered = sorted(set(numbers))
    parts: list[range] = []
    for number in ordered:
        if parts and parts[-1].stop == number:
            parts[-1] = range(parts[-1].start, number + 1)
        else:
            parts.append(range(number, number + 1))
    return Ranges(tuple(parts))


def first(count: int) -> Ranges:
    """1 to `count`."""
    return Ranges((range(1, count + 1),))


def from_rows(rows: Iterable[bytes]) -> Ranges:
    """What `rows` of some ranges were, in any order; what somebody damaged is left out."""
    parts = (_RANGE.fullmatch(row.decode("ascii", "replace")) for row in rows)
    return _joined([_part(*found.groups()) for found in parts if found])


def parse(text: str) -> Ranges:
    """`7`, `3-9`, `1-1000:2`, and several of these with commas. Raises UsageError."""
    parts = []
    for word in text.split(","):
        found = _RANGE.fullmatch(word.strip())
        if not found:
            raise UsageError(f"{text!r} names no tasks: {word.strip()!r} is no range", _hint(word))
        parts.append(_checked(word.strip(), _part(*found.groups())))
    if sum(map(len, parts)) > MOST_TASKS:
        raise UsageError(f"{text!r} has more than {MOST_TASKS:,} tasks", "Submit several arrays.")
    return _joined(parts)


def _hint(word: str) -> str:
    if "%" in word:
        return "How many may run at once is told by --max-parallel N."
    return "Use 7, 3-9, 1-1000:2 (every second), or several of these with commas."


def _part(low: str, high: str | None, step: str | None) -> range:
    """Empty where it is none."""
    every = int(step or 1)
    return range(int(low), int(high or low) + 1, every) if every else range(0)


def _checked(word: str, part: range) -> range:
    if not part:
        raise UsageError(f"{word!r} has no numbers", "The first must not be above the last, nor the step 0.")
    if part[-1] > LARGEST:
        raise UsageError(f"{word!r}: the largest number of a task is {LARGEST:,}")
    return range(part[0], part[-1] + 1, part.step if len(part) > 1 else 1)


def _joined(parts: list[range]) -> Ranges:
    """In order; where some overlap, each number once."""
    ordered = sorted((part for part in parts if part), key=lambda part: part[0])
    if any(low[-1] >= high[0] for low, high in pairwise(ordered)):
        return of(number for part in ordered for number in part)
    return Ranges(tuple(ordered))
