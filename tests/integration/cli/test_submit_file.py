"""`fleet submit --file`: all jobs of a file, or none."""

from __future__ import annotations

import json

import pytest

from broker import jobs
from tests.conftest import fleet_script

FILE = """
jobs:
- name: first
  command: echo one
- name: second
  command: test -n "$FLEET_JOB_ID"
  shell: true
  after: first
- argv: ["false"]
  after_any: [second]
"""


@pytest.fixture
def file(tmp_path):
    """`file(text)`: the path of a file of jobs that says so."""

    def write(text: str, name: str = "jobs.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_all_jobs_of_a_file_run_in_their_order(fleet, file, burst, redis_client):
    lines = fleet("submit", "--file", file(FILE)).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["first", "second", "-"]
    ids = [line.split()[1] for line in lines]
    assert list(jobs.states(redis_client, ids).values()) == ["queued", "deferred", "deferred"]
    burst()
    assert list(jobs.states(redis_client, ids).values()) == ["finished", "finished", "failed"]
    assert jobs.show(redis_client, ids[0]).name == "first"


def test_json_and_stdin(read, file, redis_client):
    found = read("submit", "--file", "-", input=FILE)["jobs"]
    assert [(job["name"], job["queue"], job["state"]) for job in found] == [
        ("first", "default", "queued"),
        ("second", "default", "deferred"),
        (None, "default", "deferred"),
    ]


def test_nothing_is_queued_where_anything_is_wrong(fleet, fault, file, redis_client):
    path = file("jobs:\n- name: a\n  command: x\n- comand: y\n  after: [nobody, b]\n")
    done = fleet("submit", "--file", path, code=2)
    assert done.stderr.splitlines() == [
        f"fleet: {path}:4: unknown field 'comand': did you mean 'command'?",
        f"{path}:5: no job 'nobody' in this file or in Redis",
        f"{path}:5: no job 'b' in this file or in Redis",
        "  Nothing was queued. docs/cli.md shows what a file of jobs holds.",
    ]
    assert fault("submit", "--file", path, code=2)["code"] == "job_file"
    assert redis_client.keys("rq:*") == []


def test_a_file_may_wait_for_jobs_that_are_there(fleet, submit, read, file, redis_client):
    there = submit("true")
    found = read("submit", "--file", file(f"jobs: [{{command: x, after: [{there}]}}]"))["jobs"]
    assert found[0]["state"] == "deferred"
    fleet("submit", "--file", file("jobs: [{command: x, after: [nobody]}]"), code=2)
    fleet("submit", "--file", file(f"jobs: [{{command: x}}, {{command: x, id: {there}}}]"), code=1)
    assert len(jobs.listed(redis_client)) == 2


def test_the_exit_code_says_how_they_ended(fleet, file, spawn):
    spawn([fleet_script(), "worker", "--name", "w1"])
    done = fleet("submit", "--file", file(FILE), "--wait", "--json", code=3)
    assert [job["state"] for job in json.loads(done.stdout)["jobs"]] == ["finished", "finished", "failed"]


def test_a_file_may_have_arrays_beside_single_jobs(fleet, file, burst, redis_client):
    text = """
jobs:
- {name: before, command: "true"}
- {name: many, array: 1-3, command: test $FLEET_TASK_ID != 2, shell: true, after: before}
- {name: after, command: "true", after: many}
- {name: anyway, command: "true", after_any: many}
"""
    lines = fleet("submit", "--file", file(text)).stdout.splitlines()
    ids = dict(line.split() for line in lines)
    burst()
    states = jobs.states(redis_client, list(ids.values()))
    assert {name: states[job] for name, job in ids.items()} == {
        "before": "finished",
        "many": "failed",
        "after": "failed",
        "anyway": "finished",
    }
    assert jobs.show(redis_client, ids["after"]).reason == f"dependency {ids['many']} failed"
    taken = ids["before"]
    fleet(
        "submit", "--file", file(f"jobs: [{{command: x, array: 1-3}}, {{command: x, id: {taken}}}]"), code=1
    )
    assert redis_client.keys("fleet:array:*") == redis_client.keys(f"fleet:array:{ids['many']}*")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--queue", "x"), "--file and --queue exclude each other"),
        (("--follow",), "--file and --follow exclude each other"),
        (("--", "true"), "--file and a command exclude each other"),
    ],
)
def test_what_a_file_says_is_not_said_elsewhere(fleet, file, words, message):
    assert message in fleet("submit", "--file", file(FILE), *words, code=2).stderr


def test_files_that_cannot_be_read(fleet, file, tmp_path):
    assert "No such file" in fleet("submit", "--file", "none.toml", code=2).stderr
    assert "not the name of a file of jobs" in fleet("submit", "--file", file("", "jobs.txt"), code=2).stderr
    (tmp_path / "x.json").write_bytes(b'{\n"a\xff')
    said = fleet("submit", "--file", str(tmp_path / "x.json"), code=2).stderr
    assert "x.json:2: is not UTF-8 text" in said
