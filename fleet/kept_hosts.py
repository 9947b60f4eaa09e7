"""The hosts kept in Redis, so that `up`, `down` and `status` need no file again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker import hosts as rows
from broker.connection import address, translated
from broker.errors import NotFound
from fleet.hosts import Host, NoHosts

if TYPE_CHECKING:
    import redis


def load(client: redis.Redis) -> tuple[Host, ...]:
    """All that are kept, none being fine. Raises RedisUnreachable, UsageError for a damaged row."""
    with translated(address(client)):
        return tuple(Host.from_json(row) for row in rows.kept(client).values())


def keep(client: redis.Redis, hosts: Sequence[Host]) -> None:
    """Add hosts; one that is kept already is replaced."""
    with translated(address(client)):
        rows.keep(client, {host.key: host.to_json() for host in hosts})


def remove(client: redis.Redis, names: Sequence[str]) -> None:
    """Remove hosts. Raises NotFound, and then removes none."""
    chosen = choose(client, names)
    with translated(address(client)):
        rows.remove(client, [host.key for host in chosen])


def choose(client: redis.Redis, names: Sequence[str]) -> tuple[Host, ...]:
    """The kept hosts of these names; all of them for no name. Raises NotFound, NoHosts."""
    known = {host.key: host for host in load(client)}
    if not names:
        return tuple(known.values()) or _none()
    wanted = [Host(name.strip("[]")).key for name in names]
    missing = [name for name, key in zip(names, wanted, strict=True) if key not in known]
    if missing:
        raise NotFound(f"no host {', '.join(missing)} is kept", "'fleet hosts list' shows those that are.")
    return tuple(known[key] for key in dict.fromkeys(wanted))


def _none() -> tuple[Host, ...]:
    raise NoHosts
