"""`fleet retry`: which jobs, what it says of each, exit codes."""

from __future__ import annotations

import pytest


@pytest.fixture
def failed(submit, burst):
    """`failed("q")`: a job of that queue that has failed."""

    def make(queue: str = "default") -> str:
        job = submit("false", options=("--queue", queue))
        burst("--queues", queue)
        return job

    return make


def test_a_failed_job_is_retried_under_its_id(fleet, read, failed, burst):
    job = failed()
    assert fleet("retry", job).stdout == f"{job}  retried\n"
    assert read("show", job)["state"] == "queued"
    burst()
    assert [attempt["outcome"] for attempt in read("show", job)["attempts"]] == ["failed", "failed"]
    assert read("retry", job)["jobs"] == [{"id": job, "outcome": "retried"}]


def test_the_exit_code_says_how_many(fleet, submit, failed, burst):
    finished = submit("true")
    burst()
    job, queued = failed(), submit("true")
    assert "has finished" in fleet("retry", finished, code=1).stdout
    assert "is queued already" in fleet("retry", queued, code=1).stdout
    assert fleet("retry", "x", "y", code=4).stdout == "x  no such job\ny  no such job\n"
    fleet("retry", finished, "x", code=1)
    assert f"{job}  retried" in fleet("retry", finished, job, "x", code=3).stdout


def test_all_that_failed_are_retried_and_nothing_else(fleet, read, submit, failed):
    canceled = submit("true")
    fleet("cancel", canceled)
    jobs = [failed("a"), failed("a"), failed("b")]
    # those that failed within one second have no order
    assert {row["id"] for row in read("retry", "--failed", "--queue", "a")["jobs"]} == set(jobs[:2])
    done = fleet("retry", "--failed")
    assert done.stdout == f"{jobs[2]}  retried\n"
    assert "Retried: 1." in done.stderr
    done = fleet("retry", "--failed")
    assert (done.stdout, done.stderr) == ("", "No job has failed.\n")
    assert read("show", canceled)["state"] == "canceled"


def test_what_failed_and_is_run_again_is_waited_for_and_canceled_and_nothing_else(fleet, read, submit, burst):
    assert fleet("cancel", "--failed").stderr == "No job that failed is to run again.\n"
    gone = submit("false")
    jobs = [submit("false", options=("--retries", "3", "--retry-delay", "1h")) for _ in range(2)]
    array = submit("false", options=("--array", "1-2", "--retries", "1", "--retry-delay", "1h"))
    burst()
    new = submit("true")
    found = read("cancel", "--failed", array)["jobs"]
    assert found == [{"id": f"{array}-{number}", "outcome": "canceled"} for number in (1, 2)]
    assert read("cancel", "--failed", jobs[0])["jobs"] == [{"id": jobs[0], "outcome": "canceled"}]
    assert read("wait", "--failed", new)["jobs"] == []
    fleet("wait", "--failed", "--timeout", "0.1", code=5)
    assert read("cancel", "--failed")["jobs"] == [{"id": jobs[1], "outcome": "canceled"}]
    assert read("wait", "--failed")["jobs"] == []
    assert [read("show", job)["state"] for job in (gone, new)] == ["failed", "queued"]
    assert read("retry", "--failed")["jobs"] == [{"id": gone, "outcome": "retried"}]
    assert "1 jobs had not ended" in fleet("wait", "--failed", "--timeout", "0.1", code=5).stderr
    burst()
    assert read("wait", "--failed")["jobs"] == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["x", "--failed", "--queue", "default"], 2),
        (["x", "--queue", "default"], 2),
        (["--failed", "--queue", "unknown"], 4),
        (["a b"], 2),
    ],
)
def test_words_that_name_nothing_are_refused(fault, words, code):
    assert fault("retry", *words, code=code)["hint"]
