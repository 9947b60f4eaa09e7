"""`fleet up --tunnel`: hosts that find Redis through their SSH connection, by real sshd and real workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest
import redis

from broker import jobs, keys
from broker.command import Command
from broker.submit import Options, submit_commands
from fleet.launchers.ssh_connect import Address, SshOptions
from fleet.launchers.ssh_forward import open_forward
from fleet.tunnel_folder import Settings, TunnelFolder, Wish
from fleet.tunnel_keeper import Keeper
from tests.conftest import wait_until
from tests.integration.sshd import PYTHON, SshdFarm, fleet_processes, tunnel_processes

pytestmark = pytest.mark.needs("sshd")
FAST = {
    "FLEET_WORKER__HEARTBEAT_SECONDS": "0.5",
    "FLEET_WORKER__LEASE_SECONDS": "20",
    "FLEET_WORKER__STOP_GRACE_SECONDS": "5",
}
#: for a connection whose silence is to be noticed soon
SHORT_LEASE = {"FLEET_WORKER__LEASE_SECONDS": "6"}
#: seconds for what depends on other processes: far more than it takes
PATIENCE_SECONDS = 60


@pytest.fixture
def farm(spawn: Any) -> Iterator[SshdFarm]:
    """Hosts whose homes are no longer a path than most: a unix socket's is some hundred bytes at most."""
    with tempfile.TemporaryDirectory(prefix="farm-", ignore_cleanup_errors=True) as folder:
        yield SshdFarm(Path(folder), spawn)


class Fleet:
    """What is typed at this machine, and what there is to see of the tunnels from here."""

    def __init__(self, run_fleet: Any, farm: SshdFarm, folder: Path) -> None:
        self._run = run_fleet
        self.farm = farm
        self.folder = folder
        self.state = folder / "home/.local/state/rq-fleet/tunnels"
        self.environ: dict[str, str] = {}

    def __call__(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        ssh = ["--ssh-config", self.farm.config] if verb in ("up", "down") else []
        python = ["--no-install", "--python", PYTHON] if verb == "up" else []
        return self._run(verb, *words, *ssh, *python, env=FAST | self.environ)

    def up(self, *names: str, options: tuple[str, ...] = ("--tunnel",)) -> subprocess.CompletedProcess[str]:
        file = self.folder / "hosts.txt"
        file.write_text("".join(f"{name}\n" for name in names))
        return self("up", *([str(file)] if names else []), *options)

    def document(self, *words: str) -> dict[str, Any]:
        done = self(*words, "--json")
        assert done.stdout, done.stderr
        return dict(json.loads(done.stdout))

    def tunnels(self) -> dict[str, str | None]:
        """What `fleet status` says of the tunnel of each host."""
        return {worker["host"]: worker["tunnel"] for worker in self.document("status")["workers"]}

    def processes(self) -> list[psutil.Process]:
        """The supervisor and its forwarder, in this order."""
        return tunnel_processes(self.state)

    def kill(self) -> None:
        """Kill both, so that neither starts the other again."""
        for process in self.processes():
            process.suspend()
        for process in self.processes():
            process.kill()
        wait_until(lambda: not self.processes(), timeout_seconds=PATIENCE_SECONDS)

    def times_up(self, host: str) -> int:
        """How often a host was brought to hang on Redis."""
        return self.log().count(f"{host} hangs on Redis")

    def ended(self) -> bool:
        """Whether nothing is left; a process that let go of its lock takes a moment to end."""
        wait_until(lambda: not self.processes(), timeout_seconds=PATIENCE_SECONDS)
        return self.left() == []

    def log(self) -> str:
        return "".join(path.read_text() for path in self.state.glob("*/tunnel.log"))

    def left(self) -> list[Path]:
        """What is there of tunnels, here and at the hosts, but for a log and locks."""
        here = [path for path in self.state.rglob("*") if path.suffix not in ("", ".log", ".lock")]
        return here + list(self.farm.folder.rglob("redis-*"))


@pytest.fixture
def fleet(run_fleet: Any, farm: SshdFarm, fleet_redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    found = Fleet(run_fleet, farm, tmp_path)
    yield found
    for process in [*fleet_processes(found.state), *fleet_processes(farm.folder)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def run_job(eventually: Callable[..., Any]) -> Callable[..., str]:
    """Submit one command, wait until it has ended, and return which worker finished it."""

    def run(client: redis.Redis, *argv: str) -> str:
        job = submit(client, *argv)
        wait_for(client, job, eventually)
        return str(jobs.show(client, job).attempts[-1].worker)

    return run


def submit(client: redis.Redis, *argv: str) -> str:
    return submit_commands(client, "default", [(None, Command(argv or ("true",)))], Options())[0]


def wait_for(client: redis.Redis, job: str, eventually: Callable[..., Any]) -> None:
    eventually(lambda: jobs.states(client, [job])[job] == "finished", timeout_seconds=PATIENCE_SECONDS)


def url_of(host: Any) -> str:
    """Where the worker of a host looks for Redis."""
    (config,) = host.home.rglob("*.config.json")
    return str(json.loads(config.read_text())["redis_url"])


def test_a_tunnel_from_up_to_down(farm, fleet, redis_client, run_job):
    host, other = farm.add("host1"), farm.add("host2")
    done = fleet.up("host1 tunnel=no", "host2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "host2: tunnel ok" in done.stderr
    assert "host1: tunnel" not in done.stderr
    path = Path(redis.Redis.from_url(url_of(other)).connection_pool.connection_kwargs["path"])
    assert (path.is_socket(), path.stat().st_mode & 0o77, path.parent.stat().st_mode & 0o77) == (True, 0, 0)
    assert not list(Path(f"/tmp/rq-fleet-{os.getuid()}").glob(f"{path.name}*")), "where it might have been"
    assert url_of(host).startswith("redis://127.0.0.1:")
    assert fleet.tunnels() == {"host1": None, "host2": "up"}
    assert "TUNNEL" in fleet("status").stdout
    assert fleet("down", "host1").returncode == 0
    assert run_job(redis_client) == "host2-0"

    supervisor, forwarder = fleet.processes()
    assert supervisor.ppid() == 1
    assert os.getsid(supervisor.pid) == supervisor.pid, "no terminal and no Ctrl-C reaches it"
    assert not any(name.startswith("FLEET_") for name in forwarder.environ())
    again = fleet.up(options=())
    assert again.returncode == 0, again.stdout
    assert [process.pid for process in fleet.processes()] == [supervisor.pid, forwarder.pid]
    assert "host2  running" in again.stdout
    assert "other options" not in again.stdout
    assert "tunnel=yes" in fleet("hosts", "list").stdout

    # the last one ends it all, and what is kept of the host brings it back
    down = fleet("down")
    assert (down.returncode, "its tunnel is closed" in down.stdout) == (0, True), down.stdout + down.stderr
    assert fleet.ended()
    assert not list(redis_client.scan_iter(keys.tunnel("*")))
    assert fleet.up("host2", options=()).returncode == 0
    assert url_of(other).startswith("unix://")
    assert fleet("down").returncode == 0
    assert fleet.ended()


def test_one_process_serves_all_hosts_and_each_ends_alone(farm, fleet, redis_client, run_job):
    names = [farm.add(f"host{number}").name for number in (1, 2, 3)]
    assert fleet.up(*names, options=("--tunnel", "--max-parallel-ssh", "2")).returncode == 0
    (settings,) = fleet.state.glob("*/tunnel.json")
    assert json.loads(settings.read_text())["max_parallel"] == 2
    before = [process.pid for process in fleet.processes()]
    assert len(before) == 2
    assert fleet.tunnels() == dict.fromkeys(names, "up")
    assert fleet("down", "host1", "host2").returncode == 0
    assert [process.pid for process in fleet.processes()] == before
    assert {path.relative_to(farm.folder).parts[0] for path in farm.folder.rglob("redis-*.sock")} == {"host3"}
    assert run_job(redis_client) == "host3-0"
    assert fleet("down").returncode == 0
    assert fleet.ended()


@pytest.mark.parametrize(("victim", "staying"), [(1, 1), (0, 0)], ids=["forwarder", "supervisor"])
def test_a_process_that_is_killed_is_started_again(
    farm, fleet, redis_client, run_job, eventually, victim, staying
):
    farm.add("host1")
    assert fleet.up("host1").returncode == 0
    before, times = {process.pid for process in fleet.processes()}, fleet.times_up("host1")
    fleet.processes()[victim].kill()
    eventually(
        lambda: len(found := {p.pid for p in fleet.processes()}) == 2 and len(found & before) == staying,
        timeout_seconds=PATIENCE_SECONDS,
    )
    eventually(lambda: fleet.times_up("host1") > times, timeout_seconds=PATIENCE_SECONDS)
    assert run_job(redis_client) == "host1-0"
    assert fleet.tunnels() == {"host1": "up"}
    assert "died" in fleet.log()
    assert fleet("down").returncode == 0
    assert fleet.ended()


def test_a_forwarder_that_cannot_write_makes_room_for_another(farm, fleet, redis_client, run_job, eventually):
    """As on a full disk: it would hold no host again, and say nothing of it."""
    host = farm.add("host1")
    assert fleet.up("host1").returncode == 0
    supervisor, forwarder = fleet.processes()
    forwarder.rlimit(psutil.RLIMIT_FSIZE, (0, 0))
    host.stop()
    eventually(lambda: not forwarder.is_running(), timeout_seconds=PATIENCE_SECONDS)
    host.start()
    eventually(lambda: fleet.tunnels() == {"host1": "up"}, timeout_seconds=PATIENCE_SECONDS)
    assert fleet.processes()[0] == supervisor
    assert run_job(redis_client) == "host1-0"
    assert fleet("down").returncode == 0
    assert fleet.ended()


def test_a_forwarder_that_hears_late_of_its_supervisor_spoils_nothing_of_the_next(
    farm, fleet, redis_client, run_job, eventually
):
    farm.add("host1")
    assert fleet.up("host1").returncode == 0
    supervisor, forwarder = fleet.processes()
    supervisor.kill()
    forwarder.suspend()  # not before: those stopped whose session's leader dies are sent SIGHUP
    eventually(lambda: not supervisor.is_running())
    assert fleet.up("host1").returncode == 0
    (note,) = redis_client.scan_iter(keys.tunnel("*"))
    forwarder.resume()
    eventually(lambda: not forwarder.is_running(), timeout_seconds=PATIENCE_SECONDS)
    (state,) = fleet.state.glob("*/host1.state")
    assert json.loads(state.read_text())["state"] == "up"
    assert json.loads(redis_client.get(note))["state"] == "up"
    assert run_job(redis_client) == "host1-0"
    eventually(lambda: len(fleet.processes()) == 2, timeout_seconds=PATIENCE_SECONDS)
    assert fleet("down").returncode == 0
    assert fleet.ended()


def test_where_all_of_it_is_gone_status_says_so_and_up_brings_it_back(
    farm, fleet, redis_client, run_job, eventually
):
    host = farm.add("host1")
    assert fleet.up("host1").returncode == 0
    before = url_of(host)
    fleet.kill()
    # its last note lapses by itself, which takes half a minute
    for key in redis_client.scan_iter(keys.tunnel("*")):
        assert 0 < redis_client.ttl(key) <= 30
        redis_client.delete(key)
    assert fleet.tunnels() == {"host1": "down"}
    assert "! host1: its tunnel to Redis is down: nobody holds it: 'fleet up'" in fleet("status").stdout
    again = fleet.up(options=())
    assert again.returncode == 0, again.stdout + again.stderr
    assert url_of(host) == before, "the worker that lives knows it by that"
    assert "host1  running" in again.stdout
    assert fleet.tunnels() == {"host1": "up"}
    assert run_job(redis_client) == "host1-0"

    # what nobody holds is taken away from the host, too
    fleet.kill()
    assert {path.suffix for path in farm.folder.rglob("redis-*")} == {".sock", ".sshd"}
    down = fleet("down")
    assert (down.returncode, "its tunnel is closed" in down.stdout) == (0, True), down.stdout + down.stderr
    assert fleet.ended()


def test_a_forward_that_is_given_up_on_the_way_leaves_nothing_at_the_host(farm, monkeypatch):
    farm.add("host1")
    left: list[Path] = []

    async def given_up() -> None:
        prepared = asyncio.Event()

        async def never(*words: Any, **more: Any) -> None:
            prepared.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(asyncssh.SSHClientConnection, "start_unix_server", never)
        options = SshOptions(config=farm.config)
        opening = asyncio.create_task(
            open_forward(
                Address("host1"), options, name="redis-up.sock", path=None, dial=never, keepalive_seconds=5
            )
        )
        await asyncio.wait_for(prepared.wait(), PATIENCE_SECONDS)
        left.extend(farm.folder.rglob("redis-up.sock*"))
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)

    asyncio.run(given_up())
    assert left
    assert not list(farm.folder.rglob("redis-*"))
    assert not list(Path(f"/tmp/rq-fleet-{os.getuid()}").glob("redis-up.sock*"))


def test_a_forward_of_which_no_note_can_be_made_here_is_closed(farm, tmp_path):
    farm.add("host1")
    folder = TunnelFolder(tmp_path)
    wish = Wish("host1", "unkept", ssh_config=str(farm.config))
    folder.ask("host1", wish, Settings("redis://127.0.0.1:1", 20.0))
    (tmp_path / "host1.path").mkdir()
    with pytest.raises(IsADirectoryError):
        asyncio.run(Keeper(folder).open("host1", wish, 0, again=False))
    assert not list(farm.folder.rglob("redis-*"))


def test_a_broken_connection_is_made_again_under_a_job_that_runs_on(farm, fleet, redis_client, eventually):
    host = farm.add("host1")
    assert fleet.up("host1").returncode == 0
    job = submit(redis_client, "sh", "-c", f"until [ -e {farm.folder}/go ]; do sleep 0.05; done")
    eventually(lambda: jobs.states(redis_client, [job])[job] == "started", timeout_seconds=PATIENCE_SECONDS)
    host.stop()
    eventually(
        lambda: "its tunnel to Redis is down" in fleet("status").stdout, timeout_seconds=PATIENCE_SECONDS
    )
    host.start()
    eventually(lambda: fleet.tunnels() == {"host1": "up"}, timeout_seconds=PATIENCE_SECONDS)
    (farm.folder / "go").touch()
    wait_for(redis_client, job, eventually)
    assert fleet("down").returncode == 0
    assert fleet.ended()


def test_a_session_of_sshd_that_has_not_noticed_our_end_is_ended(
    farm, fleet, redis_client, run_job, eventually
):
    """Its connections lead nowhere, and workers would wait on them."""
    host = farm.add("host1")
    fleet.environ |= SHORT_LEASE
    assert fleet.up("host1").returncode == 0
    times = fleet.times_up("host1")
    (note,) = host.home.rglob("redis-*.sshd")
    session = psutil.Process(int(note.read_text().split()[0]))
    session.suspend()  # it hears of nothing any more, and its socket is still there
    try:
        eventually(lambda: fleet.times_up("host1") > times, timeout_seconds=PATIENCE_SECONDS)
        assert int(note.read_text().split()[0]) != session.pid
        assert run_job(redis_client) == "host1-0"
    finally:
        session.resume()
    eventually(lambda: not session.is_running(), timeout_seconds=PATIENCE_SECONDS)
    assert fleet.tunnels() == {"host1": "up"}
    assert fleet("down").returncode == 0


@pytest.mark.parametrize("line", ["DisableForwarding yes", "AllowStreamLocalForwarding no"])
def test_sshd_that_forbids_it_is_told_and_nothing_is_left(farm, fleet, line):
    farm.add("host1", sshd=(line,))
    done = fleet.up("host1", options=("--tunnel", "--json"))
    assert done.returncode == 1
    (row,) = json.loads(done.stdout)["hosts"]
    assert (row["step"], row["error"]["code"]) == ("tunnel", "forward_refused")
    assert "AllowStreamLocalForwarding yes" in row["error"]["hint"]
    assert fleet.ended()
    assert fleet_processes(farm.folder) == []


def test_a_home_whose_path_is_too_long_for_a_socket_is_passed_over(farm, fleet, redis_client, run_job):
    farm.add("host1", XDG_STATE_HOME=str(farm.folder / ("long" * 25)))
    assert fleet.up("host1").returncode == 0
    (config,) = farm.folder.rglob("*.config.json")
    where = json.loads(config.read_text())["redis_url"]
    path = Path(redis.Redis.from_url(where).connection_pool.connection_kwargs["path"])
    assert path.parent == Path(f"/tmp/rq-fleet-{os.getuid()}")
    assert sorted(path.parent.glob(f"{path.name}*")) == [path, Path(f"{path}.sshd")]
    assert run_job(redis_client) == "host1-0"
    assert fleet("down").returncode == 0
    assert not list(path.parent.glob(f"{path.name}*"))


def test_an_interrupt_before_the_start_leaves_no_tunnel(farm, fleet, spawn, eventually, tmp_path):
    """A host that was not there before hangs on nothing after."""
    farm.add("host1")
    (tmp_path / "hosts.txt").write_text("host1\n")
    script = str(Path(PYTHON).parent / "fleet")
    words = ["up", tmp_path / "hosts.txt", "--tunnel", "--ssh-config", farm.config, "--python", PYTHON]
    # the wheel is installed for real, which takes its time
    up = spawn([script, *words], env={**os.environ, **FAST}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    eventually(lambda: "hangs on Redis" in fleet.log(), timeout_seconds=PATIENCE_SECONDS)
    up.send_signal(signal.SIGINT)
    out, err = up.communicate(timeout=60)
    assert up.returncode == 130, err
    assert b"untouched" in out
    eventually(lambda: not fleet.processes(), timeout_seconds=PATIENCE_SECONDS)
    assert fleet.left() == []


def test_no_secret_is_seen_outside_of_files_of_ones_own(farm, fleet, own_redis, run_job):
    secret = "hunt-for-this-secret"
    server = own_redis("--requirepass", secret)
    fleet.environ["FLEET_REDIS_URL"] = f"redis://:{secret}@127.0.0.1:{server.port}/0"
    farm.add("host1")
    done = fleet.up("host1")
    assert done.returncode == 0, done.stdout + done.stderr
    with server.client(password=secret) as client:
        run_job(client, "sh", "-c", f"env > {farm.folder}/environ")
        notes = b"".join(client.get(key) for key in client.scan_iter(keys.tunnel("*")))
    said = [done.stdout, done.stderr, fleet.log(), (farm.folder / "environ").read_text(), notes.decode()]
    processes = fleet.processes()
    said += [" ".join([*process.cmdline(), *process.environ().values()]) for process in processes]
    assert not [text for text in said if secret in text]
    holding = [path for path in fleet.state.rglob("*") if path.is_file() and secret in path.read_text()]
    assert [path.name for path in holding] == ["tunnel.json"]
    assert holding[0].stat().st_mode & 0o77 == 0
    assert fleet("down").returncode == 0
    assert fleet.ended()


@pytest.mark.needs("sshd", "redis-server", "openssl")
def test_tls_ends_here_so_that_the_host_needs_no_certificate(
    farm, fleet, own_redis, run_job, tmp_path, free_port
):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ("-subj", "/CN=redis.test", "-addext", "subjectAltName=IP:127.0.0.1")
    new = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    files = ("-keyout", key, "-out", certificate)
    subprocess.run([*new, *subject, *files], check=True, capture_output=True)
    port = free_port()
    tls = {
        "tls-port": port,
        "tls-cert-file": certificate,
        "tls-key-file": key,
        "tls-ca-cert-file": certificate,
        "tls-auth-clients": "no",
    }
    server = own_redis(*(str(word) for name, value in tls.items() for word in (f"--{name}", value)))
    url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
    fleet.environ["FLEET_REDIS_URL"] = url
    host = farm.add("host1")
    done = fleet.up("host1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ssl" not in url_of(host)
    with server.client() as client:
        assert run_job(client) == "host1-0"
    assert fleet("down").returncode == 0


def test_a_redis_at_a_unix_socket_is_reached_from_other_machines_too(
    farm, fleet, own_redis, run_job, tmp_path
):
    server = own_redis("--unixsocket", str(tmp_path / "r.sock"))
    fleet.environ["FLEET_REDIS_URL"] = f"unix://{tmp_path}/r.sock?db=0"
    farm.add("host1")
    assert fleet.up("host1").returncode == 0
    with server.client() as client:
        assert run_job(client) == "host1-0"
    assert fleet("down").returncode == 0


def test_workers_of_this_machine_have_no_tunnel(fleet):
    done = fleet("up", "--local", "2", "--tunnel")
    assert (done.returncode, "--local workers are on this machine" in done.stderr) == (2, True)


def test_a_host_that_is_kept_no_longer_hangs_on_nothing(farm, fleet):
    farm.add("host1")
    assert fleet.up("host1").returncode == 0
    assert len(fleet.processes()) == 2
    assert fleet("hosts", "remove", "host1").returncode == 0
    assert fleet.ended()


def test_functions_of_rq_find_redis_through_it_too(farm, fleet, redis_client, eventually):
    import rq

    farm.add("host1")
    assert fleet.up("host1").returncode == 0
    job = rq.Queue("default", connection=redis_client).enqueue("time.sleep", 0.01)
    eventually(lambda: job.get_status(refresh=True) == "finished", timeout_seconds=PATIENCE_SECONDS)
    assert fleet("down").returncode == 0
    assert fleet.ended()
