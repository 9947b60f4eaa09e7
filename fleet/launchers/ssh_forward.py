"""A reverse forward over SSH: a unix socket at the host, and at our end whatever `dial` opens.

A socket and not a port: none but the user who logs in there (and root) can open it, no network sees it
whatever sshd's GatewayPorts, and a session of sshd that has not yet noticed that we are gone cannot keep
it from us. OpenSSH removes no socket when a session ends (`unix_listener` in its misc.c), so we do.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncssh

from fleet.launchers import base
from fleet.launchers.ssh_connect import Address, Connection, SshOptions, connect

log = logging.getLogger(__name__)

Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

#: folders for the socket at a host, the first that will do; the second for a home that is too long a
#: path for a socket, or whose disk takes none
_FOLDERS = '"${XDG_STATE_HOME:-$HOME/.local/state}/rq-fleet/tunnel" "/tmp/rq-fleet-$(id -u)"'
#: what a unix socket's path may have (sockaddr_un holds 104 bytes on macOS, 108 on Linux)
_LONGEST_PATH = 100
_MARK = "rq-fleet-socket:"
#: with what is done at each path after it, and "done"
_EACH = """\
umask 077
session() {{ set -- $(cat "/proc/$1/stat" 2>/dev/null); case "$2" in "(sshd"*) echo "$1 ${{22}}";; esac; }}
for folder in {folders}; do
  path="$folder/{name}"
"""
#: names the paths where we may listen. The session of sshd that listened there before is ended: workers
#: would wait on its connections, which lead nowhere. It is known by its start time, not by its PID alone.
_PREPARE = f"""\
  [ ${{#path}} -le {_LONGEST_PATH} ] && mkdir -p "$folder" || continue
  [ -O "$folder" ] && [ ! -L "$folder" ] || continue
  chmod 700 "$folder"
  before=$(cat "$path.sshd" 2>/dev/null)
  [ -n "$before" ] && [ "$before" = "$(session "${{before%% *}}")" ] && kill "${{before%% *}}"
  rm -f "$path"
  session "$PPID" > "$path.sshd"
  echo "{_MARK}$path"
done
"""
#: not what a later session has there by now, for this may arrive late
_REMOVE = """\
  case "$(cat "$path.sshd" 2>/dev/null)" in ""|"$(session "$PPID")") rm -f "$path" "$path.sshd";; esac
done
"""
_FORBIDDEN = (
    "Its sshd_config must allow it: AllowStreamLocalForwarding yes (or remote), no DisableForwarding;"
    " nor may authorized_keys say restrict or no-port-forwarding for our key."
)
#: seconds that this may take: a host may be cut off when it is let go of
_REMOVE_SECONDS = 10.0
_LARGEST_READ = 2**16


class ForwardRefused(base.HostError):
    """The host's sshd, or its file system, lets us listen nowhere."""

    code = "forward_refused"


@dataclass(frozen=True)
class Forward:
    """A socket at a host that leads here for as long as the connection holds."""

    path: str
    _connection: Connection

    async def wait_closed(self) -> None:
        """Wait until the connection has ended, by whomever. Never raises but when cancelled."""
        await _quietly(self._connection.ssh.wait_closed())

    async def close(self) -> None:
        """Remove the socket and let go of the host. Never raises."""
        await _remove(self._connection, _each_at(self.path))
        await self._connection.close()


async def open_forward(
    address: Address,
    options: SshOptions,
    *,
    name: str,
    path: str | None,
    dial: Dial,
    keepalive_seconds: float,
) -> Forward:
    """Have a host listen at `path`, or where it may for a socket of that `name`; `dial` is the other end.

    A connection that has fallen silent is given up after three times `keepalive_seconds`.
    Raises ConnectError, ForwardRefused, HostError.
    """
    connection = await connect(address, options)
    each = _each_at(path) if path else _EACH.format(folders=_FOLDERS, name=name)
    try:
        connection.ssh.set_keepalive(keepalive_seconds, 2)
        found = await _listen(connection, options.command_timeout_seconds, each, dial)
        return Forward(found, connection)
    except BaseException:
        await asyncio.shield(asyncio.create_task(_abandon(connection, each)))
        raise


def _each_at(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return _EACH.format(folders=shlex.quote(folder), name=name)


async def _abandon(connection: Connection, each: str) -> None:
    await _remove(connection, each)
    await connection.close()


async def _listen(connection: Connection, limit_seconds: float, each: str, dial: Dial) -> str:
    paths = await _prepared(connection, each + _PREPARE, limit_seconds)
    for candidate in paths:
        try:
            async with asyncio.timeout(limit_seconds):
                await connection.ssh.start_unix_server(lambda: _Relay(dial), candidate, encoding=None)
        except asyncssh.ChannelListenError:
            continue
        except (TimeoutError, OSError, asyncssh.Error) as exc:
            raise base.Disconnected(f"the SSH connection broke: {exc}") from exc
        for other in paths:
            if other != candidate:
                await _remove(connection, _each_at(other))
        return candidate
    raise ForwardRefused(f"sshd there refuses to forward {' or '.join(paths)} to us", _FORBIDDEN)


async def _prepared(connection: Connection, script: str, limit_seconds: float) -> list[str]:
    """The paths that the host's answer names. Raises HostError."""
    try:
        said = await _shell(connection, script, limit_seconds)
    except TimeoutError:
        raise base.CommandTimeout(f"a command there did not end within {limit_seconds:g} s") from None
    except (OSError, asyncssh.Error) as exc:
        raise base.Disconnected(f"the SSH connection broke: {exc}") from exc
    lines = str(said.stdout or "").splitlines()
    paths = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]
    if not paths:
        why = " / ".join(str(said.stderr or "").strip().splitlines()[-3:])
        raise ForwardRefused(
            f"there is no folder there for a socket of ours: {why or 'it did not say why'}",
            "One of ~/.local/state/rq-fleet/tunnel and /tmp/rq-fleet-UID must be that user's own.",
        )
    return paths


async def _shell(connection: Connection, script: str, limit_seconds: float) -> asyncssh.SSHCompletedProcess:
    async with asyncio.timeout(limit_seconds):
        return await connection.ssh.run("exec /bin/sh -s", input=script, errors="replace")


async def _remove(connection: Connection, each: str) -> None:
    await _quietly(_shell(connection, each + _REMOVE, _REMOVE_SECONDS))


async def _quietly(work: Awaitable[Any]) -> None:
    try:
        await work
    except (TimeoutError, OSError, asyncssh.Error):
        pass


class _Relay:
    """What asyncssh calls with each connection that is made to the socket."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial

    async def __call__(self, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
        """Hand bytes both ways until one end has no more."""
        try:
            far_reader, far_writer = await self._dial()
        except OSError as exc:
            log.warning("a worker's connection cannot be handed on: %s", exc)
            writer.close()
            return
        ways = {
            asyncio.create_task(_hand_on(reader, far_writer)),
            asyncio.create_task(_hand_on(far_reader, writer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            far_writer.close()
            writer.close()
            await asyncio.gather(*ways, return_exceptions=True)


async def _hand_on(reader: Any, writer: Any) -> None:
    try:
        while data := await reader.read(_LARGEST_READ):
            writer.write(data)
            await writer.drain()
    except (OSError, asyncssh.Error):
        return
