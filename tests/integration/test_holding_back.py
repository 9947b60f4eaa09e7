"""Drain, pause, `rq suspend` and forget: what an operator holds back, with real workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from broker import control, jobs, keys
from tests.integration.conftest import HASTY, Workers

#: beats are far apart: what happens sooner did not wait for one
_SLOW_BEAT = {"heartbeat_seconds": 300.0, "lease_seconds": 600.0}


def drain(workers: Workers, *names: str) -> None:
    control.drain(workers.client, dict.fromkeys(names, "here"))


def state(workers: Workers, name: str) -> str | None:
    from broker import status

    return next((w.state for w in status.read(workers.client).workers if w.name == name), None)


def running(workers: Workers, folder: Path) -> str:
    """A job that runs, until the file `go` is there: it has begun, it was not merely given out."""
    job = workers.submit("sh", "-c", f"touch {folder}/begun; until [ -e {folder}/go ]; do sleep 0.05; done")
    workers.until((folder / "begun").exists, "it runs")
    return job


def says(workers: Workers, name: str, text: str) -> Callable[[], bool]:
    return lambda: text in workers.log(name)


# --- drain -----------------------------------------------------------------------------------------


def test_a_drained_worker_ends_what_runs_and_takes_nothing_new(workers, tmp_path):
    worker = workers.start("w0", slots=2, settings=_SLOW_BEAT)
    job = running(workers, tmp_path)
    drain(workers, "w0")
    workers.until(says(workers, "w0", "draining"), "told at once, not with the next beat")
    waiting = workers.submit("true")
    (tmp_path / "go").touch()
    workers.wait([job])
    assert workers.state(waiting) == "queued"
    assert worker.poll() is None, "a worker that is not ephemeral stays"
    control.undrain(workers.client, ["w0"])
    assert [job.state for job in workers.wait([waiting])] == ["finished"]


def test_a_job_goes_to_others_at_once_while_a_drained_worker_idles(workers):
    for name in ("w0", "w1"):
        workers.start(name, settings=_SLOW_BEAT)
    drain(workers, "w0")
    workers.until(says(workers, "w0", "draining"))
    took = []
    for _ in range(10):  # the token of each would be lost if a drained worker took it
        began = time.monotonic()
        assert workers.wait([workers.submit("true")])[0].worker == "w1"
        took.append(time.monotonic() - began)
    assert sorted(took)[5] < 1, took


def test_the_wish_outlives_stop_kill_and_a_lapsed_record(workers):
    first = workers.start("w0", settings=HASTY)
    drain(workers, "w0")
    workers.until(lambda: "draining" in workers.log("w0"), "it has heard")
    job = workers.submit("true")
    first.terminate()
    first.wait(60)
    second = workers.start("w0", settings=HASTY)
    workers.until(lambda: workers.log("w0").count("draining") == 2, "it says so when it starts")
    workers.kill(second)
    third = workers.start("w0", settings=HASTY)
    workers.until(lambda: workers.log("w0").count("draining") == 3)
    workers.kill(third, signal.SIGSTOP)
    workers.until(lambda: not workers.is_beating("w0"))
    workers.kill(third, signal.SIGCONT)
    workers.until(lambda: workers.is_beating("w0"), "it registers again")
    assert workers.state(job) == "queued"
    assert state(workers, "w0") == "draining"
    control.undrain(workers.client, ["w0"])
    workers.wait([job])


def test_the_wish_outlives_a_restart_of_redis(own_redis, workers_of):
    server = own_redis()
    workers = workers_of(server.url)
    workers.start("w0")
    drain(workers, "w0")
    workers.until(says(workers, "w0", "draining"))
    server.stop()
    server.start()
    workers.until(lambda: any(one["cmd"] == "blpop" for one in workers.client.client_list()), "it is back")
    job = workers.submit("true")
    with pytest.raises(pytest.fail.Exception):
        workers.wait([job], 1.5)
    control.undrain(workers.client, ["w0"])
    workers.wait([job])


def test_an_ephemeral_worker_leaves_when_it_is_drained(workers, tmp_path):
    idle = workers.start("idle", ephemeral=True, max_jobs=1, settings=_SLOW_BEAT)
    workers.until(lambda: workers.client.llen(keys.wake("default")) == 0)
    drain(workers, "idle")
    assert idle.wait(60) == 0
    busy = workers.start("busy", ephemeral=True, max_jobs=1, settings=_SLOW_BEAT)
    job = running(workers, tmp_path)
    drain(workers, "busy")
    workers.until(says(workers, "busy", "draining"))
    assert busy.poll() is None
    (tmp_path / "go").touch()
    assert busy.wait(60) == 0
    assert workers.state(job) == "finished"
    workers.assert_clean()


def test_what_was_claimed_ahead_is_given_back(workers, tmp_path):
    workers.start("w0", slots=os.cpu_count() + 1, settings=_SLOW_BEAT)
    script = f"test -e {tmp_path}/slow && sleep 600"
    ids = workers.submit_many([("sh", "-c", script)] * 2000)
    workers.until(lambda: sum(workers.state(job) == "failed" for job in ids[:100]) > 50, "it hurries")
    (tmp_path / "slow").touch()
    drain(workers, "w0")
    workers.until(says(workers, "w0", "draining"), "told in the middle of it")

    def all_held_run() -> bool:
        held = workers.client.hlen(keys.worker_leases("w0"))
        return held <= os.cpu_count() + 1

    workers.until(all_held_run, "nothing is held that does not run")


def test_a_claim_that_arrives_while_the_worker_leaves_is_given_back_at_once(own_redis, workers_of, tmp_path):
    server = own_redis()
    workers = workers_of(server.url)
    worker = workers.start("w0", settings=_SLOW_BEAT)
    client = workers.client
    workers.until(lambda: any(one["cmd"] == "blpop" for one in client.client_list()), "it waits")
    workers.kill(worker, signal.SIGSTOP)
    job = workers.submit("touch", str(tmp_path / "ran"))
    client.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
    workers.kill(worker, signal.SIGCONT)
    workers.until(lambda: client.info("clients")["blocked_clients"] >= 1, "it asks for jobs")
    workers.until(lambda: any(one["cmd"] == "evalsha" for one in client.client_list()))
    workers.kill(worker, signal.SIGSTOP)
    client.execute_command("CLIENT", "UNPAUSE")
    workers.until(lambda: workers.state(job) == "started", "it was given the job, and has not heard of it")
    workers.kill(worker, signal.SIGTERM)
    workers.kill(worker, signal.SIGCONT)
    assert worker.wait(60) == 0
    assert workers.state(job) == "queued"
    assert not (tmp_path / "ran").exists()
    workers.assert_clean()


# --- pause, suspend --------------------------------------------------------------------------------


def test_a_paused_queue_gives_out_nothing_until_it_is_resumed(workers):
    workers.start("w0", queues=("first", "second"), settings=_SLOW_BEAT)
    workers.until(lambda: control.pause(workers.client, "first") == "paused")
    held = workers.submit_many([["true"]] * 3, "first")
    other = workers.submit_many([["true"]], "second")
    workers.wait(other)
    assert {workers.state(job) for job in held} == {"queued"}
    assert control.resume(workers.client, "first") == "resumed"
    workers.wait(held)


def test_a_pause_holds_while_workers_and_redis_restart(own_redis, workers_of):
    server = own_redis()
    workers = workers_of(server.url)
    first = workers.start("w0")
    control.pause(workers.client, "default")
    job = workers.submit("true")
    workers.kill(first)
    server.stop()
    server.start()
    workers.start("w0")
    workers.start("w1", queues=("default", "other"))
    workers.wait(workers.submit_many([["true"]], "other"))
    assert workers.state(job) == "queued"
    control.resume(workers.client, "default")
    workers.wait([job])


def test_a_full_queue_that_is_paused_wakes_nobody(workers):
    workers.start("w0")
    control.pause(workers.client, "default")
    workers.submit("true")
    workers.client.delete(keys.wake("default"))

    def looks() -> int:
        return int(workers.client.info("commandstats").get("cmdstat_blmove", {"calls": 0})["calls"])

    before = looks()
    workers.until(lambda: looks() > before + 3, "the watcher of plain queues looks at it")
    assert workers.client.llen(keys.wake("default")) == 0


def rq(url: str, *arguments: str) -> None:
    """The real command of RQ."""
    program = str(Path(sys.executable).parent / "rq")
    done = subprocess.run(
        [program, *arguments, "--url", url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_rq_suspend_and_resume_stop_and_restart_claims(workers):
    for name in ("w0", "w1"):
        workers.start(name, settings=_SLOW_BEAT)
    workers.wait([workers.submit("true")])
    rq(workers.url, "suspend")
    held = workers.submit_many([["true"]] * 20)
    workers.start("w2")
    with pytest.raises(pytest.fail.Exception):
        workers.wait(held[:1], 1.5)
    assert jobs.states(workers.client, held) == dict.fromkeys(held, "queued")
    rq(workers.url, "resume")
    workers.until(lambda: any(workers.state(job) != "queued" for job in held), "claims begin again")
    workers.wait(held)


# --- forget ----------------------------------------------------------------------------------------


def test_only_a_worker_that_is_offline_and_holds_nothing_is_forgotten(workers):
    worker = workers.start("w0", settings=HASTY)
    job = workers.submit("sleep", "600")
    workers.until(lambda: workers.state(job) == "started")
    assert control.forget(workers.client, "w0") == ("alive", 1)
    workers.kill(worker)
    workers.until(lambda: not workers.is_beating("w0"))
    assert control.forget(workers.client, "w0") == ("leases", 1)
    workers.start("w1", settings=HASTY)
    workers.until(
        lambda: workers.state(job) == "started" and not workers.client.hlen(held("w0")), "recovered"
    )
    assert control.forget(workers.client, "w0") == ("forgotten", 0)
    assert control.forget(workers.client, "w0") == ("not_found", 0)
    assert state(workers, "w0") is None
    assert list(workers.client.scan_iter("*w0*")) == []
    assert workers.client.smembers(keys.of("queue_workers", "default")) == {b"rq:worker:w1"}


def test_jobs_that_were_deleted_do_not_keep_a_worker_from_being_forgotten(workers):
    worker = workers.start("w0", settings=HASTY)
    job = workers.submit("sleep", "600")
    workers.until(lambda: workers.state(job) == "started")
    workers.kill(worker)
    workers.client.delete(keys.job(job))
    workers.until(lambda: not workers.is_beating("w0"))
    assert control.forget(workers.client, "w0") == ("forgotten", 0)


def test_a_name_that_was_forgotten_is_still_drained(workers):
    worker = workers.start("w0", settings=HASTY)
    drain(workers, "w0")
    workers.kill(worker)
    workers.until(lambda: not workers.is_beating("w0"))
    assert control.forget(workers.client, "w0")[0] == "forgotten"
    assert control.hosts_of_workers(workers.client) == {"w0": "here"}
    workers.start("w0", settings=HASTY)
    workers.until(says(workers, "w0", "draining"))


def held(name: str) -> str:
    return keys.worker_leases(name)
