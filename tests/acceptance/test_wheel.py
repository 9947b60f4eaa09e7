"""What is installed from the wheel is whole, and no folder of the user's gets in its way."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("broker", "cli", "fleet")
#: installing takes a dozen packages from the index
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the tree by the build backend of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    _pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, REPOSITORY)
    (path,) = folder.glob("rq_fleet-*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """`bin` of a fresh environment in which the wheel is installed, and nothing of the tree."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    _pip(folder / "bin" / "python", "install", "--constraint", REPOSITORY / "constraints.txt", wheel)
    return folder / "bin"


@pytest.fixture
def hostile(tmp_path):
    """A working folder with packages of our names, which must never be imported."""
    for name in PACKAGES:
        package = tmp_path / "hostile" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text('raise SystemExit("shadowed")\n')
    return tmp_path / "hostile"


def _pip(python, *arguments):
    done = subprocess.run(
        [python, "-m", "pip", "-qq", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _run(folder, *argv):
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False, timeout=250)


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    """Scripts, templates and the mark for type checkers included, and no package beside the three."""
    ours = {
        str(path.relative_to(REPOSITORY))
        for name in PACKAGES
        for path in (REPOSITORY / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == ours
    assert any(name.endswith(".lua") for name in inside)
    assert "broker/py.typed" in inside


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["config", "show"]], ids=" ".join)
def test_fleet_is_not_shadowed(clean, hostile, arguments):
    done = _run(hostile, clean / "fleet", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_worker_started_as_hosts_start_it_is_not_shadowed(clean, hostile):
    done = _run(hostile, clean / "python", "-I", "-m", "fleet.worker", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower()


def test_the_folder_would_shadow_what_is_not_isolated(clean, hostile):
    """So the tests above would notice."""
    done = _run(hostile, clean / "python", "-m", "fleet.worker")
    assert done.stderr == "shadowed\n"
