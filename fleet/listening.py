"""Addresses and ports to listen on: which are this machine's, which are free."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence

from broker.errors import FleetError, UsageError

LOOPBACK = "127.0.0.1"
#: every IPv4 address of the machine, loopback included; "::" stands for the IPv6 ones alone
EVERY_IPV4 = "0.0.0.0"
EVERY_IPV6 = "::"
EVERY_ADDRESS = (EVERY_IPV4, EVERY_IPV6)
#: ports tried, from the one wanted upwards
PORTS_TRIED = 100


def addresses(host: str) -> tuple[str, ...]:
    """What to bind so that `host` and loopback are listened on.

    A name that has several addresses stands for its first, IPv4 before IPv6. Raises
    UsageError for a host that is not this machine.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"--host {host}: {exc}", "Give an address or a name of this machine.") from exc
    address = str(min(found, key=lambda info: info[0] != socket.AF_INET)[4][0])
    if listen_error(address, 0) is not None:
        raise UsageError(f"--host {host}: {address} is no address of this machine")
    return (address,) if address in (LOOPBACK, EVERY_IPV4) else (LOOPBACK, address)


def covers(bound_to: Sequence[str], address: str) -> bool:
    """Whether a server that is bound to `bound_to` is reached at `address` of this machine."""
    return address in bound_to or (EVERY_IPV6 if ":" in address else EVERY_IPV4) in bound_to


def still_ours(hosts: tuple[str, ...], say: Callable[[str], None]) -> tuple[str, ...]:
    """Those of `hosts` that are addresses of this machine (still); `say` is told of the others."""
    lost = [host for host in hosts if listen_error(host, 0) is not None]
    for host in lost:
        say(f"{host} is no longer an address of this machine.")
    return tuple(host for host in hosts if host not in lost)


def ports(first: int) -> range:
    """The ports to try. Raises UsageError for a number that is no port."""
    if not 1 <= first <= 65535:
        raise UsageError(f"--port must be from 1 to 65535, got {first}")
    return range(first, min(first + PORTS_TRIED, 65536))


def can_listen(hosts: tuple[str, ...], port: int, say: Callable[[str], None]) -> bool:
    """Whether `port` is free on all `hosts`; `say` is told where not.

    Raises FleetError where something else forbids it.
    """
    for host in hosts:
        number = listen_error(host, port)
        if number == errno.EADDRINUSE:
            say(f"Port {port} of {host} is taken by another program; trying the next one.")
            return False
        if number is not None:
            raise FleetError(f"cannot listen on {bracketed(host)}:{port}: {os.strerror(number)}")
    return True


def listen_error(host: str, port: int) -> int | None:
    """The errno of listening as Redis does, or None; port 0 asks about the address alone."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as exc:
        return exc.errno or errno.EINVAL
    return None


def bracketed(host: str) -> str:
    """`host` as it stands before a port."""
    return f"[{host}]" if ":" in host else host
