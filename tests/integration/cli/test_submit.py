"""`fleet submit`: one command line becomes one job."""

from __future__ import annotations

import re
import resource
import subprocess
from datetime import datetime

import pytest

from broker import jobs, keys
from broker.command import from_data
from tests.conftest import fleet_script


def test_prints_the_id_and_nothing_else(fleet, redis_client):
    redis_client.sadd(keys.of("queue_workers", "default"), keys.rq_worker("w0"))
    done = fleet("submit", "--", "true")
    assert re.fullmatch(r"[0-9a-f]{16}\n", done.stdout)
    assert done.stderr == ""
    assert jobs.show(redis_client, done.stdout.strip()).argv == ("true",)


def test_says_so_where_no_worker_listens_on_the_queue(fleet):
    done = fleet("submit", "--queue", "gpu", "--", "true")
    assert re.fullmatch(r"[0-9a-f]{16}\n", done.stdout)
    assert done.stderr.startswith("No worker listens on queue gpu yet")
    assert fleet("-q", "submit", "--queue", "gpu", "--", "true").stderr == ""


def test_what_follows_the_command_is_the_commands(fleet, submit, redis_client):
    for words in (["--", "prog", "--json", "-q"], ["prog", "--queue", "x", "--", "--json"]):
        job = fleet("submit", *words).stdout.strip()
        assert jobs.show(redis_client, job).argv == tuple(words[1:] if words[0] == "--" else words)


def test_options_reach_the_job(submit, redis_client):
    options = ("--queue", "q", "--name", "n", "--timeout", "1.5m", "--retries", "2", "--retry-delay", "10")
    more = ("--env", "A=1", "--env", "B=x=y", "--cwd", "/tmp", "--id", "mine")
    assert submit("prog", options=options + more) == "mine"
    fields = redis_client.hgetall("rq:job:mine")
    assert (fields[b"origin"], fields[b"description"], fields[b"timeout"]) == (b"q", b"n", b"90")
    assert fields[b"retries_left"] == b"2"
    command = from_data(fields[b"data"])
    assert command is not None
    assert (dict(command.env), command.cwd) == ({"A": "1", "B": "x=y"}, "/tmp")


def test_a_relative_folder_is_meant_from_here(submit, redis_client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = submit("prog", options=("--cwd", "sub"))
    command = from_data(redis_client.hget(f"rq:job:{job}", "data"))
    assert command is not None
    assert command.cwd == str(tmp_path / "sub")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command given"),
        (["--"], "no command given"),
        (["--", ""], "no command given"),
        (["--timeout", "0", "x"], "must be more than 0"),
        (["--timeout", "-5", "x"], "must be more than 0"),
        (["--timeout", "soon", "x"], "no duration"),
        (["--timeout", "1e9", "x"], "no duration"),
        (["--timeout", "99999999999d", "x"], "hundred years"),
        (["--retries", "-1", "x"], "--retries"),
        (["--env", "A", "x"], "NAME=VALUE"),
        (["--env", "=1", "x"], "NAME=VALUE"),
        (["--name", "", "x"], "--name is empty"),
        (["--cwd", "", "x"], "--cwd is empty"),
        (["--id", "a b", "x"], "no job id"),
        (["--id", "../x", "x"], "no job id"),
        (["--queue", "a b", "x"], "no queue name"),
        (["--queue", "a\nb", "x"], "no queue name"),
        (["--queue", "", "x"], "no queue name"),
        (["--queue", "\udcff", "x"], "no queue name"),
        (["--nonsense", "x"], "No such option"),
    ],
)
def test_what_cannot_be_is_a_usage_error_and_no_job(fleet, redis_client, words, message):
    done = fleet("submit", *words, code=2)
    assert message in done.stderr
    assert done.stdout == ""
    assert redis_client.keys("rq:*") == []


def test_json_of_the_command_is_not_our_json(fleet):
    assert fleet("submit", "--queue", "a b", "--", "prog", "--json", code=2).stderr.startswith("fleet: ")
    assert fleet("submit", "--queue", "a b", "prog", "--json", code=2).stderr.startswith("fleet: ")


def test_an_id_that_is_taken_is_refused(submit, fault, redis_client):
    submit("true", options=("--id", "once"))
    assert fault("submit", "--id", "once", "--", "false", code=1)["code"] == "conflict"
    assert jobs.show(redis_client, "once").argv == ("true",)


def test_arguments_that_are_no_utf8_arrive_as_they_are(submit, burst, read, run_fleet):
    job = submit("printf", "%s", "\udcff\udcfeé")
    burst()
    assert run_fleet("logs", job).stdout == "\udcff\udcfeé"
    assert read("show", job)["argv"] == ["printf", "%s", "\udcff\udcfeé"]
    assert "\\xff\\xfe" in run_fleet("show", job).stdout
    assert "\\xff\\xfe" in run_fleet("jobs").stdout


def test_json_says_what_was_made(read):
    made = read("submit", "--queue", "q", "--", "true")
    assert made.keys() == {"schema", "id", "state", "queue"}
    assert (made["state"], made["queue"]) == ("queued", "q")


def test_waiting_ends_with_the_job_and_takes_its_side(fleet, workers, read):
    workers.start("w0")
    done = fleet("submit", "--wait", "--", "true")
    assert re.fullmatch(r"[0-9a-f]{16}\n", done.stdout)
    failed = fleet("submit", "--wait", "--", "sh", "-c", "exit 3", code=1)
    assert "exit code 3" in failed.stderr
    told = read("submit", "--wait", "--", "sh", "-c", "exit 3", code=1)
    assert (told["state"], told["exit_code"], told["reason"]) == ("failed", 3, "exit code 3")


def test_following_prints_what_the_job_prints_and_nothing_else(fleet, workers):
    workers.start("w0")
    script = "echo out; printf '\\377' ; echo err >&2; sleep 1.3; echo late; exit 4"
    done = fleet("submit", "--follow", "--", "sh", "-c", script, code=1)
    assert done.stdout == "out\n\udcfflate\n"
    assert "err\n" in done.stderr
    assert "exit code 4" in done.stderr


def test_following_shows_output_while_the_job_runs(fleet, workers, spawn, tmp_path, eventually):
    workers.start("w0")
    go = tmp_path / "go"
    script = f"echo early; while [ ! -e {go} ]; do sleep 0.05; done; echo late"
    told = tmp_path / "told"
    with open(told, "wb") as output:
        process = spawn([fleet_script(), "submit", "--follow", "--", "sh", "-c", script], stdout=output)
    eventually(lambda: told.read_bytes() == b"early\n", message="early output")
    go.touch()
    assert process.wait(60) == 0
    assert told.read_bytes() == b"early\nlate\n"


def test_waiting_says_when_no_worker_listens(spawn, fleet_redis_url, eventually, tmp_path, redis_client):
    said = tmp_path / "said"
    with open(said, "wb") as errors:
        command = [fleet_script(), "submit", "--wait", "--queue", "lonely", "--", "true"]
        spawn(command, stderr=errors, stdout=subprocess.DEVNULL)
    eventually(lambda: b"No worker listens on queue lonely" in said.read_bytes(), message="the warning")


@pytest.mark.parametrize("program", ["no-such-program", "/etc/passwd"])
def test_a_command_that_cannot_start_fails_with_its_reason(submit, burst, read, program):
    bad, good = submit(program), submit("true")
    burst()
    job = read("show", bad)
    assert job["state"] == "failed"
    assert program in job["reason"]
    assert read("show", good)["state"] == "finished"


def test_it_is_quick(fleet):
    """Half a second is promised, of which nearly all is its own work: waiting for others in a test
    run that fills the machine does not count."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        fleet("submit", "--", "true")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(once() < 0.5 for _ in range(10))


def test_a_retry_waits_for_its_delay_and_none_where_that_is_nothing(fleet, read, submit, burst, redis_client):
    late = submit("false", options=("--retries", "2", "--retry-delay", "100"))
    at_once = submit("false", options=("--retries", "2", "--retry-delay", "0"))
    burst()
    assert len(read("show", at_once)["attempts"]) == 3
    shown = read("show", late)
    assert (shown["state"], len(shown["attempts"])) == ("scheduled", 1)
    ended = datetime.fromisoformat(shown["attempts"][0]["ended_at"]).timestamp()
    assert 99.9 <= redis_client.zscore(keys.of("scheduled", "default"), late) - ended <= 150.1
