"""`fleet metrics` as Prometheus sees it: the right numbers, in few series, whatever becomes of Redis."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from broker import bootstraps, control, keys, metrics
from broker.command import Command
from broker.requirements import Requirements
from broker.session import Identity, Session
from broker.submit import Options, submit_commands
from broker.work import End
from tests.integration.monitoring.conftest import Exporter
from tests.integration.test_claims import SETTINGS, claim, report, submit

Start = Callable[..., Exporter]


def registered(client: redis.Redis, name: str, *queues: str) -> Session:
    """A worker that has a record, as real ones do."""
    queues = queues or ("default",)
    who = Session(Identity(name, "here", queues, 1, "3"), SETTINGS)
    record = {"name": name, "host": "here", "queues": queues, "slots": 2, "heartbeat_seconds": 600}
    assert who.register(client, json.dumps(record)) == ""
    return who


def lived(client: redis.Redis) -> None:
    """A fleet that has seen something: 3 finished, 1 failed, 1 running and 2 waiting."""
    who = registered(client, "w0")
    submit(client, 7)
    *ends, failing = claim(client, who, 4)
    for one in ends:
        assert report(client, who, End(one, "finished", duration_seconds=2.0))
    assert report(client, who, End(failing, "failed", "exit code 3", 0.2, exit_code=3))
    claim(client, who)


def test_it_tells_what_became_of_jobs(exporter: Start, redis_client: redis.Redis, redis_url: str) -> None:
    lived(redis_client)
    found = exporter(redis_url).scrape()
    exact = {
        "fleet_redis_up": 1,
        'fleet_jobs{queue="default",state="queued"}': 2,
        'fleet_jobs{queue="default",state="started"}': 1,
        'fleet_jobs{queue="default",state="finished"}': 3,
        'fleet_jobs{queue="default",state="failed"}': 1,
        'fleet_claims_total{queue="default"}': 5,
        'fleet_jobs_finished_total{queue="default"}': 3,
        'fleet_jobs_failed_total{queue="default",reason="exit_code"}': 1,
        'fleet_job_waiting_seconds_count{queue="default"}': 5,
        'fleet_job_running_seconds_bucket{le="1.0",outcome="finished",queue="default"}': 0,
        'fleet_job_running_seconds_bucket{le="5.0",outcome="finished",queue="default"}': 3,
        'fleet_job_running_seconds_sum{outcome="finished",queue="default"}': 6,
        'fleet_job_running_seconds_count{outcome="failed",queue="default"}': 1,
        "fleet_worker_registrations_total": 1,
        "fleet_redis_append_only": 1,
        "fleet_redis_may_evict": 0,
        "fleet_redis_append_only_write_ok": 1,
    }
    assert {name: found.get(name) for name in exact} == exact
    assert 0 < found['fleet_oldest_job_age_seconds{queue="default"}'] < 600
    assert sum(value for name, value in found.items() if name.startswith("fleet_workers{")) == 1


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("options", [(), ("--per-worker", "--per-set")])
def test_promtool_has_nothing_to_say_of_it(
    exporter: Start, redis_client: redis.Redis, redis_url: str, options: tuple[str, ...]
) -> None:
    lived(redis_client)
    text = exporter(redis_url, *options).text()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_redis_that_goes_hangs_and_comes_back_is_a_metric(
    exporter: Start, own_redis: Any, eventually: Any
) -> None:
    server = own_redis()
    running = exporter(server.url)
    assert running.scrape()["fleet_redis_up"] == 1
    server.kill()
    assert running.scrape()["fleet_redis_up"] == 0
    assert not any(name.startswith("fleet_jobs") for name in running.scrape())
    server.start()
    eventually(lambda: running.scrape()["fleet_redis_up"] == 1)
    os.kill(server.pid, signal.SIGSTOP)
    assert running.scrape()["fleet_redis_up"] == 0, "and sooner than Prometheus gives up, see the next test"
    os.kill(server.pid, signal.SIGCONT)
    eventually(lambda: running.scrape()["fleet_redis_up"] == 1)
    assert running.said().count("Redis does not answer") == 2
    assert running.process.poll() is None


def test_it_begins_without_redis_and_ends_when_told(
    exporter: Start, free_port: Callable[[], int], run_fleet: Any
) -> None:
    running = exporter(f"redis://127.0.0.1:{free_port()}/0")
    assert running.scrape()["fleet_redis_up"] == 0
    taken = run_fleet("metrics", "--redis", "redis://127.0.0.1:1/0", "--port", str(running.port))
    assert taken.returncode == 1
    assert "cannot listen on" in taken.stderr
    assert "--port" in taken.stderr
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0


def test_it_listens_on_loopback_alone_unless_told(exporter: Start, redis_url: str) -> None:
    running = exporter(redis_url)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", running.port), timeout=10)
    everywhere = exporter(redis_url, "--host", "0.0.0.0")
    socket.create_connection(("127.0.0.2", everywhere.port), timeout=10).close()


def labels(found: dict[str, float], label: str) -> set[str]:
    return {value for name in found for value in re.findall(rf'\b{label}="([^"]*)"', name)}


def test_nothing_grows_with_queues_workers_or_jobs(
    exporter: Start, redis_client: redis.Redis, redis_url: str
) -> None:
    queues = [f"q{number}" for number in range(30)]
    workers = [registered(redis_client, f"worker-{number}", *queues) for number in range(12)]
    for queue in queues:
        submit(redis_client, 2, queue)
    ids = [one.job_id for who in workers for one in claim(redis_client, who, 5)]
    running = exporter(redis_url)
    text, found = running.text(), running.scrape()
    assert labels(found, "queue") <= {*queues, "(other)"}
    assert len(labels(found, "queue")) == 9
    assert not [word for word in [*ids, "worker-"] if word in text]
    assert sum(value for name, value in found.items() if "fleet_claims_total" in name) == 60
    jobs = {name: value for name, value in found.items() if name.startswith("fleet_jobs{")}
    assert sum(value for name, value in jobs.items() if "started" in name) == 60
    many = exporter(redis_url, "--max-queues", "100").scrape()
    assert labels(many, "queue") == set(queues)


def test_each_worker_is_told_of_where_that_is_asked_for(
    exporter: Start, redis_client: redis.Redis, redis_url: str
) -> None:
    lived(redis_client)
    found = exporter(redis_url, "--per-worker").scrape()
    assert found['fleet_worker_jobs_finished_total{host="here",worker="w0"}'] == 3


def test_control_characters_of_names_are_spelled_out(
    exporter: Start, redis_client: redis.Redis, redis_url: str
) -> None:
    odd = "w\x1b[31m\x07"
    record = {"name": odd, "host": odd, "queues": [odd], "slots": 1}
    redis_client.set(keys.worker_record(odd), json.dumps(record))
    redis_client.set(keys.worker_beat(odd), "1")
    redis_client.sadd(keys.FLEET_WORKERS, odd)
    text = exporter(redis_url, "--per-worker", "--rq-names").text()
    told = r"w\\x1b[31m\\x07"
    assert f'fleet_worker_slots{{host="{told}",worker="{told}"}} 1.0' in text
    assert f'name="{told}",queues="{told}"' in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_sets_of_requirements_are_summed_unless_asked_for(
    exporter: Start, redis_client: redis.Redis, redis_url: str
) -> None:
    need = Requirements(gpus=64)
    submit_commands(redis_client, "default", [(None, Command(("true",)))] * 3, Options(requirements=need))
    submit(redis_client, 2)
    name = 'fleet_jobs{{queue="{}",state="queued"}}'
    assert exporter(redis_url).scrape()[name.format("default")] == 5
    found = exporter(redis_url, "--per-set").scrape()
    assert found[name.format("default")] == 2
    assert found[name.format(need.queue_of("default"))] == 3


def test_jobs_that_no_worker_would_take_are_counted(
    exporter: Start, redis_client: redis.Redis, redis_url: str, workers: Any
) -> None:
    need = Options(requirements=Requirements(gpus=64))
    submit_commands(redis_client, "default", [(None, Command(("true",)))] * 3, need)
    submit(redis_client, 2, "nobody")
    submit(redis_client, 1, "paused")
    control.pause(redis_client, "paused")
    workers.start("w0", queues=("default",))
    done = workers.submit_many([["true"]], requirements=Requirements(cpus=1))
    workers.wait(done)
    found = exporter(redis_url).scrape()
    assert found['fleet_unplaceable_jobs{queue="default"}'] == 3
    assert found['fleet_unplaceable_jobs{queue="nobody"}'] == 2
    assert found['fleet_unplaceable_jobs{queue="paused"}'] == 0
    assert found['fleet_paused_queues{queue="paused"}'] == 1
    assert found["fleet_slots"] == 1
    assert found["fleet_memory_bytes"] > 0
    assert found["fleet_memory_used_bytes"] == 0


def test_rq_exporters_names_are_told_too(exporter: Start, redis_client: redis.Redis, redis_url: str) -> None:
    """As mdawar/rq-exporter has them: names, labels and what they count."""
    lived(redis_client)
    found = exporter(redis_url, "--rq-names").scrape()
    exact = {
        'rq_jobs{queue="default",status="queued"}': 2,
        'rq_jobs{queue="default",status="started"}': 1,
        'rq_jobs{queue="default",status="finished"}': 3,
        'rq_jobs{queue="default",status="failed"}': 1,
        'rq_jobs{queue="default",status="deferred"}': 0,
        'rq_jobs{queue="default",status="scheduled"}': 0,
        "rq_request_processing_seconds_count": 1,
    }
    assert {name: found.get(name) for name in exact} == exact
    plain = exporter(redis_url).scrape()
    assert not [name for name in plain if name.startswith("rq_")]


def test_rq_workers_are_told_with_what_they_did(exporter: Start, workers: Any, redis_url: str) -> None:
    workers.start("w0", queues=("default",))
    workers.wait(workers.submit_many([["true"], ["sh", "-c", "exit 3"], ["true"]]))
    running = exporter(redis_url, "--rq-names")
    workers.until(lambda: 'rq_workers{name="w0",queues="default",state="idle"}' in running.scrape())
    found = running.scrape()
    assert found['rq_workers_success_total{name="w0",queues="default"}'] == 2
    assert found['rq_workers_failed_total{name="w0",queues="default"}'] == 1
    assert found['rq_workers_working_time_total{name="w0",queues="default"}'] > 0


def test_steps_of_up_leave_how_long_they_took_and_which_failed(
    exporter: Start, fleet: Callable[..., Any], farm: Any, fleet_redis_url: str, free_port: Any
) -> None:
    farm.add("a")
    farm.alias("gone", free_port())
    done = fleet("up", "a", "gone")
    assert done.returncode == 3, done.stderr
    found = exporter(fleet_redis_url).scrape()
    for step in ("connect", "probe", "install", "start", "confirm"):
        assert found[f'fleet_bootstrap_step_seconds_count{{step="{step}"}}'] == 1, step
    assert found['fleet_bootstrap_step_seconds_sum{step="confirm"}'] > 0
    assert found['fleet_bootstrap_failures_total{step="connect"}'] == 1
    assert labels(found, "step") == set(bootstraps.STEPS)
    fleet("down")


class Counting(redis.Connection):
    """Counts how often something is sent: a pipeline goes at once."""

    sent = 0

    def send_packed_command(self, *arguments: object, **options: object) -> None:
        Counting.sent += 1
        super().send_packed_command(*arguments, **options)


@pytest.fixture
def counted(redis_url: str) -> Iterator[redis.Redis]:
    pool = redis.ConnectionPool.from_url(redis_url, connection_class=Counting)
    with redis.Redis(connection_pool=pool) as client:
        client.ping()
        yield client


def test_a_large_fleet_takes_no_more_round_trips_than_a_small_one(
    counted: redis.Redis, redis_client: redis.Redis
) -> None:
    def trips() -> int:
        before = Counting.sent
        metrics.read(counted)
        return Counting.sent - before

    def grow(workers: int, queues: int) -> None:
        names = [f"q{number}" for number in range(queues)]
        for number in range(workers):
            who = registered(redis_client, f"{workers}-{number}", *names)
        for name in names:
            submit(redis_client, 2, name)
            need = Options(requirements=Requirements(cpus=1))
            submit_commands(redis_client, name, [(None, Command(("true",)))], need)
        claim(redis_client, who, queues)

    grow(1, 1)
    few = trips()
    grow(40, 30)
    assert trips() == few
    assert few <= 12
    assert redis_client.scard(keys.FLEET_WORKERS) == 41
