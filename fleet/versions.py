"""Versions of rq-fleet: ours, that of a host, that of a worker which runs.

What `up` installs is of our version by construction. The gate matters where it uses what is
there: whoever looks after that may have forgotten a machine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from broker import __version__
from fleet.launchers import base

_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)(.*)")
#: what follows a release that comes before it: 1.0rc1, 1.0.dev3
_BEFORE = re.compile(r"[.-]?(a|b|rc|dev)")


def check(host: str, probe: base.Probe) -> str:
    """The version of the rq-fleet that would be used as it is at `host`, if it is ours.

    Raises VersionMismatch, InstallFailed where there is none.
    """
    python, version = probe.in_use
    if version == __version__ or (probe.is_here and python == sys.executable):
        return __version__
    raise base.VersionMismatch(
        f"Version mismatch: local={__version__}, {host}={version}",
        f"Without --no-install it gets {__version__}; --skip-version-check uses what is there.",
    )


def is_older(version: str | None) -> bool:
    """Whether a worker of that version is older than we are; one that does not say is."""
    return version is None or _order(version) < _order(__version__)


def older(seen: Sequence[base.Seen]) -> dict[str, str | None]:
    """The workers that live and are older than we are, and their versions."""
    return {worker.name: worker.version for worker in seen if worker.alive and is_older(worker.version)}


def note(started: Sequence[base.Started]) -> str:
    """What is worth telling of the versions of a host's workers, "" for nothing."""
    left = {worker.version for worker in started if not worker.fresh and worker.version != __version__}
    old = _listed(version for version in left if is_older(version))
    new = _listed(version for version in left if not is_older(version))
    replaced = _listed(worker.replaced for worker in started if worker.replaced)
    notes = (
        f"replaced version {replaced}" if replaced else "",
        f"runs version {old}, here it is {__version__}: 'fleet up --upgrade' replaces it" if old else "",
        f"runs version {new}, newer than {__version__} here" if new else "",
    )
    return "; ".join(filter(None, notes))


def _listed(versions: Iterable[str | None]) -> str:
    return ", ".join(sorted({version or "unknown" for version in versions}))


def _order(version: str) -> tuple[tuple[int, ...], bool, str]:
    """What sorts versions as PEP 440 does, as far as releases and what comes before and after them."""
    found = _RELEASE.match(version)
    if not found:
        return (), False, version
    release = [int(part) for part in found[1].split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release), not _BEFORE.match(found[2]), found[2]
