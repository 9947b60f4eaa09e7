"""The copies of a host's files in a folder of this machine, continued where an earlier run was cut off.

A copy lies at its own place from its first byte on, and is at all times the beginning of what the host
has: so what a cut leaves is continued by the next run, and a log that grew by its new end. It gets the
time of the file there only when it is whole, so a copy of that size and time is not fetched again. What
is no beginning of the host's file - a log of an earlier life, removed there since - is never overwritten,
but put aside as NAME.~1~, NAME.~2~.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from broker.errors import Conflict
from fleet.launchers import base
from fleet.launchers.remote_files import Problem, RemoteFile, Wanted

_BLOCK_BYTES = 2**18
_ZEROS = bytes(_BLOCK_BYTES)


@dataclass
class _File:
    """The copy that is being written. `digest` is that of all that is in it."""

    path: Path
    now: RemoteFile
    offset: int
    descriptor: int
    digest: hashlib._Hash
    length: int


@dataclass
class Copies:
    """A `Receiver` that writes into `folder`. `durable`: what is whole is on the disk, too."""

    folder: Path
    durable: bool
    #: told of bytes that need not be fetched any more
    on_bytes: Callable[[int], None]
    #: what is here, whole and verified, as the host had it
    whole: list[RemoteFile] = field(default_factory=list)
    fetched_bytes: int = 0
    fetched_files: int = 0
    problems: list[Problem] = field(default_factory=list)
    aside: int = 0
    #: the digests of what is here already, by path
    _digests: dict[str, hashlib._Hash] = field(default_factory=dict)
    _file: _File | None = None
    #: whether whoever waits for our hashes has gone
    _is_cut: bool = False

    def has(self, file: RemoteFile) -> bool:
        """Whether a whole copy is here, as far as size and time tell."""
        try:
            found = (self.folder / file.path).lstat()
        except OSError:
            return False
        same = (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns)
        return same and stat.S_ISREG(found.st_mode)

    def wanted(self, files: Sequence[RemoteFile]) -> list[Wanted]:
        """What to ask for: the hash of what is here is computed. Blocks for as long as that takes."""
        return [self._wanted(file) for file in files]

    def _wanted(self, file: RemoteFile) -> Wanted:
        length, digest = 0, hashlib.sha256()
        try:
            with _opened(self.folder / file.path, os.O_RDONLY) as descriptor:
                # a longer one is no beginning
                if os.fstat(descriptor).st_size <= file.size:
                    while (data := os.read(descriptor, _BLOCK_BYTES)) and not self._is_cut:
                        digest.update(data)
                        length += len(data)
        except OSError:  # none is here, or something that is put aside
            pass
        self._digests[file.path] = digest
        return Wanted(file, length, digest.hexdigest())

    def begin(self, wanted: Wanted, offset: int, now: RemoteFile) -> None:
        digest = self._digests.pop(wanted.file.path) if offset else hashlib.sha256()
        path = self.folder / now.path
        with self._explained(path):
            if not offset:
                self._make_room(path)
            descriptor = _open(path, os.O_WRONLY | os.O_CREAT)
            os.lseek(descriptor, offset, os.SEEK_SET)
        self._file = _File(path, now, offset, descriptor, digest, offset)
        self.on_bytes(offset)

    def data(self, data: bytes) -> None:
        file = self._under_way()
        file.digest.update(data)
        with self._explained(file.path):
            view = memoryview(data)
            while view:
                view = view[os.write(file.descriptor, view) :]
        self._came(file, len(data))

    def hole(self, length: int) -> None:
        file = self._under_way()
        for start in range(0, length, _BLOCK_BYTES):
            file.digest.update(_ZEROS[: length - start])
        with self._explained(file.path):
            os.lseek(file.descriptor, length, os.SEEK_CUR)
        self._came(file, length)

    def end(self, size: int, sha256: str) -> None:
        file = self._under_way()
        intact = (file.length, file.digest.hexdigest()) == (size, sha256)
        with self._explained(file.path):
            # the end of a hole; what came damaged goes, for it is no beginning of the file
            os.ftruncate(file.descriptor, size if intact else file.offset)
            if intact:
                os.utime(file.descriptor, ns=(file.now.mtime_ns, file.now.mtime_ns))
                if self.durable:
                    os.fsync(file.descriptor)
        self.close()
        if not intact:
            self.problems.append(Problem(file.now.path, "arrived damaged"))
            return
        self.fetched_files += file.length > file.offset or not size
        if size == file.now.size:  # else it was cut while it was sent
            self.whole.append(file.now)

    def missing(self, wanted: Wanted, reason: str, *, gone: bool) -> None:
        self.close()
        if not gone:  # another that collects from the same folder, or its worker, has removed it
            self.problems.append(Problem(wanted.file.path, reason))

    def close(self) -> None:
        """Let go of the file under way: what came of it stays, to be continued."""
        if self._file:
            os.close(self._file.descriptor)
            self._file = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else writes into the folder. Raises Conflict, HostError."""
        with self._explained(self.folder):
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            descriptor = _open(self.folder / ".lock", os.O_WRONLY | os.O_CREAT)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(
                    f"another 'fleet collect-logs' writes into {self.folder}", "Wait until it has ended."
                ) from None
            yield
        finally:
            self._is_cut = True
            self.close()
            os.close(descriptor)

    def _under_way(self) -> _File:
        if self._file is None:
            raise base.CommandFailed("the host sent bytes of no file")
        return self._file

    def _came(self, file: _File, count: int) -> None:
        file.length += count
        self.fetched_bytes += count
        self.on_bytes(count)

    def _make_room(self, path: Path) -> None:
        """Make the folders of a new file, and put aside whatever is in the way."""
        for folder in reversed(path.relative_to(self.folder).parents):
            place = self.folder / folder
            if place != self.folder and not _is(place, stat.S_ISDIR):
                self._put_aside(place)
                place.mkdir()
        if not (_is(path, stat.S_ISREG) and path.lstat().st_size == 0):
            self._put_aside(path)

    def _put_aside(self, path: Path) -> None:
        if not os.path.lexists(path):
            return
        number = 1
        while os.path.lexists(aside := path.with_name(f"{path.name}.~{number}~")):
            number += 1
        path.rename(aside)
        self.aside += 1

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """Raises DiskFull or HostError for what this machine has to say."""
        try:
            yield
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise base.DiskFull(
                    f"no space is left here for {path}",
                    "Make room, or name another folder with -l; what came is kept, and the rest continued.",
                ) from exc
            raise base.HostError(
                f"cannot write {path} here: {exc.strerror}", "-l DIR names another folder."
            ) from exc


def _open(path: Path, flags: int) -> int:
    # O_NONBLOCK: what is here may be a pipe of somebody's
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = _open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(path.lstat().st_mode)
    except FileNotFoundError:
        return False
