"""What workers log: as JSON every line of a worker's life has its fields; for people by default."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from broker import control
from tests.integration import fleets
from tests.integration.conftest import Workers

FIELDS = {"time", "level", "worker", "host", "job", "fence", "event", "message"}
#: long enough for a busy machine, and short enough to wait for its end
LEASE = {"heartbeat_seconds": 0.5, "lease_seconds": 8.0}


def entries(text: str) -> list[dict[str, Any]]:
    """Every line that is whole, each of which is an object with all fields."""
    found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    assert all(set(entry) >= FIELDS for entry in found), found
    return found


def sidecar_of(pid: int) -> psutil.Process:
    [sidecar] = [p for p in psutil.Process(pid).children() if "sidecar_main.py" in " ".join(p.cmdline())]
    return sidecar


def test_every_line_of_a_workers_life_is_json_with_its_fields(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any], tmp_path: Path
) -> None:
    server = own_redis("--appendfsync", "always")
    workers = workers_of(server.url)
    gate = tmp_path / "gate"
    worker = workers.start("w0", slots=2, settings=LEASE, log_format="json", log_level="debug")

    def seen(event: str, **fields: Any) -> Callable[[], Any]:
        def find() -> Any:
            wanted = {"event": event, **fields}
            return [one for one in entries(workers.log("w0")) if wanted.items() <= one.items()]

        return find

    def waited(event: str, **fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = workers.until(seen(event, **fields), f"{event} {fields}")[0]
        return found

    good = workers.submit("true")
    once = tmp_path / "once"
    bad = workers.submit("sh", "-c", f"[ -e {once} ] || {{ touch {once}; exit 7; }}", retries=1)
    workers.wait([good, bad])
    first = waited("job_failed", job=bad)
    assert (first["level"], first["message"]) == ("info", f"job {bad} failed: exit code 7")
    assert waited("job_finished", job=bad)["fence"] > first["fence"]

    # what the sidecar has to say, and its death
    sidecar = sidecar_of(worker.pid)
    Path(f"/proc/{sidecar.pid}/fd/2").write_text("it is amiss\n")
    assert "it is amiss" in waited("sidecar_says")["message"]
    sidecar.kill()
    waited("sidecar_died", level="warning")

    # Redis goes away, for longer than the lease holds
    lost = workers.submit("sh", "-c", f"while [ ! -e {gate} ]; do sleep 0.1; done")
    waited("job_started", job=lost)
    server.kill()
    waited("redis_away", level="warning")
    waited("job_lost", job=lost)
    gate.touch()
    server.start()
    waited("redis_back")
    workers.wait([lost])

    control.drain(workers.client, {"w0": "here"})
    waited("draining")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    waited("stopping")
    waited("signed_off")

    told = entries(workers.log("w0"))
    assert {(one["worker"], one["host"]) for one in told} == {("w0", "here")}
    assert told[0]["event"] in ("resources", "registered")
    assert all(one["time"].endswith("Z") and datetime.fromisoformat(one["time"]) for one in told)
    assert all((one["job"] is None) == (one["fence"] is None) for one in told)


def test_people_are_told_by_default_and_no_more_than_asked_for(workers: Workers) -> None:
    job = workers.submit("sh", "-c", "exit 3")
    worker = workers.start("w0", burst=True, wait=False)
    assert worker.wait(60) == 0
    log = workers.log("w0")
    assert all(
        re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING) ", line) for line in log.splitlines()
    )
    assert f"INFO job {job} failed: exit code 3" in log
    assert "job_" not in log
    quiet = workers.start("w1", burst=True, wait=False, log_level="error")
    assert quiet.wait(60) == 0
    assert workers.log("w1") == ""


def test_the_form_is_set_by_option_variable_and_file_and_a_refusal_has_it_too(
    run_fleet: Callable[..., Any], fleet_redis_url: str, tmp_path: Path
) -> None:
    once = ("worker", "--burst", "--output-dir", tmp_path / "work")
    by_option = run_fleet(*once, "--log-format", "json", "--log-level", "debug")
    by_variable = run_fleet(*once, env={"FLEET_LOG_FORMAT": "json"})
    assert {"registered", "signed_off"} <= {one["event"] for one in entries(by_option.stderr)}
    assert "registered" in {one["event"] for one in entries(by_variable.stderr)}
    refused = run_fleet(*once, "--executor-python", "/no/python", env={"FLEET_LOG_FORMAT": "json"})
    [said] = [one for one in entries(refused.stderr) if one["event"] == "refused"]
    assert (refused.returncode, said["level"]) == (2, "error")
    assert "/no/python" in said["message"]
    wrong = run_fleet(*once, env={"FLEET_LOG_FORMAT": "xml"})
    assert wrong.returncode == 2
    assert "log_format" in wrong.stderr


def test_fleet_up_starts_workers_whose_logs_are_as_the_settings_here_have_them(
    run_fleet: Callable[..., Any], redis_client: redis.Redis, fleet_redis_url: str, tmp_path: Path
) -> None:
    env = {**fleets.FAST, "FLEET_LOG_FORMAT": "json"}
    folder = tmp_path / "work"
    try:
        up = run_fleet("up", "--local", "1", "--output-dir", folder, env=env)
        assert up.returncode == 0, up.stderr
        [log] = (folder / "log").glob("*.log")
        assert "registered" in {one["event"] for one in entries(log.read_text())}
    finally:
        assert run_fleet("down", "--force", env=env).returncode == 0


#: what nobody logs by itself: a library's line, a warning, a thread that dies, what Python drops, the end
UNCAUGHT = """
import logging, threading, warnings
from fleet import logs
logs.set_up("json", worker="w", host="h")
class Fell:
    def __del__(self): raise ValueError("dropped")
def die(): raise KeyError("in a thread")
logging.getLogger("somebody.else").warning("b\\udcffd %s", "\\u00e4")
warnings.warn("old ways")
Fell()
thread = threading.Thread(target=die); thread.start(); thread.join()
raise RuntimeError("the end")
"""


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_what_libraries_say_and_nobody_caught_is_logged_too(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCAUGHT],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )
    found = entries(done.stderr.decode("ascii"))
    library, warning, dropped, thread, end = found
    assert (library["event"], library["message"]) == ("log", "b\udcffd ä")
    assert "old ways" in warning["message"]
    assert [one["event"] for one in (dropped, thread, end)] == ["crash"] * 3
    assert "ValueError: dropped" in dropped["traceback"]
    assert "KeyError: 'in a thread'" in thread["traceback"]
    assert (end["level"], end["message"]) == ("critical", "RuntimeError: the end")
    assert done.returncode == 1
