"""The hosts file: one host a line, `[user@]host[:port]  key=value ...`.

Every fault of a file is found before anything starts, and all are told at once.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from broker import names
from broker.errors import UsageError

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
#: a comment opens the line, follows a blank, or follows the address at once
_COMMENT = re.compile(r"((?:^|[ \t])|^[ \t]*[^ \t#]+)#.*")
_PORTS = range(1, 65536)
_KEYS = ("slots", "workers", "queues", "label.", "python", "output_dir", "tunnel")


class HostsFileError(UsageError):
    """A hosts file has faults; `faults` holds one line for each, with file and line."""

    code = "hosts_file"

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults), "Nothing was started. docs/cli.md shows what a hosts file holds.")
        self.faults = tuple(faults)


class NoHosts(UsageError):
    """No host was named and none is kept."""

    code = "no_hosts"

    def __init__(self) -> None:
        super().__init__("No hosts configured. Use 'fleet hosts add' or 'fleet up HOSTS'.")


@dataclass(frozen=True)
class HostOptions:
    """What a line says beyond the address; None and empty: as the command line has it."""

    slots: int | None = None
    workers: int | None = None
    queues: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    output_dir: str | None = None
    #: whether it finds Redis through its SSH connection
    tunnel: bool | None = None


@dataclass(frozen=True)
class Host:
    """One machine. `name` is the host as its line has it (an alias of ssh_config is fine)."""

    name: str
    user: str | None = None
    port: int | None = None
    options: HostOptions = HostOptions()
    #: "ssh", or "local" for this machine without SSH
    launcher: str = "ssh"
    #: the interpreter there that `fleet up` used last: the first to be tried where none is named
    found_python: str | None = None

    @property
    def key(self) -> str:
        """What makes it the same host: neither user nor port nor case nor how IPv6 is spelled."""
        address = _ipv6(self.name)
        return str(address) if address else self.name.rstrip(".").lower()

    @property
    def worker_base(self) -> str:
        """The name made safe for worker names; it has no '.', '_' or '-' at its start.

        A colon becomes '-'; '::1' is read as '0::1', so that a name is left.
        """
        name = f"0{self.name}" if self.name.startswith(":") else self.name
        return _UNSAFE.sub("-", name).lstrip("._-")[:100]

    @property
    def is_tunnelled(self) -> bool:
        """Whether it finds Redis through its SSH connection."""
        return self.launcher == "ssh" and bool(self.options.tunnel)

    def worker_name(self, number: int) -> str:
        """The name of its worker `number`, from 0. Raises UsageError."""
        return names.worker_name(f"{self.worker_base}-{number}")

    def with_options(self, **changes: Any) -> Host:
        """The same host with some options replaced."""
        return replace(self, options=replace(self.options, **changes))

    def to_json(self) -> str:
        """One row for `broker.hosts`; `from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Host:
        """Read what `to_json` wrote. Raises UsageError."""
        try:
            fields = json.loads(text)
            options = fields.pop("options")
            options["queues"] = tuple(options["queues"])
            return cls(options=HostOptions(**options), **fields)
        except (ValueError, TypeError, KeyError) as exc:
            raise UsageError(
                f"a host kept in Redis cannot be read: {exc}", "Remove and add it again."
            ) from exc


def read(path: str) -> tuple[Host, ...]:
    """The hosts of the file `path`; '-' reads stdin. Raises UsageError, HostsFileError."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as exc:
        raise UsageError(f"cannot read the hosts file {path}: {exc.strerror or exc}") from exc
    source = "<stdin>" if path == "-" else path
    try:
        return parse(data.decode("utf-8-sig"), source)
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise HostsFileError([f"{source}:{line}: is not UTF-8 text"]) from exc


def parse(text: str, source: str) -> tuple[Host, ...]:
    """The hosts of a file's text. Raises HostsFileError, which tells all faults at once."""
    hosts: list[tuple[int, Host]] = []
    faults: list[str] = []
    for number, line in _lines(text):
        found, wrong = _entry(line)
        faults += [f"{source}:{number}: {fault}" for fault in wrong]
        if found:
            faults += [f"{source}:{number}: {fault}" for fault in _clashes(found, hosts)]
            hosts.append((number, found))
    if not hosts and not faults:
        faults.append(f"{source}:1: holds no host")
    if faults:
        raise HostsFileError(faults)
    return tuple(host for _, host in hosts)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that hold an entry, comments cut off."""
    for number, line in enumerate(text.split("\n"), start=1):
        words = _COMMENT.sub(r"\1", line.rstrip("\r")).strip(" \t")
        if words:
            yield number, words


def _entry(line: str) -> tuple[Host | None, list[str]]:
    """The host of one line, if its address can be read, and the line's faults."""
    address, *words = re.split(r"[ \t]+", line)
    values, faults = _options(words)
    try:
        user, name, port = _address(address)
        host = Host(name, user, port, HostOptions(**values))
        host.worker_name(0)
    except UsageError as exc:
        return None, [exc.message, *faults]
    return host, faults


def _clashes(host: Host, before: Sequence[tuple[int, Host]]) -> Iterator[str]:
    for number, other in before:
        if other.key == host.key:
            yield f"{host.name} is there already, in line {number}: a host may appear once"
        elif other.worker_base.lower() == host.worker_base.lower():
            yield f"workers of {host.name} would be named like those of {other.name} in line {number}"


# --- the address -----------------------------------------------------------------------------------


def _address(word: str) -> tuple[str | None, str, int | None]:
    """(user, host, port) of `[user@]host[:port]`. Raises UsageError."""
    head, at, rest = word.rpartition("@")
    user = _checked(head, "user") if at else None
    name, port = _bracketed(rest) if rest.startswith("[") else _plain(rest)
    return user, _checked(name, "host"), None if port is None else _port(port)


def _bracketed(text: str) -> tuple[str, str | None]:
    inside, closed, rest = text[1:].partition("]")
    if not closed:
        raise UsageError(f"{text!r} has an unclosed bracket")
    if inside and not _ipv6(inside):
        raise UsageError(f"{inside!r} in brackets is no IPv6 address")
    if rest and not rest.startswith(":"):
        raise UsageError(f"{rest!r} after the bracket is no port: write [{inside}]:PORT")
    return inside, rest[1:] if rest else None


def _plain(text: str) -> tuple[str, str | None]:
    """A name, a name with a port, or an IPv6 address that cannot be read as one with a port."""
    name, colon, port = text.rpartition(":")
    if text.count(":") < 2:
        return (name, port) if colon else (text, None)
    if _ipv6(name) and port.isdigit():
        raise UsageError(f"{text!r}: an IPv6 address with a port needs brackets: [{name}]:{port}")
    if not _ipv6(text):
        raise UsageError(f"{text!r} is neither a host with a port nor an IPv6 address")
    return text, None


def _ipv6(text: str) -> ipaddress.IPv6Address | None:
    try:
        return ipaddress.IPv6Address(text)
    except ValueError:
        return None


def _checked(text: str, what: str) -> str:
    if not text:
        raise UsageError(f"the {what} is empty")
    if text.startswith("-"):
        raise UsageError(f"{what} {text!r} begins with '-'")
    if any(char.isspace() or not char.isprintable() for char in text):
        raise UsageError(f"{what} {text!r} holds blanks or control characters")
    if any(char in text for char in "[]") or (what == "host" and "/" in text):
        raise UsageError(f"{what} {text!r} holds a bracket or a slash")
    return text


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) in _PORTS:
        return int(text)
    raise UsageError(f"port {text!r} is no number from 1 to 65535")


# --- the options -----------------------------------------------------------------------------------


def _options(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What `words` set, by field of HostOptions, and their faults."""
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    faults: list[str] = []
    for word in words:
        try:
            name, value = _option(word)
            into: dict[str, Any] = labels if name.startswith("label.") else values
            name = name.removeprefix("label.")
            if name in into:
                raise UsageError(f"{word!r}: {name} is set twice")
            into[name] = value
        except UsageError as exc:
            faults.append(exc.message)
    return {**values, **({"labels": labels} if labels else {})}, faults


def _option(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise UsageError(f"unexpected {word!r}: what follows a host is key=value")
    if name.startswith("label."):
        names.label_name(name.removeprefix("label."))
        return name, names.label_value(value)
    if name not in _READERS:
        raise UsageError(f"unknown {name}=" + _nearest(name))
    return name, _READERS[name](name, value)


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, _KEYS, n=1, cutoff=0.5)
    known = ", ".join(f"{key}K=" if key.endswith(".") else f"{key}=" for key in _KEYS)
    return (
        f"; did you mean {close[0].rstrip('.')}{'.K' if close[0].endswith('.') else ''}=?"
        if close
        else f"; known are {known}"
    )


def _printable(name: str, value: str) -> str:
    if not value.isprintable():
        raise UsageError(f"{name}= holds control characters")
    return value


def _count(name: str, value: str) -> int:
    if value.isascii() and value.isdigit() and len(value) < 7 and int(value) >= 1:
        return int(value)
    raise UsageError(f"{name}={value}: must be a whole number of at least 1")


def _queues(name: str, value: str) -> tuple[str, ...]:
    queues = tuple(_path(name, value).split(","))
    names.weighted_queues(queues)
    return queues


def _path(name: str, value: str) -> str:
    if not value:
        raise UsageError(f"{name}= is empty")
    return _printable(name, value)


def _folder(name: str, value: str) -> str:
    if value.startswith(("/", "~/")):
        return _printable(name, value)
    raise UsageError(f"{name}={value}: must begin with / or ~/")


def _yes_or_no(name: str, value: str) -> bool:
    if value in ("yes", "no"):
        return value == "yes"
    raise UsageError(f"{name}={value}: must be yes or no")


_READERS: dict[str, Callable[[str, str], Any]] = {
    "slots": _count,
    "workers": _count,
    "queues": _queues,
    "python": _path,
    "output_dir": _folder,
    "tunnel": _yes_or_no,
}
