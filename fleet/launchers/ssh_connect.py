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
import shlex
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
from asyncssh.config import SSHClientConfig

from broker.errors import UsageError
from fleet.launchers import base, ssh_keys
from fleet.launchers.ssh_known_hosts import Entry, KnownHosts, pattern_of

log = logging.getLogger(__name__)
# asyncssh's reader passes over this option; from here on it keeps it, as text
SSHClientConfig._handlers.setdefault(
    "stricthostkeychecking", ("StrictHostKeyChecking", SSHClientConfig._set_string)
)

#: a jump through more hosts than this goes in circles
_MOST_JUMPS = 8
_DEFAULT_KNOWN_HOSTS = "~/.ssh/known_hosts"
#: seconds between two signs of life asked of a host, unless ServerAliveInterval says otherwise: an install,
#: or a long grace, is quiet for minutes, and a host that dies in it shall be noticed sooner
_ALIVE_SECONDS = 15
#: what makes a ProxyCommand one for a shell
_OF_A_SHELL = "|&;<>$`~"
#: errors that mean: no way there
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


@dataclass(frozen=True)
class SshOptions:
    """How hosts are reached. `config`: a file instead of ~/.ssh/config."""

    config: Path | None = None
    #: what was asked for; None: ConnectTimeout of ssh_config, else the default below
    connect_timeout_seconds: float | None = None
    default_connect_timeout_seconds: float = 30.0
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
    """Connect within the time that `options`, or ssh_config, give it. Raises ConnectError."""
    attempt = await _Attempt.prepared(address, options)
    seconds = (
        options.connect_timeout_seconds or attempt.timeout_seconds or options.default_connect_timeout_seconds
    )
    try:
        async with asyncio.timeout(seconds):
            return await _through_hops(attempt, options, jumps_left=_MOST_JUMPS)
    except TimeoutError:
        raise base.TimedOut(
            f"no SSH connection to {attempt.where} within {seconds:g} s",
            "Is the machine up, and does a firewall let SSH through? --connect-timeout waits longer.",
        ) from None


async def _through_hops(attempt: _Attempt, options: SshOptions, jumps_left: int) -> Connection:
    hops = await _hops(attempt.address, attempt.jumps, options, jumps_left)
    try:
        return await attempt.connected(hops)
    except BaseException:
        _close(hops)
        raise


def _close(hops: Sequence[asyncssh.SSHClientConnection]) -> None:
    for hop in reversed(hops):
        hop.close()


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
    try:
        for jump in jumps[1:]:
            attempt = await _Attempt.prepared(jump, options)
            hops.append((await attempt.connected(tuple(hops))).ssh)
    except BaseException:
        _close(hops)
        raise
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
            arguments |= _arguments_by_config(settings)
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

    @property
    def timeout_seconds(self) -> float | None:
        """ConnectTimeout of ssh_config."""
        found = self.settings.config.get("ConnectTimeout")
        return float(found) if isinstance(found, int) and found > 0 else None

    @property
    def checking(self) -> str:
        """StrictHostKeyChecking: "yes", "no" or "accept-new", which "ask" is too, as nobody is asked."""
        said = str(self.settings.config.get("StrictHostKeyChecking", "ask")).lower()
        return {"true": "yes", "false": "no", "off": "no"}.get(said, "accept-new" if said == "ask" else said)

    async def connected(self, hops: tuple[asyncssh.SSHClientConnection, ...]) -> Connection:
        """Connect, through the last of `hops`. Raises ConnectError."""
        keys = await asyncio.to_thread(ssh_keys.keys_for, self.settings)
        try:
            ssh = await asyncssh.connect(
                **self.arguments,
                **_arguments_of_keys(keys),
                known_hosts=self._known_keys,
                client_factory=lambda: _Client(self),
                tunnel=hops[-1] if hops else None,
            )
        except asyncssh.PermissionDenied as exc:
            raise await self._denied(keys) from exc
        except (OSError, asyncssh.Error, ValueError) as exc:
            raise self._explained(exc, hops) from exc
        direct = not hops and not self.settings.proxy_command
        if not direct:
            return Connection(ssh, hops)
        return Connection(ssh, is_here=_is_here(ssh), our_address=_our_address(ssh))

    def _known_keys(self, host: str, _addr: str, port: int | None) -> tuple[list[Any], ...]:
        """asyncssh asks for the keys to trust: plain, authorities, revoked."""
        self.known = self.known_hosts.find(host, self._recorded(port))
        # where any key will do, none may keep the host from showing the one it has
        kinds = ("" if self.checking == "no" else "key", "authority", "revoked")
        return tuple([entry.key for entry in self.known if entry.kind == kind] for kind in kinds)

    def _recorded(self, port: int | None) -> int | None:
        """The port under which a key is recorded: of an alias, none."""
        return None if self.settings.host_key_alias else port

    def accept_new(self, host: str, port: int | None, key: asyncssh.SSHKey) -> bool:
        """Whether to trust a key that is not among the known ones: as a rule, only if there are none."""
        self.shown_key = key.get_fingerprint()
        plain = [entry for entry in self.known if entry.kind == "key"]
        if plain:
            if self.checking == "no" and all(entry.key != key for entry in plain):
                log.warning("%s, which StrictHostKeyChecking allows", self._key_changed(self.where).message)
            return self.checking == "no"
        if self.checking == "yes":
            return False
        try:
            self.known_hosts.record(host, self._recorded(port), key)
        except OSError as exc:  # as ssh(1): the connection is made, and next time is the first again
            log.warning("the host key of %s could not be recorded: %s", host, exc)
        return True

    async def _denied(self, keys: ssh_keys.Keys) -> base.KeyDenied:
        unlock = await ssh_keys.how_to_unlock(self.settings, keys.locked)
        return base.KeyDenied(
            f"{self.where} accepts none of our keys",
            unlock or "Is our public key in ~/.ssh/authorized_keys there?",
        )

    def _explained(self, exc: Exception, hops: Sequence[object]) -> base.ConnectError:
        """Our error for one of asyncssh or the system."""
        where = self.where
        if isinstance(exc, asyncssh.HostKeyNotVerifiable | asyncssh.KeyExchangeFailed):
            if any(entry.kind != "authority" for entry in self.known):
                return self._key_changed(where)
            if self.shown_key:
                return self._key_unknown(where)
        if isinstance(exc, asyncssh.ChannelOpenError) and hops:
            return base.ConnectError(f"the jump host cannot reach {where}: {exc.reason}")
        if self.settings.proxy_command:
            command = self.settings.config.get("ProxyCommand")
            return base.ConnectError(f"no way to {where}: {exc}", f"Does its ProxyCommand work? {command}")
        if isinstance(exc, asyncssh.Error):
            return _explained_ssh(exc, where)
        return _explained_os(exc, where)

    def _key_changed(self, where: str) -> base.HostKeyChanged:
        entry = next(entry for entry in self.known if entry.kind != "authority")
        said = "is revoked by" if entry.kind == "revoked" else "is not the one in"
        name = shlex.quote(pattern_of(self._name, self._recorded(self.settings.port)))
        return base.HostKeyChanged(
            f"the host key of {where} has changed: {self.shown_key or 'what it offers'} {said} {entry}",
            "If the machine was set up anew, remove that line and run again:"
            f" ssh-keygen -f {shlex.quote(str(entry.file))} -R {name}\n"
            "If not, somebody may be listening in between.",
        )

    def _key_unknown(self, where: str) -> base.HostKeyUnknown:
        files = ", ".join(map(str, self.known_hosts.files))
        return base.HostKeyUnknown(
            f"the host key of {where} is not known, and StrictHostKeyChecking is yes: {self.shown_key}",
            f"If that is its fingerprint, add it to {files}: ssh-keyscan -p {self.settings.port}"
            f" {self.settings.host}",
        )

    @property
    def _name(self) -> str:
        """What known_hosts calls the host."""
        return self.settings.host_key_alias or self.settings.host


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
        # one limit of ours is over all hops
        "connect_timeout": None,
        "login_timeout": 0,
        "request_pty": False,
        "agent_forwarding": False,
        "x11_forwarding": False,
        "command": None,
    }
    optional = {"username": address.user, "port": address.port}
    return found | {name: value for name, value in optional.items() if value is not None}


def _arguments_by_config(settings: asyncssh.SSHClientConnectionOptions) -> dict[str, Any]:
    """Where ssh_config has to be read before it is known."""
    found: dict[str, Any] = {"keepalive_interval": settings.config.get("ServerAliveInterval", _ALIVE_SECONDS)}
    command = str(settings.config.get("ProxyCommand") or "")
    if any(sign in command for sign in _OF_A_SHELL):
        # asyncssh, which would start it by itself, takes the end of stderr for that of the connection:
        # so the shell must outlive a command that redirects it
        found["proxy_command"] = ["/bin/sh", "-c", f"( {command}\n); exit"]
    return found


def _arguments_of_keys(keys: ssh_keys.Keys) -> dict[str, Any]:
    """No key at all is an empty list, for with None the agent would not be asked either."""
    found: dict[str, Any] = {"client_keys": list(keys.pairs), "agent_identities": keys.of_agent}
    return found if keys.of_agent is None or keys.of_agent else found | {"agent_path": None}


def _known_hosts(settings: asyncssh.SSHClientConnectionOptions) -> KnownHosts:
    """The files of UserKnownHostsFile; "none" means that nothing is recorded."""
    files: Any = settings.config.get("UserKnownHostsFile", [_DEFAULT_KNOWN_HOSTS])
    of_system: Any = settings.config.get("GlobalKnownHostsFile")
    return KnownHosts(
        [Path(file).expanduser() for file in files], None if of_system is None else [*map(Path, of_system)]
    )


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


def _explained_ssh(exc: asyncssh.Error, where: str) -> base.ConnectError:
    if "Too many authentication failures" in exc.reason:
        return base.KeyDenied(
            f"{where} broke off before the right key was tried: {exc.reason}",
            "ssh-agent holds many: name the right one in ssh_config: IdentityFile, and IdentitiesOnly yes.",
        )
    return base.ConnectError(
        f"{where} broke off the SSH connection: {exc.reason}", "Does an SSH server listen there?"
    )


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
