"""A fleet of four, fed by a program that knows only `redis` and `rq`, and watched by RQ's own tools."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rq

from broker import status
from tests.integration.conftest import Workers

#: a producer as people have them: not one import of ours
PRODUCER = """
import json, sys
import redis, rq
queue = rq.Queue("default", connection=redis.Redis.from_url(sys.argv[1]))
print(json.dumps([queue.enqueue("rq_jobs.add", number, 1).id for number in range(1000)]))
"""


def test_a_thousand_commands_and_a_thousand_plain_rq_functions(workers: Workers, redis_url: str) -> None:
    for number in range(4):
        workers.start(f"w{number}", settings={"heartbeat_seconds": 10, "lease_seconds": 30})
    producer = subprocess.Popen(
        [sys.executable, "-I", "-c", PRODUCER, redis_url], stdout=subprocess.PIPE, text=True
    )
    commands = workers.submit_many([("sh", "-c", f"exit {number % 2}") for number in range(1000)])
    functions = json.loads(producer.communicate(timeout=150)[0])
    shown = workers.wait([*commands, *functions], 100)
    states = [job.state for job in shown]
    assert states == ["finished", "failed"] * 500 + ["finished"] * 1000
    values = [rq.job.Job.fetch(job, connection=workers.client).return_value() for job in functions]
    assert values == [number + 1 for number in range(1000)]
    info = subprocess.run(
        [Path(sys.executable).parent / "rq", "info", "--url", redis_url, "--raw"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "queue default 0, 0 executing, 1500 finished, 500 failed" in info
    ours = status.read(workers.client)
    assert sum(worker.finished for worker in ours.workers) == 1500
    for worker in ours.workers:
        line = f"idle default. jobs: {worker.finished} finished, {worker.failed} failed"
        assert any(row.startswith(f"worker {worker.name} ") and line in row for row in info.splitlines())
    workers.assert_clean()


@pytest.mark.parametrize("producer", ["rq", "broker"])
def test_an_idle_worker_starts_a_job_at_once_whoever_enqueued_it(workers: Workers, producer: str) -> None:
    from broker import Queue

    workers.start("w0", slots=2)
    make = rq.Queue if producer == "rq" else Queue
    queue = make("default", connection=workers.client)
    warm_up = queue.enqueue("rq_jobs.add", 1, 1)
    workers.wait([warm_up.id])
    latencies = []
    for _ in range(20):
        started = time.monotonic()
        job = queue.enqueue("rq_jobs.add", 1, 1)
        workers.until(lambda job=job: job.get_status() == "finished", "it ran")
        latencies.append(time.monotonic() - started)
    # far below any interval of polling or beating; the poll of `until` itself is 10-50 ms
    assert sorted(latencies)[4] < 0.25, latencies


def test_broker_queue_takes_commands_beside_functions(workers: Workers) -> None:
    from broker import Queue

    queue = Queue("default", connection=workers.client)
    command = queue.submit(["sh", "-c", "echo $GREETING"], env={"GREETING": "hello"}, timeout_seconds=10)
    function = queue.enqueue("rq_jobs.add", 2, 2)
    workers.start("w0", burst=True, wait=False)
    shown = workers.wait([command, function.id])
    assert [job.state for job in shown] == ["finished", "finished"]


def test_a_plain_rq_client_reads_deletes_and_requeues_commands(workers: Workers) -> None:
    failed = workers.submit("false")
    other = workers.submit("true")
    workers.start("w0")
    workers.wait([failed, other])
    job = rq.job.Job.fetch(failed, connection=workers.client)
    assert (job.get_status(), job.description, job.return_value()) == ("failed", "false", None)
    assert job.latest_result().exc_string == "exit code 1"
    queue = rq.Queue("default", connection=workers.client)
    assert queue.failed_job_registry.get_job_ids() == [failed]
    job.requeue()
    workers.until(lambda: len(jobs_attempts(workers, failed)) == 2, "it ran again")
    rq.job.Job.fetch(other, connection=workers.client).delete()
    assert workers.state(other) is None


def jobs_attempts(workers: Workers, job_id: str) -> list[str | None]:
    from broker import jobs

    return [attempt.outcome for attempt in jobs.show(workers.client, job_id).attempts]
