"""The settings of a worker, as the file that a launcher wrote carries them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest

from broker import settings
from broker.errors import ConfigError
from broker.worker_settings import WorkerSettings


def test_what_a_launcher_writes_a_worker_reads():
    written = settings.load({"worker": {"lease_seconds": "60", "executor_max_jobs": "7"}}).worker
    assert WorkerSettings.from_json(json.loads(json.dumps(asdict(written)))) == written
    assert (written.lease_seconds, written.executor_max_jobs) == (60.0, 7)
    assert WorkerSettings.from_json({}) == WorkerSettings()


@pytest.mark.parametrize(
    "values",
    [
        {"no_such": 1},
        {"lease_seconds": "30"},
        {"lease_seconds": 0},
        {"lease_seconds": -1.0},
        {"lease_seconds": float("nan")},
        {"lease_seconds": None},
        {"losses_limit": -1},
        {"losses_limit": 1.5},
        {"losses_limit": True},
        {"executor_max_jobs": 0},
        {"lease_seconds": 10, "heartbeat_seconds": 6},
    ],
)
def test_anything_else_is_refused_by_name(values: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"setting worker"):
        WorkerSettings.from_json(values)


def test_a_worker_is_spared_what_it_does_not_need():
    heavy = ("pydantic", "asyncssh", "rich", "click", "rq", "jinja2", "cryptography.hazmat")
    code = f"import sys, fleet.assembly; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
