"""The hosts kept in Redis, so that `up`, `down` and `status` need no file again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from broker import hosts as rows
from broker.connection import address, translated
from broker.errors import NotFound, UsageError
from fleet.hosts import Host, NoHosts

if TYPE_CHECKING:
    import redis

#: options that a host has for good once it has them: `down` must look where `up` started, and who came
#: by a tunnel comes by it again
SETTLED = ("output_dir", "tunnel")


def load(client: redis.Redis) -> tuple[Host, ...]:
    """All that are kept, none being fine. Raises RedisUnreachable, UsageError for a damaged row."""
    with translated(address(client)):
        return tuple(Host.from_json(row) for row in rows.kept(client).values())


def check(client: redis.Redis, hosts: Sequence[Host]) -> None:
    """Raises UsageError where workers of `hosts` would be named like those of another host that is kept."""
    kept = load(client)
    for host in hosts:
        for other in kept:
            if host.key != other.key and host.worker_base.lower() == other.worker_base.lower():
                raise UsageError(
                    f"workers of {host.name} would be named like those of {other.name}, which is kept",
                    f"Name one of them otherwise, or let go of the other: 'fleet hosts remove {other.name}'.",
                )


def keep(client: redis.Redis, hosts: Sequence[Host]) -> None:
    """Add hosts; one that is kept already is replaced."""
    with translated(address(client)):
        rows.keep(client, {host.key: host.to_json() for host in hosts})


def settled(
    client: redis.Redis, hosts: Sequence[Host], chosen: Mapping[str, Any], *, named: bool
) -> tuple[Host, ...]:
    """`hosts` with the options of SETTLED settled.

    What the line of a file says, if `named`, comes first, then what was `chosen` for all, then what is kept.
    """
    kept = {host.key: host.options for host in load(client)}

    def option(host: Host, name: str) -> Any:
        line = getattr(host.options, name) if named else None
        said = (line, chosen.get(name), getattr(kept.get(host.key), name, None))
        return next((one for one in said if one is not None), None)

    return tuple(host.with_options(**{name: option(host, name) for name in SETTLED}) for host in hosts)


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
