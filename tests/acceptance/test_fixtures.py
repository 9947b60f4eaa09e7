"""The fixtures do what the other tests lean on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def test_redis_is_empty_and_real(redis_client):
    assert redis_client.dbsize() == 0
    redis_client.set("left", "behind")


def test_redis_is_empty_again(redis_client):
    assert redis_client.dbsize() == 0


def test_own_redis_keeps_its_data_over_kill_9(own_redis):
    server = own_redis()
    with server.client() as client:
        client.set("k", "v")
        client.execute_command("BGREWRITEAOF")
        client.config_set("appendfsync", "always")
        client.set("k", "w")
        old = server.pid
        server.kill()
        server.start()
        assert client.get("k") == b"w"
        assert server.pid != old


def test_own_redis_may_ask_for_a_password(own_redis, run_fleet):
    assert own_redis("--requirepass", "secret").port


def test_the_home_is_the_tests_own(home):
    assert Path("~").expanduser() == home
    assert not [name for name in os.environ if name.startswith("FLEET_")]


def test_the_command_line_runs(run_fleet):
    done = run_fleet("--version")
    assert (done.returncode, done.stdout) == (0, "fleet, version 0.1.0\n")


def test_a_spawned_process_runs(spawn, eventually, tmp_path):
    spawn(["sh", "-c", f"sleep 100 & echo $! > {tmp_path}/pid; wait"])
    assert eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())


def test_eventually_has_a_limit(eventually):
    with pytest.raises(pytest.fail.Exception, match="never came"):
        eventually(lambda: 0, timeout_seconds=0.05, message="never came")


@pytest.mark.needs("redis-server")
@pytest.mark.root
def test_needs():
    assert sys.executable
