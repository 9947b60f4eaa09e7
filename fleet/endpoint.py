"""How scripts that run elsewhere find Redis: by a URL without its password, and a file that has that.

No secret is in a script, so it may be kept, mailed and printed. The file is the one that the settings or the
embedded broker have; for a password that stands in the URL one is made, 0600, in this user's state folder.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlunsplit

from broker import sentinel
from broker.connection import check_url, redacted
from broker.errors import FleetError, RedisUnreachable, UsageError
from fleet import reach
from fleet.embedded import EmbeddedBroker, restart_command
from fleet.embedded import state_dir as broker_dir
from fleet.embedded_folder import RunningBroker, atomic_file
from fleet.listening import EVERY_ADDRESS, bracketed, covers
from fleet.worker_config import state_dir

Say = Callable[[str], None]

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECRETS = ("password", "sentinel_password", "ssl_password")
_NAME_IT = "Name its machine as workers see it: --redis-host NAME (127.0.0.1, if they are on this machine)."


@dataclass(frozen=True)
class Endpoint:
    """`url` holds no password; `password_file` is absolute, or '' where Redis asks for none."""

    url: str
    password_file: str = ""

    @property
    def environ(self) -> dict[str, str]:
        """The variables that tell a worker of it."""
        file = {"FLEET_REDIS_PASSWORD_FILE": self.password_file} if self.password_file else {}
        return {"FLEET_REDIS_URL": self.url, **file}


def configured(url: str, password_file: Path | None, redis_host: str | None, say: Say) -> Endpoint:
    """Of the Redis at `url`, whose password may be in `password_file`.

    `redis_host` takes the place of its host's name. `say` is told of a file that is made. Raises UsageError
    for what cannot be told without a secret, or is out of others' reach.
    """
    check_url(url)
    parts = sentinel.split(url)
    if any(name in _SECRETS for name, _ in parse_qsl(parts.query)):
        raise UsageError(
            f"the query of the URL {redacted(url)} holds a password, which no script may hold",
            "Use a Redis whose password can stand in redis_password_file.",
        )
    if redis_host is not None:
        url = _moved(url, _checked(redis_host))
    elif reach.is_loopback(url):
        raise UsageError(f"Redis listens at {redacted(url)}, out of other machines' reach", _NAME_IT)
    if parts.password:
        password_file = _kept(url, unquote(parts.password), say)
    return Endpoint(
        _without_password(url), str(password_file.expanduser().absolute()) if password_file else ""
    )


def of_embedded(redis_host: str | None) -> Endpoint:
    """Of this user's embedded broker, which must run and listen on a network.

    `redis_host` names this machine as workers see it; else it is an address that the broker listens on.
    Raises RedisUnreachable, UsageError.
    """
    broker = EmbeddedBroker(broker_dir())
    running = _running(broker, "no Redis is configured and the embedded broker of this user is not running")
    host = _address(running) if redis_host is None else _listening(running, _checked(redis_host))
    return Endpoint(f"redis://{bracketed(host)}:{running.port}/0", str(broker.folder.password_file))


def embedded_url(redis_host: str) -> str:
    """The URL of this user's embedded broker, password included, for who calls this machine `redis_host`.

    Raises RedisUnreachable, UsageError.
    """
    running = _running(EmbeddedBroker(broker_dir()), "the embedded broker of this user is not running")
    return running.url_for(_listening(running, _checked(redis_host)))


def _running(broker: EmbeddedBroker, otherwise: str) -> RunningBroker:
    running = broker.running()
    if running is None:
        raise RedisUnreachable(
            otherwise,
            "Start it where workers reach it: fleet broker start --host ADDRESS.",
        )
    return running


def _address(running: RunningBroker) -> str:
    of_networks = [host for host in running.hosts if not reach.is_loopback(f"redis://{bracketed(host)}")]
    if not of_networks:
        raise UsageError(
            f"the embedded Redis listens on {', '.join(running.hosts)}, out of other machines' reach",
            f"Let it listen on a network: {restart_command('ADDRESS')}",
        )
    return next((host for host in of_networks if host not in EVERY_ADDRESS), socket.gethostname())


def _listening(running: RunningBroker, host: str) -> str:
    """`host`, if the broker listens there. Raises UsageError."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as exc:
        raise UsageError(f"--redis-host {host}: {exc}", _NAME_IT) from exc
    if not any(covers(running.hosts, address) for address in found):
        raise UsageError(
            f"--redis-host {host}: the embedded Redis listens on {', '.join(running.hosts)} alone",
            f"Let it listen there: {restart_command(host)}",
        )
    return host


def _checked(host: str) -> str:
    if not _HOST.fullmatch(host) and not _is_address(host):
        raise UsageError(f"--redis-host {host!r} is no name and no address of a machine", _NAME_IT)
    return host


def _is_address(host: str) -> bool:
    """An IPv6 one without a zone, which means nothing to other machines."""
    try:
        return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False


def _moved(url: str, host: str) -> str:
    parts = sentinel.split(url)
    if sentinel.is_sentinel(url) or parts.scheme == "unix":
        raise UsageError(
            f"--redis-host does not go with {redacted(url)}",
            "Name Redis by its address in a network: --redis URL.",
        )
    return reach.moved(url, host)


def _without_password(url: str) -> str:
    parts = sentinel.split(url)
    login, _, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@{host}" if user else host))


def _kept(url: str, password: str, say: Say) -> Path:
    """The file in which that password is; one for each Redis."""
    bare = _without_password(url)
    folder = state_dir() / "passwords"
    file = folder / hashlib.sha256(bare.encode()).hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_file(file) as target:
            target.write(f"{password}\n".encode())
    except OSError as exc:
        raise FleetError(
            f"cannot write {file}: {exc.strerror or exc}", "XDG_STATE_HOME names another place."
        ) from exc
    say(f"The password of Redis is in {file} (0600): workers read it there.")
    return file
