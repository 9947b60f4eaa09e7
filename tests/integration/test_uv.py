"""Hosts where a real uv finds the Python, makes the environment, or fetches a Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import uv

from fleet.launchers import base, shell
from fleet.launchers.ssh import SshLauncher
from tests.integration.sshd import SshdFarm, at
from tests.unit.test_bundle import tiny_bundle

pytestmark = [pytest.mark.needs("sshd"), pytest.mark.timeout(300)]
UV = uv.find_uv_bin()


@pytest.fixture
def farm(tmp_path: Path, spawn: Any) -> SshdFarm:
    return SshdFarm(tmp_path / "farm", spawn)


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """A Python that has no ensurepip, as Debian's without python3-venv."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    folder, real = tmp_path / "bare", Path(sys.base_prefix)
    (folder / "bin").mkdir(parents=True)
    shutil.copy(real / "bin" / version, folder / "bin/python3")
    (folder / "lib" / version).mkdir(parents=True)
    for path in (real / "lib" / version).iterdir():
        if path.name != "ensurepip":
            (folder / "lib" / version / path.name).symlink_to(path)
    for library in (real / "lib").glob("libpython*"):
        (folder / "lib" / library.name).symlink_to(library)
    return str(folder / "bin/python3")


def install(farm: SshdFarm, python: str | None) -> Path:
    """Install at host1; returns the environment."""
    found: str = at(farm, "host1", lambda launcher: launcher.install(tiny_bundle("one")), python=python)
    assert subprocess.run([found, "-I", "-c", "import fleet.assembly"], check=False).returncode == 0
    return Path(found).parent.parent


def made_by_uv(environment: Path) -> bool:
    return "uv = " in (environment / "pyvenv.cfg").read_text()


def test_a_uv_that_is_named_finds_a_python_and_installs(farm):
    host = farm.add("host1")
    found = at(farm, "host1", lambda launcher: launcher.probe(), python=UV)
    assert (found.uv, found.python_was_named) == (UV, False)
    environment = install(farm, UV)
    assert made_by_uv(environment)
    assert environment.is_relative_to(host.home)
    assert install(farm, UV) == environment


def test_a_uv_makes_up_for_a_python_that_cannot_make_environments(farm, bare_python):
    host = farm.add("host1")
    with pytest.raises(base.InstallFailed, match="cannot make virtual environments") as caught:
        install(farm, bare_python)
    assert "apt install python3-venv" in caught.value.hint
    assert not list(host.home.iterdir()), "that was told before anything was brought"
    (host.home / ".local/bin").mkdir(parents=True)
    (host.home / ".local/bin/uv").symlink_to(UV)
    assert made_by_uv(install(farm, bare_python))


def test_a_host_without_an_index_is_served_by_uv_too(farm, tmp_path):
    farm.add("host1", UV_DEFAULT_INDEX="http://127.0.0.1:9/", UV_OFFLINE="1")
    wheelhouse = tmp_path / "wheels"
    wheelhouse.mkdir()
    wheel = tiny_bundle("dependency", name="some_dependency")
    (wheelhouse / wheel.filename).write_bytes(wheel.data)
    bundle = tiny_bundle("one", requires="some-dependency")
    python = at(farm, "host1", lambda launcher: launcher.install(bundle, wheelhouse), python=UV)
    assert made_by_uv(Path(python).parent.parent)
    with pytest.raises(base.InstallFailed, match="some-dependency"):
        at(
            farm,
            "host1",
            lambda launcher: launcher.install(tiny_bundle("2", requires="some-dependency")),
            python=UV,
        )


def only_uv(**environ: str) -> dict[str, str]:
    """A host where uv knows of no Python but those that it fetched."""
    return {"UV_PYTHON_PREFERENCE": "only-managed", "UV_HTTP_RETRIES": "0", **environ}


async def fetching(launcher: SshLauncher) -> base.Probe:
    return await launcher.probe(fetch_python=True)


def test_a_uv_that_can_fetch_no_python_is_told(farm):
    host = farm.add("host1", **only_uv(UV_PYTHON_INSTALL_MIRROR="http://127.0.0.1:9"))
    with pytest.raises(base.NoPython, match=f"^{UV} knows of no Python 3.11 or newer there"):
        at(farm, "host1", lambda launcher: launcher.probe(), python=UV)
    assert not (host.home / ".local").exists(), "who only looks fetches nothing"
    with pytest.raises(base.NoPython, match=f"{UV} could not fetch one:\n(.*\n)*.*refused"):
        at(farm, "host1", fetching, python=UV)


def test_a_uv_fetches_a_python_where_there_is_none(farm, tmp_path):
    host = farm.add("host1", **only_uv(UV_PYTHON_DOWNLOADS_JSON_URL=python_to_fetch(tmp_path)))
    found = at(farm, "host1", fetching, python=UV)
    assert list(host.home.glob(f".local/share/uv/python/cpython-{shell.FETCHED_PYTHON}.*"))
    assert found.uv == UV


def python_to_fetch(folder: Path) -> str:
    """A list of one Python to download: small, for it hands on to the one of the tests."""
    content = folder / "content"
    program = content / f"python/bin/python{shell.FETCHED_PYTHON}"
    program.parent.mkdir(parents=True)
    library = content / f"python/lib/python{shell.FETCHED_PYTHON}"
    library.mkdir(parents=True)
    # uv mends what is in there
    header = "# system configuration generated and used by the sysconfig module\n"
    (library / "_sysconfigdata__linux_.py").write_text(f"{header}build_time_vars = {{}}\n")
    program.write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} "$@"\n')
    program.chmod(0o755)
    with tarfile.open(folder / "python.tar.gz", "w:gz") as archive:
        archive.add(content / "python", "python")
    major, minor = shell.FETCHED_PYTHON.split(".")
    machine = os.uname().machine
    entry = {
        "name": "cpython",
        "arch": {"family": machine, "variant": None},
        "os": "linux",
        "libc": "gnu",
        "major": int(major),
        "minor": int(minor),
        "patch": 0,
        "prerelease": "",
        "url": (folder / "python.tar.gz").as_uri(),
        "sha256": None,
        "variant": None,
        "build": "20250101",
    }
    (folder / "downloads.json").write_text(
        json.dumps({f"cpython-{shell.FETCHED_PYTHON}.0-linux-{machine}-gnu": entry})
    )
    return str(folder / "downloads.json")
