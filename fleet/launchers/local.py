"""This machine as a host, without SSH: the same verbs through subprocesses."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fleet.bundle import Bundle
from fleet.launchers import base
from fleet.launchers.shell import Output, ShellLauncher


class LocalLauncher(ShellLauncher):
    """Workers beside us, run by the interpreter that runs us unless another is named."""

    is_here = True

    def __init__(self, *, python: str | None = None, limit_seconds: float = 30.0) -> None:
        super().__init__(python=python or sys.executable, limit_seconds=limit_seconds)

    async def install(self, bundle: Bundle, wheelhouse: Path | None = None) -> str:
        """We are installed: nothing is brought. Another interpreter must have rq-fleet already."""
        del bundle, wheelhouse
        return (self._found or await self.probe()).python

    async def close(self) -> None:
        """There is nothing to let go of."""

    async def _upload(self, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(data)

    @asynccontextmanager
    async def _opened(self, command: str, stdin: str) -> AsyncIterator[_Running]:
        running = _Running(await _started(command), stdin)
        try:
            yield running
        finally:
            await running.close()

    async def _execute(self, command: str, stdin: str, limit_seconds: float) -> Output:
        process = await _started(command)
        try:
            async with asyncio.timeout(limit_seconds):
                out, err = await process.communicate(stdin.encode())
        except TimeoutError:
            raise base.CommandTimeout(f"a command did not end within {limit_seconds:g} s") from None
        finally:
            await _ended(process)
        return Output(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


async def _started(command: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", command), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )


class _Running:
    """A command whose output is read as it comes."""

    def __init__(self, process: asyncio.subprocess.Process, stdin: str) -> None:
        self._process: Any = process  # its three pipes are there
        self._said = asyncio.create_task(self._talk(stdin.encode()))

    async def read(self, size: int) -> bytes:
        data: bytes = await self._process.stdout.read(size)
        return data

    async def ended(self) -> tuple[int | None, str]:
        return await self._process.wait(), (await self._said).decode("utf-8", "replace")

    async def close(self) -> None:
        """End it if it has not ended."""
        self._said.cancel()
        await _ended(self._process)

    async def _talk(self, stdin: bytes) -> bytes:
        """Write its input, and read its stderr: the end of it is enough."""
        last = b""
        try:
            self._process.stdin.write(stdin)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it ended without reading all of that: what it said tells why
        self._process.stdin.close()
        while data := await self._process.stderr.read(4096):
            last = (last + data)[-4096:]
        return last


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Leave no process behind, whatever interrupted us."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        await process.wait()
