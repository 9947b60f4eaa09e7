"""Workers that must end: Redis knows them no more, or another has their name."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from broker import keys
from tests.conftest import RedisServer
from tests.integration.conftest import HASTY, Workers
from tests.integration.test_worker import appending, is_live, lines, runs

__all__ = ["runs"]

RULES = ("on", "~*", "&*", "+@all")


def setuser(server: RedisServer, *rules: str) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "fleet", *rules)


def deleted(server: RedisServer) -> None:
    with server.client() as client:
        client.execute_command("ACL", "DELUSER", "fleet")  # Redis drops its connections


def other_password(server: RedisServer) -> None:
    setuser(server, "resetpass", ">another")  # those connected stay so: it is the next one that fails
    with server.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)


def without_scripts(server: RedisServer) -> None:
    setuser(server, "-evalsha")


def without_our_keys(server: RedisServer) -> None:
    setuser(server, "resetkeys", "~rq:*")


def without_what_scripts_do(server: RedisServer) -> None:
    setuser(server, "-zadd")


@pytest.mark.parametrize(
    "revoke", [deleted, other_password, without_scripts, without_our_keys, without_what_scripts_do]
)
def test_a_worker_whose_access_is_revoked_ends_with_its_jobs_and_says_why(
    workers_of: Callable[[str], Workers],
    own_redis: Callable[..., RedisServer],
    runs: Path,
    revoke: Callable[[RedisServer], None],
) -> None:
    server = own_redis()
    setuser(server, *RULES, ">secret")
    workers = workers_of(server.url)
    workers.url = server.url.replace("redis://", "redis://fleet:secret@")
    worker = workers.start("w0")
    workers.submit("sh", "-c", f"echo $$ >> {runs}; exec sleep 300")
    workers.until(lambda: lines(runs), "it runs")
    revoke(server)
    assert worker.wait(60) == 6
    assert "Redis refused us" in workers.log("w0")
    assert "secret" not in workers.log("w0")
    assert "Traceback" not in workers.log("w0")
    workers.until(lambda: not is_live(int(lines(runs)[0])), "its job is gone")


@pytest.mark.parametrize("url", ["redis://fleet:wrong@{}", "redis://nobody:secret@{}", "redis://:wrong@{}"])
def test_a_wrong_password_ends_a_worker_at_its_start(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., RedisServer], url: str
) -> None:
    server = own_redis()
    setuser(server, *RULES, ">secret")
    workers = workers_of(server.url)
    workers.client.config_set("requirepass", "right")
    workers.url = url.format(f"127.0.0.1:{server.port}/0")
    assert workers.start("w0", wait=False).wait(60) == 6
    assert "refused us" in workers.log("w0")
    assert "Traceback" not in workers.log("w0")


def test_a_user_without_the_rights_is_refused_at_its_start_and_leaves_nothing(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., RedisServer]
) -> None:
    server = own_redis()
    setuser(server, *RULES, ">secret", "resetkeys", "~rq:*")
    workers = workers_of(server.url)
    workers.url = server.url.replace("redis://", "redis://fleet:secret@")
    assert workers.start("w0", wait=False).wait(60) == 6
    assert "refused us" in workers.log("w0")
    assert [key for key in workers.client.scan_iter("*") if b"w0" in key] == []


def test_a_host_that_slept_while_another_took_its_name_stops_itself_and_is_refused(
    workers: Workers, tmp_path: Path
) -> None:
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    script = f'echo $$ >> {runs}; until [ -e {gate} ]; do sleep 0.02; done; echo "$FLEET_HOST"'
    job = workers.submit("sh", "-c", script)
    first = workers.start("w0", host="sleeper", output_dir=str(tmp_path / "sleeper"), settings=HASTY)
    workers.until(lambda: lines(runs), "it runs")
    tree = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in tree:  # the whole host: its sidecar too
        process.send_signal(signal.SIGSTOP)
    second = workers.start("w0", host="waker", output_dir=str(tmp_path / "waker"), settings=HASTY, wait=False)
    workers.until(lambda: len(lines(runs)) == 2, "the other took the name, and the job")
    gate.touch()
    [shown] = workers.wait([job])
    for process in reversed(tree):
        process.send_signal(signal.SIGCONT)
    assert first.wait(60) == 1
    assert "another worker has our name now" in workers.log("w0")
    workers.until(lambda: not any(is_live(process.pid) for process in tree), "nothing of it is left")
    assert second.poll() is None
    [ended] = [attempt for attempt in shown.attempts if attempt.outcome == "finished"]
    assert len(lines(runs)) == 2
    assert workers.client.hget(keys.job(job), "status") == b"finished"
    record = workers.client.get(keys.worker_record("w0"))
    assert b'"waker"' in record
    after = workers.submit(*appending(runs, "after"))
    assert workers.wait([after])[0].state == "finished"
    assert ended.worker == "w0"
    workers.assert_clean()
