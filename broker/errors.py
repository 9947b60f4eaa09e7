"""Every error that a user can cause: a code for programs, a message and a hint for people.

`FleetError` is the root; the command line prints `message` and `hint` and exits with
`exit_code`. Errors of redis-py are translated where they cross into our code.
"""

from __future__ import annotations


class FleetError(Exception):
    """Something a user can cause or mend.

    `code` is stable, for `--json`; `message` says what happened and where; `hint` what to
    do next; `exit_code` is the one of docs/cli.md.
    """

    code = "error"
    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(FleetError):
    """The words of the command are off: a bad name, a number out of range, a bad file."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A setting has a value that cannot be used; the message names where it came from."""

    code = "config"


class NotFound(FleetError):
    """No job, queue, host or worker of that name."""

    code = "not_found"
    exit_code = 4


class WaitTimeout(FleetError):
    """Time ran out while waiting."""

    code = "timeout"
    exit_code = 5


class RedisUnreachable(FleetError):
    """Redis refused, did not answer, or does not exist at that address."""

    code = "redis_unreachable"
    exit_code = 6


class RedisDenied(RedisUnreachable):
    """Redis answered, and said no: wrong password, or a user without the rights."""

    code = "redis_denied"


class RedisLoading(RedisUnreachable):
    """Redis is up, and still reads its data."""

    code = "redis_loading"


class RedisRefused(FleetError):
    """Redis is in a state in which it takes no change: full, a replica, cannot write to its disk."""

    code = "redis_refused"


class RedisFault(FleetError):
    """Redis answered with an error that nothing above explains."""

    code = "redis_error"


class Conflict(FleetError):
    """The state of things forbids it: a worker of that name lives, a broker runs already."""

    code = "conflict"
