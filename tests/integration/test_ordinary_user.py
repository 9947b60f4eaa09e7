"""The whole life of a fleet as somebody who is not root: own keys, or an agent's, through a jump host.

The user is made for the test, and has two hosts; what is typed is typed by that user too.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import REPOSITORY, SESSION_MARK, fleet_script, wait_until
from tests.integration.fleets import FAST, pids, rows
from tests.integration.sshd import PYTHON, SshdFarm

pytestmark = [pytest.mark.root, pytest.mark.needs("sshd", "useradd"), pytest.mark.timeout(300)]


#: Redis, by a name that is not that of loopback: behind a jump host that would be another machine's
REDIS_NAME = "redis.rq-fleet.test"


class Somebody:
    """An ordinary user, and a folder where everything is theirs.

    What runs here may lie where only root may look (/root). So whatever the user runs, and what runs
    for them, sees a file system in which such folders hold nothing but that, open to all.
    """

    def __init__(self, folder: Path, spawn: Any) -> None:
        self.folder = folder
        self.name = f"rqf{uuid.uuid4().hex[:8]}"
        self.home = folder / "home"
        self.home.mkdir(mode=0o700)
        options = ("--no-create-home", "-d", str(self.home), "-s", "/bin/sh", "-p", "*")
        subprocess.run(["useradd", *options, self.name], check=True)
        self.uid = pwd.getpwnam(self.name).pw_uid
        self.owns(folder)
        (folder / "hosts").write_text(f"127.0.0.1 localhost {REDIS_NAME}\n")
        view = spawn(["unshare", "--mount", "sh", "-ec", opened(folder)])
        wait_until((folder / "ready").exists, message="the file system is open")
        self.view = ["nsenter", f"--mount=/proc/{view.pid}/ns/mnt"]

    def owns(self, path: Path) -> None:
        """Give them this, and all that is below."""
        for each in (path, *path.rglob("*")):
            os.chown(each, self.uid, self.uid, follow_symlinks=False)

    def words(self, *argv: Any) -> list[str]:
        """A command of that user."""
        who = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
        return [*self.view, *who, *map(str, argv)]

    def environ(self, **more: str) -> dict[str, str]:
        own = {"HOME": str(self.home), "USER": self.name, "PATH": "/usr/local/bin:/usr/bin:/bin"}
        return {**own, SESSION_MARK: os.environ[SESSION_MARK], **more}

    def does(self, *argv: Any, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.words(*argv),
            env=self.environ(**environ),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )


def opened(folder: Path) -> str:
    """A script that opens the way to what runs here, in a file system of its own, and waits."""
    stash = folder / "stash"
    places = {Path(sys.base_prefix), Path(sys.prefix), REPOSITORY, *map(Path, sys.path)}
    behind = {path: door for path in places if path.is_dir() and (door := closed_door(path))}
    lines = []
    for number, path in enumerate(behind):
        lines += [f"mkdir -p {stash}/{number}", f"mount --bind {path} {stash}/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {door}" for door in sorted({*behind.values()})]
    for number, path in enumerate(behind):
        lines += [f"mkdir -p {path}", f"mount --bind {stash}/{number} {path}"]
    lines += [f"mount --bind {folder}/hosts /etc/hosts", f"touch {folder}/ready", "exec sleep 1000"]
    return "\n".join(lines)


def closed_door(path: Path) -> Path | None:
    """The topmost folder on the way to `path` that only its owner may enter."""
    return next((each for each in reversed(path.parents) if not each.stat().st_mode & 0o001), None)


@pytest.fixture
def somebody(spawn: Any) -> Iterator[Somebody]:
    folder = Path(tempfile.mkdtemp(prefix="rq-fleet-somebody-"))
    folder.chmod(0o755)
    somebody = Somebody(folder, spawn)
    yield somebody
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.uids().real == somebody.uid:
                process.kill()
    subprocess.run(["userdel", "--force", somebody.name], check=True, capture_output=True)
    shutil.rmtree(folder)


@pytest.mark.parametrize("means", ["key", "agent"])
def test_the_life_of_a_fleet_behind_a_jump_host(somebody, spawn, redis_url, eventually, means):
    farm = SshdFarm(somebody.folder / "farm", lambda argv: spawn([*somebody.view, *argv]))
    jump, host = farm.add("jump"), farm.add("host1")
    agent = str(somebody.folder / "agent") if means == "agent" else "none"
    options = {"User": somebody.name, "IdentityAgent": agent}
    farm.config.write_text("")
    farm.alias("jump", jump.port, **options)
    farm.alias("host1", host.port, ProxyJump="jump", **options)
    hosts = farm.folder / "hosts.txt"
    hosts.write_text("host1 slots=2\n")
    (farm.folder / "id").chmod(0o600)
    somebody.owns(farm.folder)
    if means == "agent":
        serve = somebody.words("ssh-agent", "-D", "-a", agent)
        spawn(serve, env=somebody.environ(), stdout=subprocess.DEVNULL)
        eventually(Path(agent).exists, message="ssh-agent listens")
        added = somebody.does("ssh-add", farm.folder / "id", SSH_AUTH_SOCK=agent)
        assert added.returncode == 0, added.stderr
        (farm.folder / "id").unlink()

    url = redis_url.replace("127.0.0.1", REDIS_NAME)

    def fleet(verb: str, *words: Any) -> subprocess.CompletedProcess[str]:
        done = somebody.does(fleet_script(), verb, *words, FLEET_REDIS_URL=url, **FAST)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    up = fleet("up", hosts, "--ssh-config", farm.config, "--no-install", "--python", PYTHON, "--json")
    assert up.returncode == 0, up.stdout + up.stderr
    worker = psutil.Process(pids(rows(up))["host1-0"])
    assert worker.uids().real == somebody.uid
    done = fleet("submit", "--wait", "--", "sh", "-c", f"id -un > {farm.folder}/who")
    assert done.returncode == 0, done.stderr
    assert (farm.folder / "who").read_text().strip() == somebody.name
    assert "Accepted publickey" in jump.log
    assert [line.split()[0] for line in farm.known_hosts.read_text().splitlines()] == [
        f"[127.0.0.1]:{each.port}" for each in (jump, host)
    ]
    down = fleet("down", "--ssh-config", farm.config, "--json")
    assert (down.returncode, rows(down)["host1"]["outcome"]) == (0, "stopped"), down.stderr
    eventually(lambda: not worker.is_running())


def test_a_worker_that_its_user_may_not_end_remains_and_stays_known(
    somebody, spawn, run_fleet, fleet_redis_url
):
    """Somebody else started it: it is told, and nothing of it is forgotten."""
    farm = SshdFarm(somebody.folder / "farm", lambda argv: spawn([*somebody.view, *argv]))
    for name in ("host1", "host2"):
        farm.add(name)
    hosts = farm.folder / "hosts.txt"
    hosts.write_text("host1\nhost2\n")
    ssh = ("--ssh-config", farm.config)
    up = run_fleet("up", hosts, *ssh, "--no-install", "--python", PYTHON, "--json", env=FAST)
    assert up.returncode == 0, up.stdout + up.stderr
    worker = psutil.Process(pids(rows(up))["host1-0"])
    home, run_dir = farm.hosts["host1"].home, farm.hosts["host1"].output_dir / "run"
    for note in run_dir.glob("host1-0*.json"):  # whose token it is only they themselves can see
        fields = json.loads(note.read_text())
        note.write_text(json.dumps({name: fields[name] for name in fields.keys() - {"token"}}))
    somebody.owns(home)
    farm.config.write_text(farm.config.read_text().replace("User root", f"User {somebody.name}", 1))
    notes = sorted(run_dir.glob("*.json"))

    def down(*names: str) -> subprocess.CompletedProcess[str]:
        return run_fleet("down", *names, "--force", *ssh, "--json", env=FAST)

    with ThreadPoolExecutor() as at_once:  # each waits for what never ends
        alone = at_once.submit(down, "host1")
        some, every = down(), alone.result()
    assert (some.returncode, rows(some)["host2"]["outcome"]) == (3, "stopped"), some.stderr
    assert every.returncode == 1, every.stderr
    for row in (rows(some)["host1"], rows(every)["host1"]):
        assert (row["outcome"], row["workers"][0]["state"]) == ("failed", "remains")
        assert row["error"]["message"] == f"host1-0 (pid {worker.pid}) did not end"
    assert worker.is_running()
    assert sorted(run_dir.glob("*.json")) == notes
    assert "host1" in run_fleet("hosts", "list").stdout
    worker.kill()
