"""What agent_files.py sends, as it comes: frames, and the answer below them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from fleet.launchers import agent, base
from fleet.launchers.agent_files import FRAMES

Value = TypeVar("Value")
#: the kind of a frame, and what is in it
Frame = tuple[bytes, bytes]
_READ_BYTES = 2**18
_BEGIN = f"\n{agent.MARK}{FRAMES}\n".encode()
#: what a login shell may print before the frames
_MOST_NOISE_BYTES = 2**20
#: the most that a frame holds, and what follows the last one
_MOST_BYTES = 2**22
_KINDS = b"JDH."


@contextmanager
def understood() -> Iterator[None]:
    """What a host said is read inside. Raises CommandFailed where it makes no sense."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as exc:
        raise nonsense() from exc


def nonsense() -> base.CommandFailed:
    return base.CommandFailed(
        "the host answers nonsense", "Is its Python the one that it says, and does nothing print between?"
    )


class Source(Protocol):
    """The output of a command."""

    async def read(self, size: int) -> bytes:
        """At most `size` bytes, as soon as there are some; none at its end. Raises Disconnected."""
        ...


class FrameReader:
    """Reads frames; each read has a limit, the whole has none."""

    def __init__(self, source: Source, limit_seconds: float) -> None:
        self._source = source
        self._limit = limit_seconds
        self._buffer = bytearray()

    async def frames(self) -> AsyncIterator[Frame]:
        """All frames; none where the command printed something else. Raises HostError."""
        if not await self._begun():
            return
        while await self._has(5) and self._buffer[:1] != b"\n":
            kind, length = struct.unpack(">cI", self._taken(5))
            if kind not in _KINDS or length > _MOST_BYTES:
                raise nonsense()
            if not await self._has(length):
                return
            yield kind, self._taken(length)

    async def rest(self) -> str:
        """What follows the last frame, or all there is where none came. Raises HostError."""
        while await self._more():
            if len(self._buffer) > _MOST_BYTES:
                raise nonsense()
        return self._buffer.decode("utf-8", "replace")

    async def limited(self, work: Awaitable[Value]) -> Value:
        """What `work` returns. Raises CommandTimeout where that takes too long."""
        try:
            async with asyncio.timeout(self._limit):
                return await work
        except TimeoutError:
            raise base.CommandTimeout(
                f"nothing came from there for {self._limit:g} s",
                "Is the machine overloaded, or its disk hung? Run it again: what came is kept.",
            ) from None

    async def _begun(self) -> bool:
        while (at := self._buffer.find(_BEGIN)) < 0:
            if len(self._buffer) > _MOST_NOISE_BYTES or not await self._more():
                return False
        self._taken(at + len(_BEGIN))
        return True

    async def _has(self, length: int) -> bool:
        """Whether so many bytes are there, or come."""
        while len(self._buffer) < length:
            if not await self._more():
                return False
        return True

    async def _more(self) -> bool:
        """Read on; False at the end."""
        data = await self.limited(self._source.read(_READ_BYTES))
        self._buffer += data
        return bool(data)

    def _taken(self, length: int) -> bytes:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data
