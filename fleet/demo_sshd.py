"""An SSH server of our own on loopback that plays several hosts, for `fleet demo` and for tests.

Each host has a port, a home and a host key of its own; the protocol, the keys, the shells and
the processes are real. Only the key made for the occasion opens it, only from this machine.
Runs in a thread (`with DemoHosts(folder, names) as hosts:`) or as a process that outlives
its parent (`python -I -m fleet.demo_sshd FOLDER NAME...`, ended by SIGTERM).

    FOLDER/ssh_config        Host NAME for each; for `fleet up --ssh-config`
    FOLDER/hosts.txt         the names, one a line
    FOLDER/id, id.pub        the key that opens them
    FOLDER/known_hosts       empty at first: filled as with any other host
    FOLDER/NAME/             the home of a host
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import asyncssh

from broker import names as checked

USER = "demo"
ADDRESS = "127.0.0.1"
_CHUNK_BYTES = 65536
#: seconds that sessions get to end when the server does
_SESSION_SECONDS = 5.0
#: what a session is given of the environment of whoever started the server
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class DemoHost:
    """One of the hosts: its alias in ssh_config, its port, its home."""

    name: str
    port: int
    home: Path


class DemoHosts:
    """Several hosts, from `start` to `stop`; also a context manager, with or without async."""

    def __init__(
        self, folder: Path, names: Sequence[str], *, environ: Mapping[str, str] | None = None
    ) -> None:
        """`environ` is added to what every session there finds. Raises UsageError for a bad name."""
        self.folder = folder.resolve()
        self.names = tuple(checked.worker_name(name) for name in names)
        self.hosts: tuple[DemoHost, ...] = ()
        self._environ = dict(environ or {})
        self._servers: list[asyncssh.SSHAcceptor] = []
        self._sessions: set[asyncio.Task[None]] = set()
        self._processes: set[asyncio.subprocess.Process] = set()
        self._connections: set[asyncssh.SSHServerConnection] = set()
        self._thread: _LoopThread | None = None

    @property
    def ssh_config(self) -> Path:
        """For `fleet up --ssh-config`, or `ssh -F`."""
        return self.folder / "ssh_config"

    @property
    def hosts_file(self) -> Path:
        """For `fleet up`."""
        return self.folder / "hosts.txt"

    async def start(self) -> DemoHosts:
        """Make keys, listen, write the files. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = _key(self.folder / "id")
        self.hosts = tuple([await self._host(name, key) for name in self.names])
        _write(self.ssh_config, "".join(self._stanza(host) for host in self.hosts))
        _write(self.hosts_file, "".join(f"{name}\n" for name in self.names))
        return self

    async def stop(self) -> None:
        """Close every connection, end what its commands still run. Started workers are not ours."""
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.close()
            await connection.wait_closed()
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        # each has its process collected before the loop may end; what left its group may hold the streams
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=_SESSION_SECONDS)
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()

    async def _host(self, name: str, key: asyncssh.SSHKey) -> DemoHost:
        home = self.folder / name
        home.mkdir(exist_ok=True, mode=0o700)
        server = await asyncssh.listen(
            *(ADDRESS, 0),
            server_host_keys=[_key(self.folder / f"{name}.host-key")],
            server_factory=functools.partial(_OnlyOurKey, key.convert_to_public(), self._connections),
            process_factory=functools.partial(self._begin, home),
            sftp_factory=True,
            encoding=None,
            config=[],
        )
        self._servers.append(server)
        return DemoHost(name, server.get_port(), home)

    def _begin(self, home: Path, session: asyncssh.SSHServerProcess[bytes]) -> None:
        """Run a session in a task of ours: one of asyncssh's would be cut with the connection."""
        task = asyncio.get_running_loop().create_task(self._run(home, session))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def _run(self, home: Path, session: asyncssh.SSHServerProcess[bytes]) -> None:
        """Run the command of a session as a real process, its streams joined to the client's."""
        if session.command is None:
            session.stderr.write(b"There is no login here, only commands.\n")
            session.exit(1)
            return
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", session.command),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=home,
            env=self._session_environ(home),
            start_new_session=True,
        )
        self._processes.add(process)
        feeding = asyncio.create_task(_feed(session.stdin, process.stdin))
        try:
            await asyncio.gather(_copy(process.stdout, session.stdout), _copy(process.stderr, session.stderr))
            status = _exit_status(await process.wait())
        finally:
            feeding.cancel()
            self._processes.discard(process)
        with suppress(OSError, asyncssh.Error):
            session.exit(status)

    def _session_environ(self, home: Path) -> dict[str, str]:
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return {
            **passed,
            "HOME": str(home),
            "USER": USER,
            "LOGNAME": USER,
            "SHELL": "/bin/sh",
            **self._environ,
        }

    def _stanza(self, host: DemoHost) -> str:
        lines = {
            "HostName": ADDRESS,
            "Port": host.port,
            "User": USER,
            "IdentityFile": f'"{self.folder / "id"}"',
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": f'"{self.folder / "known_hosts"}"',
        }
        return f"Host {host.name}\n" + "".join(f"  {name} {value}\n" for name, value in lines.items())

    async def __aenter__(self) -> DemoHosts:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def __enter__(self) -> DemoHosts:
        self._thread = _LoopThread()
        try:
            self._thread.run(self.start())
        except BaseException:
            self._thread.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread:
            self._thread.run(self.stop())
            self._thread.close()


class _OnlyOurKey(asyncssh.SSHServer):
    """Lets in who has the key that was made for the occasion, and nobody else."""

    def __init__(self, key: asyncssh.SSHKey, connections: set[asyncssh.SSHServerConnection]) -> None:
        self._key = key
        self._connections = connections

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._connections.add(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self._connection)

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return username == USER and key == self._key


async def _feed(client: asyncssh.SSHReader[bytes], program: asyncio.StreamWriter | None) -> None:
    """What the client sends, until it has no more, goes away, or the program reads no more."""
    if program is None:
        return
    with suppress(OSError, asyncssh.Error):
        while data := await client.read(_CHUNK_BYTES):
            program.write(data)
            await program.drain()
    program.close()


async def _copy(program: asyncio.StreamReader | None, client: asyncssh.SSHWriter[bytes]) -> None:
    """What the program prints. A client that goes away ends no program: the rest is read and dropped."""
    while program and (data := await program.read(_CHUNK_BYTES)):
        with suppress(OSError, asyncssh.Error):
            client.write(data)
            await client.drain()


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="demo-sshd", daemon=True)
        self._thread.start()

    def run(self, work: Any) -> Any:
        """Do `work`, a coroutine, there and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the loop and the thread."""
        self.run(self._cancelled())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancelled(self) -> None:
        """Let what is under way end, so that nothing is destroyed while pending."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_default_executor()


def _key(path: Path) -> asyncssh.SSHKey:
    """The key in `path`, made if it is not there: a host that starts again is the same host."""
    if not path.exists():
        key = asyncssh.generate_private_key("ssh-ed25519")
        _write(path, key.export_private_key().decode())
        _write(path.with_name(f"{path.name}.pub"), key.export_public_key().decode())
    return asyncssh.read_private_key(path)


def _write(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _exit_status(code: int) -> int:
    """As a shell tells it: 128 and the number of the signal."""
    return code if code >= 0 else 128 - code


async def _serve(folder: Path, names: Sequence[str]) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with DemoHosts(folder, names) as hosts:
        sys.stdout.write(f"{hosts.ssh_config}\n")
        sys.stdout.flush()
        await stopped.wait()


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; prints the path of ssh_config when it listens."""
    parser = argparse.ArgumentParser(prog="python -I -m fleet.demo_sshd", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    arguments = parser.parse_args(argv)
    asyncio.run(_serve(arguments.folder, arguments.names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
