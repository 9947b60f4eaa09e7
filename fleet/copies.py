"""The copies of a host's files in a folder of this machine, continued where an earlier run was cut off.

A copy lies at its own place from its first byte on, and is at all times the beginning of what the host
has: so what a cut leaves is continued by the next run, and a log that grew by its new end. It gets the
time of the file there only when it is whole, so a copy of that size and time is not fetched again. What
is no beginning of the host's file - a log of an earlier life, removed there since - is never overwritten,
but put aside as NAME.~1~, NAME.~2~. Only a series is replaced, whose name no other has had, and which has
lost nothing that it had. A file that cannot be had here, for its name or its size, is passed over.
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
from fleet.launchers.agent_files import SERIES
from fleet.launchers.remote_files import Problem, RemoteFile, Wanted

_BLOCK_BYTES = 2**18
_ZEROS = bytes(_BLOCK_BYTES)
#: what this machine may have against one file; all else ends the collection of a host
_OF_ONE_FILE = (
    *(errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EFBIG, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO),
)


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
    """A `Receiver` that writes into `folder`. `durable`: what counts as whole is on the disk, too."""

    folder: Path
    durable: bool
    #: told of bytes that need not be fetched any more
    on_bytes: Callable[[int], None]
    #: what is here, whole, verified and made safe, as the host had it
    whole: list[RemoteFile] = field(default_factory=list)
    fetched_bytes: int = 0
    fetched_files: int = 0
    problems: list[Problem] = field(default_factory=list)
    aside: int = 0
    #: the digests of what is here already, by path
    _digests: dict[str, hashlib._Hash] = field(default_factory=dict)
    _file: _File | None = None
    #: what has come whole, and is not safe yet
    _arrived: list[RemoteFile] = field(default_factory=list)
    #: folders in which others were made
    _grown: set[Path] = field(default_factory=set)
    #: whether what comes now is of a file that cannot be had here
    _is_passed_over: bool = False
    #: whether whoever waits for our hashes has gone
    _is_cut: bool = False

    def has(self, file: RemoteFile) -> bool:
        """Whether a whole copy is here, as far as size and time tell."""
        try:
            found = (self.folder / file.path).lstat()
        except (OSError, UnicodeEncodeError):
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
        except (OSError, UnicodeEncodeError):  # none is here, or something that is put aside
            pass
        self._digests[file.path] = digest
        return Wanted(file, length, digest.hexdigest())

    def begin(self, wanted: Wanted, offset: int, now: RemoteFile) -> None:
        self.close()
        digest = self._digests.pop(wanted.file.path, None) if offset else hashlib.sha256()
        if digest is None or offset not in (0, wanted.offset):
            raise base.CommandFailed(f"the host sends a part of {now.path} that was not asked for")
        path = self.folder / now.path
        with self._explained(path), self._of_one_file(now):
            if not offset:
                self._make_room(path)
            descriptor = _open(path, os.O_WRONLY | os.O_CREAT)
            self._file = _File(path, now, offset, descriptor, digest, offset)
            os.lseek(descriptor, offset, os.SEEK_SET)
        self.on_bytes(offset)

    def data(self, data: bytes) -> None:
        file = self._under_way(len(data))
        if file is None:
            return
        file.digest.update(data)
        with self._explained(file.path), self._of_one_file(file.now):
            view = memoryview(data)
            while view:
                view = view[os.write(file.descriptor, view) :]

    def hole(self, length: int) -> None:
        file = self._under_way(length)
        if file is None:
            return
        for start in range(0, length, _BLOCK_BYTES):
            file.digest.update(_ZEROS[: length - start])
        with self._explained(file.path), self._of_one_file(file.now):
            os.lseek(file.descriptor, length, os.SEEK_CUR)

    def end(self, size: int, sha256: str) -> None:
        file = self._under_way()
        if file is None:
            self.close()
            return
        intact = (file.length, file.digest.hexdigest()) == (size, sha256)
        with self._explained(file.path), self._of_one_file(file.now):
            # the end of a hole; what came damaged goes, for it is no beginning of the file
            os.ftruncate(file.descriptor, size if intact else file.offset)
            if intact:
                os.utime(file.descriptor, ns=(file.now.mtime_ns, file.now.mtime_ns))
        is_passed_over = self._is_passed_over
        self.close()
        if is_passed_over:
            return
        if not intact:
            self.problems.append(Problem(file.now.path, "arrived damaged"))
            return
        self.fetched_files += file.length > file.offset or not size
        if size == file.now.size:  # else it was cut while it was sent
            self._arrived.append(file.now)

    def missing(self, wanted: Wanted, reason: str, *, gone: bool) -> None:
        self.close()
        if not gone:  # another that collects from the same folder, or its worker, has removed it
            self.problems.append(Problem(wanted.file.path, reason))

    def close(self) -> None:
        """Let go of the file under way: what came of it stays, to be continued."""
        self._is_passed_over = False
        if self._file:
            os.close(self._file.descriptor)
            self._file = None

    def make_safe(self) -> None:
        """What has come whole counts from now on. Blocks for as long as the disk takes. Raises HostError."""
        if self.durable:
            paths = [self.folder / file.path for file in self._arrived]
            folders = {folder for path in paths for folder in path.parents} - {*self.folder.parent.parents}
            for path in (*paths, *sorted(folders | self._grown)):
                with self._explained(path), _opened(path, os.O_RDONLY) as descriptor:
                    _sync(descriptor)
        self.whole += self._arrived
        self._arrived = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else writes into the folder. Raises Conflict, HostError."""
        with self._explained(self.folder):
            self._grown |= {path.parent for path in (self.folder, *self.folder.parents) if not path.exists()}
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

    def _under_way(self, count: int = 0) -> _File | None:
        """The file of which `count` bytes have come; None: it cannot be had here. Raises CommandFailed."""
        file = self._file
        if not self._is_passed_over:
            if file is None or file.length + count > file.now.size:
                raise base.CommandFailed("the host sent bytes of no file")
            file.length += count
            self.fetched_bytes += count
        self.on_bytes(count)
        return file

    def _make_room(self, path: Path) -> None:
        """Make the folders of a new file, and put aside whatever is in the way."""
        for folder in reversed(path.relative_to(self.folder).parents):
            place = self.folder / folder
            if place != self.folder and not _is(place, stat.S_ISDIR):
                self._put_aside(place)
                place.mkdir()
        if _is(path, stat.S_ISREG) and SERIES.fullmatch(str(path.relative_to(self.folder))):
            path.unlink()
        elif not (_is(path, stat.S_ISREG) and path.lstat().st_size == 0):
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
    def _of_one_file(self, now: RemoteFile) -> Iterator[None]:
        """Only this file is passed over for what this machine has against it."""
        try:
            yield
        except (OSError, UnicodeEncodeError) as exc:
            if isinstance(exc, OSError) and exc.errno not in _OF_ONE_FILE:
                raise
            self.close()
            self._is_passed_over = True
            reason = exc.strerror if isinstance(exc, OSError) else exc.reason
            self.problems.append(Problem(now.path, f"cannot be written here: {reason}"))

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


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # how some file systems say that of folders they know none
            raise


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(path.lstat().st_mode)
    except FileNotFoundError:
        return False
