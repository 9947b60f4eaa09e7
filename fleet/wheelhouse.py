"""`--offline`: what a bundle depends on, as wheels for a host's Python, gathered here and kept.

pip downloads for other platforms, but judges by the Python that runs it which requirements
hold (PEP 508's markers). So that Python is told to pass for the host's.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleet.bundle import Bundle
from fleet.launchers import base
from fleet.launchers.agent import FULL

#: seconds that pip gets
_LIMIT_SECONDS = 600.0
_LINES_OF_PIP = 8
#: runs pip with the markers of the first argument
_PIP = """\
import json, runpy, sys
from pip._vendor.packaging import markers
environment = json.loads(sys.argv.pop(1))
markers.default_environment = lambda: dict(environment)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
#: oldest glibc of a machine for which there are wheels, and the names that some versions had before PEP 600
_OLDEST_GLIBC = 5
_LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


@dataclass(frozen=True)
class Target:
    """The Python that wheels must fit. `markers` are those of PEP 508, `platforms` wheel tags, best first."""

    markers: Mapping[str, str]
    abi: str
    platforms: tuple[str, ...]

    @classmethod
    def of(cls, probe: base.Probe) -> Target:
        """That of a host. Raises InstallFailed where no wheels are known to fit."""
        name = probe.markers["platform_python_implementation"]
        platforms = tuple(_platforms(probe))
        if name != "CPython" or not platforms:
            raise base.InstallFailed(
                f"--offline brings wheels for CPython on Linux and macOS; this is {name} on {probe.system}",
                "Leave out --offline, and let that host install from an index.",
            )
        return cls(probe.markers, probe.abi, platforms)

    @property
    def version(self) -> str:
        return self.markers["python_full_version"]

    def __str__(self) -> str:
        return f"Python {self.version} on {self.platforms[0]}"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where wheels are kept: $XDG_CACHE_HOME or ~/.cache, rq-fleet/wheels. May be emptied at any time."""
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rq-fleet" / "wheels"


class Wheelhouses:
    """Wheelhouses under way and done: hosts with the same Python share one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tasks: dict[str, asyncio.Task[Path]] = {}

    async def for_host(self, bundle: Bundle, probe: base.Probe) -> Path:
        """A folder with the wheels that `bundle` needs there, itself aside.

        Raises InstallFailed, DiskFull.
        """
        target = Target.of(probe)
        key = _key(bundle, target)
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(_gathered(self._folder / key, bundle, target))
        return await asyncio.shield(self._tasks[key])


def _key(bundle: Bundle, target: Target) -> str:
    """What decides which wheels are needed: requirements, and the Python that they are for."""
    with zipfile.ZipFile(io.BytesIO(bundle.data)) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    requirements = [line for line in lines if line.startswith("Requires-Dist:")]
    facts = json.dumps([requirements, dict(target.markers), target.abi, target.platforms], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


async def _gathered(folder: Path, bundle: Bundle, target: Target) -> Path:
    """Gather into `folder`, which appears whole or not at all."""
    if folder.is_dir():
        return folder
    with _explained(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as part:
            wheel, wheels = Path(part) / bundle.filename, Path(part) / "wheels"
            wheel.write_bytes(bundle.data)
            await _download(wheel, wheels, target)
            (wheels / bundle.filename).unlink()
            try:
                wheels.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another did the same meanwhile
                    raise
    return folder


@contextmanager
def _explained(cache: Path) -> Iterator[None]:
    """Raises DiskFull or InstallFailed for what this machine has to say."""
    hint = "XDG_CACHE_HOME names another folder than ~/.cache."
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space is left here for the wheels in {cache}"
            raise base.DiskFull(message, f"Make room. {hint}") from exc
        raise base.InstallFailed(f"cannot gather wheels in {cache} here: {exc}", hint) from exc


async def _download(wheel: Path, into: Path, target: Target) -> None:
    """Have pip download what `wheel` requires. Raises InstallFailed, OSError."""
    words = ["download", "-qq", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
    words += ["--dest", str(into), "--python-version", target.version, "--implementation", "cp"]
    words += ["--abi", target.abi, *(f"--platform={platform}" for platform in target.platforms), str(wheel)]
    # -P: a folder named pip where we happen to be is not meant
    argv = [sys.executable, "-P", "-c", _PIP, json.dumps(dict(target.markers)), *words]
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(_LIMIT_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError:
        raise base.InstallFailed(f"pip had no wheels for {target} within {_LIMIT_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        if any(words in said for words in FULL):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise _failed(said.decode("utf-8", "replace"), target)


def _failed(said: str, target: Target) -> base.InstallFailed:
    if "No module named 'pip'" in said:
        return base.InstallFailed(
            f"--offline gathers wheels here with pip, and {sys.executable} has none",
            f"Install it: {sys.executable} -m ensurepip",
        )
    lines = "\n".join(said.rstrip().splitlines()[-_LINES_OF_PIP:])
    return base.InstallFailed(
        f"the wheels for {target} could not be gathered here:\n{lines}",
        "This machine needs an index that pip can reach, with wheels for that Python.",
    )


def _platforms(probe: base.Probe) -> Iterator[str]:
    """The platform tags that wheels for a host may have (PEP 600, PEP 656); none: not known."""
    kind, _, version = probe.libc.partition(" ")
    major, minor = (int(part) for part in (*(version or "0").split("."), "0")[:2])
    if kind == "macos":  # pip knows those of older ones
        yield f"macosx_{major}_{minor}_{probe.machine}"
    elif kind == "musl":
        yield from (f"musllinux_{major}_{number}_{probe.machine}" for number in range(minor, -1, -1))
    elif kind == "glibc":
        for number in range(minor, _OLDEST_GLIBC - 1, -1):
            yield f"manylinux_{major}_{number}_{probe.machine}"
            if number in _LEGACY:
                yield f"{_LEGACY[number]}_{probe.machine}"
    if kind in ("musl", "glibc"):
        yield f"linux_{probe.machine}"
