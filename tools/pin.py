"""Write both constraints.txt: the newest versions that the ranges of pyproject.toml allow.

    python tools/pin.py [PYTHON...]

One list is for the project and its test extra, the other, in benchmarks/, for its bench extra. For
each, each PYTHON (default: the one that runs this) gets a fresh environment; what they resolve to
is merged, so name the oldest and the newest that are supported: some packages are needed by old
ones alone. Where they differ in a version, the lowest is taken, which is the only one that all of
them can use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parent.parent
#: extra -> where its list is
LISTS = {"test": REPOSITORY / "constraints.txt", "bench": REPOSITORY / "benchmarks" / "constraints.txt"}
#: the build backend, and what it needs for an editable install; tools/set-up installs them too
BUILD = ("hatchling", "editables")
HEADER = {
    "test": "# What the project is developed and tested with.",
    "bench": "# What the benchmarks are run with: the project and the peers.",
}
NOTE = """\
 Not what it needs: that is in pyproject.toml.
# Written by `make pins`; no addresses, no hashes: any index that has these versions will do.
"""


def main(pythons: list[str]) -> None:
    """Resolve with each of `pythons`, merge, write."""
    for extra, path in LISTS.items():
        found = [resolved(python, extra) for python in pythons or [sys.executable]]
        path.write_text(HEADER[extra] + NOTE + "".join(f"{line}\n" for line in merged(found)))


def resolved(python: str, extra: str) -> dict[str, str]:
    """Name and version of everything that `python` installs for the project with this extra."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "-qq", "--disable-pip-version-check"]
        # an old list must not hold back the new one
        env = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        subprocess.run([*pip, "install", *BUILD, f"{REPOSITORY}[{extra}]"], check=True, env=env)
        listed = subprocess.run([*pip, "freeze"], check=True, env=env, capture_output=True, text=True)
    lines = (line.partition("==") for line in listed.stdout.splitlines())
    return {name: version for name, sep, version in lines if sep}


def merged(lists: Iterable[dict[str, str]]) -> list[str]:
    """`name==version` lines, sorted, the lowest version where `lists` differ."""
    versions: dict[str, str] = {}
    for found in lists:
        for name, version in found.items():
            versions[name] = min(version, versions.get(name, version), key=Version)
    return [f"{name}=={versions[name]}" for name in sorted(versions, key=str.lower)]


if __name__ == "__main__":
    main(sys.argv[1:])
