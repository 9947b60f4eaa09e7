"""This machine as a host, without SSH: the same verbs through subprocesses."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

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

    async def _execute(self, command: str, stdin: str, limit_seconds: float) -> Output:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", command), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        try:
            async with asyncio.timeout(limit_seconds):
                out, err = await process.communicate(stdin.encode())
        except TimeoutError:
            raise base.CommandTimeout(f"a command did not end within {limit_seconds:g} s") from None
        finally:
            await _ended(process)
        return Output(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Leave no process behind, whatever interrupted us."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        await process.wait()
