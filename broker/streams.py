"""Bytes to and from Redis, for whoever hands them on: a tunnel, which speaks no Redis itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlunsplit

from redis import connection
from redis.asyncio.connection import SSLConnection

from broker import sentinel
from broker.errors import UsageError

#: what a URL of Redis may name a file with
_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def check_can_be_handed_on(url: str) -> None:
    """Raise UsageError where Redis is not one place, for a tunnel has one end."""
    if sentinel.is_sentinel(url):
        raise UsageError(
            "a tunnel leads to one Redis, and this URL names sentinels, which name another at every failover",
            "Name the primary itself for hosts that need --tunnel: --redis redis://HOST:PORT/DB.",
        )


def url_at_socket(url: str, path: str) -> str:
    """The URL of the same database, user and password where Redis is found at a unix socket.

    TLS ends where the tunnel begins: whoever connects through it is spared certificates.
    """
    known = _parsed(url)
    user, password = (quote(str(known.get(name) or ""), safe="") for name in ("username", "password"))
    login = f"{user}:{password}@" if password else ""
    return f"unix://{login}{quote(path)}?db={known.get('db', 0)}"


def with_whole_paths(url: str) -> str:
    """`url` with the files that it names for TLS spelled from the root: it will be used elsewhere."""
    parts = sentinel.split(url)
    if not any(f"{name}=" in parts.query for name in _FILES):
        return url
    words = [
        (name, str(Path(value).absolute()) if name in _FILES else value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
    ]
    return urlunsplit(parts._replace(query=urlencode(words)))


async def open_stream(url: str) -> Stream:
    """Connect to the Redis of `url` as a client would: by TCP, TLS or a unix socket. Raises OSError."""
    known = _parsed(url)
    if "path" in known:
        return await asyncio.open_unix_connection(known["path"])
    context = None
    if url.startswith("rediss:"):
        tls = {name: value for name, value in known.items() if name.startswith("ssl_")}
        context = SSLConnection(**tls).ssl_context.get()
    return await asyncio.open_connection(known.get("host", "localhost"), known.get("port", 6379), ssl=context)


def _parsed(url: str) -> dict[str, Any]:
    """What a URL of Redis says, by the names that redis-py has for it."""
    return dict(connection.parse_url(url))  # type: ignore[no-untyped-call]
