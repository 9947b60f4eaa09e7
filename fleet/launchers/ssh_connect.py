"""Opening one SSH connection: ssh_config and agent honoured, nothing ever asked of a person.

New host keys are accepted once and recorded, changed ones refused. Each way in which it can
fail has its own error. Connections through ProxyJump are opened here hop by hop, so the same
holds for every hop.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

from broker.errors import UsageError
from fleet.launchers import base
from fleet.launchers.ssh_known_hosts import Entry, KnownHosts

log = logging.getLogger(__name__)

#: a jump through more hosts than this goes in circles
_MOST_JUMPS = 8
_DEFAULT_KNOWN_HOSTS = "~/.ssh/known_hosts"
#: errors that mean: no way there
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


@dataclass(frozen=True)
class SshOptions:
    """How hosts are reached. `config`: a file instead of ~/.ssh/config."""

    config: Path | None = None
    connect_timeout_seconds: float = 30.0
    command_timeout_seconds: float = 30.0

    def checked(self) -> SshOptions:
        """Return itself. Raises UsageError where `config` cannot be read."""
        if self.config is not None:
            try:
                self.config.read_bytes()
            except OSError as exc:
                raise UsageError(f"cannot read --ssh-config {self.config}: {exc.strerror}") from exc
        return self


@dataclass(frozen=True)
class Address:
    """Where to connect: as the user wrote it, before ssh_config is asked."""

    host: str
    user: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Connection:
    """An open connection and the hops that it goes through; `is_here`: to this very machine.

    `our_address` is this machine's at its end of the connection; None where others are in between.
    """

    ssh: asyncssh.SSHClientConnection
    hops: tuple[asyncssh.SSHClientConnection, ...] = ()
    is_here: bool = False
    our_address: str | None = None

    async def close(self) -> None:
        """Close it and its hops. Never raises."""
        for connection in (self.ssh, *reversed(self.hops)):
            connection.close()
            try:
                async with asyncio.timeout(2):
                    await connection.wait_closed()
            except (TimeoutError, OSError, asyncssh.Error):
                connection.abort()


async def connect(address: Address, options: SshOptions) -> Connection:
    """Connect within `options.connect_timeout_seconds`. Raises ConnectError."""
    attempt: _Attempt | None = None
    try:
        async with asyncio.timeout(options.connect_timeout_seconds):
            attempt = await _Attempt.prepared(address, options)
            return await _through_hops(attempt, options, jumps_left=_MOST_JUMPS)
    except TimeoutError:
        where = attempt.where if attempt else address.host
        raise base.TimedOut(
            f"no SSH connection to {where} within {options.connect_timeout_seconds:g} s",
            "Is the machine up, and does a firewall let SSH through? --connect-timeout waits longer.",
        ) from None


async def _through_hops(attempt: _Attempt, options: SshOptions, jumps_left: int) -> Connection:
    hops = await _hops(attempt.address, attempt.jumps, options, jumps_left)
    try:
        return await attempt.connected(hops)
    except BaseException:
        for hop in reversed(hops):
            hop.close()
        raise


async def _hops(
    address: Address, jumps: Sequence[Address], options: SshOptions, jumps_left: int
) -> tuple[asyncssh.SSHClientConnection, ...]:
    """Connections to the hosts of ProxyJump, each opened through the one before it."""
    if not jumps or jumps[-1].host == address.host:
        return ()
    if jumps_left < len(jumps):
        raise base.ConnectError(f"ProxyJump to {address.host} goes in circles", "Mend your ssh_config.")
    first = await _through_hops(await _Attempt.prepared(jumps[0], options), options, jumps_left - 1)
    hops = [*first.hops, first.ssh]
    for jump in jumps[1:]:
        attempt = await _Attempt.prepared(jump, options)
        hops.append((await attempt.connected(tuple(hops))).ssh)
    return tuple(hops)


@dataclass
class _Attempt:
    """One try to connect, and what it learnt of the host's key."""

    address: Address
    settings: asyncssh.SSHClientConnectionOptions
    arguments: dict[str, Any]
    known_hosts: KnownHosts
    #: what was known of the host when it showed its key
    known: list[Entry] = field(default_factory=list)
    shown_key: str = ""

    @classmethod
    async def prepared(cls, address: Address, options: SshOptions) -> _Attempt:
        """Read ssh_config for `address`. Raises ConnectError."""
        arguments = _arguments(address, options)
        try:
            settings = await asyncssh.SSHClientConnectionOptions.construct(client_keys=None, **arguments)
        except (ValueError, OSError) as exc:
            raise base.ConnectError(
                f"ssh_config: {exc}", "Mend that file, or name another with --ssh-config."
            ) from exc
        return cls(address, settings, arguments, _known_hosts(settings))

    @property
    def where(self) -> str:
        """The host for people: what was written, and what ssh_config makes of it."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        real = f"{self.settings.username}@{host}:{self.settings.port}"
        return real if self.settings.host == self.address.host else f"{self.address.host} ({real})"

    @property
    def jumps(self) -> list[Address]:
        """The hosts of ProxyJump, first hop first."""
        tunnel = self.settings.tunnel
        return [_jump(word) for word in tunnel.split(",")] if isinstance(tunnel, str) else []

    async def connected(self, hops: tuple[asyncssh.SSHClientConnection, ...]) -> Connection:
        """Connect, through the last of `hops`. Raises ConnectError."""
        try:
            ssh = await asyncssh.connect(
                **self.arguments,
                client_keys=_identities(self.settings),
                ignore_encrypted=True,
                known_hosts=self._known_keys,
                client_factory=lambda: _Client(self),
                tunnel=hops[-1] if hops else None,
            )
        except (OSError, asyncssh.Error, ValueError) as exc:
            raise self._explained(exc, hops) from exc
        direct = not hops and not self.settings.proxy_command
        if not direct:
            return Connection(ssh, hops)
        return Connection(ssh, is_here=_is_here(ssh), our_address=_our_address(ssh))

    def _known_keys(self, host: str, _addr: str, port: int | None) -> tuple[list[Any], ...]:
        """asyncssh asks for the keys to trust: plain, authorities, revoked."""
        self.known = self.known_hosts.find(host, None if self.settings.host_key_alias else port)
        kinds = ("key", "authority", "revoked")
        return tuple([entry.key for entry in self.known if entry.kind == kind] for kind in kinds)

    def accept_new(self, host: str, port: int | None, key: asyncssh.SSHKey) -> bool:
        """Whether to trust a key that is not among the known ones: only if there are none."""
        self.shown_key = key.get_fingerprint()
        if any(entry.kind == "key" for entry in self.known):
            return False
        try:
            self.known_hosts.record(host, None if self.settings.host_key_alias else port, key)
        except OSError as exc:  # as ssh(1): the connection is made, and next time is the first again
            log.warning("the host key of %s could not be recorded: %s", host, exc)
        return True

    def _explained(self, exc: Exception, hops: Sequence[object]) -> base.ConnectError:
        """Our error for one of asyncssh or the system."""
        where = self.where
        changed = isinstance(exc, asyncssh.HostKeyNotVerifiable | asyncssh.KeyExchangeFailed)
        if changed and any(entry.kind != "authority" for entry in self.known):
            return self._key_changed(where)
        if isinstance(exc, asyncssh.PermissionDenied):
            return base.KeyDenied(
                f"{where} accepts none of our keys",
                "Is our public key in ~/.ssh/authorized_keys there? A key with a passphrase needs ssh-agent.",
            )
        if isinstance(exc, asyncssh.ChannelOpenError) and hops:
            return base.ConnectError(f"the jump host cannot reach {where}: {exc.reason}")
        if isinstance(exc, asyncssh.Error):
            return base.ConnectError(
                f"{where} broke off the SSH connection: {exc.reason}", "Does an SSH server listen there?"
            )
        return _explained_os(exc, where)

    def _key_changed(self, where: str) -> base.HostKeyChanged:
        entry = next(entry for entry in self.known if entry.kind != "authority")
        said = "is revoked by" if entry.kind == "revoked" else "is not the one in"
        return base.HostKeyChanged(
            f"the host key of {where} has changed: {self.shown_key or 'what it offers'} {said} {entry}",
            "If the machine was set up anew, remove that line and run again;"
            " if not, somebody may be listening in between.",
        )


class _Client(asyncssh.SSHClient):
    """Tells the attempt about a host key that is not known."""

    def __init__(self, attempt: _Attempt) -> None:
        self._attempt = attempt

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        del addr
        return self._attempt.accept_new(host, port, key)


def _arguments(address: Address, options: SshOptions) -> dict[str, Any]:
    """What every connection gets. Nothing here may ask for a password."""
    found: dict[str, Any] = {
        "host": address.host,
        # (): ~/.ssh/config, which options made without a word of it would not read
        "config": options.config or (),
        "password_auth": False,
        "kbdint_auth": False,
        # ours ends it first, over all hops
        "login_timeout": 2 * options.connect_timeout_seconds,
        "request_pty": False,
        "command": None,
    }
    optional = {"username": address.user, "port": address.port}
    return found | {name: value for name, value in optional.items() if value is not None}


def _known_hosts(settings: asyncssh.SSHClientConnectionOptions) -> KnownHosts:
    """The files of UserKnownHostsFile; "none" means that nothing is recorded."""
    files: Any = settings.config.get("UserKnownHostsFile", [_DEFAULT_KNOWN_HOSTS])
    return KnownHosts([Path(file).expanduser() for file in files])


def _identities(settings: asyncssh.SSHClientConnectionOptions) -> list[str]:
    """The files of IdentityFile that exist; as in ssh(1), one that is missing is passed over."""
    named: Any = settings.config.get("IdentityFile", [])
    return [str(path) for path in (Path(name).expanduser() for name in named) if path.is_file()]


def _jump(word: str) -> Address:
    """[user@]host[:port] of ProxyJump."""
    user, at, rest = word.strip().removeprefix("ssh://").rpartition("@")
    host, colon, port = rest.rpartition(":")
    if colon and port.isdigit():
        return Address(host.strip("[]"), user if at else None, int(port))
    return Address(rest.strip("[]"), user if at else None)


def _is_here(ssh: asyncssh.SSHClientConnection) -> bool:
    """Whether the peer is this machine: a loopback address, or the one that we ourselves have."""
    peer, own = ssh.get_extra_info("peername"), ssh.get_extra_info("sockname")
    if not peer or not own:
        return False
    return bool(peer[0] == own[0]) or ipaddress.ip_address(peer[0].partition("%")[0]).is_loopback


def _our_address(ssh: asyncssh.SSHClientConnection) -> str | None:
    """Our end of the connection; an address that holds for one link alone is of no use elsewhere."""
    own = ssh.get_extra_info("sockname")
    if not own:
        return None
    address = ipaddress.ip_address(own[0].partition("%")[0])
    return None if address.is_link_local else str(address)


def _explained_os(exc: Exception, where: str) -> base.ConnectError:
    numbers = set(_numbers(exc))
    if isinstance(exc, socket.gaierror | UnicodeError):  # a label that no name may have
        return base.NameNotResolved(
            f"{where}: no address is known for that name",
            "Is it spelled right? ssh_config may name another HostName.",
        )
    if errno.ECONNREFUSED in numbers:
        return base.Refused(f"{where} refused the connection", "Does sshd run there, and on that port?")
    if isinstance(exc, TimeoutError) or errno.ETIMEDOUT in numbers:
        return base.TimedOut(
            f"{where} does not answer", "Is the machine up, and does a firewall let SSH through?"
        )
    if numbers & set(_UNREACHABLE):
        return base.ConnectError(f"there is no way to {where}: {exc}", "Check the address and the network.")
    return base.ConnectError(f"cannot connect to {where}: {exc}")


def _numbers(exc: Exception) -> Iterator[int]:
    """The errno of an error; asyncio hides those of several addresses in one text."""
    if isinstance(exc, OSError) and exc.errno is not None:
        yield exc.errno
    yield from (
        number
        for number in (*_UNREACHABLE, errno.ETIMEDOUT, errno.ECONNREFUSED)
        if f"[Errno {number}]" in str(exc)
    )
