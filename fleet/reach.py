"""At which address a host finds Redis.

A Redis that is named by an address of a network is found there by all. The embedded broker is
named by loopback, which is right for this machine alone: another one is given an address that
the broker listens on, if there is one, and the one that this machine has in its eyes if possible.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit, urlunsplit

from broker import sentinel
from broker.connection import redacted
from fleet.embedded import restart_command
from fleet.launchers import base
from fleet.listening import EVERY_ADDRESS, bracketed, covers

_BY_SSH = "With --tunnel it is brought there over SSH."
_LOOPBACK_NAMES = ("localhost", "ip6-localhost")


def url_for(redis_url: str, bound_to: Sequence[str], probe: base.Probe) -> str:
    """The URL of Redis for the host that `probe` describes.

    `bound_to`: the addresses that the embedded broker listens on; empty where `redis_url` is
    that of another Redis. Raises RedisOutOfReach.
    """
    if probe.is_here or not is_loopback(redis_url):
        return redis_url
    address = _reachable(bound_to, probe.our_address)
    if address is None:
        raise base.RedisOutOfReach(
            f"Redis listens at {redacted(redis_url)}, out of that machine's reach",
            _way_out(urlsplit(redis_url), bound_to, probe.our_address),
        )
    return moved(redis_url, address)


def is_loopback(redis_url: str) -> bool:
    """Whether only this machine reaches Redis at that URL."""
    if sentinel.is_sentinel(redis_url):
        return all(_is_loopback(host) for host, _ in sentinel.parse(redis_url).sentinels)
    parts = urlsplit(redis_url)
    return parts.scheme == "unix" or _is_loopback(parts.hostname or "")


def _is_loopback(host: str) -> bool:
    if host in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reachable(bound_to: Sequence[str], our_address: str | None) -> str | None:
    """Our address as the host sees it if the broker listens there, else another of a network."""
    if our_address and covers(bound_to, our_address):
        return our_address
    others = (address for address in bound_to if address not in EVERY_ADDRESS)
    return next((address for address in others if not ipaddress.ip_address(address).is_loopback), None)


def _way_out(url: SplitResult, bound_to: Sequence[str], our_address: str | None) -> str:
    """What to type so that the host finds Redis."""
    address = our_address or "ADDRESS"
    meant = "" if our_address else " (ADDRESS: this machine's in a network that the host reaches)"
    if bound_to:
        command = restart_command(address)
        return f"{_BY_SSH} Or let it listen on a network, then run this again: {command}{meant}"
    if url.scheme in sentinel.SCHEMES:
        return f"Let Redis and its sentinels listen on a network, and name these so: {sentinel.SHAPE}"
    is_socket = url.scheme == "unix"
    scheme, port, path = ("redis", "PORT", "") if is_socket else (url.scheme, url.port or 6379, url.path)
    return (
        f"{_BY_SSH} Or let that Redis listen on a network, with a password, and name it by its address there:"
        f" --redis {scheme}://{bracketed(address)}:{port}{path}{meant}"
    )


def moved(redis_url: str, address: str) -> str:
    """`redis_url` with another address, its password, port and database kept."""
    parts = urlsplit(redis_url)
    login, at, _ = parts.netloc.rpartition("@")
    port = f":{parts.port}" if parts.port else ""
    return urlunsplit(parts._replace(netloc=f"{login}{at}{bracketed(address)}{port}"))
