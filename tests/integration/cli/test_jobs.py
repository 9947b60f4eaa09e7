"""`fleet jobs`, `show`, `cancel`, `queues`: what there is, and damage that others did to it."""

from __future__ import annotations

import json
import zlib
from datetime import datetime

import pytest
import rq

from broker import keys
from broker.command import Command
from broker.submit import Options, submit_commands

_SHOW = {
    *(
        "schema",
        "id",
        "requirements",
        "name",
        "state",
        "queue",
        "argv",
        "exit_code",
        "reason",
        "submitted_at",
    ),
    *("started_at", "ended_at", "usage", "attempts", "result", "dependencies", "dependents"),
    *("tasks", "array"),
}


@pytest.fixture
def make(redis_client):
    """`make("job", queue="q", name="n")`: a queued job."""

    def submit(job_id: str, queue: str = "default", **options: object) -> str:
        command = Command(("prog", job_id))
        return submit_commands(redis_client, queue, [(job_id, command)], Options(**options))[0]

    return submit


# --- jobs ------------------------------------------------------------------------------------------


def ids(document) -> list[str]:
    return [job["id"] for job in document["jobs"]]


def test_the_newest_come_first_and_no_more_than_asked_for(read, make, eventually):
    for name in ("a", "b", "c"):
        make(name)
    assert set(ids(read("jobs"))) == {"a", "b", "c"}
    times = [job["submitted_at"] for job in read("jobs")["jobs"]]
    assert times == sorted(times, reverse=True)
    assert len(ids(read("jobs", "--limit", "2"))) == 2


def test_jobs_are_chosen_by_state_queue_and_name(read, make, submit, burst):
    make("a", name="train-1")
    make("b", "other", name="train-2")
    failed = submit("false", options=("--queue", "third"))
    burst("--queues", "third")
    assert ids(read("jobs", "--state", "failed")) == [failed]
    assert ids(read("jobs", "--state", "stopped")) == []
    assert set(ids(read("jobs", "--state", "queued"))) == {"a", "b"}
    assert ids(read("jobs", "--queue", "other")) == ["b"]
    assert set(ids(read("jobs", "--name", "train-*"))) == {"a", "b"}
    assert ids(read("jobs", "--name", "train-*", "--queue", "default")) == ["a"]


def test_a_list_and_a_close_look_use_the_same_words(read, make):
    make("a")
    (listed,) = read("jobs")["jobs"]
    assert listed.keys() == _SHOW - {"schema", "attempts", "result", "dependencies", "dependents"}
    shown = read("show", "a")
    assert {name: shown[name] for name in listed} == listed


def test_a_table_off_a_terminal_is_whole_and_plain(fleet, make):
    make("a" * 60, name="long " * 30)
    header, row = fleet("jobs").stdout.splitlines()
    assert header.split() == ["JOB", "STATE", "QUEUE", "AGE", "NAME"]
    assert "a" * 60 in row
    assert ("long " * 30).strip() in row
    assert "\x1b" not in row


def test_what_would_move_the_cursor_is_spelled_out(fleet, make):
    make("a", name="red\x1b[31m\nline")
    assert "red\\x1b[31m\\nline" in fleet("jobs").stdout
    assert "red\\x1b[31m\\nline" in fleet("show", "a").stdout


def test_nothing_there_is_no_error_and_prints_nothing(fleet, read):
    done = fleet("jobs")
    assert done.stdout == ""
    assert "No jobs yet" in done.stderr
    assert fleet("-q", "jobs").stderr == ""
    assert read("jobs") == {"schema": 1, "jobs": []}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--queue", "unknown"], 4),
        (["--queue", "a b"], 2),
        (["--queue", "a\nb"], 2),
        (["--state", "gone"], 2),
        (["--limit", "0"], 2),
        (["extra"], 2),
    ],
)
def test_jobs_refuses_what_it_does_not_know(fault, make, words, code):
    make("a")
    fault("jobs", *words, code=code)


# --- show ------------------------------------------------------------------------------------------


def test_a_command_shows_how_it_went(read, submit, burst):
    job = submit("sh", "-c", "echo oops >&2; exit 3", options=("--name", "mine"))
    burst()
    shown = read("show", job)
    assert shown.keys() == _SHOW
    assert (shown["state"], shown["queue"], shown["name"]) == ("failed", "default", "mine")
    assert (shown["exit_code"], shown["reason"]) == (3, "exit code 3")
    assert shown["argv"] == ["sh", "-c", "echo oops >&2; exit 3"]
    (attempt,) = shown["attempts"]
    assert attempt.keys() == {"fence", "worker", "started_at", "ended_at", "outcome", "reason"}
    assert (attempt["worker"], attempt["outcome"]) == ("w0", "failed")
    times = [shown[name] for name in ("submitted_at", "started_at", "ended_at")]
    assert times == sorted(times)
    assert all(time.endswith("Z") and datetime.fromisoformat(time) for time in times)


def test_every_attempt_is_kept(read, submit, burst, tmp_path):
    flag = tmp_path / "flag"
    script = f"test -e {flag} || {{ touch {flag}; exit 1; }}"
    job = submit("sh", "-c", script, options=("--retries", "1", "--retry-delay", "0"))
    burst()
    assert [attempt["outcome"] for attempt in read("show", job)["attempts"]] == ["failed", "finished"]


def test_a_function_shows_its_name_and_its_result(read, fleet, redis_client, burst):
    job = rq.Queue(connection=redis_client).enqueue("operator.add", 2, 40)
    burst()
    shown = read("show", job.id)
    assert (shown["function"], shown["state"], shown["result"]) == ("operator.add", "finished", 42)
    assert "argv" not in shown
    text = fleet("show", job.id).stdout
    assert "operator.add" in text
    assert "42" in text


def test_a_result_that_json_has_not_is_shown_as_python_has_it(read, redis_client, burst):
    job = rq.Queue(connection=redis_client).enqueue("builtins.float", "nan")
    burst()
    assert read("show", job.id)["result"] == "nan"


@pytest.mark.parametrize(
    ("job_id", "code"), [("nope", 4), ("a b", 2), ("../x", 2), ("", 2), ("é", 2), ("\udcff", 2), ("a:b", 2)]
)
@pytest.mark.parametrize("verb", ["show", "logs", "wait", "cancel"])
def test_an_id_of_no_job_is_told_so(fleet, verb, job_id, code):
    done = fleet(verb, job_id, code=code)
    assert done.stderr + done.stdout != ""


# --- damage ----------------------------------------------------------------------------------------

_DAMAGE = {
    "another type": lambda client: (client.delete("rq:job:bad"), client.set("rq:job:bad", "text")),
    "no fields": lambda client: (client.delete("rq:job:bad"), client.hset("rq:job:bad", "x", "y")),
    "garbage": lambda client: client.hset(
        "rq:job:bad",
        mapping={
            "status": b"\xff",
            "data": b"\xff\x00",
            "created_at": "never",
            "started_at": b"\xfe",
            "timeout": "²",
            "fleet_exit_code": "²",
            "fleet_attempts": '[1]\n{"fence": "x"}\n{"fence": Infinity, "worker": 5}\n' + "[" * 100_000,
            "origin": b"\xff",
            "description": b"\xff",
        },
    ),
    "data of another kind": lambda client: client.hset(
        "rq:job:bad", "data", zlib.compress(json.dumps(["fleet.command", None, [5], {}]).encode())
    ),
    "data without end": lambda client: client.hset("rq:job:bad", "data", b"[" * 200_000),
    "times without a zone": lambda client: client.hset(
        "rq:job:bad", mapping={"created_at": "2026-01-01T00:00:00", "ended_at": "9999-12-31T23:59:59-10:00"}
    ),
    "results of another type": lambda client: client.set("rq:results:bad", "text"),
    "output of another type": lambda client: client.set("fleet:output:bad", "text"),
    "output of garbage": lambda client: client.hset(
        "fleet:output:bad", mapping={"stdout": b"\xff", "stdout_end": "many", "lease": b"\xff"}
    ),
}


@pytest.mark.parametrize("damage", _DAMAGE.values(), ids=_DAMAGE.keys())
def test_a_damaged_job_harms_nobody_else(fleet, read, make, redis_client, damage):
    make("bad")
    make("good")
    damage(redis_client)
    for verb in ("show", "logs", "cancel"):
        done = fleet(verb, "bad", code=None)
        assert done.returncode in (0, 4), done
    assert "good" in ids(read("jobs"))
    assert read("show", "good")["argv"] == ["prog", "good"]
    assert fleet("status").returncode == 0


def test_damage_is_called_by_its_name(fleet, redis_client):
    redis_client.set("rq:job:bad", "text")
    assert "no job" in fleet("show", "bad", code=4).stderr


@pytest.mark.parametrize("key", ["rq:queue:default", "rq:finished:default", "rq:wip:default"])
def test_a_damaged_queue_harms_no_reading(fleet, make, redis_client, key):
    make("a")
    redis_client.delete(key)
    redis_client.set(key, "text")
    for verb in ("jobs", "queues", "status"):
        fleet(verb)


def test_a_damaged_list_of_queues_is_told(fault, redis_client):
    redis_client.set(keys.QUEUES, "text")
    assert fault("jobs", code=1)["code"] == "redis_error"


# --- cancel ----------------------------------------------------------------------------------------


def test_a_queued_job_is_canceled_and_never_runs(fleet, read, make, burst):
    make("a")
    assert fleet("cancel", "a").stdout == "a  canceled\n"
    burst()
    shown = read("show", "a")
    assert (shown["state"], shown["attempts"]) == ("canceled", [])


def test_a_running_job_is_stopped(fleet, read, submit, workers, is_alive, tmp_path, eventually):
    workers.start("w0")
    job = submit("sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    pid = int(eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert fleet("cancel", job).stdout == f"{job}  stopping\n"
    fleet("wait", job, code=1)
    assert read("show", job)["state"] == "stopped"
    eventually(lambda: not is_alive(pid), message="its children ended")


def test_the_exit_code_says_how_many(fleet, read, make, submit, burst):
    ended = submit("true")
    burst()
    for name in "abc":
        make(name)
    assert "had ended already: finished" in fleet("cancel", ended, code=1).stdout
    assert fleet("cancel", "x", "y", code=4).stdout == "x  no such job\ny  no such job\n"
    assert fleet("cancel", "a", "x", code=3).stdout.startswith("a  canceled")
    fleet("cancel", "b", ended, code=3)
    fleet("cancel", "x", ended, code=1)
    fleet("cancel", "a", "a", "b")
    assert read("cancel", "c")["jobs"] == [{"id": "c", "outcome": "canceled"}]


# --- queues ----------------------------------------------------------------------------------------


def test_queues_are_counted(read, make, submit, burst, redis_client):
    submit("true", options=("--queue", "done"))
    burst("--queues", "done")
    make("a")
    make("b")
    redis_client.sadd(keys.PAUSED, "default")
    found = {queue["name"]: queue for queue in read("queues")["queues"]}
    assert (found["default"]["queued"], found["default"]["paused"]) == (2, True)
    assert found["default"]["oldest_age_seconds"] >= 0
    assert (found["done"]["finished"], found["done"]["oldest_age_seconds"]) == (1, None)


def test_queues_with_names_that_are_none_are_left_alone(fleet, read, redis_client):
    for name in ("a b", "a\nb", "\x1b[31m"):
        rq.Queue(name, connection=redis_client).enqueue("operator.add", 1, 2)
    assert read("queues")["queues"] == []
    assert fleet("status").returncode == 0
    assert "names that the fleet does not work on" in fleet("doctor").stdout
