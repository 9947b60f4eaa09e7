"""Backup and restore of the embedded Redis: everything comes back, or nothing changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from broker.errors import Conflict, FleetError, RedisUnreachable, UsageError
from fleet.redis_server import ServerProgram


def fill(client: redis.Redis) -> None:
    """One key of every type, one with a time to live, one in another database."""
    client.set("string", b"\x00\xff\r\n")
    client.hset("hash", mapping={"a": "1", "b": "2"})
    client.rpush("list", *range(300))
    client.sadd("set", "a", "b")
    client.zadd("zset", {"a": 1.5, "b": 2})
    client.xadd("stream", {"field": "value"}, id="1-1")
    client.set("short-lived", "x", ex=3600)
    client.execute_command("SELECT", 3)
    client.set("third", "database")
    client.execute_command("SELECT", 0)


def content(client: redis.Redis) -> dict[str, Any]:
    """All that `fill` wrote, as it is read."""
    found: dict[str, Any] = {
        "keys": sorted(client.keys()),
        "string": client.get("string"),
        "hash": client.hgetall("hash"),
        "list": client.lrange("list", 0, -1),
        "set": client.smembers("set"),
        "zset": client.zrange("zset", 0, -1, withscores=True),
        "stream": client.xrange("stream"),
        "expires": client.ttl("short-lived") > 3000,
    }
    client.execute_command("SELECT", 3)
    found["third"] = client.get("third")
    client.execute_command("SELECT", 0)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a backup.rdb"


# --- round trips -----------------------------------------------------------------------------------


def test_all_that_was_backed_up_comes_back(broker: Any, file: Path) -> None:
    broker.up()
    with broker.client() as client:
        fill(client)
        assert broker.backup(file) == file.stat().st_size
        wanted = content(client)
    with broker.client() as client:
        client.flushall()
        client.set("later", "than the backup")
    broker.stop()
    keys, kept = broker.restore(file, say=broker.said.append)
    assert keys == 8
    broker.up()
    with broker.client() as client:
        assert content(client) == wanted
        client.set("after", "the restore")
    broker.kill()
    broker.up()
    with broker.client() as client:
        assert client.get("after") == b"the restore", "the restored data has an append-only file"
    assert kept is not None
    assert any(kept.iterdir())


def test_what_a_restore_replaced_can_be_put_back(broker: Any, file: Path, state: Path) -> None:
    broker.up()
    broker.backup(file)
    with broker.client() as client:
        client.set("key", "value")
    broker.stop()
    _, kept = broker.restore(file)
    state.joinpath("data").rename(state / "tried")
    kept.rename(state / "data")
    broker.up()
    with broker.client() as client:
        assert client.keys() == [b"key"]


def test_a_backup_is_restored_where_there_was_no_broker(
    broker: Any, make_broker: Callable[..., Any], program: ServerProgram, file: Path, state: Path
) -> None:
    broker.up()
    with broker.client() as client:
        client.set("key", "value")
    broker.backup(file)
    broker.stop()
    state.rename(state.with_name("away"))
    fresh = make_broker(program)
    assert fresh.restore(file) == (1, None)
    fresh.up()
    assert fresh.status().keys == 1
    assert "MOVED" not in " ".join(fresh.said)


@pytest.mark.needs("redis-server")
def test_a_backup_is_restored_by_whichever_server_can_read_it(
    make_broker: Callable[..., Any], valkey: ServerProgram, file: Path
) -> None:
    from fleet.redis_server import find_programs

    first = make_broker(valkey)
    first.up()
    with first.client() as client:
        client.set("key", "value")
    first.backup(file)
    first.stop()
    [stranger, *_] = [found for found in find_programs() if found.name == "redis"]
    second = make_broker(stranger, valkey)
    assert second.restore(file)[0] == 1
    assert second.up().program == valkey
    third = make_broker(stranger)
    third.stop()
    with pytest.raises(UsageError, match="cannot be loaded by"):
        third.restore(file)


# --- backup ----------------------------------------------------------------------------------------


def test_a_backup_is_the_users_alone_and_leaves_nothing_beside_the_data(
    broker: Any, file: Path, state: Path
) -> None:
    broker.up()
    broker.backup(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir() if "backup" in path.name] == [file.name]
    assert [path.name for path in state.joinpath("data").iterdir()] == ["appendonlydir"]


def test_a_backup_begun_while_the_server_saves_holds_what_was_written_since(
    broker: Any, make_broker: Callable[..., Any], program: ServerProgram, file: Path, state: Path
) -> None:
    broker.up()
    with broker.client() as client:
        client.mset({f"key-{number}": "value" for number in range(20)})
        client.config_set("rdb-key-save-delay", 10_000)
        client.bgsave()
        client.set("since", "then")
        client.config_set("rdb-key-save-delay", 0)
        broker.backup(file)
        assert client.info("persistence")["rdb_bgsave_in_progress"] == 0
    broker.stop()
    assert broker.restore(file)[0] == 21


def test_a_backup_replaces_a_file_only_when_told(valkey_broker: Any, file: Path) -> None:
    valkey_broker.up()
    file.write_text("precious")
    with pytest.raises(Conflict, match="exists"):
        valkey_broker.backup(file)
    assert file.read_text() == "precious"
    valkey_broker.backup(file, force=True)
    assert file.read_bytes().startswith(b"VALKEY")


def test_a_backup_goes_nowhere_else_than_into_an_ordinary_file(valkey_broker: Any, tmp_path: Path) -> None:
    valkey_broker.up()
    for target in (tmp_path, tmp_path / "missing" / "file", Path("/dev/null")):
        with pytest.raises(UsageError):
            valkey_broker.backup(target, force=True)
    assert Path("/dev/null").is_char_device()


def test_a_backup_that_the_disk_does_not_take_leaves_no_half_file(
    valkey_broker: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    valkey_broker.up()
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(FleetError, match="No space left on device"):
        valkey_broker.backup(file)
    assert [path.name for path in file.parent.iterdir() if "backup" in path.name] == []


def test_there_is_no_backup_of_what_does_not_run(valkey_broker: Any, file: Path) -> None:
    with pytest.raises(RedisUnreachable, match="not running"):
        valkey_broker.backup(file)
    assert not file.exists()


# --- restore ---------------------------------------------------------------------------------------


@pytest.fixture
def stopped(broker: Any, file: Path) -> Any:
    """A stopped broker with one key, and an empty backup of it in `file`."""
    broker.up()
    broker.backup(file)
    with broker.client() as client:
        client.set("precious", "value")
    broker.stop()
    return broker


def assert_untouched(broker: Any, state: Path) -> None:
    assert [path.name for path in state.glob("data*")] == ["data"]
    broker.up()
    with broker.client() as client:
        assert client.keys() == [b"precious"]


def test_a_restore_while_it_runs_is_refused(stopped: Any, file: Path, state: Path) -> None:
    stopped.up()
    with pytest.raises(Conflict, match="is running") as caught:
        stopped.restore(file)
    assert "fleet broker stop" in caught.value.hint
    assert_untouched(stopped, state)


@pytest.mark.parametrize("garbage", [b"", b"PK\x03\x04 a zip file", b"REDI"])
def test_a_file_that_is_no_backup_changes_nothing(
    stopped: Any, file: Path, state: Path, garbage: bytes
) -> None:
    file.write_bytes(garbage)
    with pytest.raises(UsageError, match="is no backup"):
        stopped.restore(file)
    assert_untouched(stopped, state)


def test_a_backup_cut_short_changes_nothing(stopped: Any, file: Path, state: Path) -> None:
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(UsageError, match="cannot be loaded"):
        stopped.restore(file)
    assert_untouched(stopped, state)


def test_a_backup_with_a_flipped_bit_changes_nothing(stopped: Any, file: Path, state: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # of the checksum
    file.write_bytes(raw)
    with pytest.raises(UsageError, match=r"CRC error|checksum"):
        stopped.restore(file)
    assert_untouched(stopped, state)


def test_a_file_that_is_not_there_changes_nothing(stopped: Any, file: Path, state: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        stopped.restore(file.with_name("missing"))
    assert_untouched(stopped, state)


def test_a_restore_that_runs_out_of_disk_changes_nothing(
    stopped: Any, file: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(FleetError, match="No space left on device"):
            stopped.restore(file)
    assert_untouched(stopped, state)


def test_a_restore_killed_between_its_last_steps_is_finished_by_the_next_start(
    stopped: Any, state: Path
) -> None:
    state.joinpath("data").rename(state / "data.restored")
    stopped.up()
    assert "Finished a restore" in " ".join(stopped.said)
    assert_untouched(stopped, state)


def test_what_a_restore_killed_before_its_last_steps_left_is_swept_by_the_next(
    stopped: Any, file: Path, state: Path
) -> None:
    for name in ("data.incoming", "data.restored"):
        state.joinpath(name).mkdir()
    assert stopped.restore(file)[0] == 0
    names = {path.name.partition("restore-")[0] for path in state.glob("data*")}
    assert names == {"data", "data.before-"}


def test_a_long_path_for_temporary_files_does_not_matter(
    stopped: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 200)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert stopped.restore(file)[0] == 0


def test_a_server_started_to_check_a_backup_dies_with_the_restore(
    stopped: Any,
    program: ServerProgram,
    file: Path,
    tmp_path: Path,
    spawn: Callable[..., Any],
    is_alive: Callable[[int], bool],
    eventually: Callable[..., Any],
) -> None:
    folder = tmp_path / "throwaway"
    folder.mkdir()
    shutil.copy(file, folder / "dump.rdb")
    script = (
        "import sys, pathlib\n"
        "from fleet.redis_server import inspect, throwaway\n"
        "with throwaway(inspect(sys.argv[1]), pathlib.Path(sys.argv[2])) as client:\n"
        "    print(client.info('server')['process_id'], flush=True)\n"
        "    sys.stdin.read()\n"
    )
    argv = [sys.executable, "-c", script, program.path, folder]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    restore = spawn(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    server = int(restore.stdout.readline())
    assert is_alive(server)
    restore.kill()
    eventually(lambda: not is_alive(server))


# --- the command -----------------------------------------------------------------------------------


def test_the_command_backs_up_and_restores(
    run_fleet: Callable[..., Any], free_port: Callable[[], int], file: Path
) -> None:
    assert run_fleet("broker", "backup", file).returncode == 6
    assert run_fleet("broker", "start", "--port", str(free_port())).returncode == 0
    try:
        assert run_fleet("broker", "backup", file).returncode == 0
        refused = run_fleet("broker", "restore", file)
        assert (refused.returncode, "fleet broker stop" in refused.stderr) == (1, True)
    finally:
        assert run_fleet("broker", "stop").returncode == 0
    done = run_fleet("broker", "restore", file)
    assert done.returncode == 0
    assert "Restored 0 keys" in done.stderr
    assert "is kept in" in done.stderr
