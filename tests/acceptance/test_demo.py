"""`fleet demo` as a stranger sees it: to the end, and interrupted at any moment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

DEMO = [sys.executable, "-I", "-m", "cli", "demo"]


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The temporary folder in which the demo makes its own."""
    folder = tmp_path / "stage"
    folder.mkdir()
    return folder


def environ(stage: Path) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(stage)}


def left_over(stage: Path) -> list[psutil.Process]:
    """Live processes that belong to a demo in `stage`."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.environ().values(), *process.cmdline()]
            is_dead = process.status() == psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            continue
        if not is_dead and any(f"{stage}/fleet-demo" in word for word in words):
            found.append(process)
    return found


def test_the_demo_loses_a_worker_and_no_job_and_leaves_nothing(
    stage: Path, eventually: Callable[..., Any]
) -> None:
    done = subprocess.run(DEMO, env=environ(stage), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"300 of 300 jobs finished; (\d+) were lost with (demo\d-0) and run again", done.stdout)
    assert told, done.stdout
    assert int(told[1]) >= 1
    assert re.search(rf"{told[2]}\s+demo\d\s+offline", done.stdout), "fleet status knows of the dead worker"
    assert re.search(r"default\s+0\s+0\s+([\d.]+\s+)?0\s+300\s+0\s+0", done.stdout), "fleet status"
    assert re.search(r"default .* 0, 0 executing, 300 finished, 0 failed", done.stdout), "rq info"
    assert "hello from demo" in done.stdout
    eventually(lambda: not left_over(stage), message="nothing of it lives")
    assert list(stage.iterdir()) == []


@pytest.mark.parametrize(
    "moment",
    [
        "# A Redis",
        "# 3 hosts",
        "# Workers",
        "demo[123]: start",
        "# 300 jobs",
        r"\$ kill -9",
        "# Nothing",
        "# Down",
    ],
)
def test_the_demo_cleans_up_after_ctrl_c_at_any_moment(
    stage: Path, moment: str, spawn: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    demo = spawn(
        DEMO,
        env=environ(stage) | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = ""
    for line in demo.stdout:
        seen += line
        if re.search(moment, line):
            break
    else:
        pytest.fail(f"never came to {moment}: {seen}")
    os.killpg(demo.pid, signal.SIGINT)
    rest, _ = demo.communicate(timeout=150)
    assert demo.returncode == 130, seen + rest
    assert "Traceback" not in seen + rest
    eventually(lambda: not left_over(stage), message="nothing of it lives")
    assert list(stage.iterdir()) == []
