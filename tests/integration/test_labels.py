"""Labels of workers: those it is started with, those that operators give it, and how long these hold."""

from __future__ import annotations

import json
import platform
import signal
from typing import Any

import pytest

from broker import control, keys, status
from tests.integration.conftest import HASTY


def labels_of(workers: Any, name: str = "w0") -> dict[str, str]:
    found = {worker.name: dict(worker.labels) for worker in status.read(workers.client).workers}
    return found.get(name, {})


@pytest.fixture
def told(workers):
    """`told({"zone": "a"}, "b")`: what an operator says of w0."""
    return lambda given, *taken: control.label(workers.client, ["w0"], given, taken)["w0"]


@pytest.fixture
def shows(workers):
    """`shows(zone="a", disk=None)`: wait until the labels of w0 are so."""

    def wait(**expected: str | None) -> None:
        workers.until(
            lambda: all(labels_of(workers).get(name) == value for name, value in expected.items()),
            f"labels {expected}",
        )

    return wait


def test_a_worker_has_labels_of_its_own_beside_those_it_is_started_with(workers, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    workers.start("w0", host="gpu7", labels={"zone": "a", "os": "mine"})
    assert labels_of(workers) == {
        "host": "gpu7",
        "os": "mine",
        "arch": platform.machine(),
        "python": platform.python_version(),
        "slurm_job_id": "4711",
        "zone": "a",
    }


def test_an_operator_is_heard_at_once_and_outranks_the_start(workers, told, shows):
    slow = {"heartbeat_seconds": 300.0, "lease_seconds": 600.0}
    workers.start("w0", labels={"zone": "a"}, settings=slow)
    assert told({"zone": "b", "disk": "ssd"}) == {"disk": "ssd", "zone": "b"}
    shows(zone="b", disk="ssd")
    assert told({}, "zone") == {"disk": "ssd"}
    shows(zone="a", disk="ssd")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_labels_hold_across_a_restart(workers, told, shows, number):
    first = workers.start("w0", labels={"zone": "a"})
    told({"zone": "b"})
    workers.kill(first, number)
    first.wait(60)
    told({"disk": "ssd"})
    workers.start("w0", labels={"zone": "c"})
    shows(zone="b", disk="ssd")


def test_labels_that_redis_lost_come_back(workers, told, shows):
    workers.start("w0")
    told({"zone": "b", "disk": "ssd"})
    shows(zone="b")
    workers.client.flushdb()
    shows(zone="b", disk="ssd")
    workers.until(lambda: workers.client.exists(keys.worker_labels("w0")), "they are in Redis again")
    assert told({}, "disk") == {"zone": "b"}


def test_the_last_label_that_is_taken_away_does_not_come_back(workers, told, shows):
    workers.start("w0")
    told({"zone": "b"})
    shows(zone="b")
    assert told({}, "zone") == {}
    shows(zone=None)
    beat = labels_of(workers)
    workers.until(lambda: workers.client.exists(keys.worker_beat("w0")), "it lives")
    assert beat == labels_of(workers)
    assert told({}) == {}


def test_forget_takes_them_along(workers, told, shows):
    worker = workers.start("w0", settings=HASTY)
    told({"zone": "b"})
    workers.kill(worker)
    workers.until(lambda: control.forget(workers.client, "w0")[0] == "forgotten", "it is forgotten")
    assert not workers.client.exists(keys.worker_labels("w0"))
    workers.start("w0")
    assert "zone" not in labels_of(workers)


def test_those_of_an_ephemeral_worker_go_with_its_record(workers, told, shows):
    workers.start("w0", ephemeral=True, max_jobs=1)
    told({"zone": "b"})
    shows(zone="b")
    assert 0 < workers.client.ttl(keys.worker_labels("w0")) <= 3600


def test_a_key_that_somebody_damaged_stops_no_worker(workers, shows):
    workers.start("w0", labels={"zone": "a"})
    workers.client.set(keys.worker_labels("w0"), "x")
    job = workers.submit("true")
    assert workers.wait([job])[0].state == "finished"
    assert workers.is_beating("w0")
    shows(zone="a")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["w9", "a=b"], 4),
        (["w0"], 2),
        (["w0", "=b"], 2),
        (["w0", "a b=c"], 2),
        (["w0", "a"], 2),
        (["w0", "a=b", "a-"], 2),
        (["w0", "a=" + "x" * 300], 2),
        (["w0", "a=b\nc"], 2),
        (["w0", "-"], 2),
    ],
)
def test_words_that_are_no_labels_are_refused(workers, run_fleet, fleet_redis_url, words, code):
    workers.client.sadd(keys.FLEET_WORKERS, "w0")
    workers.client.set(keys.worker_record("w0"), json.dumps({"host": "h"}))
    done = run_fleet("label", "--", *words)
    assert done.returncode == code, done.stderr
    assert not workers.client.exists(keys.worker_labels("w0"))


def test_the_verb_says_what_there_is_then(workers, run_fleet, fleet_redis_url, shows):
    workers.start("w0")
    assert run_fleet("label", "w0", "zone=b", "disk=ssd").stdout == "w0  disk=ssd,zone=b\n"
    shows(zone="b")
    done = run_fleet("label", "--json", "w0", "zone-", "disk-")
    assert json.loads(done.stdout) == {"schema": 1, "worker": "w0", "labels": {}}
    assert run_fleet("label", "w0", "zone-").stdout == "w0  no labels given so\n"
    shows(zone=None)
