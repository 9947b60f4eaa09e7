"""What a claim takes, and in which order, where jobs ask for something: straight to a real Redis."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
import rq
from rq.registry import FailedJobRegistry

from broker import chores, control, keys, scripts, sets
from broker.connection import connect
from broker.queue import Queue
from broker.requirements import Offer, parse
from broker.session import Identity, Session
from broker.work import Claim, End, Round
from broker.worker_settings import WorkerSettings
from fleet.placement import Placement
from fleet.resources import Gpu, Resources
from fleet.room import Room

GIB = 2**30


class Worker:
    """One worker's claims and ends, without its processes."""

    def __init__(
        self,
        client: redis.Redis,
        name: str = "w0",
        *queues: str,
        slots: int = 8,
        cpus: float = 8,
        memory_gib: int = 64,
        gpus: int = 0,
        labels: dict[str, str] | None = None,
        ends_at: float | None = None,
        weights: tuple[int, ...] = (),
        **settings: float,
    ) -> None:
        options: Any = {"heartbeat_seconds": 10, "lease_seconds": 30} | settings
        self.client, self.slots = client, slots
        who = Identity(name, "here", queues or ("default",), 1, "3", weights=weights)
        self.who = Session(who, WorkerSettings(**options))
        assert self.who.register(client, "{}") == ""
        found = Resources(cpus, memory_gib * GIB, (Gpu("a100", 40 * GIB),) * gpus)
        offer = Offer(labels or {}, cpus, memory_gib * GIB, (40 * GIB,) * gpus, slots, ends_at)
        self.placement = Placement(self.who.identity.queues, offer, Room(found, slots), self.who.settings)
        self.running: dict[str, Claim] = {}

    def round(
        self, ends: Sequence[End] = (), wanted: int | None = None, ahead: int = 0, popped: Sequence[str] = ()
    ) -> Round:
        """As the loop does it: what ended has given back its room before."""
        self.placement.learn(sets.known(self.client, self.who.identity.queues))
        for end in ends:
            del self.running[end.claim.lease]
            self.placement.give_back(end.claim.lease)
        self.placement.count(len(self.running))
        room = self.slots - len(self.running) if wanted is None else wanted
        exchange = self.who.begin(ends, room, ahead, places=self.placement.places(popped))
        done = self.who.complete(exchange, scripts.ROUND(self.client, exchange.keys, exchange.arguments))
        self.who.settle(exchange)
        self.placement.hold(done.held)
        self.placement.count(len(self.running))
        for claim in done.claims:
            self.placement.take(claim.lease, claim.queue)  # raises if it was promised twice
            self.running[claim.lease] = claim
        return done

    def claim(self, wanted: int | None = None) -> list[str]:
        return [claim.job_id for claim in self.round(wanted=wanted).claims]

    def end(self, job_id: str, outcome: Any = "finished") -> End:
        return next(End(claim, outcome) for claim in self.running.values() if claim.job_id == job_id)

    def finish(self, *job_ids: str) -> list[str]:
        """Report their ends and claim what fits then."""
        return [claim.job_id for claim in self.round([self.end(job_id) for job_id in job_ids]).claims]

    def claim_and_finish(self) -> str:
        """One job, from its claim to its end; returns its id."""
        (job_id,) = self.claim(1)
        self.finish_with(job_id, "finished")
        return job_id

    def finish_with(self, job_id: str, outcome: Any) -> None:
        """Report that end and claim nothing."""
        self.round([self.end(job_id, outcome)], wanted=0)


def put(client: redis.Redis, job_id: str, base: str = "default", seconds_ago: float = 0, **said: Any) -> str:
    """One job that asks for this, submitted so long ago; returns its id."""
    need = parse(said)
    sets.add(client, base, need)
    queue = Queue(need.queue_of(base), connection=client)
    queue.enqueue("os.getpid", job_id=job_id)
    if seconds_ago:
        seconds, micros = client.time()
        at = datetime.fromtimestamp(seconds + micros / 1e6 - seconds_ago, UTC)
        client.hset(keys.job(job_id), "enqueued_at", at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    ring(client)
    return job_id


def ring(client: redis.Redis) -> None:
    chores.Ring().run(client)


def test_jobs_of_a_set_are_given_to_whom_it_fits_and_to_nobody_else(redis_client: redis.Redis) -> None:
    put(redis_client, "a", labels=["gpu_type=a100*"])
    assert Worker(redis_client, "plain").claim() == []
    assert Worker(redis_client, "other", labels={"gpu_type": "v100"}).claim() == []
    assert Worker(redis_client, "right", labels={"gpu_type": "a100-40g"}).claim() == ["a"]


def test_higher_priority_first_and_first_in_first_out_within_one_across_sets(
    redis_client: redis.Redis,
) -> None:
    put(redis_client, "plain", seconds_ago=50)
    put(redis_client, "low", seconds_ago=60, priority="low")
    put(redis_client, "cpus", seconds_ago=40, cpus=1)
    put(redis_client, "cpus-2", seconds_ago=20, cpus=1)
    put(redis_client, "plain-2", seconds_ago=10)
    put(redis_client, "memory", seconds_ago=30, memory="1G")
    put(redis_client, "high", priority="high")
    put(redis_client, "high-cpus", seconds_ago=5, priority="high", cpus=1)
    worker = Worker(redis_client)
    order = ["high-cpus", "high", "plain", "cpus", "memory", "cpus-2", "plain-2", "low"]
    assert worker.claim() == order


def test_one_at_a_time_comes_in_the_same_order(redis_client: redis.Redis) -> None:
    for number in range(6):
        put(
            redis_client,
            f"j{number}",
            seconds_ago=10 - number / 100,
            **([{}, {"cpus": 1}, {"memory": "1G"}][number % 3]),
        )
    worker = Worker(redis_client)
    assert [worker.claim(1) for _ in range(7)] == [[f"j{number}"] for number in range(6)] + [[]]


# --- priority and age --------------------------------------------------------------------------------


def set_served(client: redis.Redis, priority: int, seconds_ago: float) -> None:
    seconds, micros = client.time()
    client.hset(keys.of("served", "default"), priority, int((seconds + micros / 1e6 - seconds_ago) * 1000))


def test_a_level_that_was_passed_over_for_long_has_one_job_and_is_the_last_again(
    redis_client: redis.Redis,
) -> None:
    for number in range(3):
        put(redis_client, f"low-{number}", seconds_ago=3600, priority="low")
        put(redis_client, f"high-{number}", priority="high")
    set_served(redis_client, -10, seconds_ago=5)
    assert Worker(redis_client, "w0", priority_ageing_seconds=1).claim(1) == ["high-0"]
    set_served(redis_client, -10, seconds_ago=60)
    worker = Worker(redis_client, "w1", priority_ageing_seconds=1)
    assert worker.claim(4) == ["low-0", "high-1", "high-2", "low-1"]


def test_neglect_begins_when_the_first_job_is_there(redis_client: redis.Redis) -> None:
    put(redis_client, "low", priority="low")
    put(redis_client, "high", priority="high")
    set_served(redis_client, -10, seconds_ago=3600)
    assert Worker(redis_client, priority_ageing_seconds=1).claim(1) == ["high"]


def test_low_jobs_run_however_long_the_high_ones_last(redis_client: redis.Redis, eventually: Any) -> None:
    worker = Worker(redis_client, priority_ageing_seconds=0.001)
    put(redis_client, "low", priority="low")
    seen: list[str] = []

    def one_more() -> bool:
        put(redis_client, f"high-{len(seen)}", priority="high")
        seen.extend(worker.claim(1))
        worker.finish_with(seen[-1], "finished")
        return "low" in seen

    eventually(one_more, message="the low job was given out")
    assert seen[0] == "high-0"


# --- what fits ---------------------------------------------------------------------------------------


def test_small_jobs_are_taken_past_a_large_one_that_does_not_fit(redis_client: redis.Redis) -> None:
    put(redis_client, "running", cpus=3)
    worker = Worker(redis_client, cpus=4)
    assert worker.claim() == ["running"]
    put(redis_client, "large", seconds_ago=60, cpus=4)
    put(redis_client, "large-memory", seconds_ago=50, memory="65G")
    put(redis_client, "small", cpus=1)
    put(redis_client, "small-2", cpus=1)
    assert worker.claim() == ["small"]
    assert worker.finish("running", "small") == ["large"]
    assert worker.finish("large") == ["small-2"]


def test_a_plain_job_counts_its_share_of_the_cpus(redis_client: redis.Redis) -> None:
    for number in range(8):
        put(redis_client, f"plain-{number}", seconds_ago=20 - number / 10)
    put(redis_client, "three", seconds_ago=30, cpus=3)
    worker = Worker(redis_client, slots=4, cpus=4)
    assert worker.claim() == ["three", "plain-0"], "each of four slots stands for one CPU"
    assert worker.finish("three") == ["plain-1", "plain-2", "plain-3"]


def test_room_is_held_for_a_job_that_waited_too_long_by_one_worker(redis_client: redis.Redis) -> None:
    put(redis_client, "two", seconds_ago=90, cpus=2)
    put(redis_client, "one", seconds_ago=80, cpus=1)
    holder = Worker(redis_client, "holder", cpus=4, reserve_after_seconds=50)
    other = Worker(redis_client, "other", cpus=4, reserve_after_seconds=50)
    assert holder.claim() == ["two", "one"]
    put(redis_client, "two-2", seconds_ago=70, cpus=2)
    assert other.claim() == ["two-2"]
    put(redis_client, "large", seconds_ago=60, cpus=4)
    for number in range(6):
        put(redis_client, f"small-{number}", seconds_ago=10 - number, cpus=1)
    assert holder.claim() == [], "the one CPU that is left is held for the large job"
    assert holder.placement.held == "default@" + parse({"cpus": 4}).digest()
    assert holder.finish("one") == []
    assert other.claim() == ["small-0", "small-1"], "nobody else holds any back"
    assert holder.finish("two") == ["large"]
    assert holder.placement.held == ""
    assert not redis_client.exists(keys.of("reserved", "default@" + parse({"cpus": 4}).digest()))
    assert holder.finish("large") == ["small-2", "small-3", "small-4", "small-5"]


def test_as_many_workers_hold_room_as_jobs_wait_and_one_in_forty_at_most(redis_client: redis.Redis) -> None:
    redis_client.sadd(keys.FLEET_WORKERS, *(f"elsewhere-{number}" for number in range(76)))
    workers = [Worker(redis_client, f"w{number}", cpus=2, reserve_after_seconds=50) for number in range(4)]
    for number, worker in enumerate(workers):
        put(redis_client, f"one-{number}", cpus=1)
        assert worker.claim() == [f"one-{number}"]
    put(redis_client, "large-0", seconds_ago=60, cpus=2)
    for number in range(3):
        put(redis_client, f"small-{number}", seconds_ago=3 - number, cpus=1)
    assert workers[0].claim() == [], "it holds room for the large one"
    assert workers[1].claim() == ["small-0"], "for which one is enough"
    put(redis_client, "large-1", seconds_ago=60, cpus=2)
    put(redis_client, "large-2", seconds_ago=60, cpus=2)
    assert workers[2].claim() == [], "it holds room for the second"
    assert workers[3].claim() == ["small-1"], "two of 80 workers do already"
    assert workers[0].finish("one-0") == ["large-0"]
    assert workers[0].finish("large-0") == ["large-1"], "it is free before the one that waits for it"
    assert workers[2].finish("one-2") == ["large-2"]


def test_before_the_bound_nothing_is_held(redis_client: redis.Redis) -> None:
    put(redis_client, "one", seconds_ago=80, cpus=1)
    worker = Worker(redis_client, cpus=2, reserve_after_seconds=600)
    assert worker.claim() == ["one"]
    put(redis_client, "large", seconds_ago=60, cpus=2)
    put(redis_client, "small", cpus=1)
    assert worker.claim() == ["small"]
    assert worker.placement.held == ""


def test_of_a_backlog_that_others_outrank_room_is_held_for_one_job(redis_client: redis.Redis) -> None:
    for number in range(3):
        put(redis_client, f"large-{number}", seconds_ago=90, cpus=4, priority="low")
    put(redis_client, "urgent", seconds_ago=95, cpus=1, priority="urgent")
    worker = Worker(redis_client, cpus=4, reserve_after_seconds=50)
    assert worker.claim() == ["urgent"]
    assert worker.placement.held
    for number in range(8):
        put(redis_client, f"urgent-{number}", cpus=1, priority="urgent")
    assert worker.finish("urgent") == ["large-0"]
    assert worker.placement.held == ""
    assert worker.finish("large-0") == [f"urgent-{number}" for number in range(4)]
    assert worker.finish("urgent-0") == ["urgent-4"]
    assert worker.placement.held == ""


def test_of_a_backlog_that_nobody_outranks_one_after_the_other_gets_room(redis_client: redis.Redis) -> None:
    for number in range(3):
        put(redis_client, f"large-{number}", seconds_ago=90, cpus=4)
    put(redis_client, "small", seconds_ago=95, cpus=1)
    worker = Worker(redis_client, cpus=4, reserve_after_seconds=50)
    assert worker.claim() == ["small"]
    put(redis_client, "small-2", cpus=1)
    assert worker.finish("small") == ["large-0"]
    assert worker.finish("large-0") == ["large-1"]


def test_gpus_beside_those_that_are_held_are_given(redis_client: redis.Redis) -> None:
    put(redis_client, "running", seconds_ago=90, memory="40G")
    worker = Worker(redis_client, gpus=3, reserve_after_seconds=50)
    assert worker.claim() == ["running"]
    put(redis_client, "held", seconds_ago=60, memory="30G", gpus=1)
    put(redis_client, "one", seconds_ago=9, gpus=1)
    assert worker.claim() == [], "its flags are of before room was held"
    assert worker.placement.held == name_of(memory="30G", gpus=1)
    put(redis_client, "half", seconds_ago=8, gpus=0.5)
    put(redis_client, "two", seconds_ago=7, gpus=1)
    assert worker.claim() == ["one"]
    assert worker.claim() == ["half"]
    assert worker.claim() == [], "one is held"
    assert worker.finish("running") == ["held"]
    assert worker.finish("one") == ["two"]


def name_of(**said: Any) -> str:
    return parse(said).queue_of("default")


def test_room_is_let_go_when_the_job_is_gone_or_the_queue_paused(redis_client: redis.Redis) -> None:
    put(redis_client, "one", seconds_ago=80, cpus=1)
    worker = Worker(redis_client, cpus=2, reserve_after_seconds=50)
    worker.claim()
    put(redis_client, "large", seconds_ago=60, cpus=2)
    put(redis_client, "small", cpus=1)
    assert worker.claim() == []
    assert worker.placement.held
    assert control.cancel(redis_client, "large") == "canceled"
    assert worker.claim() == ["small"]
    assert worker.placement.held == ""


def test_an_exclusive_job_runs_where_nothing_else_does(redis_client: redis.Redis) -> None:
    put(redis_client, "plain", seconds_ago=30)
    worker = Worker(redis_client)
    assert worker.claim() == ["plain"]
    put(redis_client, "alone", seconds_ago=20, exclusive=True)
    put(redis_client, "plain-2", seconds_ago=10)
    assert worker.claim() == ["plain-2"]
    assert worker.finish("plain", "plain-2") == ["alone"]
    put(redis_client, "plain-3")
    put(redis_client, "cpus", cpus=1)
    assert worker.claim() == []
    assert sorted(worker.finish("alone")) == ["cpus", "plain-3"]


def test_gpus_are_given_one_job_a_round_and_the_next_round_follows(redis_client: redis.Redis) -> None:
    for number in range(3):
        put(redis_client, f"one-{number}", seconds_ago=30 - number, gpus=1)
    put(redis_client, "half", seconds_ago=10, gpus=0.5)
    put(redis_client, "half-2", seconds_ago=9, gpus=0.5)
    put(redis_client, "plain")
    worker = Worker(redis_client, gpus=2)
    done = worker.round()
    assert [claim.job_id for claim in done.claims] == ["one-0", "plain"]
    assert done.more
    done = worker.round()
    assert [claim.job_id for claim in done.claims] == ["one-1"]
    assert done.more
    done = worker.round()
    assert not done.claims, "both GPUs are taken"
    assert not done.more
    assert worker.finish("one-0") == ["one-2"]
    assert worker.finish("one-1") == ["half"]
    assert worker.claim() == ["half-2"]


def test_what_takes_too_long_for_the_rest_of_a_life_is_not_taken(redis_client: redis.Redis) -> None:
    put(redis_client, "long", seconds_ago=10, time_request="2h")
    put(redis_client, "short", time_request="10m")
    assert Worker(redis_client, "w0", ends_at=time.time() + 3600).claim() == ["short"]
    assert Worker(redis_client, "w1").claim() == ["long"]


def test_ahead_come_jobs_that_take_no_room_alone(redis_client: redis.Redis) -> None:
    put(redis_client, "labelled", seconds_ago=60, labels=["host!=x"])
    put(redis_client, "plain", seconds_ago=50)
    put(redis_client, "labelled-2", seconds_ago=30, labels=["host!=x"])
    put(redis_client, "cpus", seconds_ago=10, cpus=1)
    put(redis_client, "plain-2", seconds_ago=9)
    worker = Worker(redis_client, slots=1, cpus=1)
    done = worker.round(wanted=1, ahead=8)
    assert [claim.job_id for claim in done.claims] == ["labelled", "plain", "labelled-2"], (
        "nothing comes ahead of the job that fits as soon as the slot is free"
    )


# --- who comes late, and other hands -----------------------------------------------------------------


def test_workers_that_race_promise_nothing_twice(redis_url: str, redis_client: redis.Redis) -> None:
    draw = random.Random(7)
    kinds: list[dict[str, Any]] = [
        *({"cpus": cpus} for cpus in (0.5, 1, 2, 3)),
        *({"cpus": 1, "memory": f"{gib}G"} for gib in (4, 20, 40)),
        *({"gpus": share} for share in (0.5, 1, 2)),
        {"exclusive": True},
        {"priority": "high"},
        {},
    ]
    expected = [put(redis_client, f"j{number}", **draw.choice(kinds)) for number in range(150)]
    given: list[str] = []
    faults: list[BaseException] = []

    def work(name: str) -> None:
        client = connect(redis_url)
        try:
            worker = Worker(client, name, slots=4, cpus=4, gpus=2, reserve_after_seconds=0)
            while len(given) < len(expected):
                given.extend(worker.claim())
                ended = [claim.job_id for claim in worker.running.values()]
                given.extend(worker.finish(*ended[: max(1, len(ended) // 2)]) if ended else [])
        except BaseException as exc:
            faults.append(exc)
        finally:
            client.close()

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not faults
    assert sorted(given) == sorted(expected)


def head_of(client: redis.Redis, queue: str) -> Any:
    base, _, digest = queue.partition("@")
    need = sets.known(client, [base]).sets[base][digest]
    return client.zscore(keys.heads(base, need.priority), digest)


@pytest.mark.parametrize("how", ["handed-back", "lost"])
def test_a_job_that_comes_back_is_the_first_of_its_own_list_and_as_old_as_it_was(
    redis_client: redis.Redis, how: str
) -> None:
    put(redis_client, "a", seconds_ago=60, cpus=1)
    put(redis_client, "b", seconds_ago=20, cpus=1)
    put(redis_client, "other", seconds_ago=40, memory="1G")
    queue = "default@" + parse({"cpus": 1}).digest()
    before, at = head_of(redis_client, queue), redis_client.hget(keys.job("a"), "enqueued_at")
    worker = Worker(redis_client)
    assert worker.claim(2) == ["a", "other"]
    assert head_of(redis_client, queue) > before + 5000
    worker.finish_with("a", how)
    assert redis_client.lrange(keys.queue(queue), 0, -1) == [b"a", b"b"]
    assert redis_client.hget(keys.job("a"), "enqueued_at") == at
    assert head_of(redis_client, queue) == before
    assert worker.claim() == ["a", "b"]


def test_a_plain_producer_of_rq_is_found_and_rung_for(redis_client: redis.Redis) -> None:
    need = parse({"cpus": 1})
    sets.add(redis_client, "default", need)
    name = need.queue_of("default")
    job = rq.Queue(name, connection=redis_client).enqueue("os.getpid")
    worker = Worker(redis_client)
    assert worker.claim() == [], "nobody has told of it yet"
    ring(redis_client)
    assert redis_client.llen(keys.wake(name)) == 1
    assert worker.claim() == [job.id]
    assert redis_client.llen(keys.wake(name)) == 0
    assert head_of(redis_client, name) is None


def test_who_took_a_token_finds_a_job_that_nobody_noted(redis_client: redis.Redis) -> None:
    need = parse({"cpus": 1})
    sets.add(redis_client, "default", need)
    name = need.queue_of("default")
    ids = [Queue(name, connection=redis_client).enqueue("os.getpid").id for _ in range(2)]
    redis_client.delete(keys.wake(name))  # popped
    worker = Worker(redis_client, slots=1)
    assert [claim.job_id for claim in worker.round(popped=[name]).claims] == ids[:1]
    assert redis_client.llen(keys.wake(name)) == 1, "one is left, for somebody else"
    redis_client.delete(keys.wake(name))
    assert not worker.round(wanted=0, ahead=1, popped=[name]).claims
    assert redis_client.llen(keys.wake(name)) == 1


def test_a_failed_job_of_a_set_is_requeued_by_rq_where_it_came_from(redis_client: redis.Redis) -> None:
    put(redis_client, "a", cpus=1)
    worker = Worker(redis_client)
    worker.claim()
    worker.finish_with("a", "failed")
    registry = FailedJobRegistry(parse({"cpus": 1}).queue_of("default"), connection=redis_client)
    assert registry.get_job_ids() == ["a"]
    registry.requeue("a")
    ring(redis_client)
    assert worker.claim() == ["a"]


def test_a_queue_that_is_paused_gives_out_nothing_of_its_sets(redis_client: redis.Redis) -> None:
    put(redis_client, "a", cpus=1)
    name = parse({"cpus": 1}).queue_of("default")
    assert control.pause(redis_client, "default") == "paused"
    worker = Worker(redis_client)
    redis_client.delete(keys.wake(name))
    assert not worker.round(popped=[name]).claims
    assert redis_client.llen(keys.wake(name)) == 0, "who is paused wakes nobody"
    assert control.resume(redis_client, "default") == "resumed"
    assert redis_client.llen(keys.wake(name)) == 1
    assert worker.claim() == ["a"]


def test_many_sets_of_others_do_not_hide_ours(redis_client: redis.Redis) -> None:
    for number in range(150):
        put(redis_client, f"other-{number}", seconds_ago=60, labels=[f"rack={number}"])
    put(redis_client, "ours", labels=["rack!=0"])
    put(redis_client, "ours-2", seconds_ago=1, labels=["rack!=1"])
    assert Worker(redis_client).claim() == ["ours-2", "ours"]


def test_heads_that_somebody_damaged_stop_nobody_elses_jobs(redis_client: redis.Redis) -> None:
    put(redis_client, "plain")
    put(redis_client, "a", cpus=1, priority="high")
    redis_client.delete(keys.heads("default", 10))
    redis_client.set(keys.heads("default", 10), "garbage")
    worker = Worker(redis_client)
    assert worker.claim() == ["plain"]
    ring(redis_client)
    assert worker.claim() == ["a"], "they are a hint, and made anew"


# --- queues ------------------------------------------------------------------------------------------


def test_queues_with_weights_have_their_share_and_those_without_strict_order(
    redis_client: redis.Redis,
) -> None:
    for number in range(60):
        put(redis_client, f"a{number}", "a")
        put(redis_client, f"b{number}", "b", cpus=1)
    random.seed(1)
    weighted = Worker(redis_client, "w0", "a", "b", slots=1, weights=(3, 1))
    first = [weighted.claim_and_finish()[0] for _ in range(50)]
    assert first.count("a") > first.count("b") > 0
    strict = Worker(redis_client, "w1", "b", "a", slots=1)
    left = 60 - first.count("b")
    assert {strict.claim_and_finish()[0] for _ in range(left)} == {"b"}
    assert strict.claim_and_finish()[0] == "a"


# --- sets that nobody uses ---------------------------------------------------------------------------


def test_a_set_is_forgotten_once_nothing_was_left_of_it_for_an_hour(redis_client: redis.Redis) -> None:
    put(redis_client, "a", cpus=1, priority="high")
    name = parse({"cpus": 1, "priority": "high"}).queue_of("default")
    worker = Worker(redis_client)
    patient, at_once = chores.RetireSets(), chores.RetireSets(patience_seconds=0)
    at_once.run(redis_client)
    assert at_once.run(redis_client) == 0, "a job waits"
    worker.claim_and_finish()
    at_once.run(redis_client)
    assert at_once.run(redis_client) == 0, "its result is kept"
    redis_client.delete(keys.of("finished", name))
    assert patient.run(redis_client) + patient.run(redis_client) == 0
    version = sets.known(redis_client, ["default"]).version
    ((idle, since),) = redis_client.hgetall(keys.SETS_IDLE).items()
    redis_client.hset(keys.SETS_IDLE, idle, int(since) - 3_600_000)
    assert patient.run(redis_client) == 1
    known = sets.known(redis_client, ["default"])
    assert (known.version, known.sets["default"]) == (version + 1, {})
    left = [key for key in redis_client.scan_iter() if name.partition("@")[2] in key.decode()]
    assert left == []
    assert not redis_client.exists(keys.of("served", "default"), keys.SETS_IDLE)
    assert keys.queue(name).encode() not in redis_client.smembers(keys.QUEUES)
    put(redis_client, "b", cpus=1, priority="high")
    assert worker.claim() == ["b"], "and known again when it is asked for again"


def test_a_worker_that_leaves_takes_the_tokens_of_empty_sublists_along(redis_client: redis.Redis) -> None:
    put(redis_client, "a", cpus=1)
    name = parse({"cpus": 1}).queue_of("default")
    worker = Worker(redis_client)
    worker.claim_and_finish()
    redis_client.rpush(keys.wake(name), "1")
    assert worker.who.retire(redis_client)
    assert not redis_client.exists(keys.wake(name))
