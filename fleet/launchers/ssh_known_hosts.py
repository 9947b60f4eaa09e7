"""known_hosts as OpenSSH's accept-new has it: new keys are recorded, changed ones refused.

asyncssh compares keys but neither records new ones nor says which line is in the way.
Format: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT".
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import asyncssh

SYSTEM_FILE = Path("/etc/ssh/ssh_known_hosts")
_Kind = Literal["key", "authority", "revoked"]


@dataclass(frozen=True)
class Entry:
    """A key that a file holds for a host; `kind` tells plain keys, authorities and revoked ones."""

    file: Path
    line: int
    key: asyncssh.SSHKey
    kind: _Kind

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class KnownHosts:
    """The keys of some files. New ones are recorded in the first of `files`; with none, nowhere."""

    def __init__(self, files: Sequence[Path], of_system: Sequence[Path] | None = None) -> None:
        self.files = [*files, *([SYSTEM_FILE] if of_system is None else of_system)]
        self._record_in = files[0] if files else None

    def find(self, host: str, port: int | None) -> list[Entry]:
        """What is known of `host`; `port` None or 22 is the default one.

        As in ssh(1), keys recorded for the host without its port count only if there are none
        with it.
        """
        found = list(self._matching(pattern_of(host, port)))
        return found or (list(self._matching(host)) if port not in (None, 22) else [])

    def record(self, host: str, port: int | None, key: asyncssh.SSHKey) -> None:
        """Add `key`, unless another of us just did. Raises OSError."""
        if self._record_in is None:
            return
        self._record_in.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._record_in, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if any(entry.key == key for entry in self.find(host, port)):
                return
            file.write(_line_break(self._record_in) + line_for(host, port, key))

    def _matching(self, pattern: str) -> Iterator[Entry]:
        for file in self.files:
            for number, line in enumerate(_lines(file), start=1):
                if _may_match(line, pattern):
                    yield from _entries(file, number, line, pattern)


def pattern_of(host: str, port: int | None) -> str:
    """How known_hosts names a host: the port only where it is not the default."""
    return host if port in (None, 22) else f"[{host}]:{port}"


def line_for(host: str, port: int | None, key: asyncssh.SSHKey) -> str:
    """The line that records `key`, its comment left out."""
    algorithm, data = key.export_public_key("openssh").decode().split()[:2]
    return f"{pattern_of(host, port)} {algorithm} {data}\n"


def _lines(file: Path) -> list[str]:
    """The lines of a file; none where it cannot be read, as ssh(1) does."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []


def _may_match(line: str, pattern: str) -> bool:
    """A cheap look, so that of a long file only few lines are parsed."""
    return any(part in line for part in (pattern, "|1|", "*", "?", "!"))


def _entries(file: Path, number: int, line: str, pattern: str) -> Iterator[Entry]:
    try:
        matched = asyncssh.import_known_hosts(line).match(pattern, "", None)
    except ValueError:
        return
    kinds: tuple[_Kind, ...] = ("key", "authority", "revoked")
    for kind, keys in zip(kinds, matched[:3], strict=True):
        yield from (Entry(file, number, key, kind) for key in keys)


def _line_break(file: Path) -> str:
    """A line break where the file's last line has none."""
    data = file.read_bytes() if file.is_file() else b""
    return "\n" if data and not data.endswith(b"\n") else ""
