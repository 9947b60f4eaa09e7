"""Connections to Redis: one way to open them, one place where their errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from broker.errors import RedisDenied, RedisUnreachable, UsageError
from broker.settings import Settings

#: what answers at all
OLDEST_REDIS = (6, 2)
_SCHEMES = ("redis", "rediss", "unix")
_SHAPE = "Use redis://[:password@]host:port/db, rediss://... or unix:///path/to/socket."


def connect(url: str, *, password: str | None = None, timeout_seconds: float | None = 15.0) -> redis.Redis:
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
        "socket_connect_timeout": min(timeout_seconds or 15.0, 15.0),
        "socket_keepalive": True,
    }
    if url.startswith("unix"):
        options.pop("socket_keepalive")
    if password is not None:
        options["password"] = password
    try:
        return redis.Redis.from_url(url, **options)
    except (ValueError, TypeError) as exc:
        raise UsageError(f"cannot read the Redis URL {redacted(url)!r}: {exc}", _SHAPE) from exc


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
    """`url` carrying `password`, where it has none of its own. Never print what this returns."""
    from urllib.parse import quote

    parts = urlsplit(url)
    if password is None or parts.password is not None or parts.scheme == "unix":
        return url
    user = parts.username or ""
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def check_url(url: str) -> None:
    """Raise UsageError unless `url` has the shape of a Redis URL."""
    try:
        parts = urlsplit(url)
        _ = parts.port
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
    options = client.connection_pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn redis-py's connection and permission errors into ours; `where` is the address.

    Raises RedisDenied where Redis said no, RedisUnreachable where it did not answer.
    """
    try:
        yield
    except (exceptions.AuthenticationError, exceptions.NoPermissionError) as exc:
        raise RedisDenied(
            f"Redis at {where} refused us: {exc}",
            "Check the password (FLEET_REDIS_URL or redis_password_file) and the rights of the user.",
        ) from exc
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as exc:
        raise RedisUnreachable(
            f"Redis at {where} is not reachable: {exc}",
            "Is it running? 'fleet broker start' starts one here; --redis URL names another.",
        ) from exc
    except exceptions.ResponseError as exc:
        if not is_denied(exc):
            raise
        raise RedisDenied(
            f"Redis at {where} refused us: {exc}",
            "Check the password (FLEET_REDIS_URL or redis_password_file) and the rights of the user.",
        ) from exc


def is_denied(exc: BaseException) -> bool:
    """Whether `exc` says that Redis knows us not, or grants us not enough."""
    if isinstance(exc, exceptions.AuthenticationError | exceptions.NoPermissionError):
        return True
    return str(exc).startswith(("NOAUTH", "WRONGPASS", "NOPERM"))
