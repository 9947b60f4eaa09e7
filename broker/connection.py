"""Connections to Redis: one way to open them, one place where their errors become ours."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlunsplit

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError

from broker import sentinel
from broker.errors import (
    FleetError,
    RedisDenied,
    RedisFault,
    RedisLoading,
    RedisRefused,
    RedisUnreachable,
    UsageError,
)

if TYPE_CHECKING:
    from broker.settings import Settings

#: seconds in which a reply is to come, before the connection is given up
REPLY_SECONDS = 15.0
#: what is said of a Redis that did not answer; whoever reads a worker's log looks for it
NOT_REACHABLE = "is not reachable"
#: what answers at all
OLDEST_REDIS = (6, 2)
_SCHEMES = ("redis", "rediss", "unix", *sentinel.SCHEMES)
_SHAPE = (
    "Use redis://[:password@]host:port/db, rediss://..., unix:///path/to/socket, "
    "or redis+sentinel://[:password@]host1:26379,host2:26379/SERVICE."
)


def connect(
    url: str, *, password: str | None = None, timeout_seconds: float | None = REPLY_SECONDS
) -> redis.Redis:
    """A client for `url`, not yet connected.

    Nothing is retried behind the caller's back: a claim whose reply was lost must not be
    sent again. `timeout_seconds` bounds connecting and each reply; None waits for ever, for
    a connection that blocks. Raises UsageError for a URL that cannot be read.
    """
    check_url(url)
    options: dict[str, Any] = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": min(timeout_seconds or REPLY_SECONDS, REPLY_SECONDS),
        **({} if url.startswith("rediss") else _NAMELESS),
    }
    if not url.startswith("unix"):
        options |= _keepalive(timeout_seconds or REPLY_SECONDS)
    if password is not None:
        options["password"] = password
    try:
        if sentinel.is_sentinel(url):
            return sentinel.parse(url).client(**options)
        return redis.Redis.from_url(url, **options)
    except (ValueError, TypeError) as exc:
        raise UsageError(f"cannot read the Redis URL {redacted(url)!r}: {exc}", _SHAPE) from exc


#: Redis is not told which library speaks to it: two commands for each connection, and redis-py would have to
#: look up its own version. With TLS it is told: tickets for later sessions come over a new connection, and
#: where nothing was asked since, redis-py takes them for answers to something else
_NAMELESS: dict[str, Any] = (
    {"driver_info": None} if hasattr(redis, "DriverInfo") else {"lib_name": None, "lib_version": None}
)


def _keepalive(seconds: float) -> dict[str, Any]:
    """Options with which a connection, also one that waits, notices within `seconds` that it is cut off.

    Where the system knows them: TCP_USER_TIMEOUT (RFC 5482) is Linux's.
    """
    third = max(1, int(seconds / 3))
    wanted = {"TCP_KEEPIDLE": third, "TCP_KEEPINTVL": third, "TCP_KEEPCNT": 2}
    wanted["TCP_USER_TIMEOUT"] = int(seconds * 1000)
    known = {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
    return {"socket_keepalive": True, "socket_keepalive_options": known}


def password_from(settings: Settings) -> str | None:
    """The password in the file that the settings name, or None. Raises UsageError."""
    path = settings.redis_password_file
    if path is None:
        return None
    try:
        return path.expanduser().read_text().splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError) as exc:
        raise UsageError(
            f"cannot read redis_password_file {path}: {exc or 'it is empty'}",
            "Its first line must be the password.",
        ) from exc


def with_password(url: str, password: str | None) -> str:
    """`url` carrying `password`, where it has none of its own. Never print what this returns.

    Raises UsageError for a URL that cannot be read.
    """
    from urllib.parse import quote

    check_url(url)
    parts = sentinel.split(url)
    if password is None or parts.password is not None or parts.scheme == "unix":
        return url
    user = parts.username or ""
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def check_url(url: str) -> None:
    """Raise UsageError unless `url` has the shape of a Redis URL."""
    try:
        parts = sentinel.split(url)
        _ = sentinel.parse(url) if sentinel.is_sentinel(url) else parts.port
    except ValueError as exc:
        raise UsageError(f"cannot read the Redis URL {redacted(url)!r}: {exc}", _SHAPE) from exc
    if parts.scheme not in _SCHEMES:
        raise UsageError(f"{redacted(url)!r} is no Redis URL", _SHAPE)
    if parts.scheme != "unix" and not parts.hostname:
        raise UsageError(f"the Redis URL {redacted(url)!r} names no host", _SHAPE)


def redacted(url: str) -> str:
    """`url` without user, password and query: fit to be printed."""
    scheme, sep, rest = url.partition("://")
    if not sep:
        return "***" if "@" in url else url
    host = rest.rpartition("@")[2].partition("?")[0]
    return f"{scheme}://{host}"


def address(client: redis.Redis) -> str:
    """Where `client` connects to, fit to be printed."""
    service = sentinel.address(client)
    if service is not None:
        return service
    options = client.connection_pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"


#: every error that redis-py raises
REDIS_ERRORS = (exceptions.RedisError, exceptions.RedisClusterException)
#: how a reply begins that says why Redis takes no change -> (what that means, what to do)
_REFUSALS = {
    "OOM": ("is full and takes no new data", "Raise its maxmemory, or remove what is no longer needed."),
    "READONLY": ("is a replica and takes no change", "Name the primary with --redis URL."),
    "MISCONF": (
        "cannot write to its disk, so it takes no change",
        "Make room on its disk; its log says more. 'fleet doctor' checks it.",
    ),
    "NOREPLICAS": ("has too few replicas, so it takes no change", "Look at its replicas."),
    "MASTERDOWN": ("is a replica that lost its primary", "Name the primary with --redis URL."),
    "CLUSTERDOWN": ("is a cluster that is down", "fleet needs a Redis that is no cluster."),
    "MOVED": ("is a cluster", "fleet needs a Redis that is no cluster."),
    "CROSSSLOT": ("is a cluster", "fleet needs a Redis that is no cluster."),
    "BUSY": ("is busy with a script that does not end", "'redis-cli SCRIPT KILL' ends it."),
}
#: classes that redis-py makes of such replies; it cuts off the word they begin with
_REFUSAL_CLASSES: dict[type[Exception], str] = {
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.ClusterCrossSlotError: "CROSSSLOT",
    exceptions.AskError: "MOVED",
}


def is_wrong_type(exc: Exception) -> bool:
    """Whether Redis refused a command since its key holds something of another kind."""
    return "WRONGTYPE" in str(exc)


def replies(pipe: Pipeline) -> list[Any]:
    """Run `pipe` and return all replies; an error stands where a key holds something of another kind.

    Such a key is somebody's damage, and no reason to show nothing. Raises any other error.
    """
    found: list[Any] = pipe.execute(raise_on_error=False)
    for reply in found:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return found


def ask(client: redis.Redis, commands: Sequence[Sequence[str]]) -> list[Any]:
    """The same of so many commands, each a tuple of strings, in half the time that a pipeline takes.

    For tens of thousands: what a pipeline does for each of them, beside asking, costs more than the asking.
    """
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        return [_reply(connection) for _ in commands]
    except BaseException:
        connection.disconnect()  # what is still to come is no answer to what is asked next
        raise
    finally:
        client.connection_pool.release(connection)


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except exceptions.ResponseError as exc:
        if not is_wrong_type(exc):
            raise
        return exc


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn errors of redis-py into ours; `where` is the address.

    Raises what `explained` returns.
    """
    try:
        yield
    except (*REDIS_ERRORS, OSError) as exc:
        raise explained(exc, where) from exc


def explained(exc: BaseException, where: str) -> FleetError:
    """What an error of redis-py, or of the operating system, means to whoever speaks to `where`.

    RedisDenied where Redis said no, RedisUnreachable where it did not answer, RedisLoading while
    it reads its data, RedisRefused where it takes no change, UsageError for a database it has
    not, RedisFault for all else.
    """
    text = one_line(exc)
    if is_denied(exc):
        return RedisDenied(
            f"Redis at {where} refused us: {text}",
            "Check the password (FLEET_REDIS_URL or redis_password_file) and the rights of the user.",
        )
    if isinstance(exc, exceptions.BusyLoadingError):
        return RedisLoading(f"Redis at {where} is still reading its data", "Try again in a moment.")
    if isinstance(exc, MasterNotFoundError):
        return RedisUnreachable(
            f"there is no primary of {where}: {text}",
            "Is the service's name right, and are its sentinels up? A failover takes some seconds.",
        )
    if isinstance(exc, exceptions.ConnectionError | exceptions.TimeoutError | OSError):
        return RedisUnreachable(
            f"Redis at {where} {NOT_REACHABLE}: {text}",
            "Is it running? 'fleet broker start' starts one here; --redis URL names another.",
        )
    if isinstance(exc, exceptions.InvalidResponse):
        return RedisUnreachable(f"what answers at {where} is no Redis: {text}", _SHAPE)
    return _reply_explained(exc, text, where)


def _reply_explained(exc: BaseException, text: str, where: str) -> FleetError:
    refusal = _refusal(exc, text)
    if refusal:
        what, mend = _REFUSALS[refusal]
        return RedisRefused(f"Redis at {where} {what}: {text}", mend)
    if "DB index is out of range" in text or "invalid DB index" in text:
        return UsageError(f"Redis at {where} has no database of that number: {text}", _SHAPE)
    if "WRONGTYPE" in text:
        return RedisFault(
            f"Redis at {where} keeps something else under {_damaged_key(exc)}: {text}",
            "Somebody wrote over it. 'fleet doctor' names those that all share; --debug shows where.",
        )
    return RedisFault(f"Redis at {where} answered with an error: {text}", "--debug shows where.")


def _damaged_key(exc: BaseException) -> str:
    """The key that a command of a pipeline was about, as redis-py tells it; a script does not tell."""
    found = re.match(r"Command # \d+ \((?!EVAL)\w+ ([^\s)]+)", str(exc))
    return f"the key {found[1]}" if found else "a key of the fleet"


def _refusal(exc: BaseException, text: str) -> str | None:
    """The key in _REFUSALS that fits."""
    for kind, word in _REFUSAL_CLASSES.items():
        if isinstance(exc, kind):
            return word
    word = text.partition(" ")[0].lstrip("-")
    return word if word in _REFUSALS else None


def one_line(exc: BaseException) -> str:
    """Its text, without the address and the place in a pipeline that redis-py puts before it."""
    text = " ".join(str(exc).split())
    for prefix in (
        r"^Error -?\d+ connecting to \S+\. ",
        r"^Command # \d+ \(.*?\) of pipeline caused error: ",
    ):
        text = re.sub(prefix, "", text)
    return text or type(exc).__name__


#: what Redis 6.2 and 7.0, and later ones and Valkey, say where a script does what its user may not
_DENIED_IN_SCRIPTS = ("The user executing the script can't", "ACL failure in script")


#: how Redis begins to say that it can do nothing of the kind at the moment, for anybody
_STATES = (
    "BUSY",
    "CLUSTERDOWN",
    "DAMAGED",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM",
    "READONLY",
)


def is_refusal(exc: BaseException) -> bool:
    """Whether `exc` says that Redis is well and we are not, but cannot do what it was told."""
    if type(exc) is not exceptions.ResponseError or is_denied(exc):
        return False
    return not any(state in str(exc) for state in _STATES)


def is_denied(exc: BaseException) -> bool:
    """Whether `exc` says that Redis knows us not, or grants us not enough."""
    kinds = (
        exceptions.AuthenticationError,
        exceptions.AuthorizationError,
        exceptions.NoPermissionError,
        exceptions.AuthenticationWrongNumberOfArgsError,
    )
    text = str(exc)
    is_told = text.startswith(("NOAUTH", "WRONGPASS", "NOPERM"))
    return isinstance(exc, kinds) or is_told or any(words in text for words in _DENIED_IN_SCRIPTS)
