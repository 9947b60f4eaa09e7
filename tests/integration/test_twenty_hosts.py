"""Twenty machines of which four are not as they should be; what each is told, and half of all killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from broker import __version__, jobs
from broker.command import Command
from broker.submit import Options, submit_commands
from tests.integration.fleets import beating, pids, python_with, rows
from tests.integration.sshd import PYTHON, SshdFarm, fleet_processes

pytestmark = [pytest.mark.root, pytest.mark.needs("sshd")]
NAMES = tuple(f"node{number:02}" for number in range(1, 21))
DOWN, OLD, BARE, FULL = "node04", "node08", "node12", "node16"
GOOD = tuple(name for name in NAMES if name not in (DOWN, OLD, BARE, FULL))
JOBS = 200
#: half of the workers are lost, and no other is
_LEASE = {"FLEET_WORKER__LEASE_SECONDS": "10"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with no space left; more may be given to it."""
    folder = tmp_path / "farm/disk"
    folder.mkdir(parents=True)
    mount("size=64k", folder)
    try:
        with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(options: str, folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


@pytest.fixture
def machines(farm: SshdFarm, disk: Path) -> SshdFarm:
    for name in NAMES:
        environ = {"XDG_STATE_HOME": str(disk)} if name == FULL else {}
        farm.add(name, start=name != DOWN, **environ)
    return farm


def lines_for(python: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{name} slots=1 python={python.get(name, PYTHON)}" for name in NAMES)


def test_each_of_twenty_hosts_gets_what_is_right_for_it_and_half_of_them_may_die(
    machines: SshdFarm,
    fleet: Callable[..., Any],
    redis_client: redis.Redis,
    disk: Path,
    tmp_path: Path,
    eventually: Callable[..., Any],
) -> None:
    old, missing = python_with("0.0.9", tmp_path / "old"), tmp_path / "later/python3"
    hosts = lines_for({OLD: old, BARE: str(missing)})

    first = fleet("up", *hosts, options=("--no-install", "--python", PYTHON), env=_LEASE)
    assert first.returncode == 3, first.stdout + first.stderr
    told = {line.split()[0]: line for line in first.stdout.splitlines() if not line.startswith(" ")}
    assert all(f"started: {name}-0" in told[name] for name in GOOD)
    assert "[FAILED] connect: " in told[DOWN]
    assert "refused the connection" in told[DOWN]
    assert f"[FAILED] version: Version mismatch: local={__version__}, {OLD}=0.0.9" in told[OLD]
    assert f"[FAILED] probe: {missing} is no Python 3.11 or newer there" in told[BARE]
    assert "[FAILED] start: " in told[FULL]
    assert "No space left" in told[FULL]
    assert beating(redis_client) == [f"{name}-0" for name in GOOD]
    assert len(fleet_processes(machines.folder)) == len(GOOD), "a worker each, and nothing else is left"
    for name in (DOWN, OLD, BARE):
        assert not list(machines.hosts[name].home.iterdir()), f"{name} is untouched"

    machines.hosts[DOWN].start()
    missing.parent.mkdir()
    missing.symlink_to(PYTHON)
    mount("remount,size=64m", disk)
    options = ("--no-install", "--python", PYTHON, "--json")
    again = fleet("up", *lines_for({}), options=options, env=_LEASE)
    assert again.returncode == 0, again.stdout + again.stderr
    found = rows(again)
    assert {name for name, row in found.items() if row["outcome"] == "running"} == set(GOOD)
    assert {name for name, row in found.items() if row["outcome"] == "started"} == {DOWN, OLD, BARE, FULL}
    assert all(f"(pid {pid})" in told[name] for name in GOOD for pid in [pids(found)[f"{name}-0"]])

    script = 'echo run >> "$1/$FLEET_JOB_ID"; sleep 0.2; echo end >> "$1/$FLEET_JOB_ID"'
    board = tmp_path / "board"
    board.mkdir()
    command = Command(("sh", "-c", script, "job", str(board)))
    ids = submit_commands(redis_client, "default", [(None, command)] * JOBS, Options())
    eventually(lambda: len(list(board.iterdir())) >= JOBS // 10)
    for name in NAMES[::2]:
        os.kill(pids(found)[f"{name}-0"], signal.SIGKILL)
    eventually(lambda: states(redis_client, ids) == {"finished"}, timeout_seconds=150)
    for job_id in ids:
        outcomes = [attempt.outcome for attempt in jobs.show(redis_client, job_id).attempts]
        assert outcomes.count("finished") == 1, (job_id, outcomes)
        ran = (board / job_id).read_text().split()
        assert ran.count("end") >= 1
        assert ran.count("run") <= len(outcomes)

    ended = fleet("down")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert fleet_processes(machines.folder) == []
    assert beating(redis_client) == []


def states(client: redis.Redis, ids: list[str]) -> set[str]:
    return {jobs.show(client, job_id).state for job_id in ids}
