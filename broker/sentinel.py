"""URLs that name a service watched by Redis Sentinel, for failover.

    redis+sentinel://[user:password@]host1[:26379],host2.../SERVICE[/db][?sentinel_password=...]

User and password are those of Redis itself; the sentinels' own, where they ask for one, are the query's
`sentinel_username` and `sentinel_password`. `rediss+sentinel://` speaks TLS to both, with the query's
`ssl_ca_certs` and whatever else redis-py reads from a URL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import redis
from redis import connection, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

SCHEMES = ("redis+sentinel", "rediss+sentinel")
SHAPE = "Use redis+sentinel://[user:password@]host1:26379,host2:26379/SERVICE[/db]."
_PORT = 26379
_OWN = {"sentinel_username": "username", "sentinel_password": "password"}
_parse_url: Any = connection.parse_url  # both are untyped there
_Sentinel: Any = Sentinel
#: seconds for a sentinel to answer, before the next one is asked
_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Service:
    """A service, and the sentinels that know its primary; the options are arguments of `redis.Redis`."""

    name: str
    sentinels: tuple[tuple[str, int], ...]
    options: Mapping[str, Any] = field(repr=False)
    sentinel_options: Mapping[str, Any] = field(repr=False)

    def client(self, **options: Any) -> redis.Redis:
        """A client, not yet connected: each connection asks the sentinels for the primary when it opens."""
        asking = {"protocol": 2, "retry": Retry(NoBackoff(), 0), **self.sentinel_options}
        manager: Any = _Sentinel(self.sentinels, sentinel_kwargs=asking)
        kind = _TlsConnection if self.options.get("ssl") else _Connection
        found: redis.Redis = manager.master_for(
            self.name, connection_class=kind, **{**options, **self.options}
        )
        return found


def watchers(client: redis.Redis) -> int | None:
    """How many of the sentinels that `client` knows answer; None where it knows none."""
    pool = client.connection_pool
    if not isinstance(pool, SentinelConnectionPool):
        return None
    return sum(_heard(one) is None for one in pool.sentinel_manager.sentinels)


class _Connection(SentinelManagedConnection):
    """Asks for the primary whenever it opens, also when a command opens it.

    The one of redis-py asks in `connect` alone: used without, it goes where it was last, or to localhost.
    """

    def connect(self) -> None:
        try:
            super().connect()  # type: ignore[no-untyped-call]
        except MasterNotFoundError:
            raise self._explained() from None  # its own text has what may be a password

    def _explained(self) -> exceptions.ConnectionError:
        """Why there is no primary: AuthenticationError where every sentinel says that it knows us not."""
        proxy: Any = self.connection_pool
        said = [_heard(one) for one in proxy.sentinel_manager.sentinels]
        if all(isinstance(one, exceptions.AuthenticationError) for one in said):
            return exceptions.AuthenticationError(f"the sentinels refused us: {said[0]}")
        silent = f"; {len(said) - said.count(None)} of them do not answer" if any(said) else ""
        return MasterNotFoundError(f"its sentinels name no primary{silent}")

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self._sock:
            self.connect()
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


def _heard(one: redis.Redis) -> exceptions.RedisError | None:
    """What is wrong with a sentinel."""
    try:
        one.ping()
    except exceptions.RedisError as exc:
        return exc
    return None


class _TlsConnection(_Connection, SentinelManagedSSLConnection):
    """The same over TLS."""


def address(client: redis.Redis) -> str | None:
    """What service `client` speaks to and who watches it, for people; None where it is a server's."""
    pool = client.connection_pool
    if not isinstance(pool, SentinelConnectionPool):
        return None
    watchers = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    where = ", ".join(f"{one['host']} port {one['port']}" for one in watchers)
    return f"{pool.service_name} (of the sentinels at {where})"


def is_sentinel(url: str) -> bool:
    """Whether `url` names a service rather than a server."""
    return url.partition("://")[0] in SCHEMES


def split(url: str) -> SplitResult:
    """As `urllib.parse.urlsplit`, which, of newer Pythons, refuses an IPv6 address among several."""
    if not is_sentinel(url):
        return urlsplit(url)
    scheme, _, rest = url.partition("://")
    netloc = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return urlsplit("//host" + rest.removeprefix(netloc))._replace(scheme=scheme, netloc=netloc)


def parse(url: str) -> Service:
    """Read such a URL. Raises ValueError, whose text names no secret."""
    parts = split(url)
    login, _, hosts = parts.netloc.rpartition("@")
    name, _, number = parts.path.strip("/").partition("/")
    if not name:
        raise ValueError("it names no service")
    if number and not number.isdigit():
        raise ValueError(f"{number!r} is no number of a database")
    own, shared = _query(parts.query, tls=parts.scheme.startswith("rediss"))
    options = {**shared, **_login(login)}
    if number:
        options["db"] = int(number)
    sentinels = tuple(_address(host) for host in hosts.split(",") if host)
    if not sentinels:
        raise ValueError("it names no sentinel")
    patience = {"socket_timeout": _PATIENCE_SECONDS, "socket_connect_timeout": _PATIENCE_SECONDS}
    return Service(unquote(name), sentinels, options, {**patience, **_of_any_server(shared), **own})


def _query(query: str, *, tls: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is the sentinels' own, what else there is, as redis-py reads it)."""
    words = dict(parse_qsl(query))
    own = {_OWN[name]: value for name, value in words.items() if name in _OWN}
    rest = urlencode({name: value for name, value in words.items() if name not in _OWN})
    shared: dict[str, Any] = _parse_url(f"redis://host/?{rest}")
    shared.pop("host")
    return own | ({"ssl": True} if tls else {}), shared | ({"ssl": True} if tls else {})


def _of_any_server(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that sentinels need as well: how TLS is spoken."""
    return {name: value for name, value in options.items() if name.startswith("ssl")}


def _login(text: str) -> dict[str, str]:
    user, _, password = text.partition(":")
    found = {"username": unquote(user), "password": unquote(password)}
    return {name: value for name, value in found.items() if value}


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} is no address of a sentinel")
    return parts.hostname, parts.port or _PORT  # a port that is none raises ValueError
