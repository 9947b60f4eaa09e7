"""`fleet wait`: blocks until jobs have ended; the exit code says how."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time

import pytest

from broker import keys
from tests.conftest import fleet_script


@pytest.fixture
def ended(submit, burst):
    """A job that finished and one that failed."""
    jobs = submit("true"), submit("false")
    burst()
    return jobs


def test_the_exit_code_says_how_they_ended(fleet, ended, submit):
    good, bad = ended
    fleet("wait", good)
    fleet("wait", good, good)
    fleet("wait", bad, code=1)
    assert bad in fleet("wait", good, bad, code=3).stderr
    assert "nope" in fleet("wait", good, "nope", code=4).stderr
    waiting = submit("true")
    fleet("wait", good, waiting, "--timeout", "0.2", code=5)
    fleet("wait", "--timeout", "0", good)


def test_an_unknown_job_is_told_at_once(fleet, submit):
    begun = time.monotonic()
    fleet("wait", submit("true"), "nope", "--timeout", "140", code=4)
    assert time.monotonic() - begun < 100


def test_json_gives_the_states(read, ended):
    good, bad = ended
    states = [{"id": good, "state": "finished"}, {"id": bad, "state": "failed"}]
    assert read("wait", good, bad, code=3)["jobs"] == states


def test_it_waits_for_running_jobs(fleet, submit, workers, tmp_path, spawn, eventually, read):
    workers.start("w0")
    go = tmp_path / "go"
    job = submit("sh", "-c", f"while [ ! -e {go} ]; do sleep 0.05; done")
    process = spawn([fleet_script(), "wait", job])
    eventually(lambda: read("show", job)["state"] == "started")
    assert process.poll() is None
    go.touch()
    assert process.wait(60) == 0


def test_all_waits_for_every_queue_and_judges(fleet, submit, workers, tmp_path, spawn, eventually):
    fleet("wait", "--all")
    workers.start("w0", slots=2, queues=("default", "other"))
    go = tmp_path / "go"
    until = f"while [ ! -e {go} ]; do sleep 0.05; done"
    submit("sh", "-c", until, options=("--queue", "other"))
    submit("sh", "-c", f"{until}; exit 1")
    connected = len(workers.client.client_list())
    process = spawn([fleet_script(), "wait", "--all"])
    eventually(lambda: len(workers.client.client_list()) > connected, message="it waits")
    assert process.poll() is None
    fleet("wait", "--all", "--timeout", "0.5", code=5)
    go.touch()
    assert process.wait(60) == 3
    fleet("wait", "--all")


def test_all_gives_up_when_time_runs_out(fault, submit):
    submit("true")
    assert fault("wait", "--all", "--timeout", "0.2", code=5)["code"] == "timeout"


@pytest.mark.parametrize(
    "words",
    [[], ["--all", "x"], ["--all", "--failed"], ["x", "--timeout", "never"], ["x", "--timeout", "-1"]],
)
def test_what_makes_no_sense_is_a_usage_error(fleet, words):
    fleet("wait", *words, code=2)


def connected(client):
    """How many connections Redis has, those of other tests of this process included."""
    return len(client.client_list())


def test_a_job_deleted_meanwhile_is_told(spawn, submit, redis_client, eventually, read):
    others, job = connected(redis_client), submit("true")
    eventually(lambda: connected(redis_client) <= others, message="who submitted it has gone")
    process = spawn([fleet_script(), "wait", job], stderr=subprocess.PIPE)
    eventually(lambda: connected(redis_client) > others, message="it waits")
    redis_client.delete(keys.job(job))
    assert process.wait(60) == 4


def test_ctrl_c_ends_it_without_a_traceback(spawn, submit, tmp_path, redis_client, eventually):
    said, others, job = tmp_path / "said", connected(redis_client), submit("true")
    eventually(lambda: connected(redis_client) <= others, message="who submitted it has gone")
    with open(said, "wb") as errors:
        process = spawn([fleet_script(), "wait", job], stderr=errors)
    eventually(lambda: connected(redis_client) > others, message="it waits")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert b"Traceback" not in said.read_bytes()


def test_a_terminal_sees_a_progress_bar_and_a_pipe_none(spawn, submit, fleet, eventually):
    job = submit("true")
    assert fleet("wait", job, "--timeout", "0.3", code=5).stderr.startswith("fleet: ")
    ours, theirs = pty.openpty()
    process = spawn([fleet_script(), "wait", job, "--timeout", "1"], stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = _all_of(ours)
    assert process.wait(60) == 5
    assert "0/1" in shown


def _all_of(terminal: int) -> str:
    found = b""
    try:
        while piece := os.read(terminal, 4096):
            found += piece
    except OSError:
        pass  # how Linux says that nobody has the other end any more
    finally:
        os.close(terminal)
    return found.decode()
