"""`broker.Queue` beside `rq.Queue`: the same jobs, and a token with each."""

from __future__ import annotations

import copy

import pytest
import redis
import rq
from rq.job import Job, JobStatus

from broker import Queue, keys, names
from broker.errors import UsageError


def calls(client: redis.Redis) -> int:
    """Batches that Redis has read from clients, this question's own included."""
    return int(client.info("stats")["total_reads_processed"])


def test_a_job_goes_in_one_round_trip_with_its_token(redis_client: redis.Redis) -> None:
    queue = Queue(connection=redis_client)
    queue.enqueue("os.getpid")  # the first asks for the server's version
    before = calls(redis_client)
    job = queue.enqueue("os.getpid", 1, job_timeout=7)
    assert calls(redis_client) - before == 2
    assert redis_client.llen(keys.wake("default")) == 1
    stored = Job.fetch(job.id, connection=redis_client)
    assert (stored.func_name, stored.args, stored.timeout, stored.origin) == ("os.getpid", (1,), 7, "default")
    assert stored.get_status() == JobStatus.QUEUED
    assert rq.Queue.all(connection=redis_client) == [queue]


@pytest.mark.parametrize(("wrong", "right"), [("cpu", "cpus"), ("gpu", "gpus"), ("label", "labels")])
def test_what_it_does_not_take_is_refused_with_the_nearest_name(
    redis_client: redis.Redis, wrong: str, right: str
) -> None:
    with pytest.raises(UsageError, match=wrong) as caught:
        Queue("default", redis_client, **{wrong: 1})
    assert f"Did you mean {right}?" in caught.value.hint
    own = Queue("default", redis_client, default_timeout=7, serializer="json", is_async=True)
    assert own.enqueue("os.getpid").timeout == 7


def test_ids_are_uuids_that_tell_of_the_token_and_own_ids_are_kept(redis_client: redis.Redis) -> None:
    queue = Queue(connection=redis_client)
    assert names.is_rung_for(queue.enqueue("os.getpid").id.encode())
    assert queue.enqueue("os.getpid", job_id="mine").id == "mine"
    rows = [rq.Queue.prepare_data("os.getpid"), rq.Queue.prepare_data("os.getpid", job_id="theirs")]
    first, second = queue.enqueue_many(rows)
    assert names.is_rung_for(first.id.encode())
    assert second.id == "theirs"


def test_a_new_job_is_saved_without_empty_fields_and_one_of_a_chosen_id_overwrites_all(
    redis_client: redis.Redis,
) -> None:
    queue = Queue(connection=redis_client)
    [many] = queue.enqueue_many([rq.Queue.prepare_data("os.getpid")])
    for job in (queue.enqueue("os.getpid"), many):
        fields = redis_client.hgetall(keys.job(job.id))
        assert fields
        assert all(fields.values())
        stored = Job.fetch(job.id, connection=redis_client)
        assert (stored.ended_at, stored.worker_name, stored.success_callback) == (None, None, None)
        job.save()
        assert redis_client.hget(keys.job(job.id), "ended_at") == b"", "a later save is RQ's own"
    older = {"success_callback_name": "os.abort", "group_id": "g"}
    redis_client.hset(keys.job("mine"), mapping=older)
    queue.enqueue("os.getpid", job_id="mine")
    assert redis_client.hmget(keys.job("mine"), *older) == [b"", b""]
    renamed = queue.create_job("os.getpid")
    renamed.id = "ours"
    redis_client.hset(keys.job("ours"), mapping=older)
    queue.enqueue_job(renamed)
    assert redis_client.hmget(keys.job("ours"), *older) == [b"", b""]


def test_a_job_class_of_the_users_own_is_saved_as_it_says(redis_client: redis.Redis) -> None:
    class Tenants(Job):
        def to_dict(self, *args: bool, **options: bool) -> dict[str, object]:
            return {**super().to_dict(*args, **options), "tenant": ""}

    queue = Queue(connection=redis_client, job_class=Tenants)
    job = queue.enqueue("os.getpid")
    assert isinstance(job, Tenants)
    assert redis_client.hget(keys.job(job.id), "tenant") == b""
    twin = copy.copy(Queue(connection=redis_client).create_job("os.getpid"))
    assert Queue(connection=redis_client).enqueue_job(twin).id == twin.id


def test_a_job_that_waits_for_another_is_deferred_as_with_rq(redis_client: redis.Redis) -> None:
    queue = Queue(connection=redis_client)
    parent = queue.enqueue("os.getpid")
    child = queue.enqueue("os.getpid", depends_on=parent)
    assert child.get_status() == JobStatus.DEFERRED
    assert queue.get_job_ids() == [parent.id]
    assert queue.deferred_job_registry.get_job_ids() == [child.id]


def test_without_async_a_job_runs_at_once(redis_client: redis.Redis) -> None:
    job = Queue(connection=redis_client, is_async=False).enqueue("os.getpid")
    assert job.get_status() == JobStatus.FINISHED


def test_in_a_callers_pipeline_nothing_is_sent_before_it_is(redis_client: redis.Redis) -> None:
    queue = Queue(connection=redis_client)
    with redis_client.pipeline() as pipe:
        job = queue.enqueue("os.getpid", pipeline=pipe)
        assert not Job.exists(job.id, connection=redis_client)
        pipe.execute()
    assert queue.get_job_ids() == [job.id]
