"""`--tunnel`, from the side of `fleet up` and `down`: ask the tunnel process of this user for a host.

There is one such process for each operator and fleet (fleet/tunnel_main.py). It is asked by files
(fleet/tunnel_folder.py), so what was asked for outlives it, a reboot included.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from broker import clock, streams, tunnels
from broker.connection import address, translated
from fleet.hosts import Host
from fleet.launchers import base
from fleet.redis_server import tail
from fleet.tunnel_folder import Settings, TunnelFolder, Wish, folder_of, key_of

if TYPE_CHECKING:
    import redis

    from fleet.launchers.ssh import SshOptions

#: seconds for the tunnel process to answer, beyond those for the connection
_ANSWER_SECONDS = 60.0
#: seconds to let go of a host
_END_SECONDS = 45.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Tunnel:
    """How a host finds Redis: the URL there, and which tunnel that is."""

    redis_url: str = field(repr=False)
    tunnel_id: str


@dataclass(frozen=True)
class Tunnels:
    """The tunnels of this operator for one fleet."""

    folder: TunnelFolder
    ssh: SshOptions
    settings: Settings

    @asynccontextmanager
    async def brought(self, host: Host) -> AsyncIterator[Tunnel]:
        """Have `host` hang on Redis from now on; where what is done inside fails, only if it did before.

        Raises HostError.
        """
        key = key_of(host.key)
        before = self.folder.wish(key)
        try:
            yield await self._brought(host, key, before)
        except BaseException as exc:
            if before is None and isinstance(exc, Exception):
                with suppress(base.HostError):  # what failed before matters more
                    await end(self.folder, host)
            elif before is None:  # an interrupt: the process hears of it without us, if there is one yet
                self.folder.remove_wish(key)
                self.folder.sweep_unused()
            raise

    async def _brought(self, host: Host, key: str, before: Wish | None) -> Tunnel:
        wish = self._wish(host, before)
        self.folder.ask(key, wish, self.settings)
        longest = self.ssh.connect_timeout_seconds or self.ssh.default_connect_timeout_seconds
        deadline = clock.monotonic() + longest + _ANSWER_SECONDS
        while clock.monotonic() < deadline:
            if not self.folder.is_running():
                await asyncio.to_thread(self.folder.launch, self.settings)
            state = self.folder.state(key)
            if state and state.token == wish.token:
                if state.state == "down":
                    raise state.explained()
                url = streams.url_at_socket(self.settings.redis_url, state.path)
                return Tunnel(url, wish.tunnel_id)
            await asyncio.sleep(_LOOK_SECONDS)
        raise base.HostError(
            f"the tunnel process did not answer. Last log:\n{tail(self.folder.log)}",
            f"Log: {self.folder.log}.",
        )

    def _wish(self, host: Host, before: Wish | None) -> Wish:
        config = str(self.ssh.config.absolute()) if self.ssh.config else None
        return Wish(
            host.name,
            before.tunnel_id if before else _tunnel_id(self.folder.path.name, host),
            host.user,
            host.port,
            config,
            {name: value for name, value in asdict(self.ssh).items() if name.endswith("_seconds")},
        )


async def end(folder: TunnelFolder, host: Host) -> bool:
    """Let go of a host; whether it hung on a tunnel from here. The last one ends the process.

    Raises HostError where the process does not let go of it.
    """
    key = key_of(host.key)
    was_there = folder.wish(key) is not None or _is_held(folder, key)
    if was_there:
        folder.remove_wish(key)
        await _let_go(folder, key, host)
    folder.sweep_unused()
    return was_there


async def end_all(folder: TunnelFolder, hosts: Sequence[Host]) -> None:
    """Let go of hosts, of all at once. Raises HostError once each was tried."""
    ended = await asyncio.gather(*(end(folder, host) for host in hosts), return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, BaseException):
            raise outcome


async def _let_go(folder: TunnelFolder, key: str, host: Host) -> None:
    deadline = clock.monotonic() + _END_SECONDS
    while (_is_held(folder, key) or _is_ending(folder)) and clock.monotonic() < deadline:
        await asyncio.sleep(_LOOK_SECONDS)
    if _is_held(folder, key):
        raise base.HostError(f"the tunnel to {host.name} is still open", f"Log: {folder.log}. Run it again.")
    if not folder.is_running():
        folder.forget(key)


def _is_held(folder: TunnelFolder, key: str) -> bool:
    """Whether the process still has to let go of the host."""
    return folder.state(key) is not None and folder.is_running()


def _is_ending(folder: TunnelFolder) -> bool:
    """Whether that was the last host, and the process is still there."""
    return not folder.wishes() and folder.is_running()


def tunnels_for_up(
    client: redis.Redis, redis_url: str, ssh: SshOptions, *, lease_seconds: float, max_parallel: int
) -> Tunnels:
    """The tunnels of this operator. Raises UsageError where that Redis cannot be handed on."""
    streams.check_can_be_handed_on(redis_url)
    with translated(address(client)):
        fleet = tunnels.fleet_id(client, make=True)
    url, auth_sock = streams.with_whole_paths(redis_url), os.environ.get("SSH_AUTH_SOCK")
    settings = Settings(url, lease_seconds, max_parallel, auth_sock)
    return Tunnels(folder_of(str(fleet)), ssh, settings)


def folder_for(client: redis.Redis) -> TunnelFolder | None:
    """Where this operator's tunnels for the fleet would be; None where the fleet never had any."""
    with translated(address(client)):
        fleet = tunnels.fleet_id(client, make=False)
    return folder_of(fleet) if fleet else None


def _tunnel_id(fleet: str, host: Host) -> str:
    """Another for each operator: two may hold tunnels to one host, and must not take each other's socket."""
    whose = f"{fleet} {os.getuid()} {socket.gethostname()} {host.key}"
    return hashlib.sha256(whose.encode()).hexdigest()[:12]
