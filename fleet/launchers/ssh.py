"""A host over SSH: one connection for every step, a limit on every command."""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import asyncssh

from fleet.launchers import base
from fleet.launchers.shell import INSTALL_FACTOR, Output, ShellLauncher
from fleet.launchers.ssh_connect import Address, Connection, SshOptions, connect

__all__ = ["Address", "SshLauncher", "SshOptions", "open_launcher"]

_LOST = "Run it again: what is there already costs nothing."


class SshLauncher(ShellLauncher):
    """The verbs over one open connection."""

    def __init__(self, connection: Connection, options: SshOptions, *, python: str | None = None) -> None:
        super().__init__(python=python, limit_seconds=options.command_timeout_seconds)
        self._connection = connection
        self.is_here = connection.is_here
        self.our_address = connection.our_address

    async def close(self) -> None:
        await self._connection.close()

    async def _execute(self, command: str, stdin: str, limit_seconds: float) -> Output:
        try:
            async with asyncio.timeout(limit_seconds):
                return await self._run(command, stdin)
        except TimeoutError:
            raise base.CommandTimeout(
                f"a command there did not end within {limit_seconds:g} s",
                "Is the machine overloaded, or its disk hung?",
            ) from None
        except (OSError, asyncssh.Error) as exc:
            raise base.Disconnected(f"the SSH connection broke: {exc}", _LOST) from exc

    @asynccontextmanager
    async def _opened(self, command: str, stdin: str) -> AsyncIterator[_Running]:
        try:
            async with asyncio.timeout(self._limit):
                process = await self._connection.ssh.create_process(command, encoding=None)
        except TimeoutError:
            raise base.CommandTimeout(f"no command could be run there within {self._limit:g} s") from None
        except (OSError, asyncssh.Error) as exc:
            raise base.Disconnected(f"the SSH connection broke: {exc}", _LOST) from exc
        running = _Running(process)
        try:
            process.stdin.write(stdin.encode())
            process.stdin.write_eof()
            yield running
        finally:
            running.close()

    async def _run(self, command: str, stdin: str) -> Output:
        process = await self._connection.ssh.create_process(command, errors="replace")
        try:
            try:
                out, err = await process.communicate(stdin)
            except BrokenPipeError:  # it ended without reading all of that: what it said tells why
                out, err = await process.communicate()
            await process.wait_closed()
        finally:
            process.close()
        if process.exit_status is None:
            raise base.Disconnected("the SSH connection broke while a command ran there", _LOST)
        return Output(process.exit_status, str(out or ""), str(err or ""))

    async def _upload(self, files: Mapping[str, bytes]) -> None:
        try:
            async with asyncio.timeout(self._limit * INSTALL_FACTOR):
                await self._put(files)
        except TimeoutError:
            raise base.CommandTimeout("what is to be installed could not be brought in time", _LOST) from None
        except asyncssh.SFTPError as exc:
            raise base.InstallFailed(
                f"could not write to {posixpath.dirname(next(iter(files)))} there: {exc.reason}",
                "Is there space, and may we?",
            ) from exc
        except (OSError, asyncssh.Error) as exc:
            raise base.Disconnected(f"the SSH connection broke, or offers no SFTP: {exc}", _LOST) from exc

    async def _put(self, files: Mapping[str, bytes]) -> None:
        """Write the files, or take away the folders that were made for them."""
        folders = {posixpath.dirname(path) for path in files}
        async with self._connection.ssh.start_sftp_client() as sftp:
            try:
                for folder in folders:
                    await sftp.makedirs(folder, exist_ok=True)
                for path, data in files.items():
                    async with sftp.open(path, "wb") as file:
                        await file.write(data)
            except asyncssh.SFTPError:
                for folder in folders:
                    await sftp.rmtree(folder, ignore_errors=True)
                raise


class _Running:
    """A command whose output is read as it comes."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._process = process
        self._errors = asyncio.create_task(self._last_errors())

    async def read(self, size: int) -> bytes:
        try:
            return await self._process.stdout.read(size)
        except (OSError, asyncssh.Error) as exc:
            raise base.Disconnected(f"the SSH connection broke: {exc}", _LOST) from exc

    async def ended(self) -> tuple[int | None, str]:
        await self._process.wait_closed()
        if self._process.exit_status is None:
            raise base.Disconnected("the SSH connection broke while a command ran there", _LOST)
        return self._process.exit_status, (await self._errors).decode("utf-8", "replace")

    def close(self) -> None:
        """Let go of it; what still runs there finds nobody who listens."""
        self._process.close()
        self._errors.cancel()

    async def _last_errors(self) -> bytes:
        """Its stderr has to be read for its stdout to go on."""
        last = b""
        try:
            while data := await self._process.stderr.read(4096):
                last = (last + data)[-4096:]
        except (OSError, asyncssh.Error):
            pass  # reading stdout tells
        return last


async def open_launcher(address: Address, options: SshOptions, *, python: str | None = None) -> SshLauncher:
    """Connect to a host. Raises ConnectError."""
    return SshLauncher(await connect(address, options), options, python=python)
