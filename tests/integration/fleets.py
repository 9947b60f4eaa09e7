"""What `fleet up` and `fleet down` answered, who beats, and a rq-fleet of another version."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from broker import __version__, keys
from broker.command import Command
from broker.submit import Options, submit_commands
from fleet import bundle

#: what there is to wait for comes soon, and nobody is taken for lost, however busy the machine
FAST = {
    "FLEET_WORKER__HEARTBEAT_SECONDS": "0.5",
    "FLEET_WORKER__LEASE_SECONDS": "30",
    "FLEET_WORKER__STOP_GRACE_SECONDS": "5",
    # nothing appears in an output folder by itself
    "FLEET_WORKER__SAMPLE_SECONDS": "0",
}
#: where a worker's heartbeat is to lapse
SHORT_LEASE = {"FLEET_WORKER__LEASE_SECONDS": "5"}


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The hosts of a JSON document on stdout."""
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    return {row["host"]: row for row in document["hosts"]}


def pids(found: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {worker["name"]: worker["pid"] for row in found.values() for worker in row["workers"]}


def beating(client: Any) -> list[str]:
    """The workers that beat."""
    names = [name.decode() for name in client.smembers(keys.FLEET_WORKERS)]
    return sorted(name for name in names if client.exists(keys.worker_beat(name)))


def submit(client: Any, script: str) -> str:
    """Submit one line of shell; returns the job's id."""
    return submit_commands(client, "default", [(None, Command(("sh", "-c", script)))], Options())[0]


def python_with(version: str, folder: Path) -> str:
    """The interpreter of a new environment in which rq-fleet, this very code, is of that version."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for name, data in bundle._files():
        file = packages / name.replace(f"-{__version__}.dist-info", f"-{version}.dist-info")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.replace(f"ersion: {__version__}".encode(), f"ersion: {version}".encode()))
    (packages / "broker/__init__.py").write_text(
        (packages / "broker/__init__.py").read_text().replace(f'"{__version__}"', f'"{version}"')
    )
    (packages / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return str(folder / "bin/python")
