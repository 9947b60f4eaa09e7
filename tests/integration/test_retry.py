"""`control.retry`: jobs run again under their ids, each in exactly one place, whoever else has a hand in."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import rq
from rq.exceptions import InvalidJobOperation

from broker import control, jobs, keys
from broker.connection import connect
from tests.integration.conftest import HASTY, Workers

_REGISTRIES = ("finished", "failed", "deferred", "scheduled", "canceled")


def retry(workers: Workers, *ids: str) -> list[str]:
    return [outcome for _, outcome in control.retry(workers.client, ids)]


def places(client: redis.Redis, job_id: str, queue: str = "default") -> list[str]:
    """Every place in which a job is: exactly one, or it is lost, or there twice."""
    key = keys.queue(queue)
    waiting = client.lrange(key, 0, -1).count(job_id.encode()) if client.type(key) == b"list" else 0
    held = [kind for kind in _REGISTRIES if client.zscore(keys.of(kind, queue), job_id) is not None]
    leased = ["leased"] if client.zscore(keys.LEASES, job_id) is not None else []
    return ["queued"] * waiting + held + leased


@pytest.fixture
def fail(workers: Workers) -> Callable[..., str]:
    """`fail()`: a job that has failed; it would finish once the file `mended` is there."""

    def one(**options: Any) -> str:
        workers.start("w0")
        job = workers.submit("sh", "-c", f"echo x >> {workers.folder}/ran; test -e {mended}", **options)
        assert workers.wait([job])[0].state == "failed"
        return job

    mended = workers.folder / "mended"
    return one


# --- one job ---------------------------------------------------------------------------------------


def test_a_failed_job_runs_again_under_its_id_with_its_history(workers, fail):
    job = fail()
    (workers.folder / "mended").touch()
    assert retry(workers, job) == ["retried"]
    (shown,) = workers.wait([job])
    assert (shown.state, shown.exit_code, shown.reason) == ("finished", 0, None)
    assert [attempt.outcome for attempt in shown.attempts] == ["failed", "finished"]
    assert places(workers.client, job) == ["finished"]
    assert workers.client.ttl(keys.job(job)) > 6 * 86400, "kept as any job that has ended"
    workers.assert_clean()


def test_a_job_that_waits_again_shows_nothing_of_its_last_end(workers, fail):
    job = fail()
    control.pause(workers.client, "default")
    assert retry(workers, job) == ["retried"]
    shown = jobs.show(workers.client, job)
    assert (shown.state, shown.exit_code, shown.reason) == ("queued", None, None)
    assert (shown.started_at, shown.ended_at) == (None, None)
    assert workers.client.ttl(keys.job(job)) == -1, "a job that waits does not expire"
    assert places(workers.client, job) == ["queued"]


def test_it_has_all_its_retries_again(workers, fail):
    job = fail(retries=2, retry_delay_seconds=0)
    for round_number in (1, 2):
        assert len((workers.folder / "ran").read_text().split()) == 3 * round_number
        assert retry(workers, job) == ["retried"]
        workers.wait([job])
    assert len((workers.folder / "ran").read_text().split()) == 9


@pytest.mark.parametrize("how", [{}, {"retry": rq.Retry(max=2)}, {"retry": rq.Retry(max=2, interval=[0])}])
def test_so_has_a_job_of_rq(workers, how):
    workers.start("w0")
    path = workers.folder / "tried"
    job = rq.Queue(connection=workers.client).enqueue("rq_jobs.fail_until", str(path), 100, **how)
    tries = 3 if how else 1
    for round_number in (1, 2):
        assert workers.wait([job.id])[0].state == "failed"
        assert len(path.read_text().split()) == tries * round_number
        assert retry(workers, job.id) == ["retried"]
    workers.wait([job.id])
    job.refresh()
    assert (job.get_status(), job.retries_left) == ("failed", 0 if how else None)


def test_it_has_all_its_losses_again(workers):
    worker = workers.start("w0", settings=HASTY | {"losses_limit": 0})
    job = workers.submit("sleep", "600")
    workers.until(lambda: workers.state(job) == "started")
    workers.kill(worker)
    workers.start("w1", settings=HASTY | {"losses_limit": 0})
    assert "WorkerLost" in workers.wait([job])[0].reason
    assert retry(workers, job) == ["retried"]
    workers.until(lambda: workers.state(job) == "started")
    assert not workers.client.hexists(keys.job(job), "fleet_losses")


def test_what_was_stopped_or_canceled_runs_again(workers):
    job = workers.submit("sh", "-c", f"test -e {workers.folder}/go || sleep 600")
    assert control.cancel(workers.client, job) == "canceled"
    workers.start("w0")
    assert retry(workers, job) == ["retried"]
    workers.until(lambda: workers.state(job) == "started")
    assert control.cancel(workers.client, job) == "stopping"
    assert workers.wait([job])[0].state == "stopped"
    (workers.folder / "go").touch()
    assert retry(workers, job) == ["retried"]
    assert workers.wait([job])[0].state == "finished"
    assert places(workers.client, job) == ["finished"]


def test_what_has_not_failed_is_left_alone(workers):
    queued = workers.submit("true")
    control.pause(workers.client, "default")
    scheduled = workers.submit("false", queue="other", retries=1, retry_delay_seconds=100)
    finished, running = workers.submit_many([["true"], ["sleep", "600"]], "other")
    workers.start("w0", queues=("default", "other"))
    workers.until(lambda: workers.state(running) == "started" and workers.state(finished) == "finished")
    before = [jobs.show(workers.client, job) for job in (queued, scheduled, finished, running)]
    states = [shown.state for shown in before]
    assert states == ["queued", "scheduled", "finished", "started"]
    assert retry(workers, queued, scheduled, finished, running, "nope") == [*states, "not_found"]
    assert [jobs.show(workers.client, job) for job in (queued, scheduled, finished, running)] == before


def test_a_job_that_a_client_of_rq_canceled_waits_until_its_worker_has_ended_it(workers):
    workers.start("w0")
    job = workers.submit("sh", "-c", f"echo x >> {workers.folder}/ran; sleep 600")
    workers.until((workers.folder / "ran").exists)
    rq.job.Job.fetch(job, connection=workers.client).cancel()
    assert retry(workers, job) == ["stopping"]
    workers.until(lambda: retry(workers, job) == ["retried"], "once the worker has heard of it")
    workers.until(lambda: len((workers.folder / "ran").read_text().split()) == 2, "it runs again")
    control.cancel(workers.client, job)
    workers.wait([job])
    workers.assert_clean()


# --- dependents ------------------------------------------------------------------------------------


def test_dependents_start_when_the_retried_job_finishes(workers):
    workers.start("w0")
    queue = rq.Queue(connection=workers.client)
    path = workers.folder / "tried"
    parent = queue.enqueue("rq_jobs.fail_until", str(path), 2)
    child = queue.enqueue("operator.add", 1, 2, depends_on=parent)
    assert workers.wait([parent.id])[0].state == "failed"
    assert places(workers.client, child.id) == ["deferred"]
    assert workers.client.ttl(keys.of("dependents", parent.id)) > 0
    assert retry(workers, parent.id) == ["retried"]
    assert [job.state for job in workers.wait([parent.id, child.id])] == ["finished", "finished"]


@pytest.mark.parametrize("hand", ["ours", "rq's", "rq's, thorough"])
def test_a_dependent_that_was_canceled_waits_again_for_what_it_depends_on(workers, hand):
    queue = rq.Queue(connection=workers.client)
    gate = workers.folder / "gate"
    parent = queue.enqueue("rq_jobs.note_and_wait", str(workers.folder / "ran"), "parent", str(gate))
    child = queue.enqueue("rq_jobs.note", str(workers.folder / "ran"), "child", depends_on=parent)
    if hand == "ours":
        control.cancel(workers.client, child.id)
    else:
        child.cancel(remove_from_dependencies=hand.endswith("thorough"))
    workers.start("w0", slots=2)
    workers.until(lambda: workers.state(parent.id) == "started")
    assert retry(workers, child.id) == ["retried"]
    assert places(workers.client, child.id) == ["deferred"]
    gate.touch()
    workers.wait([parent.id, child.id])
    assert (workers.folder / "ran").read_text().split() == ["parent", "child"]


# --- many, and in a crowd --------------------------------------------------------------------------


def failed_at_once(workers: Workers, count: int) -> list[str]:
    """So many failed jobs, as the end of an attempt leaves them."""
    ids = workers.submit_many([["true"]] * count)
    with workers.client.pipeline(transaction=False) as pipe:
        pipe.delete(keys.queue("default"), keys.wake("default"))
        for job in ids:
            pipe.hset(keys.job(job), "status", "failed")
            pipe.zadd(keys.of("failed", "default"), {job: 2e9})
        pipe.execute()
    return ids


def test_thousands_are_retried_in_a_moment_and_in_order(workers):
    ids = failed_at_once(workers, 5000)
    for number, job in enumerate(ids):
        workers.client.zadd(keys.of("failed", "default"), {job: 2e9 + number})

    def calls() -> int:
        return int(workers.client.info("commandstats")["cmdstat_evalsha"]["calls"])

    retry(workers, "nope")  # Redis knows the scripts
    before = calls()
    done = [job for job, outcome in control.retry(workers.client, jobs.failed_ids(workers.client))]
    assert done == ids
    assert [job.decode() for job in workers.client.lrange(keys.queue("default"), 0, -1)] == ids
    assert workers.client.zcard(keys.of("failed", "default")) == 0
    assert 50 <= calls() - before <= 51, "in batches: no step holds up everybody for long"


def test_damage_to_one_does_not_keep_the_others_from_being_retried(workers):
    ids = failed_at_once(workers, 6)
    client = workers.client
    client.delete(keys.job(ids[0]))
    client.delete(keys.job(ids[1]))
    client.set(keys.job(ids[1]), "text")
    client.hset(keys.job(ids[2]), "origin", "odd")
    client.set(keys.queue("odd"), "text")
    client.zadd(keys.of("failed", "odd"), {ids[2]: 1})
    client.hset(keys.job(ids[3]), mapping={"fleet_retries": "x", "ttl": "x", "fleet_lease": "x"})
    client.set(keys.of("dependencies", ids[4]), "text")
    outcomes = retry(workers, *ids)
    assert outcomes == ["not_found", "not_found", *["retried"] * 4]
    assert places(client, ids[2], "odd") == ["scheduled"], "until its queue is mended"
    assert places(client, ids[5]) == ["queued"]


def crowd(url: str, hands: list[Callable[[redis.Redis], Any]]) -> None:
    """All at once, each on a connection of its own."""
    start = threading.Barrier(len(hands))
    errors: list[BaseException] = []

    def run(hand: Callable[[redis.Redis], Any]) -> None:
        with connect(url) as client:
            start.wait()
            try:
                hand(client)
            except BaseException as exc:
                errors.append(exc)

    threads = [threading.Thread(target=run, args=(hand,)) for hand in hands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_a_crowd_of_retries_requeues_and_cancels_leaves_each_job_in_one_place(workers):
    ids = failed_at_once(workers, 200)
    queued: list[str] = []

    def retry_all(client: redis.Redis) -> None:
        queued.extend(job for job, outcome in control.retry(client, ids) if outcome == "retried")

    def requeue_all(client: redis.Redis) -> None:
        registry = rq.registry.FailedJobRegistry("default", connection=client)
        for job in reversed(ids):
            try:
                registry.requeue(job)
                queued.append(job)
            except InvalidJobOperation:
                continue

    def cancel_all(client: redis.Redis) -> None:
        for job in ids[::3]:
            control.cancel(client, job)

    crowd(workers.url, [retry_all, requeue_all, cancel_all, retry_all, requeue_all])
    for job in ids:
        (place,) = places(workers.client, job)
        assert place == workers.state(job)
        assert place in ("queued", "canceled")
    assert set(queued) == set(ids)


def test_rq_requeue_and_ours_run_a_job_once_between_them(workers):
    ids = failed_at_once(workers, 100)
    workers.start("w0", slots=2)
    program = str(Path(sys.executable).parent / "rq")
    others = subprocess.Popen(
        [program, "requeue", "--queue", "default", "--all", "--url", workers.url], stdout=subprocess.DEVNULL
    )
    retry(workers, *ids)
    assert others.wait(60) == 0
    shown = workers.wait(ids)
    assert {job.state for job in shown} == {"finished"}
    outcomes = [[one.outcome for one in job.attempts if one.outcome != "handed-back"] for job in shown]
    assert outcomes == [["finished"]] * len(ids)
    workers.assert_clean()
