"""Jobs in line for busy executors: begun once or taken back, and never harmed by who is before them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import rq

from broker import failures, jobs, keys
from broker.requirements import Offer
from broker.worker_settings import WorkerSettings
from fleet.attempt import CommandContext
from fleet.executors import Execution, Outcome
from fleet.limits import Limits
from fleet.memory import Memory
from fleet.outputs import Folders, Outputs, WorkingFolders
from fleet.placement import Placement
from fleet.resources import Resources
from fleet.room import Room
from fleet.sampler import Sampler
from fleet.slots import Slots
from tests.integration import test_executors
from tests.integration.test_claims import claim, send, session
from tests.integration.test_executors import Bench, returned, wait

make_bench = test_executors.make_bench


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is handed back, or thought slow, because this machine is."""
    monkeypatch.setattr("fleet.executions._SLOW_SECONDS", 60)
    monkeypatch.setattr("fleet.slots.AHEAD_SECONDS", 60)


@pytest.fixture
def bench(make_bench) -> Bench:
    """A pool with one executor, which has run a job and waits."""
    made = make_bench()
    made.run("nothing")
    return made


def line_up(bench: Bench, func: str, *args: Any) -> Execution:
    """One more job behind what runs."""
    found = try_to_line_up(bench, func, *args)
    assert found is not None
    return found


def try_to_line_up(bench: Bench, func: str, *args: Any) -> Execution | None:
    found = bench.pool.line_up(*bench.fields(func, *args), "e1")
    bench.pool.send()
    return found


def finish(bench: Bench, *executions: Execution) -> list[Any]:
    """What they returned, in the end."""
    found = []
    for one in executions:
        found.append(returned(outcome_of(one)))
        bench.pool.release(one)
    return found


def outcome_of(execution: Execution) -> Outcome:
    """Its end, which may have come with that of another."""
    return execution.outcome or wait(execution)


def executor_of(execution: Execution) -> int:
    assert execution.pid is not None
    return execution.pid


# --- in the pool -----------------------------------------------------------------------------------


def test_a_line_is_run_in_order_by_one_process(bench: Bench, tmp_path: Path) -> None:
    first = bench.start("wait_for", tmp_path / "go")
    line = [line_up(bench, "state") for _ in range(5)]
    assert all(one.begun_at is None for one in line)
    (tmp_path / "go").touch()
    assert finish(bench, first, *line) == [None, 1, 2, 3, 4, 5]
    assert len(bench.spawned) == 1


def test_what_is_taken_back_is_never_begun(bench: Bench, tmp_path: Path) -> None:
    first = bench.start("wait_for", tmp_path / "go")
    line = [line_up(bench, "touch", tmp_path / f"{number}") for number in range(3)]
    assert bench.pool.withdraw() == line
    last = line_up(bench, "add", 1)
    (tmp_path / "go").touch()
    assert finish(bench, first, last) == [None, 1]
    assert not list(tmp_path.glob("[0-9]"))


def test_whose_turn_has_come_stays_though_its_executor_is_slow_to_begin(bench: Bench) -> None:
    os.kill(bench.spawned[0], signal.SIGSTOP)
    first, second = bench.start("add", 1), line_up(bench, "add", 2)
    assert bench.pool.withdraw() == [second]
    os.kill(bench.spawned[0], signal.SIGCONT)
    assert finish(bench, first) == [1]


def test_an_executor_that_dies_leaves_those_in_line_to_others(bench: Bench) -> None:
    os.kill(bench.spawned[0], signal.SIGSTOP)
    first = bench.start("kill_self", signal.SIGKILL)
    line = [line_up(bench, "add", 1) for _ in range(3)]
    os.kill(bench.spawned[0], signal.SIGCONT)
    assert wait(first).signal == signal.SIGKILL
    assert bench.pool.stranded() == line
    bench.pool.release(first)


def test_a_job_whose_executor_died_before_it_began_has_not_failed(bench: Bench) -> None:
    os.kill(bench.spawned[0], signal.SIGSTOP)
    first, second = bench.start("add", 1), line_up(bench, "add", 2)
    os.kill(bench.spawned[0], signal.SIGKILL)
    assert wait(first).unbegun
    assert bench.pool.stranded() == [second]
    bench.pool.release(first)


def test_a_job_that_was_begun_behind_noise_is_not_begun_again(
    bench: Bench, tmp_path: Path, eventually
) -> None:
    noisy = bench.start("babble")
    begun, waiting = line_up(bench, "touch_and_nap", tmp_path / "begun"), line_up(bench, "add", 1)
    eventually((tmp_path / "begun").exists)
    assert wait(noisy).kind == "died"
    assert outcome_of(begun).kind == "died"
    assert bench.pool.stranded() == [waiting]
    bench.pool.release(noisy)


def test_a_job_that_closes_all_descriptors_harms_nobody_in_line(bench: Bench) -> None:
    os.kill(bench.spawned[0], signal.SIGSTOP)
    first = bench.start("spill", 0)
    line = [line_up(bench, "add", 1) for _ in range(2)]
    os.kill(bench.spawned[0], signal.SIGCONT)
    assert wait(first).kind == "died"
    assert bench.pool.stranded() == line
    bench.pool.release(first)


def test_a_signal_for_a_job_that_just_ended_does_not_hit_the_next(
    bench: Bench, tmp_path: Path, eventually
) -> None:
    first = bench.start("add", 1)
    second = line_up(bench, "touch", tmp_path / "begun")
    third = line_up(bench, "wait_for", tmp_path / "go")
    eventually((tmp_path / "begun").exists)
    first.kill()
    assert outcome_of(first).kind == "finished"
    (tmp_path / "go").touch()
    assert outcome_of(second).kind == "finished"
    if third not in bench.pool.stranded():
        assert outcome_of(third).kind == "finished"


def test_killing_what_runs_keeps_those_in_line_from_being_begun(bench: Bench, tmp_path: Path) -> None:
    first = bench.start("nap", 100)
    second = line_up(bench, "touch", tmp_path / "begun")
    first.kill()
    assert wait(first).signal == signal.SIGKILL
    assert bench.pool.stranded() == [second]
    bench.pool.release(first)
    assert not (tmp_path / "begun").exists()


def test_no_executor_gets_more_jobs_in_line_than_it_may_run(make_bench) -> None:
    bench = make_bench(max_jobs=3)
    bench.run("nothing")
    first, second = bench.start("add", 1), line_up(bench, "add", 2)
    assert try_to_line_up(bench, "add", 3) is None
    assert finish(bench, first, second) == [1, 2]


def test_an_executor_that_grew_too_large_runs_no_more_than_has_its_turn(make_bench, tmp_path: Path) -> None:
    bench = make_bench(max_rss_bytes=300 << 20)
    bench.run("nothing")
    first = bench.start("hoard", 400 << 20)
    second, third = line_up(bench, "wait_for", tmp_path / "go"), line_up(bench, "add", 1)
    bench.finish(first)
    assert bench.pool.stranded() == [third]
    (tmp_path / "go").touch()
    bench.finish(second)
    assert bench.value("pid") == bench.spawned[1]


def test_nothing_is_put_behind_a_job_that_is_not_short(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.start("wait_for", tmp_path / "go")
    monkeypatch.setattr("fleet.executions._SLOW_SECONDS", 0)
    assert try_to_line_up(bench, "add", 1) is None
    (tmp_path / "go").touch()
    finish(bench, first)


def test_forked_jobs_stand_in_no_line(make_bench, tmp_path: Path) -> None:
    bench = make_bench(mode="fork")
    bench.run("nothing")
    first = bench.start("wait_for", tmp_path / "go")
    assert try_to_line_up(bench, "add", 1) is None
    (tmp_path / "go").touch()
    finish(bench, first)


def test_large_values_pass_one_behind_the_other(bench: Bench) -> None:
    size = 20 << 20
    first = bench.start("many", size)
    line = [line_up(bench, "many", size), line_up(bench, "add", 1), line_up(bench, "size", "x" * size)]
    values = finish(bench, first, *line)
    assert [len(values[0]), len(values[1]), *values[2:]] == [size, size, 1, size]


def test_a_job_that_forks_and_returns_twice_does_not_disturb_the_line(bench: Bench) -> None:
    first = bench.start("fork_and_return")
    line = [line_up(bench, "state") for _ in range(3)]
    assert finish(bench, first, *line) == [None, 1, 2, 3]


# --- in the slots of a worker ----------------------------------------------------------------------


class CalmGuard:
    """A sidecar that has nothing to say."""

    late = False

    def add(self, pgid: int) -> None: ...
    def remove(self, pgid: int) -> None: ...
    def killed(self) -> set[int]:
        return set()

    def is_late(self) -> bool:
        return self.late


class Desk:
    """Slots that the test turns by itself, as the loop does."""

    def __init__(self, bench: Bench, client: redis.Redis, folder: Path, count: int = 1) -> None:
        self.bench, self.client = bench, client
        self.who = session(client, "w0", settings=WorkerSettings())
        folders = Folders(str(folder / "out-of-slots"))
        folders.create()
        null = os.open(os.devnull, os.O_RDONLY)
        context = CommandContext(
            folders, Outputs(folders), WorkingFolders(folders, "w0"), {}, null, null, Memory(), Limits(), 1000
        )
        self.guard = CalmGuard()
        guard: Any = self.guard
        settings, room = self.who.settings, Room(Resources(count, 0), count)
        placement = Placement(["default"], Offer(cpus=count, slots=count), room, settings)
        self.slots = Slots(
            count, settings, context, bench.pool, guard, placement, Sampler(lambda _: (), lambda _: None)
        )

    def take(self, *calls: tuple[Any, ...]) -> list[str]:
        """Enqueue these and claim them all; returns their ids."""
        queue = rq.Queue("default", connection=self.client)
        ids = [queue.enqueue(f"jobs_of_test.{func}", args=args).id for func, *args in calls]
        claims = claim(self.client, self.who, len(ids))
        self.slots.admit(claims)
        self.slots.take(claims)
        self.slots.start_waiting()
        return ids

    def turn(self) -> dict[str, str]:
        """Look once; returns what ended so far, job -> outcome."""
        for lane in list(self.bench.pool._busy):
            lane.look()
        self.slots.collect(redis_is_away=False)
        self.slots.start_waiting()
        return {end.claim.job_id: end.outcome for end in self.slots.ends}

    def report(self) -> None:
        assert all(send(self.client, self.who, self.slots.ends, 0).accepted)


@pytest.fixture
def desk(bench: Bench, redis_client: redis.Redis, tmp_path: Path) -> Desk:
    """One slot, and one executor that is warm."""
    redis_client.flushall()
    return Desk(bench, redis_client, tmp_path)


def test_a_job_in_line_that_is_stopped_is_not_run(desk: Desk, tmp_path: Path, eventually) -> None:
    first, second, third = desk.take(
        ("wait_for", tmp_path / "go"), ("touch", tmp_path / "second"), ("touch", tmp_path / "third")
    )
    desk.slots.stop_job(second)
    (tmp_path / "go").touch()
    ended = eventually(lambda: len(desk.turn()) == 3 and desk.turn())
    assert ended == {first: "finished", second: "stopped", third: "finished"}
    assert not (tmp_path / "second").exists()
    desk.report()


def test_a_job_that_began_unheard_is_stopped_all_the_same(desk: Desk, tmp_path: Path, eventually) -> None:
    first, second, third = desk.take(("add", 1), ("touch_and_nap", tmp_path / "second"), ("add", 2))
    eventually((tmp_path / "second").exists)
    desk.slots.stop_job(second)
    ended = eventually(lambda: len(desk.turn()) == 3 and desk.turn())
    assert ended == {first: "finished", second: "stopped", third: "finished"}


def test_a_job_that_ended_unheard_takes_nobody_with_it_when_it_is_stopped(
    desk: Desk, tmp_path: Path, eventually
) -> None:
    first, second = desk.take(("add", 1), ("touch", tmp_path / "second"))
    eventually((tmp_path / "second").exists)
    desk.slots.stop_job(first)
    assert desk.slots.next_time() <= time.monotonic(), "it is collected at once"
    ended = eventually(lambda: len(desk.turn()) == 2 and desk.turn())
    assert ended == {first: "finished", second: "finished"}


def test_a_job_in_line_whose_lease_is_lost_is_not_run(desk: Desk, tmp_path: Path, eventually) -> None:
    first, second = desk.take(("wait_for", tmp_path / "go"), ("touch", tmp_path / "second"))
    lease = next(lease for lease, job in desk.slots.leases().items() if job == second)
    assert desk.slots.get(lease) is None
    desk.slots.drop_waiting(lease, "lost", "lost before it began")
    (tmp_path / "go").touch()
    ended = eventually(lambda: len(desk.turn()) == 2 and desk.turn())
    assert ended == {first: "finished", second: "lost"}
    assert not (tmp_path / "second").exists()


def test_those_behind_a_job_that_kills_its_executor_are_run_by_another(desk: Desk, eventually) -> None:
    ids = desk.take(("add", 1), ("kill_self", signal.SIGKILL), ("add", 2), ("add", 3))
    ended = eventually(lambda: len(desk.turn()) == 4 and desk.turn())
    assert [ended[job_id] for job_id in ids] == ["finished", "failed", "finished", "finished"]


def test_a_line_is_handed_back_in_order_when_the_leases_may_be_gone(
    desk: Desk, tmp_path: Path, eventually
) -> None:
    ids = desk.take(("wait_for", tmp_path / "go"), *[("add", number) for number in range(4)])
    desk.guard.late = True
    assert desk.turn() == dict.fromkeys(ids[1:], "handed-back")
    desk.report()
    assert [one.decode() for one in desk.client.lrange(keys.queue("default"), 0, -1)] == ids[1:]
    (tmp_path / "go").touch()
    assert eventually(lambda: desk.turn().get(ids[0])) == "finished"


def test_a_free_slot_begins_a_job_however_late_the_worker_gets_to_it(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually
) -> None:
    monkeypatch.setattr("fleet.slots.AHEAD_SECONDS", -1.0)  # as if it had waited for a processor
    first, *others = desk.take(("wait_for", tmp_path / "go"), ("add", 1), ("add", 2))
    assert desk.turn() == dict.fromkeys(others, "handed-back")
    (tmp_path / "go").touch()
    assert eventually(lambda: desk.turn().get(first)) == "finished"


def test_time_in_line_is_no_time_of_the_job(desk: Desk, tmp_path: Path, eventually) -> None:
    start = time.monotonic()
    first, second = desk.take(("wait_for", tmp_path / "one"), ("wait_for", tmp_path / "two"))
    (tmp_path / "one").touch()
    eventually(lambda: desk.turn().get(first))
    finished = next(end for end in desk.slots.ends if end.claim.job_id == first)
    (running,) = list(desk.slots)
    assert running.claim.job_id == second
    assert finished.duration_seconds is not None
    assert running.duration() <= time.monotonic() - start - finished.duration_seconds + 0.01
    assert running.started > start + finished.duration_seconds - 0.01
    (tmp_path / "two").touch()
    eventually(lambda: desk.turn().get(second))


def test_a_value_larger_than_redis_is_to_keep_fails_its_job_alone(desk: Desk, eventually) -> None:
    large, small = desk.take(("many", 2000), ("add", 1))
    eventually(lambda: len(desk.turn()) == 2)
    ends = {end.claim.job_id: end for end in desk.slots.ends}
    assert ends[large].outcome == "failed"
    reason = "bytes, more than worker.max_result_bytes; let the job write a file and return its path"
    assert ends[large].reason.startswith("ResultTooLarge: 20")
    assert ends[large].reason.endswith(reason)
    assert ends[large].return_value is None
    assert ends[small].outcome == "finished"
    desk.report()


def test_a_traceback_longer_than_redis_is_to_keep_lacks_its_middle(desk: Desk, eventually) -> None:
    (job_id,) = desk.take(("fail", "begin" + "x" * 5000 + "end"))
    eventually(desk.turn)
    text = failures.decoded(desk.slots.ends[0].exc_string)
    assert text.startswith("Traceback")
    assert text.strip().endswith("xend")
    assert len(text) < 1100
    desk.report()
    assert jobs.show(desk.client, job_id).state == "failed"


def test_a_free_slot_takes_from_the_line_of_another(
    make_bench, redis_client: redis.Redis, tmp_path: Path, eventually
) -> None:
    bench = make_bench(max_idle=2)
    warm = [bench.start("nothing"), bench.start("nothing")]
    finish(bench, *warm)
    redis_client.flushall()
    desk = Desk(bench, redis_client, tmp_path, count=2)
    long, *_ = desk.take(("wait_for", tmp_path / "go"), *[("add", number) for number in range(7)])
    eventually(lambda: len(desk.turn()) == 7, message="nobody waits for the one that is long")
    assert long not in desk.turn()
    (tmp_path / "go").touch()
    eventually(lambda: long in desk.turn())


# --- with whole workers ----------------------------------------------------------------------------


def enqueue_notes(client: redis.Redis, path: Path, first: int, end: int) -> list[str]:
    """Jobs that write their number into a file, a line each."""
    queue = rq.Queue("default", connection=client)
    make = rq.Queue.prepare_data
    rows = [
        make("rq_jobs.note", args=(str(path), str(number)), result_ttl=500) for number in range(first, end)
    ]
    return [job.id for job in queue.enqueue_many(rows)]


def noted(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def test_sigterm_with_full_lines_runs_nothing_twice_and_keeps_the_order(workers, tmp_path: Path) -> None:
    path, pid = tmp_path / "notes", tmp_path / "pid"
    ids = enqueue_notes(workers.client, path, 0, 300)
    rq.Queue("default", connection=workers.client).enqueue("rq_jobs.end_process", str(pid))
    ids += enqueue_notes(workers.client, path, 300, 4000)
    worker = workers.start("w0", slots=2, wait=False)
    pid.write_text(str(worker.pid))
    assert worker.wait(60) == 0
    done = noted(path)
    # of the 300 some may be in the other executor's line still, and go back
    assert 200 <= len(done) == len(set(done)) < 4000
    states = jobs.states(workers.client, ids)
    assert {number for number, job_id in enumerate(ids) if states[job_id] == "finished"} == set(done)
    left = [one.decode() for one in workers.client.lrange(keys.queue("default"), 0, -1)]
    assert left == [job_id for job_id in ids if states[job_id] == "queued"]
    workers.assert_clean()


def test_executors_that_die_with_full_lines_cost_what_they_ran_and_no_more(workers, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    ids = enqueue_notes(workers.client, path, 0, 3000)
    worker = workers.start("w0", slots=2)
    kills = 0
    for goal in range(300, 2100, 300):
        workers.until(lambda goal=goal: len(noted(path)) > goal)
        for child in psutil.Process(worker.pid).children():
            if "executor_main" in " ".join(child.cmdline()):
                child.kill()
                kills += 1
                break
    views = workers.wait(ids)
    done = noted(path)
    assert len(done) == len(set(done)), "no job was begun twice"
    failed = [view for view in views if view.state != "finished"]
    assert len(failed) <= kills
    workers.assert_clean()
