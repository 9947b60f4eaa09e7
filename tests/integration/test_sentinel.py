"""Workers, jobs and commands on a service watched by real sentinels, through real failovers."""

from __future__ import annotations

import contextlib
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import rq

from broker import jobs, keys
from broker.command import Command
from broker.submit import Options, submit_commands
from tests.conftest import RedisServer, find_free_port, redis_program

_PASSWORD, _SENTINEL_PASSWORD = "p:w/1@", "s%w 2"
_LONGER = {"lease_seconds": 60.0, "heartbeat_seconds": 1.0}


class Watched:
    """A primary, a replica, and three sentinels that watch them as `mymaster`."""

    def __init__(self, folder: Path, spawn: Callable[..., subprocess.Popen[Any]]) -> None:
        login = ("--requirepass", _PASSWORD, "--masterauth", _PASSWORD, "--repl-diskless-sync-delay", "0")
        self.primary = RedisServer(folder / "primary", login).start()
        self.replica = RedisServer(
            folder / "replica", (*login, "--replicaof", f"127.0.0.1 {self.primary.port}")
        ).start()
        self.ports = [find_free_port() for _ in range(3)]
        for port in self.ports:
            conf = folder / f"sentinel-{port}.conf"
            conf.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {conf}.log\n"
                f'requirepass "{_SENTINEL_PASSWORD}"\nsentinel sentinel-pass "{_SENTINEL_PASSWORD}"\n'
                f"sentinel monitor mymaster 127.0.0.1 {self.primary.port} 2\n"
                f'sentinel auth-pass mymaster "{_PASSWORD}"\n'
                "sentinel down-after-milliseconds mymaster 1500\nsentinel failover-timeout mymaster 3000\n"
            )
            spawn([redis_program(), conf, "--sentinel"])

    @property
    def url(self) -> str:
        """With both passwords, and a sentinel that is not there, first."""
        from urllib.parse import quote

        hosts = ",".join(f"127.0.0.1:{port}" for port in (1, *self.ports))
        own = quote(_SENTINEL_PASSWORD, safe="")
        return f"redis+sentinel://:{quote(_PASSWORD, safe='')}@{hosts}/mymaster/0?sentinel_password={own}"

    def client_of(self, server: RedisServer) -> redis.Redis:
        return server.client(password=_PASSWORD)

    def is_formed(self) -> bool:
        """Whether all sentinels know each other and the replica, which is up to date."""
        with self.client_of(self.primary) as client, contextlib.suppress(redis.RedisError):
            if client.info("replication")["connected_slaves"] != 1:
                return False
            found = [self.sentinel(port) for port in self.ports]
            return all((one["num-other-sentinels"], one["num-slaves"]) == (2, 1) for one in found)
        return False

    def sentinel(self, port: int) -> dict[str, Any]:
        with redis.Redis(port=port, password=_SENTINEL_PASSWORD) as client:
            state: dict[str, Any] = client.sentinel_master("mymaster")
            return state

    def lose_primary(self, eventually: Callable[..., Any]) -> None:
        """Kill the primary at a moment at which it has acknowledged nothing that the replica has not."""
        with self.client_of(self.primary) as client:
            client.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
            eventually(lambda: self._lag(client) == 0)
            self.primary.kill()

    def _lag(self, client: redis.Redis) -> int:
        found = client.info("replication")
        return int(found["master_repl_offset"] - found["slave0"]["offset"])

    def role(self, server: RedisServer) -> str | None:
        """None: the sentinels cut our connection, as they do when they change roles."""
        with self.client_of(server) as client, contextlib.suppress(redis.ConnectionError):
            return str(client.info("replication")["role"])
        return None

    def promoted(self) -> bool:
        return self.role(self.replica) == "master"

    def is_known(self) -> bool:
        """Whether the one that was a replica is the primary, and every sentinel says so."""
        return self.promoted() and all(
            self.sentinel(port)["port"] == self.replica.port for port in self.ports
        )


@pytest.fixture
def watched(tmp_path: Path, spawn: Any, eventually: Any) -> Iterator[Watched]:
    found = Watched(tmp_path, spawn)
    try:
        eventually(found.is_formed, timeout_seconds=60, message="the sentinels know each other")
        yield found
    finally:
        found.primary.kill()
        found.replica.kill()


def test_a_failover_amid_300_jobs_loses_none_and_runs_none_twice(watched, workers_of, eventually, tmp_path):
    workers = workers_of(watched.url)
    ran = tmp_path / "ran"
    ran.touch()
    ids = [f"job{number}" for number in range(300)]
    commands = [(job, Command(("sh", "-c", f"echo {job} >> {ran}; sleep 0.02"))) for job in ids]
    submit_commands(workers.client, "default", commands, Options())
    alive = [workers.start(name, slots=2, settings=_LONGER) for name in ("w0", "w1")]
    workers.until(lambda: len(ran.read_text().split()) > 60, "they are in the middle of it")
    watched.lose_primary(eventually)
    done = len(ran.read_text().split())
    assert done < 300
    eventually(watched.promoted, timeout_seconds=60, message="the replica is the primary")
    shown = workers.wait(ids, 60)
    assert {job.state for job in shown} == {"finished"}
    outcomes = Counter(attempt.outcome for job in shown for attempt in job.attempts)
    assert outcomes.keys() <= {"finished", "handed-back"}, "what was claimed ahead may go back"
    assert Counter(ran.read_text().split()) == Counter(ids)
    assert [worker.poll() for worker in alive] == [None, None]
    workers.assert_clean()


def test_a_primary_that_comes_back_demoted_harms_nothing(watched, workers_of, eventually):
    workers = workers_of(watched.url)
    worker = workers.start("w0", settings=_LONGER)
    workers.wait([workers.submit("true")])
    watched.lose_primary(eventually)
    eventually(watched.promoted, timeout_seconds=60)
    watched.primary.start()

    eventually(lambda: watched.role(watched.primary) == "slave", timeout_seconds=60, message="demoted")
    # the sentinels cut connections when they change roles
    job = workers.until(lambda: workers.submit("true"), "a primary answers")
    assert workers.wait([job])[0].state == "finished"
    assert worker.poll() is None


def test_replies_that_a_primary_is_read_only_now_make_a_worker_connect_anew(watched, workers_of):
    workers = workers_of(watched.url)
    worker = workers.start("w0", settings=_LONGER)
    runs = workers.folder / "runs"
    job = workers.submit("sh", "-c", f"touch {runs}; until [ -e {workers.folder}/go ]; do sleep 0.05; done")
    workers.until(runs.exists, "it runs")
    with watched.client_of(watched.primary) as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")  # and nobody is disconnected
        (workers.folder / "go").touch()
        workers.until(lambda: "previous master is now a slave" in workers.log("w0"), "it hears of that")
        client.execute_command("REPLICAOF", "NO", "ONE")
    (shown,) = workers.wait([job])
    assert (shown.state, [attempt.outcome for attempt in shown.attempts]) == ("finished", ["finished"])
    assert worker.poll() is None


def test_functions_find_the_primary_too(watched, workers_of, eventually):
    workers = workers_of(watched.url)
    for executor in ("warm", "fork"):
        workers.start(executor, queues=(executor,), executor=executor, settings=_LONGER)

    def keep_meta(executor: str) -> bool:
        job = rq.Queue(executor, connection=workers.client).enqueue("rq_jobs.keep_meta")
        assert workers.wait([job.id])[0].state == "finished"
        job.refresh()
        return job.meta == {"seen": True}  # the job wrote over a connection of its own

    for executor in ("warm", "fork"):
        assert keep_meta(executor)
    watched.lose_primary(eventually)
    # a job that asks a sentinel which has not heard of it yet fails
    eventually(watched.is_known, timeout_seconds=60)
    for executor in ("warm", "fork"):
        # the sentinels cut connections when they change roles
        workers.until(lambda: keep_meta(executor), "a job speaks to the primary")  # noqa: B023


def test_commands_find_the_primary_and_say_no_password(watched, run_fleet, tmp_path):
    env = {"FLEET_REDIS_URL": watched.url}

    def fleet(*words: str, code: int = 0) -> str:
        done = run_fleet(*words, env=env)
        said: str = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "p:w" not in said
        assert "s%" not in said
        return said

    job = fleet("submit", "--", "true").splitlines()[0]
    fleet("worker", "--burst", "--name", "w0")
    assert "finished" in fleet("show", job)
    assert "mymaster" in fleet("status")
    assert f"127.0.0.1:{watched.ports[0]}" in fleet("status", "--json")
    fleet("config", "show")
    said = fleet("doctor")
    assert "1 replica; a failover may forget what was acknowledged last" in said
    assert "min-replicas-to-write 0" in said
    (tmp_path / "hosts.txt").write_text("host1\n")
    assert "a tunnel leads to one Redis" in fleet("up", str(tmp_path / "hosts.txt"), "--tunnel", code=2)
    watched.primary.kill()
    watched.replica.kill()
    said = fleet("jobs", code=6)
    assert "mymaster" in said


def test_a_service_that_nobody_watches_is_told(watched, run_fleet):
    url = watched.url.replace("/mymaster/", "/other/")
    done = run_fleet("jobs", env={"FLEET_REDIS_URL": url})
    assert done.returncode == 6
    assert "other" in done.stderr
    assert "service's name" in done.stderr


def test_leases_and_jobs_are_there_after_a_failover(watched, workers_of, eventually):
    workers = workers_of(watched.url)
    workers.start("w0", settings=_LONGER)
    runs = workers.folder / "runs"
    job = workers.submit("sh", "-c", f"touch {runs}; exec sleep 600")
    # before that the reply to the claim may be lost with the primary, and the job handed back
    workers.until(runs.exists, "it runs")
    watched.lose_primary(eventually)
    eventually(watched.promoted, timeout_seconds=60)
    first = workers.until(lambda: workers.client.zscore(keys.LEASES, job), "a primary answers")
    workers.until(lambda: workers.client.zscore(keys.LEASES, job) > first, "its lease is renewed there")
    shown = workers.until(lambda: jobs.show(workers.client, job))
    assert [attempt.outcome for attempt in shown.attempts] == [None]


@pytest.mark.needs("redis-server", "openssl")
def test_tls_is_spoken_to_sentinels_and_redis(tmp_path, spawn, workers_of, eventually):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {cert}"
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", *request.split(), *names], check=True, capture_output=True)
    port, sentinel_port = find_free_port(), find_free_port()
    common = (
        f"port 0\nbind 127.0.0.1\ndir {tmp_path}\ntls-cert-file {cert}\ntls-key-file {key}\n"
        f"tls-ca-cert-file {cert}\ntls-auth-clients no\ntls-replication yes\n"
    )
    (tmp_path / "redis.conf").write_text(f'{common}tls-port {port}\nsave ""\n')
    (tmp_path / "sentinel.conf").write_text(
        f"{common}tls-port {sentinel_port}\nsentinel monitor mymaster 127.0.0.1 {port} 1\n"
    )
    for words in (["redis.conf"], ["sentinel.conf", "--sentinel"]):
        spawn(["redis-server", tmp_path / words[0], *words[1:]], stdout=subprocess.DEVNULL)
    workers = workers_of(f"rediss+sentinel://127.0.0.1:{sentinel_port}/mymaster?ssl_ca_certs={cert}")
    workers.until(lambda: workers.client.ping(), "Redis and its sentinel are up")
    workers.start("w0")
    job = rq.Queue(connection=workers.client).enqueue("rq_jobs.keep_meta")
    assert workers.wait([job.id, workers.submit("true")])[0].state == "finished"
    job.refresh()
    assert job.meta == {"seen": True}


def test_a_wrong_password_of_redis_or_of_the_sentinels_ends_a_worker(watched, run_fleet):
    for url in (
        watched.url.replace("sentinel_password=s", "sentinel_password=x"),
        watched.url.replace("//:p", "//:x"),
    ):
        done = run_fleet("worker", "--name", "w0", env={"FLEET_REDIS_URL": url.replace("127.0.0.1:1,", "")})
        assert done.returncode == 6
        assert "refused us" in done.stderr
        assert "w%2F1" not in done.stderr
