"""Jobs that ask for something of their worker: which list they go to, by whatever way they come."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
import redis
import rq
from rq.job import Job, JobStatus

from broker import Queue, control, jobs, keys, sets, status
from broker.command import Command
from broker.errors import UsageError
from broker.requirements import parse
from broker.submit import Options, Submission, submit_all
from tests.integration import rq_jobs

BIG = {"cpus": 2, "memory": "4G", "gpus": 1, "labels": {"gpu_type": "a100*"}, "priority": "high"}
NEED = parse(BIG)
LIST = NEED.queue_of("default")
READABLE = "cpus=2 memory=4G gpus=1 gpu_type=a100* priority=high"


def known(client: redis.Redis) -> dict[str, object]:
    """The sets of the queue `default` that workers would learn of."""
    return dict(sets.known(client, ["default"]).sets["default"])


@pytest.fixture
def queue(redis_client: redis.Redis) -> Queue:
    return Queue("default", connection=redis_client, **BIG)


# --- fleet submit, and what it calls ---------------------------------------------------------------


def test_a_command_goes_to_the_list_of_its_set_in_one_step(redis_client: redis.Redis) -> None:
    with redis_client.pubsub() as heard:
        heard.subscribe(keys.NEWS)
        assert heard.get_message(timeout=60)["type"] == "subscribe"
        rows = [
            Submission(Command(("true",)), Options(requirements=NEED)),
            Submission(Command(("true",)), Options()),
            Submission(Command(("true",)), Options(requirements=NEED, name="big")),
        ]
        first, plain, last = (job.id for job in submit_all(redis_client, rows))
        news = json.loads(heard.get_message(timeout=60)["data"])
        assert heard.get_message(timeout=0.01) is None, "a set is told of once"
    assert sets.news(news).need == NEED
    assert known(redis_client) == {NEED.digest(): NEED}
    assert redis_client.lrange(keys.queue(LIST), 0, -1) == [first.encode(), last.encode()]
    assert redis_client.lrange(keys.queue("default"), 0, -1) == [plain.encode()]
    assert redis_client.zrange(keys.heads("default", 10), 0, -1) == [NEED.digest().encode()]
    assert redis_client.llen(keys.wake(LIST)) == redis_client.llen(keys.wake("default")) == 1
    assert {entry.decode() for entry in redis_client.smembers(keys.QUEUES)} == {
        keys.queue("default"),
        keys.queue(LIST),
    }


def test_what_a_job_asks_for_stands_beside_its_name(redis_client: redis.Redis) -> None:
    rows = [
        Submission(Command(("true",)), Options(requirements=NEED, name="train [fast]")),
        Submission(Command(("[", "x", "]")), Options()),
    ]
    big, plain = (job.id for job in submit_all(redis_client, rows))
    assert Job.fetch(big, connection=redis_client).description == f"train [fast] [{READABLE}]"
    shown = jobs.show(redis_client, big)
    assert (shown.name, shown.requirements, shown.queue) == ("train [fast]", READABLE, LIST)
    assert (jobs.show(redis_client, plain).name, jobs.show(redis_client, plain).requirements) == ("[ x ]", "")
    assert [job.id for job in jobs.listed(redis_client, name="train [[]fast]")] == [big]
    assert {job.id for job in jobs.listed(redis_client, queue="default")} == {big, plain}


def test_a_submission_that_is_refused_makes_no_set_known(redis_client: redis.Redis) -> None:
    row = Submission(Command(("true",)), Options(requirements=NEED, after=("nobody",)))
    with pytest.raises(Exception, match="no job nobody"):
        submit_all(redis_client, [row])
    assert known(redis_client) == {}
    assert not redis_client.exists(keys.SETS_VERSION)


def test_one_that_waits_for_another_has_its_set_known_and_comes_to_its_list(
    redis_client: redis.Redis,
) -> None:
    (parent,) = submit_all(redis_client, [Submission(Command(("true",)))])
    options = Options(requirements=NEED, after=(parent.id,))
    (child,) = submit_all(redis_client, [Submission(Command(("true",)), options)])
    assert child.state == "deferred"
    assert known(redis_client) == {NEED.digest(): NEED}
    assert redis_client.zrange(keys.of("deferred", LIST), 0, -1) == [child.id.encode()]
    assert not redis_client.exists(keys.queue(LIST))


def test_lists_of_a_queue_are_shown_with_what_their_jobs_ask_for(
    redis_client: redis.Redis, queue: Queue
) -> None:
    queue.enqueue("os.getpid")
    Queue("default", connection=redis_client).enqueue("os.getpid")
    found = {row.name: row for row in status.read_queues(redis_client)}
    assert {name: (row.queued, row.requirements) for name, row in found.items()} == {
        "default": (1, ""),
        LIST: (1, READABLE),
    }
    control.pause(redis_client, "default")
    assert all(row.paused for row in status.read_queues(redis_client))


# --- broker.Queue ----------------------------------------------------------------------------------


def test_a_queue_with_requirements_is_an_rq_queue_of_that_list(
    redis_client: redis.Redis, queue: Queue
) -> None:
    assert isinstance(queue, rq.Queue)
    assert (queue.name, queue.base) == (LIST, "default")
    assert not redis_client.exists(keys.sets("default")), "nothing is written before there is a job"
    job = queue.enqueue(rq_jobs.add, 1, 2)
    assert (job.origin, job.get_status()) == (LIST, JobStatus.QUEUED)
    assert job.description == f"tests.integration.rq_jobs.add(1, 2) [{READABLE}]"
    assert rq.Queue(LIST, connection=redis_client).get_job_ids() == [job.id]
    assert known(redis_client) == {NEED.digest(): NEED}
    assert redis_client.zrange(keys.heads("default", 10), 0, -1) == [NEED.digest().encode()]
    assert redis_client.llen(keys.wake(LIST)) == 1


@pytest.mark.parametrize("way", ["submit", "at", "in", "many", "dependent", "job", "schedule", "pipeline"])
def test_whatever_way_a_job_comes_its_set_is_known(redis_client: redis.Redis, queue: Queue, way: str) -> None:
    plain = Queue("default", connection=redis_client)
    parent = plain.enqueue("os.getpid")
    later = datetime.now(UTC) + timedelta(hours=1)
    if way == "submit":
        job = Job.fetch(queue.submit(["true"]), connection=redis_client)
    elif way == "at":
        job = queue.enqueue_at(later, "os.getpid")
    elif way == "in":
        job = queue.enqueue_in(timedelta(hours=1), "os.getpid")
    elif way == "many":
        job = queue.enqueue_many([rq.Queue.prepare_data("os.getpid")])[0]
    elif way == "dependent":
        job = queue.enqueue("os.getpid", depends_on=parent)
    elif way == "job":
        job = queue.enqueue_job(Job.create("os.getpid", connection=redis_client))
    elif way == "schedule":
        job = queue.schedule_job(Job.create("os.getpid", connection=redis_client, origin=LIST), later)
    else:
        with redis_client.pipeline() as pipe:
            job = queue.enqueue("os.getpid", pipeline=pipe)
            pipe.execute()
    assert job.origin == LIST
    assert known(redis_client) == {NEED.digest(): NEED}


def test_a_set_that_was_removed_meanwhile_is_written_anew(
    redis_client: redis.Redis, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.enqueue("os.getpid")
    redis_client.delete(keys.sets("default"))
    monkeypatch.setattr("broker.queue._KNOWN_SECONDS", 0.0)
    queue.enqueue("os.getpid")
    assert known(redis_client) == {NEED.digest(): NEED}


def test_what_is_asked_for_in_other_words_is_the_same_queue(redis_client: redis.Redis) -> None:
    words = {"cpus": "2.0", "memory": 4 << 30, "gpus": 1.0, "labels": ["gpu_type=a100*"], "priority": 10}
    assert Queue("default", connection=redis_client, **words).name == LIST
    assert Queue("default", redis_client, cpus=None, priority="normal").name == "default"


@pytest.mark.parametrize("asked", [{"cpus": -1}, {"memory": "4"}, {"priority": "soon"}, {"labels": "x"}])
def test_what_cannot_be_asked_for_is_refused(redis_client: redis.Redis, asked: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Queue("default", connection=redis_client, **asked)


def test_a_list_is_no_queue_to_ask_in(redis_client: redis.Redis) -> None:
    with pytest.raises(UsageError):
        Queue(LIST, connection=redis_client, cpus=1)
    assert Queue(LIST, connection=redis_client).name == LIST, "RQ makes queues of names that it finds"


# --- run again -------------------------------------------------------------------------------------


def fail(client: redis.Redis, job_id: str) -> None:
    """As if it had failed on a worker."""
    client.lrem(keys.queue(LIST), 0, job_id)
    client.hset(keys.job(job_id), "status", "failed")
    client.zadd(keys.of("failed", LIST), {job_id: 9e9})


def test_a_job_that_is_run_again_keeps_what_it_asked_for(redis_client: redis.Redis, queue: Queue) -> None:
    first, second = queue.enqueue("os.getpid").id, queue.submit(["true"])
    for job_id in (first, second):
        fail(redis_client, job_id)
    assert set(jobs.failed_ids(redis_client, "default")) == {first, second}
    assert dict(control.retry(redis_client, [second])) == {second: "retried"}
    Job.fetch(first, connection=redis_client).requeue()
    assert redis_client.lrange(keys.queue(LIST), 0, -1) == [second.encode(), first.encode()]
    assert redis_client.zscore(keys.heads("default", 10), NEED.digest()) is not None
    assert jobs.show(redis_client, first).requirements == READABLE


# --- a worker --------------------------------------------------------------------------------------


def test_a_worker_that_satisfies_a_set_runs_its_jobs_and_another_does_not(
    redis_client: redis.Redis, workers, eventually
) -> None:
    asked = {"cpus": 1, "labels": {"zone": "e*"}, "priority": "high"}
    queue = Queue("default", connection=redis_client, **asked)
    workers.start("us", labels={"zone": "us"}, resources={"cpus": 2})
    here = workers.start("eu", labels={"zone": "eu"}, resources={"cpus": 2})
    assert here.poll() is None
    ids = [queue.submit(["true"]) for _ in range(3)] + [queue.enqueue(rq_jobs.add, 1, 2).id]
    eventually(lambda: all(jobs.show(redis_client, job_id).state == "finished" for job_id in ids))
    assert {jobs.show(redis_client, job_id).worker for job_id in ids} == {"eu"}


def test_a_dependent_of_rqs_starts_on_a_worker_of_its_set(
    redis_client: redis.Redis, workers, eventually
) -> None:
    workers.start("eu", labels={"zone": "eu"})
    parent = rq.Queue("default", connection=redis_client).enqueue(rq_jobs.add, 1, 2)
    child = Queue("default", connection=redis_client, labels=["zone=eu"]).enqueue(
        rq_jobs.add, 3, 4, depends_on=parent
    )
    eventually(lambda: child.get_status(refresh=True) == JobStatus.FINISHED)


def test_a_job_in_time_starts_on_a_worker_of_its_set(redis_client: redis.Redis, workers, eventually) -> None:
    workers.start("eu", labels={"zone": "eu"})
    queue = Queue("default", connection=redis_client, labels=["zone=eu"])
    job = queue.enqueue_in(timedelta(seconds=0.2), rq_jobs.add, 3, 4)
    eventually(lambda: job.get_status(refresh=True) == JobStatus.FINISHED)
