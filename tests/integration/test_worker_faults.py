"""Real workers amid faults: nothing is lost, nothing is done twice, and nobody spins while waiting."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import rq

from broker import control, jobs, keys
from broker.command import Command
from broker.connection import connect
from broker.submit import Options, submit_commands
from tests.conftest import RedisServer
from tests.integration.conftest import HASTY, Workers
from tests.integration.proxy import proxy_to
from tests.integration.test_worker import appending, enqueue, lines, runs, waiting_for

__all__ = ["runs"]

#: of one processor, in a second: what a worker that waits may use
IDLE_SHARE = 0.2


def cpu_share(pid: int, seconds: float = 3.0) -> float:
    """The share of a processor that a process uses while it is watched."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return (sum(process.cpu_times()[:2]) - before) / seconds


# -- a worker that waits uses no processor ---------------------------------------------------


def test_a_worker_whose_redis_is_down_waits_quietly(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any], runs: Path
) -> None:
    server = own_redis()
    workers = workers_of(server.url)
    worker = workers.start("w0", settings={"heartbeat_seconds": 10, "lease_seconds": 60})
    workers.submit(*appending(runs, "x", "exec sleep 300"))
    workers.until(lambda: lines(runs), "it runs")
    server.kill()
    assert cpu_share(worker.pid) < IDLE_SHARE
    assert len(workers.log("w0").splitlines()) < 12


def test_a_worker_waits_quietly_for_a_job_longer_than_its_idle_timeout(workers: Workers, runs: Path) -> None:
    workers.submit(*appending(runs, "x", "exec sleep 300"))
    worker = workers.start("w0", idle_timeout_seconds=0.2)
    workers.until(lambda: lines(runs), "it runs")
    assert cpu_share(worker.pid) < IDLE_SHARE


@pytest.mark.parametrize("refusal", ["full", "replica", "overwritten"])
def test_a_worker_that_redis_refuses_waits_quietly_and_loses_nothing(
    workers_of: Callable[[str], Workers],
    own_redis: Callable[..., Any],
    tmp_path: Path,
    runs: Path,
    refusal: str,
) -> None:
    server = own_redis()
    workers = workers_of(server.url)
    gate, settings = tmp_path / "gate", {"heartbeat_seconds": 2, "lease_seconds": 30}
    job = workers.submit(*appending(runs, "x", f"{waiting_for(gate)}; echo done"))
    worker = workers.start("w0", settings=settings)
    workers.until(lambda: lines(runs), "it runs")
    client = workers.client
    if refusal == "full":
        client.config_set("maxmemory", 1)
    elif refusal == "replica":
        client.replicaof("127.0.0.1", "1")
    else:
        client.set(keys.LEASES + "x", 1)
        client.rename(keys.LEASES, "kept")
        client.set(keys.LEASES, "no set at all")
    gate.touch()
    assert cpu_share(worker.pid) < IDLE_SHARE
    assert len(workers.log("w0").splitlines()) < 30
    if refusal == "full":
        client.config_set("maxmemory", 0)
    elif refusal == "replica":
        client.replicaof("NO", "ONE")
    else:
        client.rename("kept", keys.LEASES)
    [shown] = workers.wait([job])
    assert (shown.state, len(shown.attempts)) == ("finished", 1), shown.attempts


def test_a_stopped_callback_that_hangs_does_not_hold_up_a_second_sigterm(
    workers: Workers, runs: Path
) -> None:
    hangs = rq.Callback("rq_jobs.nap_after_stop", timeout=100)
    job = enqueue(workers, "note_and_wait", str(runs), "f", "/no/gate", on_stopped=hangs)
    worker = workers.start("w0", settings={"stop_grace_seconds": 3})
    workers.until(lambda: lines(runs), "it runs")
    control.cancel(workers.client, job.id)
    workers.until(lambda: workers.client.exists(f"test:stopped:{job.id}"), "the callback runs")
    workers.kill(worker, signal.SIGTERM)
    assert worker.wait(60) == 0


@pytest.mark.parametrize("hold", ["suspended", "paused", "draining"])
def test_jobs_that_may_not_be_claimed_are_not_asked_for_over_and_over(workers: Workers, hold: str) -> None:
    client = workers.client
    workers.start("w0", settings={"heartbeat_seconds": 10, "lease_seconds": 30})
    if hold == "paused":
        client.sadd(keys.PAUSED, "default")
    else:
        client.set(keys.SUSPENDED if hold == "suspended" else keys.worker_drain("w0"), "1")
    workers.submit_many([("true",)] * 20)
    time.sleep(1.5)  # a queue that has just become full is looked at more often
    before = client.info("stats")["total_commands_processed"]
    time.sleep(2)
    assert client.info("stats")["total_commands_processed"] - before < 2 * 150


def test_more_queues_than_descriptors_do_not_keep_a_worker_from_its_jobs(workers: Workers) -> None:
    workers.client.sadd(keys.QUEUES, *(keys.queue(f"a{number}") for number in range(300)))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        workers.start("w0", slots=8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    ids = workers.submit_many([("sleep", "0.3")] * 80)
    assert [job.state for job in workers.wait(ids)] == ["finished"] * 80
    assert [one for one in workers.client.client_list() if one["cmd"] == "blmove"], "it watches some"


def test_queues_are_watched_again_however_often_that_was_given_up(redis_client: redis.Redis) -> None:
    from fleet.chores import _Peeks

    redis_client.sadd(keys.QUEUES, keys.queue("default"))
    with connect(f"redis://127.0.0.1:{redis_client.connection_pool.connection_kwargs['port']}") as client:
        peeks = _Peeks(client)
        for _ in range(150):
            peeks.listen_and_ring(0.0)
            peeks.close()


# -- connections -----------------------------------------------------------------------------


def test_connections_killed_over_and_over_end_neither_the_loop_nor_the_chores(workers: Workers) -> None:
    worker = workers.start("w0")
    for kinds in [("normal", "pubsub"), ("pubsub", "normal")] * 3:
        workers.kill(worker, signal.SIGSTOP)  # so that it finds all of them cut at once
        for kind in kinds:
            workers.client.client_kill_filter(_type=kind, skipme=True)
        workers.kill(worker, signal.SIGCONT)
        job = workers.submit("true")
        assert workers.wait([job])[0].state == "finished"
    later = rq.Queue("default", connection=workers.client).enqueue_in(
        timedelta(seconds=1), "rq_jobs.add", 1, 2
    )
    assert workers.wait([later.id])[0].state == "finished"
    assert "Traceback" not in workers.log("w0")


def test_chores_survive_the_cut_of_a_connection_that_watches_a_queue(workers: Workers) -> None:
    def peeks() -> list[str]:
        return [one["id"] for one in workers.client.client_list() if one["cmd"] == "blmove"]

    workers.submit("true")
    workers.start("w0")
    for _ in range(3):
        [peek] = workers.until(peeks, "it watches the queue")
        workers.client.client_kill_filter(_id=peek)
        workers.until(lambda peek=peek: peek not in peeks(), "it was cut")
    workers.until(peeks, "it watches the queue again")
    assert "Traceback" not in workers.log("w0")


def test_what_ended_while_redis_was_away_is_told_before_a_worker_leaves(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any], tmp_path: Path, runs: Path
) -> None:
    server = own_redis()
    workers = workers_of(server.url)
    gate, done = tmp_path / "gate", tmp_path / "done"
    job = workers.submit(*appending(runs, "x", f"{waiting_for(gate)}; touch {done}"))
    worker = workers.start("w0", settings={"lease_seconds": 60, "stop_grace_seconds": 15})
    workers.until(lambda: lines(runs), "it runs")
    server.kill()
    gate.touch()
    workers.until(done.exists, "it ended")
    workers.kill(worker, signal.SIGTERM)
    workers.until(lambda: "stopping" in workers.log("w0"), "it heard")
    server.start()
    assert worker.wait(60) == 0
    assert workers.state(job) == "finished"


def test_a_job_killed_because_redis_was_away_too_long_is_lost_and_not_failed(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any], runs: Path
) -> None:
    server = own_redis()
    workers = workers_of(server.url)
    ids = [
        workers.submit(*appending(runs, "x", f"[ $(wc -l < {runs}) -gt 4 ] || exec sleep 300"))
        for _ in range(4)
    ]
    worker = workers.start("w0", slots=4, settings=HASTY)
    workers.until(lambda: len(lines(runs)) == 4, "they run")
    pids = psutil.Process(worker.pid).children()
    server.kill()
    workers.until(lambda: sum(p.is_running() for p in pids) <= 1, "the sidecar killed them")
    server.start()
    shown = workers.wait(ids)
    assert [(job.state, job.attempts[0].outcome) for job in shown] == [("finished", "lost")] * 4
    assert "failed dropped" not in workers.log("w0")


# -- damage ----------------------------------------------------------------------------------


def test_words_that_are_no_text_fail_their_own_job_only(workers: Workers) -> None:
    bad = submit_commands(workers.client, "default", [(None, Command(("no-\udcff",)))], Options())[0]
    worse = submit_commands(
        workers.client, "default", [(None, Command(("true",), cwd="/no-\udcff"))], Options()
    )[0]
    good = workers.submit("true")
    workers.start("w0", slots=3)
    assert [job.state for job in workers.wait([bad, worse, good])] == ["failed", "failed", "finished"]


@pytest.mark.parametrize(
    "bad_id", [b"\xff\xfe", b"a\0b", b"a/b", b"../../up", b"a:b", b"x" * 300, b" ", b"%s%n"]
)
def test_an_odd_job_id_harms_neither_the_worker_nor_the_next_job(
    workers: Workers, bad_id: bytes, tmp_path: Path
) -> None:
    good = workers.submit("true")
    client = workers.client
    fields = client.hgetall(keys.job(good))
    client.hset(b"rq:job:" + bad_id, mapping=fields)
    client.lpush(keys.queue("default"), bad_id)
    worker = workers.start("w0")
    assert workers.wait([good])[0].state == "finished"
    after = workers.submit("true")
    assert workers.wait([after])[0].state == "finished"
    assert worker.poll() is None
    workers.until(lambda: not any(workers.leftovers().values()), "nothing is left")
    assert "Traceback" not in workers.log("w0")


def test_garbage_in_the_keys_of_the_fleet_does_not_end_the_chores(workers: Workers) -> None:
    client = workers.client
    client.sadd(keys.FLEET_WORKERS, b"\xff")
    client.sadd(keys.QUEUES, b"rq:queue:\xff", b"\xff", "rq:queue:wrong")
    client.set("rq:scheduled:wrong", "no set")
    client.set("rq:queue:wrong", "no list")
    client.hset(
        "rq:job:ghost",
        mapping={"status": "started", "fleet_lease": "1:x", "worker_name": b"\xff", "origin": "default"},
    )
    client.zadd(keys.LEASES, {"ghost": 1})
    client.hset(
        "rq:job:ghost2",
        mapping={"status": "started", "fleet_lease": "1:x", "worker_name": b"gone", "origin": "default"},
    )
    client.zadd(keys.LEASES, {"ghost2": 1})
    client.set(keys.worker_record("gone"), "[not a record")
    client.set(keys.CHORES_SEEN, int(time.time() * 1000) + 1000)
    workers.start("w0", settings=HASTY)
    later = rq.Queue("default", connection=client).enqueue_in(timedelta(seconds=8), "rq_jobs.add", 1, 2)
    assert workers.wait([later.id])[0].state == "finished"


@pytest.mark.parametrize("replacement", ["folder", "file"])
def test_a_job_that_mistreats_its_output_fails_alone(
    workers: Workers, tmp_path: Path, replacement: str
) -> None:
    output = tmp_path / "work" / "output"
    if replacement == "folder":
        script = f"cd {output}; for f in $FLEET_JOB_ID.*; do rm $f; mkdir $f; done"
    else:
        script = f"rm -rf {output}; echo x > {output}"
    worker = workers.start("w0", slots=2)
    job = workers.submit("sh", "-c", script)
    assert workers.wait([job])[0].state == "finished"
    (output.unlink(), output.mkdir()) if output.is_file() else None
    good = workers.submit("sh", "-c", "echo x")
    assert workers.wait([good])[0].state == "finished"
    assert worker.poll() is None


def test_a_worker_without_descriptors_hands_back_and_loses_nothing(workers: Workers, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    ids = [enqueue(workers, "note_and_wait", str(tmp_path / "runs"), "f", str(gate)).id for _ in range(30)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, limits[1]))
    try:
        workers.start("w0", slots=30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    workers.until(lambda: "Too many open files" in workers.log("w0"), "it has no more")
    gate.touch()
    workers.start("w1", slots=2)
    shown = workers.wait(ids)
    assert {job.state for job in shown} == {"finished"}
    workers.assert_clean()


# -- rq's hands ------------------------------------------------------------------------------


def test_a_late_save_does_not_take_a_running_job_away(workers: Workers, tmp_path: Path, runs: Path) -> None:
    gate = tmp_path / "gate"
    job = enqueue(workers, "note_and_wait", str(runs), "f", str(gate))
    workers.start("w0")
    workers.until(lambda: lines(runs), "it runs")
    job.meta["seen"] = True
    job.save()  # writes the status of a moment ago: queued
    workers.until(lambda: workers.state(job.id) == "started", "a beat mended it")
    gate.touch()
    assert workers.wait([job.id])[0].state == "finished"
    assert lines(runs) == ["f"]
    workers.assert_clean()


def test_a_callback_may_save_its_job(workers: Workers) -> None:
    first = enqueue(workers, "add", 1, 2, on_success=rq.Callback("rq_jobs.save_in_callback"))
    second = enqueue(workers, "add", 1, 2, depends_on=first)
    bad = enqueue(workers, "fail", on_failure=rq.Callback("rq_jobs.save_in_failure"))
    workers.start("w0")
    shown = workers.wait([first.id, second.id, bad.id])
    assert [job.state for job in shown] == ["finished", "finished", "failed"]
    assert rq.job.Job.fetch(first.id, connection=workers.client).return_value() == 3
    workers.assert_clean()


def test_a_sidecar_that_was_stopped_for_long_kills_no_job_of_a_living_worker(
    workers: Workers, runs: Path
) -> None:
    worker, gate = workers.start("w0", settings=HASTY), runs.with_name("gate")
    job = workers.submit(*appending(runs, "x", waiting_for(gate)))
    workers.until(lambda: lines(runs), "it runs")
    [sidecar] = [
        p for p in psutil.Process(worker.pid).children() if "sidecar_main.py" in " ".join(p.cmdline())
    ]
    sidecar.suspend()
    time.sleep(HASTY["lease_seconds"] + 1)
    sidecar.resume()
    renewed = workers.client.zscore(keys.LEASES, job)
    workers.until(lambda: workers.client.zscore(keys.LEASES, job) > renewed, "a beat later")
    gate.touch()
    [shown] = workers.wait([job])
    assert [a.outcome for a in shown.attempts] == ["finished"]


@pytest.mark.parametrize("fleet", [1, 4])
def test_the_neighbour_of_a_job_that_kills_its_workers_survives_it(
    workers: Workers, runs: Path, fleet: int
) -> None:
    """Both are lost together, time and again, for the neighbour takes longer; each worker has two slots."""
    poison = workers.submit("sh", "-c", "sleep 0.5; kill -9 $PPID; sleep 300")
    good = workers.submit("sh", "-c", f"echo run >> {runs}; sleep 1.5")
    running: dict[str, subprocess.Popen[bytes]] = {}

    def both_have_ended() -> bool:
        for name in (f"w{number}" for number in range(fleet)):
            if name not in running or running[name].poll() is not None:
                running[name] = workers.start(name, slots=2, settings=HASTY)
        return all(workers.state(job) in jobs.ENDED for job in (poison, good))

    workers.until(both_have_ended, "both have ended", 90)
    killer, neighbour = (jobs.show(workers.client, job) for job in (poison, good))
    assert (killer.state, neighbour.state) == ("failed", "finished")
    assert killer.reason is not None
    assert killer.reason.startswith("WorkerLost: ")
    assert [attempt.outcome for attempt in killer.attempts] == ["lost"] * 4


def test_a_worker_told_twice_to_stop_is_soon_gone_though_the_network_is_silent(
    workers_of: Callable[[str], Workers], redis_server: RedisServer, runs: Path
) -> None:
    with proxy_to(redis_server.port) as proxy:
        workers = workers_of(f"redis://127.0.0.1:{proxy.port}/0")
        worker = workers.start("w0", settings={"heartbeat_seconds": 20, "lease_seconds": 60})
        command = Command(appending(runs, "$$", "exec sleep 300"))
        with connect(redis_server.url) as client:
            submit_commands(client, "default", [(None, command)], Options())
        workers.until(lambda: lines(runs), "it runs")
        proxy.cut()
        workers.kill(worker, signal.SIGTERM)
        workers.until(lambda: "stopping" in workers.log("w0"), "it has heard")
        workers.kill(worker, signal.SIGTERM)
        began = time.monotonic()
        assert worker.wait(30) == 1
        assert time.monotonic() - began < 20
        workers.until(lambda: not psutil.pid_exists(int(lines(runs)[0])), "its job is gone, too", 5)
