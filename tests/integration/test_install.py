"""Installs at real hosts: what fails or is cut off touches nothing else, and the next one mends it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import uv

from fleet.bundle import Bundle
from fleet.launchers import base, shell
from fleet.launchers.local import LocalLauncher
from fleet.launchers.ssh import SshLauncher
from fleet.wheelhouse import Wheelhouses
from fleet.worker_config import WorkerConfig
from tests.integration.fleets import beating, rows
from tests.integration.sshd import PYTHON, SshdFarm, SshdHost, agents, at, fleet_processes
from tests.unit.test_bundle import tiny_bundle

# installs and starts of workers take their time where others work beside
pytestmark = [pytest.mark.needs("sshd"), pytest.mark.timeout(300)]
UV = uv.find_uv_bin()
DEPENDENCY = "rq-fleet-test-dependency"


def install(farm: SshdFarm, bundle: Bundle, python: str = UV) -> str:
    """Install `bundle` at host1, quickly by uv or as told; returns the interpreter that has it."""
    found: str = at(farm, "host1", lambda launcher: launcher.install(bundle), python=python)
    return found


def data_of(host: SshdHost) -> Path:
    return host.home / ".local/share/rq-fleet"


def works(python: str) -> bool:
    return subprocess.run([python, "-I", "-c", "import fleet.assembly"], check=False).returncode == 0


def environments(host: SshdHost) -> list[Path]:
    return sorted((data_of(host) / "venvs").iterdir())


def nothing_was_left_but(host: SshdHost, *pythons: str) -> bool:
    """Whether there are these environments alone, and nothing that was brought."""
    kept = sorted(Path(python).parent.parent for python in pythons)
    return environments(host) == kept and not list((data_of(host) / "wheels").iterdir())


def test_an_install_is_kept_and_costs_nothing_again(farm):
    host = farm.add("host1")
    python = install(farm, tiny_bundle("one"), PYTHON)
    assert Path(python).is_relative_to(data_of(host) / "venvs")
    assert works(python)
    made = Path(python).parent.parent.stat().st_mtime_ns
    assert install(farm, tiny_bundle("one"), PYTHON) == python
    assert Path(python).parent.parent.stat().st_mtime_ns == made
    assert nothing_was_left_but(host, python)


def test_an_index_out_of_reach_is_told_and_leaves_the_old_install(farm, free_port):
    index = f"http://127.0.0.1:{free_port()}/simple/"
    host = farm.add("host1", PIP_INDEX_URL=index, PIP_RETRIES="0", PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="")
    old = install(farm, tiny_bundle("one"), PYTHON)
    with pytest.raises(base.InstallFailed, match=r"could not install") as caught:
        install(farm, tiny_bundle("two", requires=DEPENDENCY), PYTHON)
    assert DEPENDENCY in caught.value.message
    assert "index that pip can reach" in caught.value.hint
    assert works(old)
    assert nothing_was_left_but(host, old)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("30m")`: a file system of that size, or the same one made larger."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size: str) -> Path:
        options = f"size={size}" + (",remount" if folder.is_mount() else "")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.root
def test_a_disk_that_fills_up_is_told_and_given_back(farm, small_disk, monkeypatch):
    monkeypatch.setattr(shell, "INSTALL_BYTES", 0)
    disk = small_disk("30m")
    farm.add("host1", XDG_DATA_HOME=str(disk))
    old = install(farm, tiny_bundle("one"), PYTHON)
    used = shutil.disk_usage(disk).used
    with pytest.raises(base.DiskFull, match="could not "):
        install(farm, tiny_bundle("two"), PYTHON)
    assert works(old)
    assert shutil.disk_usage(disk).used <= used + 64 * 1024
    small_disk("100m")
    assert works(install(farm, tiny_bundle("two"), PYTHON))


@pytest.mark.root
def test_a_disk_too_full_for_what_is_brought_is_told_and_given_back(farm, small_disk, monkeypatch):
    monkeypatch.setattr(shell, "INSTALL_BYTES", 0)
    disk = small_disk("1m")
    farm.add("host1", XDG_DATA_HOME=str(disk))
    with pytest.raises(base.InstallFailed, match=f"could not write to {disk}/rq-fleet/wheels/"):
        install(farm, tiny_bundle("one", files={"fleet/large": os.urandom(2**21)}))
    assert not [path for path in disk.rglob("*") if path.is_file()]


def test_two_installs_at_once_make_one_environment(farm):
    host = farm.add("host1")
    bundle = tiny_bundle("one")

    async def both(launcher: SshLauncher) -> list[str]:
        await launcher.probe()
        return await asyncio.gather(launcher.install(bundle), launcher.install(bundle))

    first, second = at(farm, "host1", both, python=UV)
    assert first == second
    assert nothing_was_left_but(host, first)


# --- ends midway -----------------------------------------------------------------------------------


class Index:
    """A package index that has one package, and answers when it is let."""

    def __init__(self) -> None:
        self.asked, self.may_answer = threading.Event(), threading.Event()
        wheel = tiny_bundle("dependency", name=DEPENDENCY.replace("-", "_"), files={"dependency.py": b""})
        name = wheel.filename
        link = f'<a href="/{name}#sha256={hashlib.sha256(wheel.data).hexdigest()}">{name}</a>'
        pages = {f"/simple/{DEPENDENCY}/": link.encode(), f"/{name}": wheel.data}
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.set()
                index.may_answer.wait(150)
                self.send_response(200)
                self.send_header(
                    "Content-Type", "text/html" if self.path.endswith("/") else "application/zip"
                )
                self.end_headers()
                with suppress(BrokenPipeError):  # who asked has been killed
                    self.wfile.write(pages[self.path])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def add_host(self, farm: SshdFarm) -> SshdHost:
        """host1, which has its packages from here."""
        return farm.add("host1", **self.environ)

    @property
    def environ(self) -> dict[str, str]:
        """What has pip come here, and wait."""
        return {
            "PIP_INDEX_URL": f"http://127.0.0.1:{self.server.server_port}/simple/",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_DEFAULT_TIMEOUT": "60",
        }

    def close(self) -> None:
        self.may_answer.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index()
    yield index
    index.close()


def test_an_install_killed_midway_is_mended_by_the_next_though_its_pip_goes_on(farm, index, eventually):
    host = index.add_host(farm)
    bundle = tiny_bundle("one", requires=DEPENDENCY)

    async def killed(launcher: SshLauncher) -> None:
        installing = asyncio.create_task(launcher.install(bundle))
        await asyncio.to_thread(index.asked.wait, 150)
        (agent_there,) = agents(host)
        agent_there.kill()
        with pytest.raises(base.HostError):
            await installing

    at(farm, "host1", killed, python=PYTHON)
    assert [process for process in fleet_processes(host.folder) if "pip" in process.cmdline()]
    (unfinished,) = environments(host)
    assert not (unfinished / ".complete").exists()
    (brought,) = (data_of(host) / "wheels").iterdir()
    os.utime(brought, (0, 0))
    threading.Timer(0.5, index.may_answer.set).start()
    python = install(farm, bundle, PYTHON)
    assert works(python)
    assert nothing_was_left_but(host, python)


def test_a_connection_cut_midway_lets_the_install_end_and_the_next_finds_it(farm, index, eventually):
    host = index.add_host(farm)
    bundle = tiny_bundle("one", requires=DEPENDENCY)

    async def cut(launcher: SshLauncher) -> None:
        installing = asyncio.create_task(launcher.install(bundle))
        await asyncio.to_thread(index.asked.wait, 150)
        await asyncio.to_thread(host.stop)
        with pytest.raises(base.Disconnected):
            await installing

    at(farm, "host1", cut, python=PYTHON)
    index.may_answer.set()
    host.start()
    python = install(farm, bundle, PYTHON)
    assert works(python)
    assert nothing_was_left_but(host, python)


def test_a_connection_cut_while_the_wheel_is_brought_leaves_nothing_in_the_end(farm, eventually):
    host = farm.add("host1")
    large = tiny_bundle("one", files={"fleet/large": os.urandom(2**26)})

    async def cut(launcher: SshLauncher) -> None:
        installing = asyncio.create_task(launcher.install(large))
        await asyncio.to_thread(eventually, lambda: list((data_of(host) / "wheels").rglob("*.whl")))
        await asyncio.to_thread(host.stop)
        with pytest.raises(base.Disconnected):
            await installing

    at(farm, "host1", cut, python=UV)
    host.start()
    (brought,) = (data_of(host) / "wheels").iterdir()
    os.utime(brought, (0, 0))
    python = install(farm, tiny_bundle("one"))
    assert nothing_was_left_but(host, python)


# --- without an index ------------------------------------------------------------------------------


def test_a_host_without_an_index_is_brought_all_it_needs(farm, fleet, redis_client):
    host = farm.add("host1", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    done = fleet("up", "host1", options=OFFLINE, timeout_seconds=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert beating(redis_client) == ["host1-0"]
    (environment,) = environments(host)
    assert nothing_was_left_but(host, f"{environment}/bin/python")
    assert fleet("down").returncode == 0


OFFLINE = ("--offline", "--python", PYTHON)


def test_wheels_that_cannot_be_gathered_are_told_and_no_host_is_touched(farm, fleet):
    host = farm.add("host1")
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = fleet("up", "host1", options=(*OFFLINE, "--json"), env=nowhere)
    row = rows(done)["host1"]
    assert (row["step"], row["error"]["code"]) == ("install", "install_failed")
    assert "could not be gathered here" in row["error"]["message"]
    assert not list(host.home.iterdir())
    both = fleet("up", "host1", options=("--offline", "--no-install", "--python", PYTHON))
    assert (both.returncode, "--offline and --no-install exclude each other" in both.stderr) == (2, True)


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(farm, fleet, tmp_path):
    farm.add("host1")
    (tmp_path / "cache").write_text("a file\n")
    done = fleet("up", "host1", options=(*OFFLINE, "--json"), env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    row = rows(done)["host1"]
    assert (row["step"], row["error"]["code"]) == ("install", "install_failed")
    assert f"cannot gather wheels in {tmp_path}/cache/rq-fleet/wheels here" in row["error"]["message"]
    assert "XDG_CACHE_HOME" in row["error"]["hint"]


@pytest.mark.root
@pytest.mark.parametrize("large", ["what is installed", "what it needs"])
def test_a_full_disk_here_is_told_for_what_it_is(small_disk, tmp_path, monkeypatch, large):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    content = {"data": os.urandom(2**21)}
    needed = tiny_bundle("needed", name="needed", files=content if large == "what it needs" else {})
    (tmp_path / needed.filename).write_bytes(needed.data)
    bundle = tiny_bundle("one", requires="needed", files=content if large == "what is installed" else {})
    cache = small_disk("1m") / "wheels"

    async def gather() -> Path:
        return await Wheelhouses(cache).for_host(bundle, await LocalLauncher().probe())

    with pytest.raises(base.DiskFull, match=f"no space is left here for the wheels in {cache}") as caught:
        asyncio.run(gather())
    assert "XDG_CACHE_HOME" in caught.value.hint
    assert list(cache.iterdir()) == []


def test_an_interrupt_while_wheels_are_gathered_leaves_nothing(index, tmp_path, monkeypatch):
    for name, value in index.environ.items():
        monkeypatch.setenv(name, value)

    async def interrupted() -> None:
        found = await LocalLauncher().probe()
        bundle = tiny_bundle("one", requires=DEPENDENCY)
        gathering = asyncio.create_task(Wheelhouses(tmp_path / "cache").for_host(bundle, found))
        await asyncio.to_thread(index.asked.wait, 150)
        gathering.cancel()

    asyncio.run(interrupted())
    assert list((tmp_path / "cache").iterdir()) == []
    assert not [child for child in psutil.Process().children() if "download" in child.cmdline()]


# --- what installs leave ---------------------------------------------------------------------------


def test_old_installs_are_removed_but_for_the_newest_and_those_in_use(farm, spawn):
    host = farm.add("host1")
    used = install(farm, tiny_bundle("used"))
    spawn([used, "-I", "-c", "import time; time.sleep(1000)"])
    made = data_of(host) / "venvs"
    for age, name in enumerate(["newer", "new", "old", "older", "elsewhere"], start=1):
        (made / name / ".hosts").mkdir(parents=True)
        (made / name / ".complete").touch()
        os.utime(made / name / ".complete", (time.time() - age, time.time() - age))
    os.utime(Path(used).parent.parent / ".complete", (0, 0))
    (made / "elsewhere/.hosts/another-host").touch()
    (made / "old/.hosts" / os.uname().nodename).touch()  # it did run from there
    newest = install(farm, tiny_bundle("newest"))
    assert nothing_was_left_but(
        host, used, newest, *(f"{made}/{name}/bin/python" for name in ("newer", "new", "elsewhere"))
    )
    assert works(used)


def test_a_host_says_which_environments_it_runs_from(farm, spawn):
    host = farm.add("host1")
    first, second = (data_of(host) / f"venvs/{name}" for name in ("first", "second"))
    for folder in (first, second):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/python").symlink_to(PYTHON)
    order = WorkerConfig("host1-0", "host1", "redis://127.0.0.1:1/0", str(host.output_dir))
    running = spawn([first / "bin/python", "-I", "-c", "import time; time.sleep(1000)"])
    for folder, expected in ((first, [True, False]), (second, [True, True]), (second, [False, True])):
        with pytest.raises(base.InstallFailed):  # there is nothing in it to start, but that shows later
            at(farm, "host1", lambda launcher, folder=folder: launcher.start(f"{folder}/bin/python", [order]))
        marks = [(environment / ".hosts" / os.uname().nodename).exists() for environment in (first, second)]
        assert marks == expected
        if marks == [True, True]:
            running.kill()
            running.wait()


def test_an_install_cut_off_long_ago_and_never_taken_up_again_is_removed(farm):
    host = farm.add("host1")
    for folder in (data_of(host) / "venvs/other", data_of(host) / "wheels/old", data_of(host) / "wheels/new"):
        folder.mkdir(parents=True)
    os.utime(data_of(host) / "wheels/old", (0, 0))
    vanished = data_of(host) / "wheels/vanished"  # another took it away just after it was listed
    vanished.symlink_to("nowhere")
    python = install(farm, tiny_bundle("one"))
    assert environments(host) == [Path(python).parent.parent]
    vanished.unlink()
    assert [path.name for path in (data_of(host) / "wheels").iterdir()] == ["new"], "it may be on its way"


def test_an_install_that_was_damaged_is_made_anew(farm):
    host = farm.add("host1")
    python = install(farm, tiny_bundle("one"))
    (detach,) = Path(python).parent.parent.glob("lib/python3*/site-packages/fleet/detach.py")
    detach.unlink()
    order = WorkerConfig("host1-0", "host1", "redis://127.0.0.1:1/0", str(host.output_dir))
    with pytest.raises(base.InstallFailed, match="is damaged") as caught:
        at(farm, "host1", lambda launcher: launcher.start(python, [order]), python=PYTHON)
    assert caught.value.hint == "Run it again: it is installed anew."
    assert install(farm, tiny_bundle("one")) == python
    assert detach.exists()


def test_hosts_that_share_a_home_have_an_environment_for_each_python(farm, tmp_path):
    host = farm.add("host1")
    venv.create(tmp_path / "other", symlinks=False)
    first = install(farm, tiny_bundle("one"), PYTHON)
    second = install(farm, tiny_bundle("one"), str(tmp_path / "other/bin/python"))
    assert first != second
    assert install(farm, tiny_bundle("one"), PYTHON) == first
    assert nothing_was_left_but(host, first, second)
