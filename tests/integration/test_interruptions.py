"""What becomes of all processes of a command that is interrupted, and what its job says then."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker import control
from tests.integration.conftest import Workers
from tests.integration.test_worker import is_live, lines, runs, waiting_for

__all__ = ["runs"]

#: a grace that no test would outlast
LONG = {"kill_grace_seconds": 300.0, "stop_grace_seconds": 300.0}


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Path]:
    """A file for the numbers of processes that nobody but the worker would end."""
    file = tmp_path / "daemons"
    yield file
    for pid in filter(is_live, map(int, lines(file))):
        os.kill(pid, signal.SIGKILL)


def interrupt(workers: Workers, how: str, settings: dict[str, Any], begun: Path, *argv: str) -> str:
    """Run a command and end it once it has begun; returns its job."""
    worker = workers.start("w0", settings=settings, in_slurm=how == "hand-back")
    job = workers.submit(*argv, **{"timeout_seconds": 4} if how == "timeout" else {})
    workers.until(lambda: lines(begun), "it has begun")
    if how == "cancel":
        control.cancel(workers.client, job)
    elif how == "hand-back":
        worker.send_signal(signal.SIGTERM)
    return job


@pytest.mark.parametrize("how", ["cancel", "timeout", "hand-back"])
def test_all_of_a_process_group_has_the_grace_and_not_its_first_process_alone(
    workers: Workers, runs: Path, tmp_path: Path, how: str
) -> None:
    gate = tmp_path / "gate"
    child = tmp_path / "child.sh"
    child.write_text(
        f"trap 'echo heard >> {runs}; {waiting_for(gate)}; echo saved >> {runs}; exit' TERM\n"
        f"echo $PPID >> {runs}; while :; do sleep 0.05; done\n"
    )
    job = interrupt(workers, how, LONG, runs, "sh", "-c", f"sh {child}; echo after")
    workers.until(lambda: "heard" in lines(runs), "the child was asked to end")
    workers.until(lambda: not is_live(int(lines(runs)[0])), "its parent is gone")
    gate.touch()
    ended = ["queued", "stopped", "failed"]
    workers.until(lambda: workers.state(job) in ended, "it ended, and not with the grace")
    assert lines(runs)[1:] == ["heard", "saved"]


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_what_is_left_of_a_process_group_after_the_grace_is_killed(
    workers: Workers, runs: Path, how: str
) -> None:
    script = f"(trap '' TERM; exec sh -c 'echo $$ >> {runs}; exec sleep 300'); echo after"
    job = interrupt(workers, how, {"kill_grace_seconds": 1.0}, runs, "sh", "-c", script)
    workers.wait([job])
    workers.until(lambda: not is_live(int(lines(runs)[0])), "the child is gone")


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_what_left_its_process_group_goes_with_an_interrupted_job_and_no_other_job_s(
    workers: Workers, daemons: Path, how: str
) -> None:
    leaving = f"setsid sh -c 'echo $$ >> {daemons}; exec sleep 300' & wait; sleep 300"
    workers.start("other", queues=("others",))
    workers.submit_many([("sh", "-c", leaving)], queue="others")
    workers.until(lambda: lines(daemons), "the other job runs")
    before = lines(daemons)
    neighbour = workers.submit("sh", "-c", leaving)
    workers.start("w0", slots=2)
    workers.until(lambda: len(lines(daemons)) == 2, "a job beside it runs")
    job = workers.submit("sh", "-c", leaving, **{"timeout_seconds": 4} if how == "timeout" else {})
    workers.until(lambda: len(lines(daemons)) == 3, "it runs")
    if how == "cancel":
        control.cancel(workers.client, job)
    workers.wait([job])
    *others, own = map(int, lines(daemons))
    workers.until(lambda: not is_live(own), "what left its group is gone")
    assert len(before) == 1
    assert all(map(is_live, others))
    assert workers.state(neighbour) == "started"


def test_the_text_of_an_interrupted_command_has_its_last_output(workers: Workers, runs: Path) -> None:
    script = f"echo precious >&2; echo begun >> {runs}; exec sleep 300"
    workers.start("w0", slots=2)
    late = workers.submit("sh", "-c", script, timeout_seconds=4)
    unwanted = workers.submit("sh", "-c", script)
    workers.until(lambda: len(lines(runs)) == 2, "both run")
    control.cancel(workers.client, unwanted)
    for job in workers.wait([late, unwanted]):
        assert job.result == f"{job.reason}\n\nIts last output:\nprecious"
