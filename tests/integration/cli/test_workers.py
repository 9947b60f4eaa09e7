"""`fleet drain`, `undrain`, `forget`, `pause`, `resume`: names, outcomes, exit codes."""

from __future__ import annotations

import json

import pytest

from broker import keys


def record(
    client, name: str, host: str = "h0", *, alive: bool = True, queues: tuple[str, ...] = ("q",)
) -> None:
    """A worker as the registry has it."""
    fields = {"name": name, "host": host, "queues": queues, "slots": 1, "pid": 1}
    client.sadd(keys.FLEET_WORKERS, name)
    client.set(keys.worker_record(name), json.dumps(fields))
    client.sadd(keys.of("queue_workers", "q"), keys.rq_worker(name))
    if alive:
        client.set(keys.worker_beat(name), "x")


@pytest.fixture
def three(redis_client):
    """Workers a-0 and a-1 of host a, b-0 of host b; b-0 is offline."""
    record(redis_client, "a-0", "a")
    record(redis_client, "a-1", "a")
    record(redis_client, "b-0", "b", alive=False)


def outcomes(document) -> dict[str, str]:
    return {row["name"]: row["outcome"] for row in document["workers"]}


# --- drain, undrain --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "drained"),
    [
        (["a-0"], ["a-0"]),
        (["a-0", "b-0", "a-0"], ["a-0", "b-0"]),
        (["--host", "a"], ["a-0", "a-1"]),
        (["--all"], ["a-0", "a-1", "b-0"]),
    ],
)
@pytest.mark.usefixtures("three")
def test_workers_are_drained_by_name_by_host_or_all(read, words, drained):
    assert outcomes(read("drain", *words)) == dict.fromkeys(drained, "draining")
    states = {worker["name"]: worker["state"] for worker in read("status")["workers"]}
    assert {name for name, state in states.items() if state == "draining"} == set(drained) - {"b-0"}
    assert outcomes(read("undrain", *words)) == dict.fromkeys(drained, "undrained")
    assert outcomes(read("undrain", *words)) == dict.fromkeys(drained, "not_drained")
    assert {worker["state"] for worker in read("status")["workers"]} == {"idle", "offline"}


@pytest.mark.usefixtures("three")
def test_names_that_are_none_are_told_and_the_others_drained(fleet, read):
    assert "no such worker" in fleet("drain", "x", code=4).stdout
    assert "draining" in fleet("drain", "x", "a-0", code=3).stdout
    assert "no such worker" in fleet("undrain", "x", "a-0", code=3).stdout
    fleet("drain", "a-0")
    fleet("drain", "a-0")


@pytest.mark.usefixtures("three")
def test_what_still_runs_is_told(fleet, read, redis_client):
    redis_client.hset(keys.worker_leases("a-0"), mapping={"j1": "1:x 1", "j2": "2:x 1"})
    assert "2 jobs still run" in fleet("drain", "a-0").stdout
    assert read("drain", "a-0")["workers"] == [
        {"name": "a-0", "outcome": "draining", "running": ["j1", "j2"]}
    ]


@pytest.mark.usefixtures("three")
def test_a_drained_name_is_known_when_its_worker_has_left(fleet, redis_client):
    fleet("drain", "b-0")
    fleet("forget", "b-0")
    assert "drained workers: b-0" in fleet("doctor", code=None).stdout
    assert "takes jobs again" in fleet("undrain", "--host", "b").stdout
    assert not redis_client.exists(keys.worker_drain("b-0"), keys.DRAINED)
    fleet("undrain", "b-0", code=4)


@pytest.mark.parametrize("verb", ["drain", "undrain"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["--all", "--host", "a"], 2),
        (["a-0", "--all"], 2),
        (["a b"], 2),
        (["a:b"], 2),
        (["--host", "x"], 4),
        (["--host", ""], 4),
    ],
)
@pytest.mark.usefixtures("three")
def test_words_that_name_nobody_are_refused(fault, verb, words, code):
    error = fault(verb, *words, code=code)
    assert error["hint"]


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_an_empty_fleet_is_told(fault, verb):
    assert fault(verb, "--all", code=4)["message"] == "there are no workers"


def test_damaged_records_and_wishes_of_other_hands_harm_nothing(fleet, redis_client):
    for name, document in {"w0": "{", "w1": "[1]", "w2": "7"}.items():
        record(redis_client, name)
        redis_client.set(keys.worker_record(name), document)
    redis_client.set(keys.worker_drain("w1"), "1")
    fleet("drain", "--all")
    fleet("undrain", "w0", "w1", "w2")
    assert not redis_client.exists(*(keys.worker_drain(name) for name in ("w0", "w1", "w2")))


# --- forget ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three")
def test_only_what_is_offline_is_forgotten(fleet, read):
    assert "it is alive" in fleet("forget", "a-0", code=1).stdout
    assert fleet("forget", "b-0").stdout == "b-0  forgotten\n"
    assert {worker["name"] for worker in read("status")["workers"]} == {"a-0", "a-1"}
    assert "no such worker" in fleet("forget", "b-0", code=4).stdout
    fleet("forget", "b-0", "a-0", code=1)
    fleet("forget", "a b", code=2)


@pytest.mark.usefixtures("three")
def test_what_holds_jobs_is_not_forgotten_and_the_message_says_so(fleet, read, redis_client):
    redis_client.hset(keys.job("j1"), mapping={"status": "started", "fleet_lease": "1:x", "origin": "q"})
    redis_client.hset(keys.worker_leases("b-0"), mapping={"j1": "1:x 1", "gone": "2:x 1"})
    assert "1 of its jobs" in fleet("forget", "b-0", code=1).stdout
    assert read("forget", "b-0", code=1)["workers"] == [{"name": "b-0", "outcome": "leases", "jobs": 1}]
    redis_client.delete(keys.job("j1"))
    fleet("forget", "b-0")


# --- pause, resume ---------------------------------------------------------------------------------


def test_queues_are_paused_and_resumed(fleet, read, submit, redis_client):
    submit("true", options=("--queue", "a"))
    assert fleet("pause", "a").stdout.startswith("a  paused")
    fleet("pause", "a")
    assert {queue["name"]: queue["paused"] for queue in read("queues")["queues"]} == {"a": True}
    assert "paused" in fleet("queues").stdout
    assert "paused" in fleet("status").stdout
    assert "paused queues: a" in fleet("doctor", code=None).stdout
    redis_client.delete(keys.wake("a"))
    assert read("resume", "a")["queues"] == [{"name": "a", "outcome": "resumed"}]
    assert redis_client.llen(keys.wake("a")) == 1, "it rings"
    assert read("resume", "a")["queues"] == [{"name": "a", "outcome": "not_paused"}]
    assert not read("status")["queues"][0]["paused"]


def test_queues_that_are_none_are_told(fleet, read, submit):
    submit("true", options=("--queue", "a"))
    for verb in ("pause", "resume"):
        assert "no such queue" in fleet(verb, "x", code=4).stdout
        fleet(verb, "x", "a", code=3)
        fleet(verb, "a b", code=2)
        fleet(verb, code=2)
    assert read("pause", "x", code=4)["queues"] == [{"name": "x", "outcome": "not_found"}]


@pytest.mark.usefixtures("three")
def test_a_queue_that_workers_listen_on_is_paused_before_its_first_job(fleet, read):
    fleet("pause", "q")
    assert [(queue["name"], queue["paused"]) for queue in read("queues")["queues"]] == [("q", True)]
