"""Submit command lines: many in one atomic call, without importing rq."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker import keys, names, scripts
from broker.command import Command
from broker.errors import Conflict, UsageError

if TYPE_CHECKING:
    import redis

#: jobs sent to Redis in one call of submit.lua: it must not hold up everybody for long
_BATCH = 500
#: characters of a job's name
LONGEST_NAME = 200
#: backoff of retries doubles up to this many seconds
LONGEST_RETRY_DELAY = 3600


@dataclass(frozen=True)
class Options:
    """How a command is to be treated; times in seconds, None: no limit or the default."""

    name: str | None = None
    timeout_seconds: int | None = None
    retries: int = 0
    retry_delay_seconds: float = 1.0
    result_ttl_seconds: int = 7 * 86400

    def checked(self) -> Options:
        """Return itself. Raises UsageError for a number out of range."""
        if self.timeout_seconds is not None and self.timeout_seconds <= 0:
            raise UsageError(
                f"a timeout must be more than 0 seconds, got {self.timeout_seconds}",
                "Leave --timeout out for no limit.",
            )
        if self.retries < 0:
            raise UsageError(f"retries must be 0 or more, got {self.retries}")
        if self.retry_delay_seconds < 0:
            raise UsageError(f"a retry delay must be 0 or more seconds, got {self.retry_delay_seconds}")
        return self


def submit_commands(
    client: redis.Redis, queue: str, commands: Iterable[tuple[str | None, Command]], options: Options
) -> list[str]:
    """Submit command lines, each with the id it shall have or None; returns the ids in order.

    Jobs go in batches of 500, each all or nothing. Raises UsageError, Conflict for an id
    that is taken, and what redis-py raises: then batches before it are in.
    """
    names.queue_name(queue)
    options.checked()
    rows = [(_checked_id(job_id), command.checked()) for job_id, command in commands]
    for start in range(0, len(rows), _BATCH):
        _submit_batch(client, queue, rows[start : start + _BATCH], options)
    return [job_id for job_id, _ in rows]


def _checked_id(job_id: str | None) -> str:
    return names.new_job_id() if job_id is None else names.job_id(job_id)


def _submit_batch(
    client: redis.Redis, queue: str, rows: Sequence[tuple[str, Command]], options: Options
) -> None:
    columns = tuple(_fields(rows[0][1], options))
    arguments: list[Any] = [queue, len(columns), *columns]
    for job_id, command in rows:
        arguments += [job_id, *_fields(command, options).values()]
    taken: bytes = scripts.SUBMIT(client, [keys.queue(queue)], arguments)
    if taken:
        raise Conflict(f"there is a job {taken.decode()} already", "Choose another id, or leave it out.")


def _fields(command: Command, options: Options) -> Mapping[str, Any]:
    """The fields of a command's hash, as `rq.job.Job.to_dict` names them; all rows have the same."""
    return {
        "data": command.to_data(),
        "description": described(options.name or " ".join(command.argv)),
        "timeout": options.timeout_seconds or -1,
        "result_ttl": options.result_ttl_seconds,
        "failure_ttl": options.result_ttl_seconds,
        "retries_left": options.retries,
        "retry_intervals": "[" + ",".join(map(str, backoff(options))) + "]",
        "worker_name": "",
        "started_at": "",
        "ended_at": "",
    }


def described(text: str) -> str:
    """`text` for people: not too long, and with bytes that are no UTF-8 spelled out."""
    short = text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
    return short.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def backoff(options: Options) -> Iterator[int]:
    """Seconds before each retry: doubling, with a random half on top, so that a crowd that failed
    together does not come back together; whole seconds, as RQ's scheduler counts."""
    delay = options.retry_delay_seconds
    for _ in range(options.retries):
        delay = min(delay, LONGEST_RETRY_DELAY)
        yield round(delay * random.uniform(1.0, 1.5))
        delay *= 2
