"""Workers for one set of requirements alone, and when they leave."""

from __future__ import annotations

from typing import Any

import rq
from rq.job import Job

from broker import jobs, keys, sets
from broker.requirements import Requirements, parse
from broker.submit import Submission, submit_all
from tests.integration.conftest import Workers
from tests.integration.test_dependencies import TRUE

HERE = parse({"labels": ["host=here"]})


def put(workers: Workers, job_id: str, need: Requirements = HERE, **options: Any) -> Job:
    """A function of plain RQ that asks for this."""
    sets.add(workers.client, "default", need)
    queue = rq.Queue(need.queue_of("default"), connection=workers.client)
    return queue.enqueue("os.getpid", job_id=job_id, **options)


def state(workers: Workers, *ids: str) -> list[str | None]:
    return list(jobs.states(workers.client, ids).values())


def test_a_worker_for_one_set_takes_nothing_else_and_leaves_when_none_is_left(workers: Workers) -> None:
    submit_all(workers.client, [Submission(TRUE, job_id="plain")])
    put(workers, "urgent", parse({"labels": ["host=here"], "priority": "urgent"}))
    put(workers, "a"), put(workers, "b")
    worker = workers.start("w0", until_done=True, only_set=HERE.digest(), wait=False)
    assert worker.wait(60) == 0
    assert state(workers, "a", "b", "plain", "urgent") == ["finished", "finished", "queued", "queued"]


def test_it_waits_for_what_is_to_come(workers: Workers) -> None:
    submit_all(workers.client, [Submission(TRUE, job_id="plain")])
    put(workers, "a", depends_on="plain")
    worker = workers.start("w0", until_done=True, only_set=HERE.digest())
    other = workers.start("w1")
    assert worker.wait(60) == 0
    assert state(workers, "plain", "a") == ["finished", "finished"]
    assert rq.job.Job.fetch("a", connection=workers.client).worker_name in ("w0", "w1")
    workers.kill(other)


def test_one_that_does_not_satisfy_its_set_leaves(workers: Workers) -> None:
    need = parse({"labels": ["host=elsewhere"]})
    put(workers, "a", need)
    assert workers.start("w0", until_done=True, only_set=need.digest(), wait=False).wait(60) == 0
    assert state(workers, "a") == ["queued"]
    assert "started for jobs that ask for more than it has" in workers.log("w0")


def test_one_that_leaves_when_all_is_done_waits_for_what_asks_for_something(workers: Workers) -> None:
    submit_all(workers.client, [Submission(TRUE, job_id="other", queue="other")])
    put(workers, "a", depends_on="other")
    worker = workers.start("w0", until_done=True)
    workers.until(lambda: workers.client.exists(keys.CHORES), "it had time to look")
    workers.start("w1", queues=("other",))
    assert worker.wait(60) == 0
    assert state(workers, "a") == ["finished"]
