"""What became of each of several things that a verb was asked to change, and the exit code of that."""

from __future__ import annotations

from collections.abc import Collection

#: the outcome of one that does not exist
NOT_FOUND = "not_found"


def exit_code(outcomes: Collection[str], good: Collection[str]) -> int:
    """0: all are as asked for; 3: some; 1: none; 4: there are none."""
    done = sum(outcome in good for outcome in outcomes)
    if outcomes and done == len(outcomes):
        return 0
    if done:
        return 3
    return 4 if all(outcome == NOT_FOUND for outcome in outcomes) else 1
