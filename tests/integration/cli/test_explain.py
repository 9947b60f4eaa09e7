"""`fleet explain`: each reason, with its numbers, of real jobs on real workers."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
import redis

from broker import Queue, keys
from broker.clock import wall
from fleet import resources

GIB = 2**30
QUICK = {"heartbeat_seconds": 1.0, "lease_seconds": 60.0}
QUIET = {"heartbeat_seconds": 5.0, "lease_seconds": 60.0}


@pytest.fixture
def why(fleet):
    """`why(job)`: what `fleet explain` says, line by line."""

    def explained(job: str) -> list[str]:
        lines = fleet("explain", job).stdout.splitlines()
        assert lines[0].startswith(f"{job} is ")
        return [line[2:] for line in lines[1:]]

    return explained


@pytest.fixture
def codes(read):
    """`codes(job)`: the codes of the reasons."""
    return lambda job: [reason["code"] for reason in read("explain", job)["reasons"]]


@pytest.fixture
def host(workers):
    """`host("w0", cpus=4, gib=8, zone="eu")`: a worker that says it has so much, and such labels."""

    def start(name: str, cpus: int = 2, gib: int = 4, slots: int = 2, **labels: str):
        resources = {"cpus": cpus, "memory_bytes": gib * GIB, "num_gpus": 0}
        return workers.start(name, resources=resources, slots=slots, labels=labels, settings=QUIET)

    return start


@pytest.fixture
def runs(submit, read, eventually):
    """`runs(["--cpus", "2"])`: a job that runs until the test ends."""

    def start(*options: str) -> str:
        job = submit("sleep", "600", options=options)
        eventually(lambda: read("show", job)["state"] == "started", message=f"{options} runs")
        return job

    return start


# --- nobody could run it ---------------------------------------------------------------------------


def test_no_worker_is_up(submit, why, host, redis_client, eventually):
    job = submit("true", options=("--queue", "q"))
    assert why(job) == ["no worker listens on queue q: 'fleet up', or 'fleet worker --queues q'"]
    host("w0").kill()
    assert why(job) == [
        "no worker listens on queue q; there are some on default: 'fleet up', or 'fleet worker --queues q'"
    ]
    redis_client.delete(keys.worker_beat("w0"))
    other = submit("true")
    assert why(other) == [
        "all 1 workers on queue default are offline: 'fleet up', or 'fleet worker --queues default'"
    ]


def test_no_worker_has_what_it_asks_for(submit, why, host, read, fleet):
    host("w0", gib=40, gpu_type="v100")
    host("w1", gib=16, gpu_type="l4")
    assert why(submit("true", options=("--label", "gpu_type=a100*"))) == [
        "no worker has gpu_type=a100*: seen are l4, v100"
    ]
    job = submit("true", options=("--label", "gpu_type=*", "--memory", "64G", "--gpus", "1"))
    assert why(job) == [
        "2 workers match the labels; the largest has 40G of the 64G asked for",
        "2 workers match the labels; the one with the most has 0 of the 1 GPU asked for",
    ]
    assert fleet("explain", job).stdout.startswith(
        f"{job} is queued in default, asks for memory=64G gpus=1 gpu_type=*\n"
    )
    document = read("explain", job)
    assert document.keys() == {"schema", "id", "state", "queue", "requirements", "reasons"}
    assert [reason["message"] for reason in document["reasons"]] == why(job)
    assert document["requirements"] == "memory=64G gpus=1 gpu_type=*"
    reason = document["reasons"][0]
    assert (reason["code"], reason["what"]) == ("no_match", "memory")
    assert (reason["asked"], reason["largest"]) == (64 * GIB, 40 * GIB)


def test_another_worker_of_its_host_has_it(workers, submit, why, read, eventually):
    """And when that one has died, it gets it, and the job."""
    first = workers.start("w0", queues=("other",), settings=QUICK)
    workers.start("w1", slots=2, settings=QUICK)
    cpus = resources.find_cpus()
    job = submit("true", options=("--cpus", "1"))
    assert why(job) == [
        "1 worker on the queue; the largest has 0 of the 1 CPU asked for",
        f"w1 would match, but {cpus} CPUs of its host are promised to w0, until that ends",
    ]
    (reason,) = [one for one in read("explain", job)["reasons"] if one["code"] == "elsewhere"]
    assert (reason["worker"], reason["workers"], reason["cpus"]) == ("w1", ["w0"], cpus)
    first.kill()
    first.wait()
    eventually(lambda: read("show", job)["state"] == "finished", message="w1 has it all, and runs the job")
    (left,) = [worker for worker in read("status")["workers"] if worker["name"] == "w1"]
    assert (left["cpus"], left["memory_bytes"]) == (cpus, resources.find_memory())
    assert (left["elsewhere"], left["free"]["cpus"]) == (None, cpus)


def test_submitting_what_no_worker_has_says_so(fleet, host):
    host("w0")
    done = fleet("submit", "--cpus", "64", "--", "true")
    job = done.stdout.strip()
    assert (
        f"No worker has what it asks for; the job waits for one. 'fleet explain {job}' tells more."
        in done.stderr
    )
    assert "No worker" not in fleet("submit", "--cpus", "1", "--", "true").stderr
    assert (
        "No worker listens on queue q" in fleet("submit", "--cpus", "1", "--queue", "q", "--", "true").stderr
    )


# --- those who could have no room ------------------------------------------------------------------


def test_all_that_match_are_busy(submit, why, host, runs, codes, eventually):
    host("w0", cpus=2, gib=8)
    runs("--cpus", "1", "--memory", "5G")
    job = submit("true", options=("--cpus", "1", "--memory", "4G"))
    busy = "1 worker matches, all busy; the largest has 3G free of the 4G asked for"
    eventually(lambda: why(job) == [busy], message="the heartbeat has told what is free")
    runs("--cpus", "1")
    full = "1 worker matches, all busy: none of their 2 slots is free"
    eventually(lambda: why(job) == [full], message="the heartbeat has told what is free")
    small = submit("true")
    assert why(small) == [full]
    assert codes(small) == ["busy"]


def test_others_come_first(submit, why, host, runs):
    host("w0", slots=1)
    runs()
    first = submit("true", options=("--priority", "high"))
    second = submit("true", options=("--priority", "high"))
    plain, last = submit("true"), submit("true")
    assert why(first)[1:] == []
    assert why(second)[1:] == ["1 that ask for the same came before it"]
    assert why(plain)[1:] == ["2 of its queue have a higher priority"]
    assert why(last)[1:] == [
        "1 that ask for the same came before it",
        "2 of its queue have a higher priority",
    ]


def test_room_is_told_with_the_age_of_the_news(submit, why, host, fleet):
    host("w0")
    fleet("pause", "default")
    job = submit("true")
    turn = "it starts when its turn comes"
    assert re.fullmatch(
        rf"there is room for it on w0 \(by its last heartbeat, \d+ s ago\): {turn}", why(job)[-1]
    )
    host("w1")
    news = r"\(by their last heartbeats, \d+ s ago at most\)"
    assert re.fullmatch(rf"there is room for it on w0, w1 {news}: {turn}", why(job)[-1])


def test_room_is_held(submit, why, host, runs, redis_client):
    host("w0", cpus=2)
    runs("--cpus", "1")
    big, small = (submit("true", options=("--cpus", count)) for count in ("2", "1.5"))
    queue = Queue("default", connection=redis_client, cpus=2).name
    redis_client.zadd(keys.of("reserved", queue), {"w0": 4e12})
    assert why(big)[-1] == "w0 holds room for the first of those that ask for the same"
    assert why(small)[-1] == f"w0 holds room for the first of {queue}"


def test_room_that_is_held_is_not_called_room_for_others(
    submit, why, workers, runs, redis_client, eventually
):
    resources = {"cpus": 4, "memory_bytes": 4 * GIB, "num_gpus": 3}
    workers.start("w0", resources=resources, slots=8, settings=QUIET | {"reserve_after_seconds": 0.1})
    runs("--memory", "3G")
    submit("true", options=("--memory", "2G", "--gpus", "1", "--cpus", "2"))
    held = Queue("default", connection=redis_client, memory="2G", gpus=1, cpus=2).name
    eventually(
        lambda: redis_client.zrange(keys.of("reserved", held), 0, -1) == [b"w0"], message="room is held"
    )
    runs("--gpus", "1")
    assert why(submit("true", options=("--cpus", "3"))) == [f"w0 holds room for the first of {held}"], (
        "four CPUs are free, two of them held"
    )


def test_those_that_match_drain_or_are_silent(submit, why, host, fleet, codes, redis_client, eventually):
    host("w0", zone="eu")
    host("w1", zone="eu")
    fleet("drain", "--all")
    job = submit("true", options=("--label", "zone=eu"))
    assert why(job) == ["of 2 that match 2 take nothing new: w0, w1"]
    assert codes(job) == ["draining"]


# --- it is held back -------------------------------------------------------------------------------


def test_a_paused_queue_and_suspended_workers(submit, why, host, fleet, redis_client):
    host("w0")
    fleet("pause", "default")
    plain, asks = submit("true"), submit("true", options=("--cpus", "1"))
    for job in (plain, asks):
        assert why(job)[0] == "queue default is paused: 'fleet resume default' lets it go on"
    redis_client.set(keys.SUSPENDED, 1)
    assert why(plain)[0] == "all workers are suspended: 'rq resume' lets them go on"


def test_jobs_that_it_waits_for(submit, why, codes, fleet, redis_client):
    first, second = submit("true"), submit("true")
    child = submit(
        "true", options=("--after", first, "--after-any", second, "--on-failed-dependency", "wait")
    )
    assert sorted(why(child)) == sorted(
        [f"it waits for {first}, which is queued", f"it waits for {second}, which is queued"]
    )
    assert codes(child) == ["dependency", "dependency"]
    fleet("cancel", first)
    assert f"it waits for {first} to finish, which was canceled: 'fleet retry {first}'" in why(child)
    redis_client.delete(keys.job(first))
    assert f"it waits for {first}, which is gone: nothing will start it, 'fleet cancel' ends it" in why(child)


def test_a_time_that_it_waits_for(why, codes, host, redis_client):
    queue = Queue("default", connection=redis_client)
    job = queue.enqueue_at(wall() + timedelta(hours=2, seconds=45), "os.getpid").id
    waits, nobody = why(job)
    assert waits.startswith("it is to run at 20")
    assert waits.endswith(" UTC, in 2h00m")
    assert nobody == "no worker is up, and only workers queue what is due: 'fleet up', 'fleet worker'"
    assert codes(job) == ["time", "no_worker"]


def test_what_is_broken_is_called_so(submit, why, redis_client):
    lost = submit("true")
    redis_client.delete(keys.queue("default"))
    assert why(lost) == ["it is called queued, yet stands in no list: 'fleet doctor' looks into it"]
    asks = submit("true", options=("--cpus", "1"))
    redis_client.delete(keys.sets("default"))
    (reason,) = why(asks)
    assert reason.startswith("nobody knows what jobs of default@")


# --- it runs, or has ended -------------------------------------------------------------------------


def test_a_job_that_runs(why, codes, host, runs, redis_client):
    process = host("w0")
    job = runs()
    (reason,) = why(job)
    assert reason.startswith("it runs on w0 since 20")
    assert reason.endswith(" UTC, attempt 1")
    process.kill()
    redis_client.delete(keys.worker_beat("w0"))
    (reason,) = why(job)
    assert reason.startswith("it was started on w0, which has been silent")
    assert codes(job) == ["silent"]


def test_a_job_that_has_ended(submit, why, burst, fleet):
    good, bad = submit("true"), submit("sh", "-c", "exit 3", options=("--cpus", "1"))
    canceled = submit("true", options=("--queue", "q"))
    fleet("cancel", canceled)
    burst()
    (finished,), (failed,), (gone,) = why(good), why(bad), why(canceled)
    assert finished.startswith("it finished on w0 at 20")
    assert "it failed on w0 at 20" in failed
    assert failed.endswith(f": exit code 3; 'fleet retry {bad}' runs it again")
    assert gone.startswith("it was canceled")


def test_sizes_that_differ_little_are_told_exactly(submit, why, host):
    host("w0", gib=1)
    (reason,) = why(submit("true", options=("--memory", "1025M")))
    assert "1G of the 1025M asked for" in reason


def test_a_job_that_is_not_there(fault):
    assert fault("explain", "nobody", code=4)["code"] == "not_found"


def test_an_unreadable_set_of_a_newer_producer(submit, why, redis_client: redis.Redis):
    job = submit("true", options=("--cpus", "1"))
    digest = Queue("default", connection=redis_client, cpus=1).requirements.digest()
    redis_client.hset(keys.sets("default"), digest, '{"colour":"red"}')
    (reason,) = why(job)
    assert reason.startswith("nobody knows what jobs of default@")
