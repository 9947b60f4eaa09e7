"""The embedded Redis: it starts once, keeps what it has, and is found by what it holds."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import rq

from broker.connection import connect
from broker.errors import Conflict, FleetError, RedisDenied, RedisUnreachable, UsageError
from fleet import embedded, embedded_folder, embedded_server, redis_server
from fleet.redis_server import ServerProgram

#: an address that no machine has (RFC 5737)
NOWHERE = "203.0.113.7"


def fleet_script() -> str:
    return str(Path(sys.executable).parent / "fleet")


def answers_at(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((host, port)) == 0


# --- what it is ------------------------------------------------------------------------------------


def test_it_keeps_everything_evicts_nothing_and_asks_for_a_password(broker: Any) -> None:
    running = broker.up()
    with broker.client() as client:
        config = client.config_get("append*", "max*", "aof-load-truncated", "bind")
    assert (config["appendonly"], config["appendfsync"]) == ("yes", "everysec")
    assert (config["maxmemory-policy"], config["aof-load-truncated"]) == ("noeviction", "yes")
    assert config["bind"] == "127.0.0.1"
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = (
        embedded.CONNECTIONS if files == resource.RLIM_INFINITY else min(embedded.CONNECTIONS, files - 64)
    )
    assert int(config["maxclients"]) >= enough, "workers have some seven connections each"
    with connect(f"redis://{running.address}") as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_a_result_takes_no_more_memory_than_it_needs(broker: Any) -> None:
    broker.up()
    with broker.client() as client:
        client.xadd("rq:results:a", {"type": "1", "return_value": "x" * 100})
        assert client.memory_usage("rq:results:a") < 1024  # 4.6 KiB as Redis comes


def test_its_files_are_the_users_alone(broker: Any, state: Path) -> None:
    broker.up()
    assert state.stat().st_mode & 0o777 == 0o700
    assert state.joinpath("password").stat().st_mode & 0o777 == 0o600
    with broker.client() as client:
        client.set("key", "value")
    open_to_others = [path for path in state.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == []


def test_a_password_file_that_others_can_read_is_closed_to_them(valkey_broker: Any, state: Path) -> None:
    password = valkey_broker.up().password
    valkey_broker.stop()
    state.joinpath("password").chmod(0o644)
    state.chmod(0o755)
    assert valkey_broker.up().password == password
    assert state.joinpath("password").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700


def test_the_password_is_in_no_process_list(broker: Any) -> None:
    running = broker.up()
    process = psutil.Process(running.pid)
    shown = " ".join([*process.cmdline(), *process.environ().values()])
    assert str(running.port) in shown
    assert running.password not in shown
    assert running.password not in repr(running)


def test_it_is_detached_and_holds_on_to_nothing_of_its_starter(
    valkey_broker: Any, run_fleet: Callable[..., Any], home: Path, state: Path
) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        script = [
            str(Path(sys.executable).parent / "fleet"),
            "broker",
            "start",
            f"--port={valkey_broker.port}",
        ]
        environment = {**os.environ, "XDG_STATE_HOME": str(state.parent.parent)}
        subprocess.run(script, env=environment, pass_fds=[write], check=True, stderr=subprocess.DEVNULL)
    finally:
        os.close(write)
    pid = valkey_broker.running().pid
    assert os.getsid(pid) not in (os.getsid(0), os.getpid())
    assert psutil.Process(pid).terminal() is None
    assert os.read(read, 1) == b"", "the server holds a file that its starter was given"
    os.close(read)


# --- starting twice, stopping twice ----------------------------------------------------------------


def test_a_second_start_finds_the_first(broker: Any) -> None:
    first, second = broker.up(), broker.up()
    assert first == second
    assert "already running" in broker.said[-1]


def test_a_second_start_that_wants_another_address_is_told(valkey_broker: Any, free_port: Any) -> None:
    running = valkey_broker.up()
    valkey_broker.up(port=free_port())
    assert f"stays on port {running.port}" in valkey_broker.said[-1]
    with pytest.raises(Conflict, match=r"does not listen on 0\.0\.0\.0") as caught:
        valkey_broker.up(host="0.0.0.0")
    command = "fleet broker stop && fleet broker start --host 0.0.0.0"
    assert caught.value.hint == f"Stop it, then start it there: {command}"
    with pytest.raises(Conflict) as caught:
        valkey_broker.up(host="0.0.0.0", port=embedded.default_port())
    assert caught.value.hint.endswith(f"{command} --port {embedded.default_port()}")


def test_many_starts_at_once_make_one_server(
    valkey_broker: Any, spawn: Callable[..., subprocess.Popen[Any]], state: Path
) -> None:
    start = [fleet_script(), "broker", "start", f"--port={valkey_broker.port}"]
    environment = {**os.environ, "XDG_STATE_HOME": str(state.parent.parent)}
    starts = [spawn(start, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=150)[1] for process in starts]
    assert [process.returncode for process in starts] == [0] * 4, said
    assert sorted("Started" in text for text in said) == [False, False, False, True]
    assert len(servers_in(state / "data")) == 1


def servers_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_stop_keeps_the_data_and_leaves_no_process(broker: Any, is_alive: Callable[[int], bool]) -> None:
    running = broker.up()
    with broker.client() as client:
        client.set("key", "value")
    assert broker.stop() == running
    assert not is_alive(running.pid)
    assert broker.running() is None
    assert broker.status() is None
    assert broker.stop() is None
    broker.up()
    with broker.client() as client:
        assert client.get("key") == b"value"
    assert broker.running().password == running.password


# --- it dies ---------------------------------------------------------------------------------------


def test_killed_it_comes_back_with_its_jobs_where_it_was(broker: Any) -> None:
    before = broker.up()
    with broker.client() as client:
        job = rq.Queue(connection=client).enqueue("os.getpid")
    broker.kill()
    assert broker.running() is None
    after = broker.up(port=None)
    assert (after.port, after.password) == (before.port, before.password)
    with broker.client() as client:
        assert rq.Queue(connection=client).job_ids == [job.id]


def test_killed_in_the_middle_of_a_write_it_loses_that_write_alone(broker: Any, state: Path) -> None:
    broker.up()
    with broker.client() as client:
        client.set("key", "value")
    broker.kill()
    (newest,) = state.glob("data/appendonlydir/*.incr.aof")
    with newest.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$5\r\nother\r\n$100\r\nhal")
    broker.up()
    with broker.client() as client:
        assert client.keys() == [b"key"]


def test_data_that_cannot_be_read_is_told_with_the_servers_own_words(broker: Any, state: Path) -> None:
    broker.up()
    broker.kill()
    (newest,) = state.glob("data/appendonlydir/*.incr.aof")
    newest.write_bytes(b"this was never a command\r\n" * 10)
    with pytest.raises(FleetError, match="Bad file format reading the append only file") as caught:
        broker.up()
    assert str(broker.folder.log) in caught.value.hint
    assert broker.running() is None


def test_a_pid_file_left_behind_names_a_stranger_who_is_left_alone(
    valkey_broker: Any, spawn: Callable[..., subprocess.Popen[Any]], state: Path
) -> None:
    valkey_broker.up()
    valkey_broker.kill()
    stranger = spawn(["sleep", "600"])
    state.joinpath("broker.pid").write_text(f"{stranger.pid}\n")
    assert valkey_broker.running() is None
    assert valkey_broker.stop() is None
    assert valkey_broker.up().pid != stranger.pid
    valkey_broker.stop()
    assert stranger.poll() is None


def test_a_record_that_a_power_cut_emptied_is_no_obstacle(valkey_broker: Any, state: Path) -> None:
    valkey_broker.up()
    valkey_broker.kill()
    for name in ("broker.json", "broker.pid", "broker.conf"):
        state.joinpath(name).write_bytes(b"")
    assert valkey_broker.up().port == valkey_broker.port


def test_data_being_read_counts_as_started_and_is_waited_for(
    broker: Any, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    broker.up()
    with broker.client() as client:
        client.mset({f"key-{number}": "value" * 100 for number in range(300)})
        client.bgrewriteaof()
        eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
    broker.kill()
    ordinary = broker._directives
    slowly = {"key-load-delay": 2000, "loading-process-events-interval-bytes": 1024}
    monkeypatch.setattr(broker, "_directives", lambda record: ordinary(record) | slowly)
    monkeypatch.setattr(embedded, "PATIENCE_SECONDS", 0.05)
    broker.up()
    assert "Waiting for the embedded Redis to read its data ..." in broker.said
    assert broker.status().keys == 300
    assert not broker.status().loading


def test_a_server_that_hangs_is_told_apart_from_one_that_is_not_there(
    valkey_broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = psutil.Process(valkey_broker.up().pid)
    process.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(embedded_server, "ANSWER_SECONDS", 0.2)
        with pytest.raises(RedisUnreachable, match="not reachable"):
            valkey_broker.status()
    process.resume()
    assert valkey_broker.status() is not None


def test_a_password_changed_behind_our_back_is_said(valkey_broker: Any) -> None:
    valkey_broker.up()
    with valkey_broker.client() as client:
        client.config_set("requirepass", "another")
    with pytest.raises(RedisDenied):
        valkey_broker.status()


# --- where it listens ------------------------------------------------------------------------------


def test_a_port_taken_is_said_and_the_next_one_tried(broker: Any) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", broker.port))
        squatter.listen()
        running = broker.up()
    assert running.port > broker.port
    assert f"Port {broker.port} of 127.0.0.1 is taken by another program" in broker.said[0]
    assert f"Started the embedded Redis on 127.0.0.1:{running.port}" in broker.said[-1]


@pytest.mark.parametrize("ended_by", ["stop", "kill"])
def test_the_next_start_is_on_the_last_port_and_hosts(broker: Any, ended_by: str) -> None:
    before = broker.up(host="127.0.1.1")
    getattr(broker, ended_by)()
    after = broker.up(port=None)
    assert (after.port, after.hosts) == (before.port, ("127.0.0.1", "127.0.1.1"))
    assert answers_at("127.0.1.1", before.port)
    assert "MOVED" not in " ".join(broker.said)


def test_a_last_port_that_is_taken_is_said_loudly(broker: Any) -> None:
    last = broker.up().port
    broker.stop()
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", last))
        squatter.listen()
        moved = broker.up(port=None).port
    assert f"port MOVED from {last} to {moved}" in broker.said[-1]
    assert "'fleet down', then 'fleet up'" in broker.said[-1]
    broker.stop()
    assert broker.up(port=None).port == moved


def test_a_port_told_is_taken_instead_of_the_last(valkey_broker: Any, free_port: Any) -> None:
    valkey_broker.up()
    valkey_broker.stop()
    port = free_port()
    assert valkey_broker.up(port=port).port == port


def test_a_record_of_another_version_is_read(valkey_broker: Any, state: Path) -> None:
    port = valkey_broker.up().port
    valkey_broker.stop()
    file = state / "broker.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stopped": True}))
    assert valkey_broker.up(port=None).port == port


def test_told_a_host_it_listens_there_too_until_told_otherwise(broker: Any) -> None:
    running = broker.up(host="127.0.1.1")
    assert running.hosts == ("127.0.0.1", "127.0.1.1")
    assert answers_at("127.0.1.1", running.port)
    broker.kill()
    assert broker.up(port=None).hosts == running.hosts, "a crash is no reason to hide from its workers"
    broker.up(host="127.0.0.1")
    assert "goes on listening on 127.0.1.1; stop it first" in broker.said[-1]
    broker.stop()
    assert broker.up(host="127.0.0.1").hosts == ("127.0.0.1",)
    assert not answers_at("127.0.1.1", running.port)


def test_told_every_address_it_listens_on_loopback_as_well(broker: Any) -> None:
    running = broker.up(host="0.0.0.0")
    assert answers_at("127.0.0.1", running.port)
    assert broker.status().broker == running
    assert "listens on 0.0.0.0" in broker.said[-1]
    assert broker.up(host="127.0.0.1") == running


@pytest.mark.parametrize("host", [NOWHERE, "no such host", "-x", "1.2.3.4.5"])
def test_a_host_that_is_not_this_machine_is_refused(valkey_broker: Any, host: str) -> None:
    with pytest.raises(UsageError, match="--host"):
        valkey_broker.up(host=host)
    assert valkey_broker.running() is None


def test_an_address_that_the_machine_lost_does_not_keep_it_from_coming_back(
    valkey_broker: Any, state: Path
) -> None:
    valkey_broker.up()
    valkey_broker.kill()
    file = state / "broker.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hosts": ["127.0.0.1", NOWHERE]}))
    assert valkey_broker.up().hosts == ("127.0.0.1",)
    assert f"{NOWHERE} is no longer an address of this machine." in valkey_broker.said


def test_on_another_machine_with_the_same_home_it_is_seen_and_not_started_twice(
    valkey_broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = socket.gethostname()
    valkey_broker.up()
    with monkeypatch.context() as patch:
        patch.setattr(embedded_folder.socket, "gethostname", lambda: "elsewhere")
        for ask in (valkey_broker.running, valkey_broker.status, valkey_broker.up, valkey_broker.stop):
            with pytest.raises(Conflict, match=f"runs on {here}"):
                ask()
    assert valkey_broker.stop() is not None


# --- which server ----------------------------------------------------------------------------------


@pytest.mark.needs("redis-server")
def test_the_server_that_wrote_the_data_reads_it_again_whatever_path_says_now(
    make_broker: Callable[..., Any], valkey: ServerProgram
) -> None:
    broker = make_broker(valkey)
    broker.up()
    broker.stop()
    [*_, newcomer] = [found for found in redis_server.find_programs() if found.name == "redis"]
    assert make_broker(newcomer, valkey).up().program == valkey


def test_a_server_that_ends_as_it_starts_is_told_with_its_last_words(
    make_broker: Callable[..., Any], tmp_path: Path
) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho the moon is in the wrong phase\nexit 1\n")
    broken.chmod(0o755)
    broker = make_broker(ServerProgram(str(broken), "redis", "7.0.0"))
    with pytest.raises(FleetError, match="the moon is in the wrong phase"):
        broker.up()
    assert broker.folder.read_record() is None


# --- folders that cannot be used -------------------------------------------------------------------


def test_a_state_folder_that_cannot_be_made_is_said(run_fleet: Callable[..., Any], tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    done = run_fleet("broker", "start", env={"XDG_STATE_HOME": str(tmp_path / "file")})
    assert done.returncode == 1
    assert f"the embedded broker: {tmp_path / 'file'}" in done.stderr
    assert "XDG_STATE_HOME" in done.stderr


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    read_only = tmp_path / "read-only"
    read_only.mkdir(mode=0o500)
    environment = {**os.environ, "HOME": str(read_only), "XDG_STATE_HOME": ""}
    for verb, code in (("start", 1), ("status", 1), ("stop", 0)):
        done = fleet_without_privileges("broker", verb, environment=environment)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert verb != "start" or "Permission denied" in done.stderr


def fleet_without_privileges(*arguments: str, environment: dict[str, str]) -> Any:
    """The command as one to whom permissions of files apply: root has to give that up first."""
    give_up = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*give_up, fleet_script(), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_a_disk_that_takes_nothing_is_said(tmp_path: Path, state: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(state.parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", fleet_script(), "broker", "start"]
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot start the embedded broker" in done.stderr
    assert "File too large" in done.stderr
    assert not state.joinpath("password").exists(), "an empty password must not be left behind"


@pytest.mark.root
def test_a_folder_of_another_user_is_not_taken_over(valkey_broker: Any, state: Path) -> None:
    state.mkdir(parents=True)
    os.chown(state, 12345, 12345)
    with pytest.raises(FleetError, match="belongs to another user"):
        valkey_broker.up()


# --- what the rest of the program asks for ---------------------------------------------------------


def test_the_url_of_a_broker_that_must_not_be_started_is_an_error_with_a_way_out(home: Path) -> None:
    with pytest.raises(RedisUnreachable, match="no Redis is configured") as caught:
        embedded.embedded_url(start=False, say=pytest.fail)
    assert caught.value.exit_code == 6
    assert "fleet broker start" in caught.value.hint


def test_the_url_starts_the_broker_where_it_may_and_says_so_once(
    home: Path, run_fleet: Callable[..., Any]
) -> None:
    said: list[str] = []
    try:
        url = embedded.embedded_url(start=True, say=said.append)
        with redis.Redis.from_url(url) as client:
            assert client.ping()
        assert any(line.startswith("Started the embedded Redis on 127.0.0.1:") for line in said)
        said.clear()
        assert embedded.embedded_url(start=True, say=said.append) == url
        assert embedded.embedded_url(start=False, say=said.append) == url
        assert said == []
    finally:
        assert run_fleet("broker", "stop").returncode == 0


# --- the command -----------------------------------------------------------------------------------


def test_the_command_from_start_to_stop(run_fleet: Callable[..., Any], free_port: Callable[[], int]) -> None:
    port = free_port()
    down = run_fleet("broker", "status", "--json")
    assert (down.returncode, json.loads(down.stdout)["running"]) == (1, False)
    assert run_fleet("broker", "start", "--port", str(port)).returncode == 0
    try:
        again = run_fleet("broker", "start")
        assert (again.returncode, "already running" in again.stderr) == (0, True)
        status = run_fleet("broker", "status", "--json")
        assert status.returncode == 0
        found = json.loads(status.stdout)
        assert (found["schema"], found["running"], found["address"]) == (1, True, f"127.0.0.1:{port}")
        assert (found["append_only"], found["append_only_last_write"]) == (True, "ok")
        assert psutil.pid_exists(found["pid"])
        assert Path(found["data_dir"]).is_dir()
        password = Path(found["password_file"]).read_text().strip()
        url = run_fleet("broker", "url")
        assert (url.returncode, url.stderr) == (0, "")
        assert url.stdout == f"redis://:{password}@127.0.0.1:{port}/0\n"
        with redis.Redis.from_url(url.stdout.strip()) as client:
            assert client.ping()
        assert password not in status.stdout + run_fleet("broker", "status").stdout
    finally:
        assert run_fleet("broker", "stop").returncode == 0
    stopped = run_fleet("broker", "stop")
    assert (stopped.returncode, "not running" in stopped.stderr) == (0, True)
    nowhere = run_fleet("broker", "url")
    assert (nowhere.returncode, nowhere.stdout) == (6, "")
    assert "Start it with 'fleet broker start'" in nowhere.stderr


def test_the_help_says_that_the_url_holds_the_password(run_fleet: Callable[..., Any]) -> None:
    assert "PASSWORD" in run_fleet("broker", "url", "--help").stdout


def test_redis_py_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, fleet.embedded, cli.broker; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
