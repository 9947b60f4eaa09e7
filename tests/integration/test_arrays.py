"""Arrays: one entry of a queue, many tasks, each a job from the moment it is claimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job

from broker import arrays, chores, control, jobs, keys, ranges, selection, tasks
from broker.arrays import Tasks
from broker.command import Command
from broker.errors import Conflict, NotFound, UsageError
from broker.session import Session
from broker.submit import Options, Submission, submit_commands
from broker.tasks import TaskCounts
from broker.work import Claim, End
from tests.integration.test_claims import claim, expire_lease, send, session

TRUE = Command(("true",))


def submit(client: redis.Redis, text: str = "1-10", array: str | None = None, **how: Any) -> str:
    return arrays.submit(client, Submission(TRUE, job_id=array), Tasks(ranges.parse(text), **how)).id


def of_lines(client: redis.Redis, lines: Sequence[bytes], **how: Any) -> str:
    return arrays.submit(client, Submission(TRUE), Tasks(ranges.first(len(lines)), lines, "line", **how)).id


def counts(client: redis.Redis, array: str) -> TaskCounts:
    return tasks.counts(client, [array])[array]


def state(client: redis.Redis, job_id: str) -> str | None:
    return jobs.states(client, [job_id])[job_id]


def end(client: redis.Redis, who: Session, claims: Sequence[Claim], outcome: Any = "finished") -> None:
    code = 0 if outcome == "finished" else 1
    assert all(send(client, who, [End(one, outcome, exit_code=code) for one in claims], 0).accepted)


def numbers(claims: Sequence[Claim]) -> list[int]:
    return [int(one.job_id.rpartition("-")[2]) for one in claims]


def _any_numbers(claims: Sequence[Claim]) -> list[int]:
    """0 for a job that is no task."""
    return [int(tail) if (tail := one.job_id.rpartition("-")[2]).isdigit() else 0 for one in claims]


def run_all(
    client: redis.Redis, who: Session, outcome: Callable[[int], Any] = lambda _: "finished"
) -> list[int]:
    """Run what there is, one after the other; returns the numbers in the order in which they ran."""
    ran: list[int] = []
    while claims := claim(client, who, 1):
        ran += _any_numbers(claims)
        end(client, who, claims, outcome(ran[-1]))
    return ran


@pytest.fixture
def who(redis_client: redis.Redis) -> Session:
    return session(redis_client, "w0")


# --- giving out ------------------------------------------------------------------------------------


def test_tasks_are_jobs_once_they_are_claimed_and_the_array_ends_with_the_last(
    redis_client: redis.Redis, who: Session
) -> None:
    array = submit(redis_client, "1-9:2,20")
    assert redis_client.llen(keys.queue("default")) == 1
    first = claim(redis_client, who, 4)
    assert numbers(first) == [1, 3, 5, 7]
    assert counts(redis_client, array) == TaskCounts(6, 2, 4, 0, 0, 0)
    end(redis_client, who, first)
    rest = claim(redis_client, who, 4)
    assert numbers(rest) == [9, 20]
    assert redis_client.llen(keys.queue("default")) == 0
    assert (state(redis_client, array), state(redis_client, f"{array}-20")) == ("deferred", "started")
    end(redis_client, who, rest)
    assert counts(redis_client, array) == TaskCounts(6, 0, 0, 6, 0, 0)
    assert state(redis_client, array) == "finished"
    assert redis_client.zscore("rq:finished:default", array)


def test_claims_of_many_take_from_arrays_and_jobs_in_their_order(
    redis_client: redis.Redis, who: Session
) -> None:
    one = submit(redis_client, "1-3")
    job = submit_commands(redis_client, "default", [(None, TRUE)], Options())[0]
    two = submit(redis_client, "1-3")
    given = [found.job_id for found in claim(redis_client, who, 5)]
    assert given == [f"{one}-1", f"{one}-2", f"{one}-3", job, f"{two}-1"]
    assert [found.job_id for found in claim(redis_client, who, 5)] == [f"{two}-2", f"{two}-3"]


def test_each_task_has_its_item(redis_client: redis.Redis, who: Session) -> None:
    lines = [b"line %d" % number for number in range(1, 100)] + [b"", b"\xff caf\xc3\xa9", b"x" * 100_000]
    array = of_lines(redis_client, lines)
    claims = [found for _ in range(4) for found in claim(redis_client, who, 30)]
    assert [found.fields[b"fleet_task_line"] for found in claims] == lines
    variables = tasks.variables(claims[6].job_id, claims[6].fields)
    assert variables == {"FLEET_ARRAY_ID": array, "FLEET_TASK_ID": "7", "FLEET_TASK_LINE": "line 7"}


def test_a_task_that_is_lost_handed_back_or_retried_is_an_ordinary_job(
    redis_client: redis.Redis, who: Session
) -> None:
    options = Options(retries=1, retry_delay_seconds=0)
    array = arrays.submit(redis_client, Submission(TRUE, options), Tasks(ranges.parse("1-9"))).id
    one, two, three = claim(redis_client, who, 3)
    end(redis_client, who, [one], "handed-back")
    end(redis_client, who, [two], "lost")
    end(redis_client, who, [three], "failed")
    waiting = [f"{array}-2", f"{array}-1", array, f"{array}-3"]
    assert [found.decode() for found in redis_client.lrange(keys.queue("default"), 0, -1)] == waiting
    assert counts(redis_client, array) == TaskCounts(9, 9, 0, 0, 0, 0)
    assert run_all(redis_client, who) == [2, 1, 4, 5, 6, 7, 8, 9, 3]
    assert counts(redis_client, array) == TaskCounts(9, 0, 0, 9, 0, 0)
    assert state(redis_client, array) == "finished"


def test_tasks_of_a_claim_whose_reply_was_lost_are_handed_back(
    redis_client: redis.Redis, who: Session
) -> None:
    array = submit(redis_client, "1-5")
    claim(redis_client, who, 3)  # and never heard of
    who.beat(redis_client, "{}", {}, who.claims_settled)
    assert counts(redis_client, array) == TaskCounts(5, 5, 0, 0, 0, 0)
    assert sorted(run_all(redis_client, who)) == [1, 2, 3, 4, 5]
    assert state(redis_client, array) == "finished"


def test_tasks_of_a_worker_that_died_run_again(redis_client: redis.Redis, who: Session) -> None:
    array = submit(redis_client, "1-3")
    claims = claim(redis_client, who, 2)
    for found in claims:
        expire_lease(redis_client, found.job_id)
    who.lose_foreign(redis_client, [(found.job_id, found.lease) for found in claims])
    assert counts(redis_client, array) == TaskCounts(3, 3, 0, 0, 0, 0)
    assert sorted(run_all(redis_client, who)) == [1, 2, 3]


# --- submitting ------------------------------------------------------------------------------------


def test_a_submission_cut_short_runs_nothing_and_goes_by_itself(
    redis_client: redis.Redis, who: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "submit_all", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        of_lines(redis_client, [b"x"] * 100)
    assert claim(redis_client, who, 9) == []
    left = list(redis_client.scan_iter("fleet:array*"))
    assert len(left) == 3
    assert all(0 < redis_client.ttl(key) <= 600 for key in left)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_id_that_is_taken_is_refused_and_what_has_it_is_left_alone(
    redis_client: redis.Redis, who: Session
) -> None:
    submit(redis_client, "1-3", "one")
    submit_commands(redis_client, "default", [("two", TRUE)], Options())
    for taken in ("one", "two"):
        with pytest.raises(Conflict):
            submit(redis_client, "5-9", taken)
    assert [found.job_id for found in claim(redis_client, who, 9)] == ["one-1", "one-2", "one-3", "two"]


def test_a_task_whose_id_somebody_has_fails_and_that_job_is_left_alone(
    redis_client: redis.Redis, who: Session
) -> None:
    redis_client.hset(keys.job("a-2"), "status", "finished")
    submit(redis_client, "1-3", "a")
    assert run_all(redis_client, who) == [1, 3]
    assert redis_client.hgetall(keys.job("a-2")) == {b"status": b"finished"}
    assert (counts(redis_client, "a").failed, state(redis_client, "a")) == (1, "failed")


@pytest.mark.parametrize("item", [b"a\0b", b"x" * 131_072])
def test_items_that_no_program_can_be_given_are_refused(redis_client: redis.Redis, item: bytes) -> None:
    with pytest.raises(UsageError, match="item 2"):
        of_lines(redis_client, [b"", item])
    assert redis_client.keys() == []


def test_results_of_an_array_and_its_tasks_are_kept_as_long_as_was_said(
    redis_client: redis.Redis, who: Session
) -> None:
    how = Submission(TRUE, Options(result_ttl_seconds=100))
    array = arrays.submit(redis_client, how, Tasks(ranges.first(2), [b"a", b"b"], "line")).id
    run_all(redis_client, who)
    kept = [*redis_client.scan_iter(f"fleet:array:{array}*"), *redis_client.scan_iter(f"rq:job:{array}*")]
    assert len(kept) == 6, kept  # hash, items, bitmap; array, two tasks
    assert all(0 < redis_client.ttl(key) <= 100 for key in kept)
    assert redis_client.zcard(keys.ARRAYS) == 0


# --- limits ----------------------------------------------------------------------------------------


def test_no_more_run_at_once_than_may_and_others_pass(redis_client: redis.Redis, who: Session) -> None:
    array = submit(redis_client, "1-5", max_parallel=2)
    job = submit_commands(redis_client, "default", [(None, TRUE)], Options())[0]
    claims = claim(redis_client, who, 9)
    assert [found.job_id for found in claims] == [f"{array}-1", f"{array}-2", job]
    assert claim(redis_client, who, 9) == []
    assert redis_client.llen(keys.wake("default")) == 0, "nobody is rung for what cannot be given out"
    end(redis_client, who, claims[:1])
    claims = [*claims[1:2], *claim(redis_client, who, 9)]
    assert numbers(claims) == [2, 3]
    end(redis_client, who, claims)
    assert run_all(redis_client, who) == [4, 5]
    assert state(redis_client, array) == "finished"


def test_a_task_that_runs_again_counts_among_those_that_run(redis_client: redis.Redis, who: Session) -> None:
    array = submit(redis_client, "1-4", max_parallel=2)
    one, two = claim(redis_client, who, 9)
    end(redis_client, who, [one], "handed-back")  # it goes to the front, and its array behind it
    three = claim(redis_client, who, 9)
    assert [found.job_id for found in three] == [one.job_id]
    assert claim(redis_client, who, 9) == []
    end(redis_client, who, [two], "lost")
    assert numbers(claim(redis_client, who, 9)) == [2]
    assert counts(redis_client, array) == TaskCounts(4, 2, 2, 0, 0, 0)


def test_more_failures_than_may_be_stop_the_array(redis_client: redis.Redis, who: Session) -> None:
    array = submit(redis_client, "1-9", max_fails=1)
    claims = claim(redis_client, who, 4)
    end(redis_client, who, claims[:1], "failed")
    assert counts(redis_client, array) == TaskCounts(9, 5, 3, 0, 1, 0)
    end(redis_client, who, claims[1:2], "failed")
    assert claim(redis_client, who, 9) == []
    assert who.beat(redis_client, "{}", {found.lease: found.job_id for found in claims[2:]}, 0).stop
    end(redis_client, who, claims[2:], "stopped")
    assert counts(redis_client, array) == TaskCounts(9, 0, 0, 0, 2, 7)
    job = jobs.show(redis_client, array)
    assert (job.state, job.reason) == ("failed", "MaxFails: 2 of 9 tasks failed, more than 1")


def test_an_array_with_failures_has_failed_and_says_how_many(redis_client: redis.Redis, who: Session) -> None:
    array = submit(redis_client, "1-4")
    run_all(redis_client, who, lambda number: "failed" if number % 2 else "finished")
    job = jobs.show(redis_client, array)
    assert (job.state, job.reason) == ("failed", "TasksFailed: 2 of 4 tasks failed")
    assert redis_client.zscore("rq:failed:default", array)


# --- others' hands ---------------------------------------------------------------------------------


def test_a_canceled_array_gives_out_nothing_and_ends_when_what_ran_has(
    redis_client: redis.Redis, who: Session
) -> None:
    array = submit(redis_client, "1-9")
    back, *running = claim(redis_client, who, 3)
    end(redis_client, who, [back], "handed-back")
    assert arrays.cancel(redis_client, array) == "stopping"
    assert claim(redis_client, who, 9) == []
    assert state(redis_client, back.job_id) == "canceled"
    assert redis_client.llen(keys.worker_signals("w0")) == 2, "the worker of what runs is told at once"
    assert state(redis_client, array) == "deferred"
    end(redis_client, who, running, "stopped")
    assert counts(redis_client, array) == TaskCounts(9, 0, 0, 0, 0, 9)
    assert state(redis_client, array) == "canceled"
    assert arrays.cancel(redis_client, array) == "canceled"


def test_some_tasks_are_canceled_and_the_others_run(redis_client: redis.Redis, who: Session) -> None:
    array = submit(redis_client, "1-20:2")
    running = claim(redis_client, who, 2)  # 1, 3
    arrays.cancel(redis_client, array, ranges.parse("2-6,9,15-99"))
    assert counts(redis_client, array) == TaskCounts(10, 3, 2, 0, 0, 5)
    end(redis_client, who, running[:1])
    end(redis_client, who, running[1:], "stopped")
    assert run_all(redis_client, who) == [7, 11, 13]
    assert counts(redis_client, array) == TaskCounts(10, 0, 0, 4, 0, 6)
    assert state(redis_client, array) == "canceled"


def test_tasks_that_all_run_are_canceled(redis_client: redis.Redis, who: Session) -> None:
    array = submit(redis_client, "1-5")
    running = claim(redis_client, who, 3)
    assert arrays.cancel(redis_client, array, ranges.parse("2-3")) == "stopping"
    assert redis_client.llen(keys.worker_signals("w0")) == 2
    end(redis_client, who, running)
    assert run_all(redis_client, who) == [4, 5]


def as_rq_knows_it(client: redis.Redis, job_id: str) -> Job:
    from rq.serializers import JSONSerializer

    return Job.fetch(job_id, connection=client, serializer=JSONSerializer)


@pytest.mark.parametrize("how", ["cancel", "delete", "empty"])
def test_rq_can_stop_an_array(redis_client: redis.Redis, who: Session, how: str) -> None:
    array = submit(redis_client, "1-9", max_parallel=4)
    running = claim(redis_client, who, 2)
    if how == "empty":
        Queue("default", connection=redis_client).empty()
    else:
        getattr(as_rq_knows_it(redis_client, array), how)()
    assert claim(redis_client, who, 9) == []
    beat = who.beat(redis_client, "{}", {found.lease: found.job_id for found in running}, 0)
    assert beat.stop == {found.lease for found in running}
    end(redis_client, who, running, "stopped")
    chores.MendArrays().run(redis_client)
    assert redis_client.zcard(keys.ARRAYS) == 0
    assert state(redis_client, array) == ("canceled" if how == "cancel" else None)
    assert all(redis_client.ttl(key) > 0 for key in redis_client.scan_iter("fleet:array:*"))


def test_tasks_that_rq_deletes_or_cancels_are_missed_by_nobody(
    redis_client: redis.Redis, who: Session
) -> None:
    array = submit(redis_client, "1-4")
    claims = claim(redis_client, who, 3)
    end(redis_client, who, claims[2:], "handed-back")
    as_rq_knows_it(redis_client, claims[0].job_id).delete()
    as_rq_knows_it(redis_client, claims[2].job_id).cancel()
    chores.MendArrays().run(redis_client)
    assert counts(redis_client, array) == TaskCounts(4, 1, 1, 0, 0, 2)
    end(redis_client, who, claims[1:2])
    assert run_all(redis_client, who) == [4]
    assert state(redis_client, array) == "canceled"


def test_the_array_s_own_job_is_cancelled_by_control_too(redis_client: redis.Redis, who: Session) -> None:
    array = submit(redis_client, "1-9")
    assert control.cancel(redis_client, array) == "canceled"
    assert claim(redis_client, who, 1) == []
    assert state(redis_client, array) == "canceled"


# --- one array after another -----------------------------------------------------------------------


def after(client: redis.Redis, other: str, **options: Any) -> str:
    how = Submission(TRUE, Options(**options))
    return arrays.submit(client, how, Tasks(ranges.Ranges(()), after=other)).id


def numbers_of(claims: Sequence[Claim], array: str) -> list[int]:
    return [
        number for one, number in zip(claims, numbers(claims), strict=True) if one.job_id.startswith(array)
    ]


def test_a_task_begins_once_that_of_the_other_array_has_finished(
    redis_client: redis.Redis, who: Session
) -> None:
    one = submit(redis_client, "1-9:2")
    claims = claim(redis_client, who, 3)
    end(redis_client, who, claims[:1])
    two = after(redis_client, one)
    assert counts(redis_client, two) == TaskCounts(5, 5, 0, 0, 0, 0)
    given = claim(redis_client, who, 9)
    assert (numbers_of(given, one), numbers_of(given, two)) == ([7, 9], [1])
    assert tasks.states(redis_client, two, ranges.parse("1-4")) == {
        1: "started",
        2: None,
        3: "deferred",
        4: None,
    }
    end(redis_client, who, [claims[2], *given])
    assert [found.job_id for found in claim(redis_client, who, 9)] == [
        f"{two}-{number}" for number in (5, 7, 9)
    ]
    end(redis_client, who, claims[1:2])
    assert numbers(claim(redis_client, who, 9)) == [3]
    assert counts(redis_client, two) == TaskCounts(5, 0, 4, 1, 0, 0)


def test_those_that_wait_in_vain_fail_with_the_array_and_wait_again_when_it_is_retried(
    redis_client: redis.Redis, who: Session
) -> None:
    one = submit(redis_client, "1-3")
    two = after(redis_client, one)
    three = after(redis_client, two)
    waiting = after(redis_client, one, on_failed_dependency="wait")
    run_all(redis_client, who, lambda number: "failed" if number == 2 else "finished")
    assert counts(redis_client, two) == counts(redis_client, three) == TaskCounts(3, 0, 0, 2, 1, 0)
    job = jobs.show(redis_client, two)
    assert (job.state, job.reason) == ("failed", f"dependency {one}: 1 of its tasks did not finish")
    assert counts(redis_client, waiting) == TaskCounts(3, 1, 0, 2, 0, 0)
    (target,) = selection.targets_of(redis_client, [two])
    assert selection.retry(redis_client, target) == ("dependency", 0)
    assert dict(control.retry(redis_client, [f"{one}-2"])) == {f"{one}-2": "retried"}
    assert counts(redis_client, three) == TaskCounts(3, 1, 0, 2, 0, 0)
    run_all(redis_client, who)
    for array in (one, two, three, waiting):
        assert counts(redis_client, array) == TaskCounts(3, 0, 0, 3, 0, 0)
        assert state(redis_client, array) == "finished"


def test_an_array_that_waits_can_be_canceled_and_retried(redis_client: redis.Redis, who: Session) -> None:
    one = submit(redis_client, "1-3")
    two = after(redis_client, one)
    assert arrays.cancel(redis_client, two) == "canceled"
    assert (state(redis_client, two), counts(redis_client, two).canceled) == ("canceled", 3)
    assert run_all(redis_client, who) == [1, 2, 3]
    (target,) = selection.targets_of(redis_client, [two])
    assert selection.retry(redis_client, target) == ("retried", 3)
    assert run_all(redis_client, who) == [1, 2, 3]
    assert state(redis_client, two) == "finished"


def test_an_array_that_is_gone_holds_nobody(redis_client: redis.Redis, who: Session) -> None:
    one = submit(redis_client, "1-3")
    two = after(redis_client, one)
    as_rq_knows_it(redis_client, one).delete()
    chores.MendArrays().run(redis_client)
    chores.MendArrays().run(redis_client)
    assert (state(redis_client, two), counts(redis_client, two).failed) == ("failed", 3)
    assert claim(redis_client, who, 9) == []
    with pytest.raises(NotFound):
        after(redis_client, one)


def test_the_numbers_must_be_those_of_the_other_array(redis_client: redis.Redis) -> None:
    one = submit(redis_client, "1-3")
    with pytest.raises(UsageError, match="has the tasks 1-3, this one 1-4"):
        arrays.submit(redis_client, Submission(TRUE), Tasks(ranges.parse("1-4"), after=one))


def test_a_whole_array_is_waited_for_as_a_job_is(redis_client: redis.Redis, who: Session) -> None:
    one = submit(redis_client, "1-3")
    options = Options(after=(one,))
    two = arrays.submit(redis_client, Submission(TRUE, options), Tasks(ranges.parse("7-8"))).id
    job = submit_commands(redis_client, "default", [(None, TRUE)], Options(after=(two,)))[0]
    assert run_all(redis_client, who)[:5] == [1, 2, 3, 7, 8]
    assert state(redis_client, job) == "finished"
    failing = submit(redis_client, "1-2")
    child = arrays.submit(
        redis_client, Submission(TRUE, Options(after=(failing,))), Tasks(ranges.parse("1-2"))
    ).id
    run_all(redis_client, who, lambda _: "failed")
    assert state(redis_client, child) == "failed"
    (target,) = selection.targets_of(redis_client, [failing])
    selection.retry(redis_client, target)
    run_all(redis_client, who)
    assert state(redis_client, child) == "finished"
