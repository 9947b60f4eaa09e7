"""What the words of a verb mean, where it is an error that one means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker.errors import NotFound

if TYPE_CHECKING:
    import redis

    from broker.selection import Target, Word

#: jobs named in a message
_NAMED = 10


def targets(client: redis.Redis, words: Sequence[Word], *, failed: bool = False) -> list[Target]:
    """The jobs meant; `failed`: of arrays those of their tasks that failed. Raises NotFound."""
    from broker import jobs, keys, selection

    found, unknown = selection.resolve(client, words)
    if len(unknown) == 1:
        raise jobs.not_found(unknown[0], damaged=client.exists(keys.job(unknown[0])) == 1)
    if unknown:
        raise NotFound(f"no such job: {listed(unknown)}", "'fleet jobs' lists those there are.")
    return [selection.failed_of(client, one) if failed and one.is_array else one for one in found]


def failing(client: redis.Redis, words: Sequence[Word]) -> list[str]:
    """What --failed means of jobs that have not ended: those named (none: all) that failed and are run again.

    Raises NotFound.
    """
    from broker import jobs, selection

    if words and not any(word.job_id == selection.ALL for word in words):
        found = targets(client, words)
    else:
        found = selection.targets_of(client, jobs.unfinished_ids(client))
    return selection.failing(client, found)


#: where there are none
NONE_FAILING = "No job that failed is to run again."


def listed(names: Sequence[str]) -> str:
    """Some of them."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
