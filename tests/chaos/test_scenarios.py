"""Plain scenarios that a storm may miss."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import partial

from broker import keys
from tests.chaos.evidence import Evidence
from tests.chaos.harness import Child, Harness, digest, rq_counts
from tests.chaos.harness import counts as our_counts
from tests.chaos.history import read

#: for workers of which one is to lose its jobs, and the others none, however busy the machine
CALMER = {"lease_seconds": 5.0}
Acquit = Callable[[Evidence], None]


def outcomes(harness: Harness, job: str) -> list[str]:
    """What became of each attempt, by the journal."""
    return [record.outcome for _, record in harness.evidence().records(job)]


def pause(harness: Harness, worker: Child, *, frozen: bool) -> Callable[[], None]:
    """SIGSTOP to a worker, or to it and all its processes; returns how to let them go on."""
    below = [process.pid for process in harness.descendants(worker)] if frozen else []
    harness.history.note("stopped", worker=worker.who, seconds=60.0, frozen=frozen)
    for pid in (worker.pid, *below):
        harness.signal(pid, signal.SIGSTOP)
    return lambda: resume(harness, [*below, worker.pid])


def resume(harness: Harness, pids: Sequence[int]) -> None:
    for pid in pids:
        harness.signal(pid, signal.SIGCONT)


def test_workers_that_are_stopped_for_longer_than_their_lease(harness: Harness, acquit: Acquit) -> None:
    """One alone, whose sidecar ends its job in time, and one with all its processes, as if its host froze."""
    with harness.client() as client:
        names = ("alone", "frozen")
        stopped = {name: harness.worker(f"w-{name}", queues=(name,), settings=CALMER) for name in names}
        job = {name: harness.submit(client, 7.0, queue=name)[0] for name in names}
        harness.until(lambda: all(harness.runs(job[name]) for name in names), "they run")
        go_on = [pause(harness, stopped[name], frozen=name == "frozen") for name in names]
        heir = harness.worker("w-heir", queues=names, slots=2, settings=CALMER)
        harness.until(lambda: all(len(harness.runs(job[name])) == 2 for name in names), "another runs them")
        for let_go in go_on:
            let_go()
        harness.until(lambda: harness.have_ended(client, list(job.values())), "they ended")
        harness.drain([*stopped.values(), heir])
    for name in names:
        assert [run["worker"] for run in harness.runs(job[name])] == [f"w-{name}", "w-heir"]
        assert sorted(outcomes(harness, job[name])) == ["finished", "lost"]
    acquit(harness.evidence())


def test_a_worker_that_is_told_to_stop_when_it_has_just_registered_leaves_nothing(
    harness: Harness, acquit: Acquit
) -> None:
    # the first is answered with NOSCRIPT by a Redis that has never seen one
    worker = harness.worker("w1", failpoint=("register#2", "term"))
    assert harness.wait(worker) == 0, harness.log("w1")
    assert [event["event"] for event in read(harness.path)].count("failpoint") == 1
    harness.history.note("drained")
    acquit(harness.evidence())


def test_of_three_workers_of_one_name_one_lives(harness: Harness, acquit: Acquit) -> None:
    with harness.client() as client:
        first = harness.worker("w1")
        harness.until_registered(client, first)
        others = [harness.worker("w1", output_dir=str(harness.folder / place)) for place in ("work", "else")]
        assert [harness.wait(other) for other in others] == [1, 1]
        ids = harness.submit(client, 0.0, 0.2)
        harness.until(lambda: harness.have_ended(client, ids), "the jobs ended")
        assert first.status is None
        harness.drain([first])
    acquit(harness.evidence())


def test_rq_info_changes_nothing_while_leases_run_out(harness: Harness, acquit: Acquit) -> None:
    with harness.client() as client:
        dead = harness.worker("w1", slots=3, settings=CALMER)
        ids = harness.submit(client, 6.0, 6.0, 6.0, 0.0)
        harness.until(lambda: all(harness.runs(job) for job in ids[:3]), "they run")
        harness.kill(dead)
        late = lambda: client.zcount(keys.LEASES, "-inf", client.time()[0] * 1000) == 3  # noqa: E731
        harness.until(late, "their leases have run out")
        harness.until(lambda: not client.exists(keys.rq_worker("w1"), keys.CHORES), "all else has, too")
        before = without_workers(digest(client))
        reader = harness.fork("rq-info", "reader", url=harness.redis.url, pause=0.0, times=100)
        assert harness.wait(reader) == 0, harness.log("reader")
        harness.history.note("rq-info", before=before, after=without_workers(digest(client)))
        harness.history.note("counted", rq=rq_counts(harness.redis.url), ours=our_counts(client))
        worker = harness.worker("w1", slots=3, settings=CALMER)
        harness.until(lambda: harness.have_ended(client, ids), "all ended")
        harness.drain([worker])
    assert {job: outcomes(harness, job) for job in ids[:3]} == {job: ["lost", "finished"] for job in ids[:3]}
    acquit(harness.evidence())


def without_workers(found: dict[str, str]) -> dict[str, str]:
    """Less RQ's lists of workers: those that are gone it strikes off, as it should; and what runs out."""
    passing = ("rq:workers", keys.RECOVERY_NOT_BEFORE, keys.LOSSES_NOT_BEFORE)
    return {key: value for key, value in found.items() if not key.startswith(passing)}


def some_run(harness: Harness, ids: Sequence[str]) -> bool:
    return sum(len(harness.runs(job)) for job in ids) > 4


def test_every_connection_cut_while_all_slots_end_at_once(harness: Harness, acquit: Acquit) -> None:
    with harness.client() as client:
        workers = [harness.worker(f"w{number}", slots=4) for number in range(2)]
        for worker in workers:
            harness.until_registered(client, worker)
        for _ in range(4):
            ids = harness.submit(client, *[0.1] * 16)
            harness.until(partial(some_run, harness, ids), "some run")
            client.client_kill_filter(_type="normal", skipme=True)
            harness.until(partial(harness.have_ended, client, ids), "they ended")
        harness.drain(workers)
    acquit(harness.evidence())


def test_the_last_worker_to_leave_takes_the_token_of_an_empty_queue_along(harness: Harness) -> None:
    with harness.client() as client:
        worker = harness.worker("w1", queues=("empty", "full"))
        harness.until_registered(client, worker)
        client.set(keys.worker_drain("w1"), 1)  # so that it takes none itself
        for queue in ("empty", "full"):
            client.rpush(keys.wake(queue), "1")
        client.rpush(keys.queue("full"), "job")
        harness.kill(worker, signal.SIGTERM)
        assert harness.wait(worker) == 0
        assert client.exists(keys.wake("empty"), keys.wake("full")) == 1
