"""Commands that wait for other jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
import rq

from broker import chores, control, jobs, keys
from broker.command import Command
from broker.errors import Conflict, NotFound
from broker.submit import Options, Submission, submit_all, submit_together
from tests.integration.conftest import Workers
from tests.integration.test_claims import claim, session

TRUE, FALSE = Command(("true",)), Command(("false",))


@pytest.fixture
def client(redis_client: redis.Redis) -> redis.Redis:
    return redis_client


def put(client: redis.Redis, job_id: str, *after: str, command: Command = TRUE, **options) -> str:
    """Submit one command of that id; returns its state."""
    options["after"] = tuple(after)
    row = Submission(command, Options(**options), job_id=job_id)
    return submit_all(client, [row])[0].state


def state(client, *ids: str) -> list[str | None]:
    return list(jobs.states(client, ids).values())


def reason(client, job_id: str) -> str | None:
    return jobs.show(client, job_id).reason


def test_a_job_waits_until_the_others_have_finished(workers: Workers) -> None:
    client = workers.client
    put(client, "a"), put(client, "b")
    assert put(client, "c", "a", "b") == "deferred"
    assert put(client, "d", "c") == "deferred"
    assert "c" in rq.Queue(connection=client).deferred_job_registry
    assert rq.job.Job.fetch("c", connection=client)._dependency_ids == ["a", "b"]
    workers.start("w0")
    assert [job.state for job in workers.wait(["a", "b", "c", "d"])] == ["finished"] * 4
    assert put(client, "e", "a", "d") == "queued"
    a, b, c, d = (jobs.show(client, job) for job in "abcd")
    assert max(a.ended_at, b.ended_at) <= c.started_at
    assert c.ended_at <= d.started_at


def test_those_that_wait_for_a_failure_fail_at_once_and_theirs(workers: Workers) -> None:
    client = workers.client
    put(client, "a", command=FALSE)
    put(client, "b", "a"), put(client, "c", "b"), put(client, "other")
    put(client, "patient", "a", on_failed_dependency="wait")
    put(client, "any", after_any=("c",))
    workers.start("w0")
    workers.wait(["a", "b", "c", "any"])
    assert state(client, "a", "b", "c", "patient", "any") == [
        "failed",
        "failed",
        "failed",
        "deferred",
        "finished",
    ]
    assert [reason(client, job) for job in "bc"] == ["dependency a failed", "dependency b failed"]
    assert rq.Queue(connection=client).failed_job_registry.get_job_ids() == ["a", "b", "c"]
    assert put(client, "d", "a") == "failed"
    assert put(client, "e", "a", on_failed_dependency="wait") == "deferred"
    assert put(client, "f", after_any=("a",)) == "queued"


def test_nothing_is_in_where_one_of_them_cannot_be(client: redis.Redis) -> None:
    with pytest.raises(NotFound, match="no job nobody to wait for"):
        submit_all(client, [Submission(TRUE, job_id="x"), Submission(TRUE, Options(after=("nobody",)))])
    put(client, "a")
    with pytest.raises(Conflict, match="a job a already"):
        submit_all(
            client, [Submission(TRUE, job_id="x"), Submission(TRUE, Options(after=("x",)), job_id="a")]
        )
    with pytest.raises(Conflict, match="would wait for itself"):
        put(client, "self", "self")
    assert sorted(client.keys("rq:job:*")) == [b"rq:job:a"]
    assert jobs.unfinished_ids(client) == ["a"]


def test_an_id_that_others_wait_for_cannot_wait_for_these(client: redis.Redis) -> None:
    queue = rq.Queue(connection=client)
    put(client, "x")
    queue.enqueue("time.time", job_id="plain", depends_on="x")
    put(client, "ours", "plain")
    queue.fetch_job("x").delete()
    with pytest.raises(Conflict, match="job x would wait for itself"):
        put(client, "x", "ours")
    assert put(client, "y", "ours") == "deferred"


def test_jobs_of_one_submission_may_wait_for_each_other(client: redis.Redis) -> None:
    rows = [
        Submission(TRUE, job_id="a"),
        Submission(TRUE, Options(after=("a",)), "other", "b"),
        Submission(TRUE, Options(after=("a",), after_any=("b",)), job_id="c"),
    ]
    assert [job.state for job in submit_all(client, rows)] == ["queued", "deferred", "deferred"]
    assert client.lrange(keys.queue("default"), 0, -1) == [b"a"]


def test_canceled_jobs_take_those_along_that_wait_for_them(client: redis.Redis) -> None:
    put(client, "a"), put(client, "b", "a"), put(client, "c", "b"), put(client, "d", after_any=("b",))
    assert control.cancel(client, "b") == "canceled"
    assert state(client, "a", "b", "c", "d") == ["queued", "canceled", "failed", "queued"]
    assert reason(client, "c") == "dependency b was canceled"
    assert dict(control.retry(client, ["c"])) == {"c": "dependency"}
    assert dict(control.retry(client, ["c", "b"])) == {"c": "retried", "b": "retried"}
    assert state(client, "a", "b", "c") == ["queued", "deferred", "deferred"]
    assert reason(client, "c") is None
    assert client.zcard("rq:failed:default") == client.zcard("rq:canceled:default") == 0


def fail_a_chain_and_mend_it(workers: Workers, folder: Path) -> None:
    """a, b and c, one after the other: all have failed, and a would not again."""
    put(workers.client, "a", command=Command(("test", "-e", str(folder / "mended"))))
    put(workers.client, "b", "a"), put(workers.client, "c", "b")
    workers.start("w0")
    workers.wait(["c"])
    (folder / "mended").touch()


def test_a_chain_that_is_mended_goes_on(workers: Workers, tmp_path) -> None:
    client = workers.client
    fail_a_chain_and_mend_it(workers, tmp_path)
    assert dict(control.retry(client, ["a"])) == {"a": "retried"}
    assert [job.state for job in workers.wait(["a", "b", "c"])] == ["finished"] * 3


def test_a_failure_that_rq_requeues_brings_those_back_that_failed_for_it(workers: Workers, tmp_path) -> None:
    client = workers.client
    fail_a_chain_and_mend_it(workers, tmp_path)
    rq.Queue(connection=client).failed_job_registry.requeue("a")
    workers.until(lambda: state(client, "a", "b", "c") == ["finished"] * 3, "all finished")


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_what_rq_takes_away_is_not_waited_for(client: redis.Redis, how: str) -> None:
    put(client, "a"), put(client, "b", "a"), put(client, "c", "b", on_failed_dependency="wait")
    put(client, "d", after_any=("a",))
    getattr(rq.job.Job.fetch("a", connection=client), how)()
    assert chores.Deferred().run(client) == 2
    assert state(client, "b", "c", "d") == ["failed", "deferred", "queued"]
    gone = {"cancel": "was canceled", "delete": "is gone"}[how]
    assert reason(client, "b") == f"dependency a {gone}"


def test_what_rq_cancels_is_waited_for_while_it_runs(client: redis.Redis) -> None:
    put(client, "a"), put(client, "b", after_any=("a",)), put(client, "c", "a")
    assert len(claim(client, session(client, "w0"), 1)) == 1
    rq.job.Job.fetch("a", connection=client).cancel()
    assert chores.Deferred().run(client) == 0
    assert state(client, "a", "b", "c") == ["canceled", "deferred", "deferred"]
    client.zrem(keys.LEASES, "a")
    assert chores.Deferred().run(client) == 2
    assert state(client, "b", "c") == ["queued", "failed"]


def test_plain_jobs_of_rq_wait_as_ever(client: redis.Redis) -> None:
    put(client, "a")
    queue = rq.Queue(connection=client)
    strict = queue.enqueue("time.time", depends_on="a")
    put(client, "b", strict.id)
    control.cancel(client, "a")
    assert chores.Deferred().run(client) == 0
    assert state(client, strict.id, "b") == ["deferred", "deferred"]


def test_many_that_wait_are_looked_at_some_at_a_time(client: redis.Redis) -> None:
    put(client, "a")
    for number in range(450):
        put(client, f"b{number}", "a")
    put(client, "c", *(f"b{number}" for number in range(450)))
    client.hset("rq:job:a", "status", "failed")
    chores.Deferred().run(client)
    chores.Settle().run(client)
    assert client.llen(keys.SETTLING) == 0
    assert set(state(client, "c", *(f"b{number}" for number in range(450)))) == {"failed"}


def rows(count: int) -> list[Submission]:
    return [
        Submission(TRUE, Options(after=(f"j{n - 1}",) if n % 10 else ()), job_id=f"j{n}")
        for n in range(count)
    ]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.submit.TOGETHER", 100)
    monkeypatch.setattr("broker.submit._BATCH", 100)


def test_a_submission_in_parts_starts_when_all_of_it_is_in(client: redis.Redis, few: None) -> None:
    done = submit_together(client, rows(450))
    assert [job.state for job in done].count("queued") == 45
    assert [job.id for job in done] == [f"j{n}" for n in range(450)]
    assert client.llen(keys.queue("default")) == 45
    assert client.zcard("rq:deferred:default") == 405
    assert client.smembers("rq:job::j1:dependencies") == {b"j0"}


def test_a_submission_in_parts_that_fails_leaves_nothing(client: redis.Redis, few: None) -> None:
    put(client, "j333")
    with pytest.raises(Conflict):
        submit_together(client, rows(450))
    assert sorted(client.keys("rq:job:j*")) == [b"rq:job:j333"]
    assert client.zcard("rq:deferred:default") == 0


def test_a_submission_that_is_cut_off_is_removed(client: redis.Redis, few: None, monkeypatch) -> None:
    monkeypatch.setattr("broker.dependents.settle", lambda *_: True)  # it died before
    put(client, "j333")
    with pytest.raises(Conflict):
        submit_together(client, rows(450))
    assert client.llen(keys.queue("default")) == 1
    assert client.zcard("rq:deferred:default") == 300
    (gate,) = client.keys("rq:job:gate:*[0-9a-f]")
    assert 0 < client.ttl(gate) <= 120
    client.delete(gate)
    chores.Deferred().run(client)
    chores.Settle().run(client)
    assert sorted(client.keys("rq:job:j*")) == [b"rq:job:j333"]
    assert client.zcard("rq:deferred:default") == client.zcard("rq:failed:default") == 0
