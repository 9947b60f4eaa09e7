"""Wheels for other Pythons and other machines, gathered by a real pip from a folder."""

from __future__ import annotations

import asyncio
import dataclasses
import venv
from pathlib import Path

import pytest

from fleet.bundle import Bundle
from fleet.launchers import base
from fleet.wheelhouse import Target, Wheelhouses
from tests.unit.test_bootstrap import PROBE
from tests.unit.test_bundle import tiny_bundle


def probe_of(version: str, libc: str, machine: str = "x86_64", **more: str) -> base.Probe:
    markers = {
        "implementation_name": "cpython",
        "implementation_version": version,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": version,
        "python_version": version.rpartition(".")[0],
        "sys_platform": "linux",
    }
    abi = "cp" + markers["python_version"].replace(".", "")
    return dataclasses.replace(PROBE, machine=machine, markers={**markers, **more}, abi=abi, libc=libc)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def offer(index: Path, name: str, *tags: str) -> None:
    for tag in tags:
        (index / f"{name}-0.0-{tag}.whl").write_bytes(tiny_bundle(name, name=name).data)


def gathered(folder: Path, bundle: Bundle, *probes: base.Probe) -> list[list[str]]:
    """The wheels for each host."""

    async def all_of_them() -> list[Path]:
        wheelhouses = Wheelhouses(folder)
        return await asyncio.gather(*(wheelhouses.for_host(bundle, probe) for probe in probes))

    return [sorted(wheel.name for wheel in found.iterdir()) for found in asyncio.run(all_of_them())]


def test_each_host_gets_wheels_for_its_python_and_its_machine(index, tmp_path):
    offer(index, "compiled", "cp311-cp311-manylinux_2_17_x86_64", "cp312-cp312-musllinux_1_1_aarch64")
    bundle = tiny_bundle("one", requires="compiled")
    debian, alpine = probe_of("3.11.2", "glibc 2.36"), probe_of("3.12.1", "musl 1.2", "aarch64")
    assert gathered(tmp_path / "cache", bundle, debian, alpine) == [
        ["compiled-0.0-cp311-cp311-manylinux_2_17_x86_64.whl"],
        ["compiled-0.0-cp312-cp312-musllinux_1_1_aarch64.whl"],
    ]


@pytest.mark.parametrize(
    ("version", "wheels"), [("3.11.2", ["backport-0.0-py3-none-any.whl"]), ("3.11.3", [])]
)
def test_requirements_are_judged_by_the_hosts_python_not_by_ours(index, tmp_path, version, wheels):
    offer(index, "backport", "py3-none-any")
    bundle = tiny_bundle("one", requires='backport; python_full_version < "3.11.3"')
    assert gathered(tmp_path / "cache", bundle, probe_of(version, "glibc 2.36")) == [wheels]


def test_what_was_gathered_is_kept_until_requirements_change(index, tmp_path):
    offer(index, "plain", "py3-none-any")
    debian = probe_of("3.11.2", "glibc 2.36")
    first = gathered(tmp_path / "cache", tiny_bundle("one", requires="plain"), debian, debian)
    (index / "plain-0.0-py3-none-any.whl").unlink()
    assert gathered(tmp_path / "cache", tiny_bundle("two", requires="plain"), debian) == first[:1]
    with pytest.raises(base.InstallFailed):
        gathered(tmp_path / "cache", tiny_bundle("two", requires="plain>=0"), debian)


def test_wheels_that_are_not_to_be_had_are_told_and_leave_nothing(index, tmp_path):
    offer(index, "compiled", "cp311-cp311-manylinux_2_17_x86_64")
    with pytest.raises(base.InstallFailed) as caught:
        gathered(tmp_path / "cache", tiny_bundle("1", requires="compiled"), probe_of("3.11.2", "glibc 2.12"))
    message = caught.value.message
    assert message.startswith(
        "the wheels for Python 3.11.2 on manylinux_2_12_x86_64 could not be gathered here:"
    )
    assert "No matching distribution found for compiled" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_python_without_pip_is_told(index, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", symlinks=True)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(base.InstallFailed, match=r"gathers wheels here with pip, and .* has none") as caught:
        gathered(tmp_path / "cache", tiny_bundle("one", requires="plain"), probe_of("3.11.2", "glibc 2.36"))
    assert caught.value.hint.endswith("-m ensurepip")


@pytest.mark.parametrize(
    ("libc", "first", "last", "count"),
    [
        ("glibc 2.17", "manylinux_2_17_x86_64", "linux_x86_64", 17),
        ("musl 1.2", "musllinux_1_2_x86_64", "linux_x86_64", 4),
        ("macos 14.4", "macosx_14_4_x86_64", "macosx_14_4_x86_64", 1),
    ],
)
def test_platforms_of_older_libraries_fit_too(libc, first, last, count):
    platforms = Target.of(probe_of("3.12.1", libc)).platforms
    assert (platforms[0], platforms[-1], len(platforms)) == (first, last, count)


@pytest.mark.parametrize(
    "how", [{"libc": ""}, {"libc": "glibc 2.36", "platform_python_implementation": "PyPy"}]
)
def test_a_python_for_which_no_wheels_are_known_is_told(how):
    with pytest.raises(base.InstallFailed, match="--offline brings wheels for CPython on Linux and macOS"):
        Target.of(probe_of("3.11.2", **how))
