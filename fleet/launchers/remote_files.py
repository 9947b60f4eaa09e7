"""The files of one host's output folder: listed, fetched as a stream, removed. See agent_files.py."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fleet.launchers import base
from fleet.launchers.agent import Json
from fleet.launchers.agent_files import HOLE_BYTES
from fleet.launchers.frames import Frame, nonsense, understood

#: has the host do what a request says, and yields its frames, and its answer as b"A". Raises HostError.
Streamer = Callable[[Json], AsyncGenerator[Frame, None]]
#: where files of ours are; what lies elsewhere is no business of a host
_FOLDERS = ("log", "output", "jobs")
_MOST = 2**63 - 1


@dataclass(frozen=True)
class RemoteFile:
    """A file of ours at a host, its path below the output folder. Its time tells whether it is unchanged."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Problem:
    """A file, or folder, that could not be dealt with."""

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """What there is. `passed_over` counts symbolic links, sockets and the like."""

    files: tuple[RemoteFile, ...]
    passed_over: int
    #: how many folders could not be read; `problems` names the first of them
    failed: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Users:
    """Who uses an output folder."""

    #: the workers, of any host, that left a trace there: whether their processes live at this host
    lives: dict[str, bool]
    #: the fleets whose workers noted that they use it
    fleets: frozenset[str]


@dataclass(frozen=True)
class Removed:
    """What became of files that were to be removed; `kept` are in use, or have changed since."""

    files: int = 0
    total_bytes: int = 0
    kept: int = 0
    #: how many could not be removed; `problems` names the first of them
    failed: int = 0
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """A file to be sent, from `offset` on if what lies before it has that SHA-256, else from its start."""

    file: RemoteFile
    offset: int
    sha256: str


class Receiver(Protocol):
    """Takes the files that are sent, one after the other."""

    def begin(self, wanted: Wanted, offset: int, now: RemoteFile) -> None:
        """`now` follows, from `offset` on."""

    def data(self, data: bytes) -> None:
        """Its next bytes."""

    def hole(self, length: int) -> None:
        """So many bytes of zeros, which take no room."""

    def end(self, size: int, sha256: str) -> None:
        """It ends; `sha256` is that of all of it, as the host computed it."""

    def missing(self, wanted: Wanted, reason: str, *, gone: bool) -> None:
        """It could not be read (any further); `gone`: somebody has removed it."""


class RemoteFolder:
    """What the workers of a host left in an output folder. Every method raises HostError."""

    def __init__(self, streamer: Streamer, output_dir: str | None, base_name: str) -> None:
        self._streamer = streamer
        self._about = {"output_dir": output_dir, "base": base_name}

    async def listing(self) -> Listing:
        """The files there are."""
        rows, answer = await self._asked("list_files")
        with understood():
            files = tuple(_file(*row) for row in rows)
            passed_over, failed = _count(answer["passed_over"]), _count(answer["failed"])
            return Listing(files, passed_over, failed, _problems(answer))

    async def users(self) -> Users:
        """Who uses the folder."""
        _, answer = await self._asked("workers_there")
        with understood():
            lives = {str(name): bool(lives) for name, lives in answer["workers"]}
            return Users(lives, frozenset(map(str, answer["fleets"])))

    async def fetch(self, wanted: Sequence[Wanted], receiver: Receiver) -> None:
        """Have these files sent to `receiver`."""
        rows = [[want.file.path, want.offset, want.sha256] for want in wanted]
        async with aclosing(self._streamer({"verb": "send_files", "files": rows, **self._about})) as frames:
            async for kind, data in frames:
                if kind == b"D":
                    receiver.data(data)
                elif kind == b"H":
                    receiver.hole(_hole(data))
                    await asyncio.sleep(0)  # it was hashed, and others wait
                elif kind == b"J":
                    _told(receiver, wanted, data)()

    async def remove(self, files: Sequence[RemoteFile], alive: Sequence[str]) -> Removed:
        """Remove those that are unchanged. `alive`: the workers of which it is known that they live there."""
        rows = [[file.path, file.size, file.mtime_ns] for file in files]
        _, answer = await self._asked("remove_files", files=rows, alive=list(alive))
        return _removed(answer)

    async def clear(self, *, force: bool) -> Removed:
        """Remove all that is ours. Raises InUse where a worker lives, unless `force`."""
        _, answer = await self._asked("remove_logs", force=force)
        return _removed(answer)

    async def _asked(self, verb: str, **more: Any) -> tuple[list[Any], Json]:
        """The rows of the documents that came, and the answer."""
        rows: list[Any] = []
        answer: Json = {}
        async with aclosing(self._streamer({"verb": verb, **self._about, **more})) as frames:
            async for kind, data in frames:
                with understood():
                    if kind == b"J":
                        rows += json.loads(data)
                    elif kind == b"A":
                        answer = json.loads(data)
        return rows, answer


def _told(receiver: Receiver, wanted: Sequence[Wanted], data: bytes) -> Callable[[], None]:
    """What a document has to tell the receiver. Raises CommandFailed."""
    with understood():
        document = json.loads(data)
        want = wanted[_count(document["index"])]
        if "error" in document:
            return partial(receiver.missing, want, str(document["error"]), gone=bool(document["gone"]))
        size = _count(document["size"])
        if "sha256" in document:
            return partial(receiver.end, size, str(document["sha256"]))
        now = _file(want.file.path, size, document["mtime_ns"])
        return partial(receiver.begin, want, _count(document["offset"]), now)


def _file(path: str, size: int, mtime_ns: int) -> RemoteFile:
    """A host may say what it likes, but no path of it leads out of our folders. Raises CommandFailed."""
    top, *parts = path.split("/")
    if top not in _FOLDERS or not parts or any(p in ("", ".", "..") for p in parts) or "\0" in path:
        raise base.CommandFailed(f"the host names a file {path!r}, which may not be")
    return RemoteFile(path, _count(size), _count(mtime_ns, least=-_MOST))


def _hole(data: bytes) -> int:
    with understood():
        (length,) = struct.unpack(">Q", data)
    if length > HOLE_BYTES:
        raise nonsense()
    return int(length)


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _MOST:
        raise ValueError(value)
    return value


def _removed(answer: Json) -> Removed:
    with understood():
        files, size, kept, failed = (_count(answer[name]) for name in ("files", "bytes", "kept", "failed"))
        return Removed(files, size, kept, failed, _problems(answer))


def _problems(answer: Json) -> tuple[Problem, ...]:
    return tuple(Problem(str(path), str(reason)) for path, reason in answer["problems"])
