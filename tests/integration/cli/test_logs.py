"""`fleet logs`: a job's output, byte for byte."""

from __future__ import annotations

import subprocess
import time

import psutil

from tests.conftest import fleet_script


def logs(*words: str) -> bytes:
    """The bytes on stdout."""
    return subprocess.run([fleet_script(), "logs", *words], check=True, capture_output=True).stdout


def test_each_stream_comes_as_it_was_written(submit, burst):
    job = submit("sh", "-c", "printf 'a\\377\\000\\r\\nb'; printf 'e\\376' >&2")
    burst()
    assert logs(job) == b"a\xff\0\r\nb"
    assert logs("--stderr", job) == b"e\xfe"
    assert logs(job, "--stderr", "-f") == b"e\xfe"


def test_a_job_without_output_prints_nothing(submit, fleet, burst):
    job = submit("true")
    assert fleet("logs", job).stdout == ""
    burst()
    assert fleet("logs", job).stdout == ""


def test_what_is_on_the_other_stream_is_mentioned(submit, burst, fleet):
    job = submit("sh", "-c", "echo gone wrong >&2; exit 1")
    burst()
    done = fleet("logs", job)
    assert done.stdout == ""
    assert f"fleet logs --stderr {job}" in done.stderr


def test_following_ends_with_the_job(submit, workers, spawn, tmp_path, eventually):
    workers.start("w0")
    go, told = tmp_path / "go", tmp_path / "told"
    job = submit("sh", "-c", f"echo one; while [ ! -e {go} ]; do sleep 0.05; done; echo two")
    with open(told, "wb") as output:
        process = spawn([fleet_script(), "logs", "-f", job], stdout=output)
    eventually(lambda: told.read_bytes() == b"one\n", message="what it printed so far")
    assert process.poll() is None
    go.touch()
    assert process.wait(60) == 0
    assert told.read_bytes() == b"one\ntwo\n"


def test_following_a_job_that_is_deleted_ends(submit, spawn, redis_client, eventually):
    job = submit("true")
    process = spawn([fleet_script(), "logs", "-f", job])
    eventually(lambda: psutil.Process(process.pid).num_threads() and process.poll() is None)
    redis_client.delete(f"rq:job:{job}")
    assert process.wait(60) in (0, 4)


def test_a_second_attempt_is_followed_too(submit, workers, tmp_path, spawn, eventually):
    workers.start("w0")
    flag, go, told, said = (tmp_path / name for name in ("flag", "go", "told", "said"))
    first = f"touch {flag}; echo first; until [ -e {go} ]; do sleep 0.05; done; exit 1"
    script = f"if [ -e {flag} ]; then echo second; else {first}; fi"
    job = submit("sh", "-c", script, options=("--retries", "1", "--retry-delay", "1"))
    with open(told, "wb") as output, open(said, "wb") as errors:
        process = spawn([fleet_script(), "logs", "-f", job], stdout=output, stderr=errors)
    eventually(lambda: told.read_bytes() == b"first\n", message="it follows the first")
    go.touch()
    assert process.wait(60) == 0
    assert told.read_bytes() == b"first\nsecond\n"
    assert b"starts anew" in said.read_bytes()


def test_much_output_costs_no_memory_and_its_end_is_kept(submit, workers, fleet, read):
    worker = psutil.Process(workers.start("w0").pid)
    submit("true")
    before = worker.memory_info().rss
    job = submit("sh", "-c", "yes 0123456789abcde | head -c 200000000; echo; echo the end")
    peak = 0
    deadline = time.monotonic() + 200
    while read("show", job)["state"] in ("queued", "started") and time.monotonic() < deadline:
        peak = max(peak, worker.memory_info().rss)
    assert read("show", job)["state"] == "finished"
    assert max(peak, worker.memory_info().rss) - before < 30e6
    done = fleet("logs", job)
    assert done.stdout.endswith("0123456789abcde\n\nthe end\n")
    assert len(done.stdout) == 65536
    assert "skipped" in done.stderr
    assert f"output/{job}." in done.stderr
