"""Arrays on the command line: submitting them, and the verbs that take tasks."""

from __future__ import annotations

import json

import pytest

ECHO = ("sh", "-c", 'echo "$FLEET_TASK_ID [$FLEET_TASK_LINE$FLEET_TASK_JSON]"')
FAILS_AT_3 = ("sh", "-c", 'echo "task $FLEET_TASK_ID"; test "$FLEET_TASK_ID" != 3')


@pytest.fixture
def array(fleet):
    """`array("--array", "1-5", argv=...)`: the id of a new array."""

    def make(*options: str, argv: tuple[str, ...] = ECHO, **how) -> str:
        return fleet("submit", *options, "--", *argv, **how).stdout.strip()

    return make


def test_tasks_find_their_number_and_line(fleet, array, burst):
    made = array("--each-line", "-", input="a b\n\n $x'\"\nlast")
    burst()
    assert fleet("logs", made).stdout == "1 [a b]\n2 []\n3 [ $x'\"]\n4 [last]\n"
    assert fleet("logs", f"{made}[2-3]", f"{made}-1").stdout == "2 []\n3 [ $x'\"]\n1 [a b]\n"


def test_tasks_find_their_element(fleet, array, burst, tmp_path):
    file = tmp_path / "items.json"
    file.write_text('[{"a": "é"}, 2, null]')
    made = array("--from-json", str(file))
    burst()
    assert fleet("logs", "last").stdout == '1 [{"a":"é"}]\n2 [2]\n3 [null]\n'
    assert fleet("wait", made).stdout == ""


def test_an_array_is_one_line_with_counts_and_its_tasks_are_listed_apart(fleet, read, array, burst):
    made = array("--array", "1-5", "--name", "five", argv=FAILS_AT_3)
    (row,) = read("jobs")["jobs"]
    counts = {"total": 5, "queued": 5, "running": 0, "finished": 0, "failed": 0, "canceled": 0}
    assert (row["id"], row["state"], row["tasks"]) == (made, "queued", counts)
    burst()
    (row,) = read("jobs")["jobs"]
    assert (row["state"], row["tasks"]) == ("failed", counts | {"queued": 0, "finished": 4, "failed": 1})
    assert "5 tasks, 4 finished, 1 failed: five" in fleet("jobs").stdout
    tasks = read("jobs", "--array", made)["jobs"]
    assert [task["id"] for task in tasks] == [f"{made}-{number}" for number in range(1, 6)]
    assert [task["id"] for task in read("jobs", "--array", made, "--state", "failed")["jobs"]] == [
        f"{made}-3"
    ]
    assert {task["array"] for task in tasks} == {made}


def test_a_million_tasks_are_counted_before_any_is_claimed(fleet, read, array):
    made = array("--array", "1-1000000")
    assert read("queues")["queues"][0]["queued"] == 1_000_000
    assert read("status")["queues"][0]["queued"] == 1_000_000
    assert read("show", f"{made}-777777")["state"] == "queued"
    assert [task["id"] for task in read("jobs", "--array", made, "--limit", "2")["jobs"]] == [
        f"{made}-1",
        f"{made}-2",
    ]
    assert fleet("cancel", f"{made}[1-999990]").stdout == f"{made}[1-999990]  canceled\n"
    assert read("queues")["queues"][0]["queued"] == 10
    assert fleet("cancel", "all").stdout == f"{made}  canceled\n"


def test_an_array_follows_another_task_by_task(fleet, read, array, burst):
    one = array("--array", "1-3", argv=FAILS_AT_3)
    two = array("--after-array", one, "--max-parallel", "1")
    assert fleet("submit", "--after-array", two, "--array", "1-2", "--", "true", code=2).stdout == ""
    burst()
    assert fleet("logs", two).stdout == "1 []\n2 []\n"
    assert read("show", two)["reason"] == f"dependency {one}: 1 of its tasks did not finish"
    assert "retry that one" in fleet("retry", two, code=1).stdout


def test_what_an_array_or_a_task_waits_for_is_explained(fleet, read, array, spawn, eventually):
    one = array("--array", "1-9", "--max-parallel", "1", argv=("sleep", "300"))
    two = array("--after-array", one)
    codes = [reason["code"] for reason in read("explain", f"{one}-7")["reasons"]]
    assert codes == ["no_worker"]
    assert "9 of its tasks wait for those of" in fleet("explain", two).stdout
    spawn([*_fleet(), "worker", "--name", "w0"])
    eventually(lambda: read("show", one)["tasks"]["running"] == 1)
    for job in (one, f"{one}-7"):
        assert "1 of its tasks run, and no more than 1 may at once" in fleet("explain", job).stdout
    assert [reason["code"] for reason in read("explain", f"{one}-1")["reasons"]] == ["running"]
    fleet("explain", f"{one}-10", code=4)


def test_waiting_tells_how_many_finished(fleet, read, array, burst):
    made = array("--array", "1-4", argv=FAILS_AT_3)
    burst()
    done = fleet("wait", made, code=3)
    assert "of 4 tasks 3 finished, 1 failed, 0 canceled" in done.stderr
    fleet("wait", f"{made}[1,4]")
    fleet("wait", f"{made}-3", code=1)
    assert read("wait", f"{made}[3-4]", code=3)["jobs"] == [
        {"id": f"{made}-3", "state": "failed"},
        {"id": f"{made}-4", "state": "finished"},
    ]


def test_what_failed_is_shown_and_retried(fleet, read, array, burst):
    made = array("--array", "1-4", argv=FAILS_AT_3)
    burst()
    assert fleet("logs", "--failed", made).stdout == "task 3\n"
    assert [job["id"] for job in read("show", "--failed", made)["jobs"]] == [f"{made}-3"]
    assert read("retry", "--failed", made)["jobs"] == [{"id": made, "outcome": "retried", "tasks": 1}]
    assert read("show", made)["tasks"]["queued"] == 1
    burst()
    outcomes = [attempt["outcome"] for attempt in read("show", f"{made}-3")["attempts"]]
    # on a busy machine what was claimed ahead may go back first
    assert [outcome for outcome in outcomes if outcome != "handed-back"] == ["failed", "failed"]
    assert "not retried: it has finished" in fleet("retry", f"{made}-4", code=1).stdout
    assert "1 of its tasks" in fleet("retry", "all").stdout


def test_what_was_canceled_before_it_began_can_be_retried(fleet, read, array, burst):
    made = array("--array", "1-6")
    fleet("cancel", f"{made}[2-5]")
    fleet("retry", f"{made}[4]")
    burst()
    assert fleet("logs", made).stdout == "1 []\n4 []\n6 []\n"
    assert read("show", made)["state"] == "canceled"
    assert read("retry", made)["jobs"][0]["tasks"] == 3
    burst()
    assert read("show", made)["state"] == "finished"


def test_following_prints_the_tasks_in_their_order(fleet, spawn, burst):
    burst("--queues", "q")  # the queue is known
    command = "exec fleet submit --queue q --array 1-3 --follow -- sh -c 'echo $FLEET_TASK_ID'"
    follower = spawn(["sh", "-c", command], stdout=-1, env=_with_path())
    fleet("worker", "--queues", "q", "--name", "w1", "--max-jobs", "3")
    assert follower.communicate(timeout=150)[0] == b"1\n2\n3\n"
    assert follower.returncode == 0


def _fleet() -> list[str]:
    import sys
    from pathlib import Path

    return [str(Path(sys.executable).parent / "fleet")]


def _with_path() -> dict[str, str]:
    import os
    import sys
    from pathlib import Path

    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--array", "x"], "'x' is no range"),
        (["--array", "1-9%3"], "--max-parallel"),
        (["--array", "1-2", "--each-line", "-"], "exclude each other"),
        (["--each-line", "/nowhere"], "/nowhere: No such file"),
        (["--each-line", "-"], "no tasks"),
        (["--from-json", "-"], "stdin:1: no JSON"),
        (["--max-parallel", "2"], "are for arrays"),
        (["--id", "last"], "would be no id"),
        (["--array", "1-2", "--id", "x" * 120], "at most 119 characters"),
    ],
)
def test_words_that_make_no_array_are_refused(fleet, words, told):
    done = fleet("submit", *words, "--", "true", code=2)
    assert (done.stdout, told in done.stderr) == ("", True), done.stderr


def test_words_that_name_no_tasks_are_refused(fault, array, submit):
    made, job = array("--array", "1-3"), submit("true")
    assert fault("show", f"{made}-9", code=4)["code"] == "not_found"
    assert "no array" in fault("cancel", f"{job}[1-2]", code=2)["message"]
    assert fault("wait", f"{made}[x]", code=2)["code"] == "usage"
    assert fault("logs", "all", code=2)["code"] == "usage"
    assert fault("jobs", "--array", job, code=4)["code"] == "not_found"


def test_an_array_says_as_json_what_it_is(read):
    assert set(json.loads(json.dumps(read("submit", "--array", "1-3", "--", "true")))) >= {
        "id",
        "state",
        "queue",
    }
