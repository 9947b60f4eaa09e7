"""Whether the worker of a name lives on this machine and is one of the fleet: one question to Redis."""

from __future__ import annotations

import json
from typing import Any

import redis

from broker import hosts
from broker.errors import FleetError
from fleet import lifecycle, process
from fleet.outputs import Folders


class NotHealthy(FleetError):
    """It does not run here, or the fleet does not hear of it."""


def check(client: redis.Redis, folders: Folders, name: str) -> str:
    """Its incarnation, if it runs here and Redis has had a heartbeat of it within a lease.

    Raises NotHealthy, and what redis-py raises.
    """
    note = _note(folders, name)
    if not process.is_running(note.get("pid", 0), note.get("start_time", 0.0)):
        raise NotHealthy(f"no worker named {name} runs here", f"Its files are looked for in {folders.root}.")
    incarnation = str(note["incarnation"]).encode()
    sign = hosts.signs(client, [name])[name]
    if sign is None or sign.has_left:
        raise NotHealthy(
            f"worker {name} (pid {note['pid']}) runs, and no heartbeat of it has come for a lease"
        )
    if sign.incarnation != incarnation:
        raise NotHealthy(f"worker {name} (pid {note['pid']}) runs, and another one has its name")
    return incarnation.decode()


def _note(folders: Folders, name: str) -> dict[str, Any]:
    """What the worker left of its process when it had registered; nothing, where there is none."""
    try:
        found = json.loads(lifecycle.run_file(folders, name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
