"""`fleet status`: what workers do, and which do it no more."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from datetime import datetime

import psutil
import pytest

from broker import __version__, keys
from tests.conftest import fleet_script
from tests.integration.conftest import HASTY

_WORKER = {
    *("name", "host", "pid", "state", "probe", "queues", "slots", "running", "labels", "version", "cpus"),
    *("memory_bytes", "gpus", "started_at", "last_heartbeat", "heartbeat_age_seconds", "finished", "failed"),
    "tunnel",
    "ends_at",
    "free",
    "elsewhere",
}
_QUEUE = {"name", "queued", "running", "finished", "failed", "oldest_age_seconds", "paused", "requirements"}
_QUEUE |= {"finished_per_minute"}


def test_json_has_the_promised_fields(read, workers, submit, eventually, redis_url):
    process = workers.start("w0", slots=3, queues=("a", "b"), labels={"gpu": "yes"})
    job = submit("sleep", "60", options=("--queue", "b"))
    eventually(lambda: read("show", job)["state"] == "started")
    found = read("status")
    assert found.keys() == {"schema", "at", "redis", "workers", "queues"}
    assert found["redis"]["url"] == redis_url
    (worker,) = found["workers"]
    assert worker.keys() == _WORKER
    assert (worker["name"], worker["host"], worker["pid"], worker["state"]) == (
        "w0",
        "here",
        process.pid,
        "busy",
    )
    assert (worker["queues"], worker["slots"], worker["running"]) == (["a", "b"], 3, [job])
    assert (worker["labels"]["gpu"], worker["version"], worker["probe"]) == ("yes", __version__, None)
    assert worker["cpus"] == psutil.cpu_count() or worker["cpus"] >= 1
    assert datetime.fromisoformat(worker["started_at"]) <= datetime.fromisoformat(worker["last_heartbeat"])
    assert 0 <= worker["heartbeat_age_seconds"] < 30
    (queue,) = found["queues"]
    assert queue.keys() == _QUEUE
    assert (queue["name"], queue["queued"], queue["running"]) == ("b", 0, 1)


def test_finished_and_failed_jobs_are_counted(read, workers, submit, fleet, eventually):
    workers.start("w0")
    good, bad = submit("true"), submit("false")
    fleet("wait", good, bad, code=3)

    def counts() -> tuple[int, int]:
        (worker,) = read("status")["workers"]
        return worker["finished"], worker["failed"]

    eventually(lambda: counts() == (1, 1), message="both counted")


def test_a_dead_worker_is_shown_offline(read, fleet, workers, eventually):
    workers.kill(workers.start("w0", settings=HASTY))
    eventually(lambda: read("status")["workers"][0]["state"] == "offline")
    assert "offline" in fleet("status").stdout


def test_without_workers_it_says_what_to_do(fleet, read):
    assert "fleet worker" in fleet("status").stdout
    assert read("status")["workers"] == []


def test_the_notice_of_a_worker_is_shown(fleet, redis_client):
    record = {"name": "w0", "host": "h", "pid": 1, "notice": "disk full:\x1b[31m 3 bytes left"}
    redis_client.sadd(keys.FLEET_WORKERS, "w0")
    redis_client.set(keys.worker_record("w0"), json.dumps(record))
    assert "! w0: disk full:\\x1b[31m 3 bytes left" in fleet("status").stdout


@pytest.mark.parametrize("record", [b"\xff", b"[]", b'{"pid": "x"}', b'{"slots": []}', b'{"queues": 5}'])
def test_a_damaged_record_harms_nobody_else(read, fleet, redis_client, record):
    good = {"name": "good", "host": "h", "pid": 1}
    redis_client.sadd(keys.FLEET_WORKERS, "good", "bad")
    redis_client.set(keys.worker_record("good"), json.dumps(good))
    redis_client.set(keys.worker_record("bad"), record)
    assert [worker["name"] for worker in read("status")["workers"]] == ["good"]
    fleet("status")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits_the_terminal(fleet_redis_url, redis_client, width):
    for number in range(3):
        name = f"gpu{number}.a-rather-long-name.example.com-0"
        record = {"name": name, "host": name[:-2], "pid": 1, "queues": ["default", "low", "very-low"]}
        redis_client.sadd(keys.FLEET_WORKERS, name)
        redis_client.set(keys.worker_record(name), json.dumps(record))
        redis_client.hset(keys.worker_leases(name), mapping={f"{job:016x}": "1:x 1" for job in range(5)})
    shown = _on_terminal(["status"], width)
    assert max(len(line) for line in shown.splitlines()) <= width
    for word in ("WORKER", "STATE", "offline", "SLOTS"):
        assert word in shown


def test_of_a_great_fleet_a_terminal_gets_those_in_trouble_first_and_a_pipe_all(fleet, redis_client):
    with redis_client.pipeline() as pipe:
        for number in range(300):
            name = f"w{number:03}"
            pipe.sadd(keys.FLEET_WORKERS, name)
            pipe.set(keys.worker_record(name), json.dumps({"name": name, "host": "h", "pid": 1}))
            if number != 299:
                pipe.set(keys.worker_beat(name), "incarnation")
        pipe.execute()
    lines = _on_terminal(["status"], 100).splitlines()
    assert "300 workers: 299 idle, 1 offline" in lines[0]
    assert lines[4].startswith("w299")
    assert "284 more ('fleet status --all'): 284 idle" in lines[-1]
    assert fleet("status").stdout.count("\nw") == 300


def _on_terminal(words: list[str], width: int) -> str:
    """What a terminal of that width without colours is sent."""
    ours, theirs = pty.openpty()
    # Rich believes COLUMNS on a dumb terminal only where LINES is there too
    env = {**os.environ, "COLUMNS": str(width), "LINES": "25", "TERM": "dumb"}
    process = subprocess.Popen([fleet_script(), *words], stdout=theirs, env=env, stdin=subprocess.DEVNULL)
    os.close(theirs)
    found = b""
    try:
        while piece := os.read(ours, 4096):
            found += piece
    except OSError:
        pass  # how Linux says that nobody has the other end any more
    finally:
        os.close(ours)
    assert process.wait(60) == 0
    return found.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("words", [["--watch"], ["--watch", "--json"]])
def test_watch_goes_on_until_ctrl_c(fleet_redis_url, spawn, tmp_path, eventually, words):
    told, said = tmp_path / "told", tmp_path / "said"
    with open(told, "wb") as output, open(said, "wb") as errors:
        process = spawn([fleet_script(), "status", *words], stdout=output, stderr=errors)
    word = b'"schema"' if "--json" in words else b"No workers"
    eventually(lambda: told.read_bytes().count(word) >= 2, message="two looks")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert b"Traceback" not in said.read_bytes()


def test_a_program_that_watches_is_told_of_a_redis_that_is_away(own_redis, spawn, eventually, tmp_path):
    server = own_redis()
    server.kill()
    told, said = tmp_path / "told", tmp_path / "said"
    with open(told, "wb") as output, open(said, "wb") as errors:
        process = spawn(
            [fleet_script(), "--redis", server.url, "status", "--watch", "0.1", "--json"],
            stdout=output,
            stderr=errors,
        )
    eventually(lambda: said.read_bytes().count(b"\n") >= 2, message="two failures")
    assert json.loads(said.read_bytes().splitlines()[0])["error"]["code"] == "redis_unreachable"
    server.start()
    eventually(told.read_bytes, message="a document")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_a_redis_that_refuses_us_ends_a_watch_at_its_start(own_redis, run_fleet):
    url = f"redis://:wrong@127.0.0.1:{own_redis('--requirepass', 'right').port}"
    done = run_fleet("--redis", url, "status", "--watch")
    assert (done.returncode, "refused us" in done.stderr) == (6, True)


def test_a_redis_that_hangs_is_told_before_it_is_given_up(own_redis, spawn, eventually, tmp_path):
    server, said = own_redis(), tmp_path / "said"
    server.process.send_signal(signal.SIGSTOP)
    with open(said, "wb") as errors:
        process = spawn(
            [fleet_script(), "--redis", server.url, "status"], stdout=subprocess.PIPE, stderr=errors
        )
    eventually(lambda: b"has not answered for 3 s" in said.read_bytes())
    assert process.poll() is None
    server.process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
