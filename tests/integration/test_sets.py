"""Jobs that ask for something of their worker, with real workers: who hears of them, and who takes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rq

from broker import Queue, control, jobs, keys, sets
from broker.requirements import parse
from tests.integration.conftest import HASTY, Workers

#: beats are far apart: what happens sooner did not wait for one
SLOW_BEAT = {"heartbeat_seconds": 300.0, "lease_seconds": 600.0}
#: two CPUs, whatever the machine has, and a slot for each
TWO = {"slots": 2, "resources": {"cpus": 2, "memory_bytes": 2**30}}


def queue_for(workers: Workers, **said: Any) -> Queue:
    """The list of jobs that ask for this."""
    need = parse(said)
    sets.add(workers.client, "default", need)
    return Queue(need.queue_of("default"), connection=workers.client)


def name_of(**said: Any) -> str:
    return parse(said).queue_of("default")


def put(workers: Workers, **said: Any) -> str:
    return queue_for(workers, **said).enqueue("rq_jobs.add", 1, 1).id


def running(workers: Workers, folder: Path, name: str, **said: Any) -> str:
    """A job that runs until the file `name` is there; it has begun."""
    began = folder / f"{name}.began"
    job = queue_for(workers, **said).enqueue("rq_jobs.note_and_wait", str(began), "x", str(folder / name))
    workers.until(began.exists, f"{name} runs")
    return job.id


def did_a_plain_job(workers: Workers) -> bool:
    """A worker that has room did one, and so has heard whatever was said before."""
    job = workers.submit("true")
    return workers.wait([job])[0].state == "finished"


# --- who hears of a set ------------------------------------------------------------------------------


def test_an_idle_worker_hears_of_a_new_set_and_takes_its_jobs_at_once(workers: Workers) -> None:
    workers.start("w0", labels={"gpu_type": "a100-40g"}, settings=SLOW_BEAT)
    did_a_plain_job(workers)
    for rule in ("gpu_type=a100*", "gpu_type!=v100", "host=here"):
        assert [job.state for job in workers.wait([put(workers, labels=[rule])])] == ["finished"]
    workers.assert_clean()


def test_what_a_lost_message_said_is_learned_with_the_next_beat(workers: Workers) -> None:
    workers.start("w0")
    did_a_plain_job(workers)
    need = parse({"cpus": 1})
    workers.client.hset(keys.sets("default"), need.digest(), need.canonical())
    workers.client.incr(keys.SETS_VERSION)
    job = Queue(need.queue_of("default"), connection=workers.client).enqueue("rq_jobs.add", 1, 1)
    assert workers.wait([job.id])[0].state == "finished"


def test_what_was_said_while_the_worker_was_cut_off_is_learned_when_it_is_back(workers: Workers) -> None:
    workers.start("w0", settings=SLOW_BEAT)
    did_a_plain_job(workers)
    for kind in ("pubsub", "normal"):
        workers.client.client_kill_filter(_type=kind, skipme=True)
    assert workers.wait([put(workers, cpus=1)])[0].state == "finished"


def test_sets_that_come_after_redis_lost_all_are_heard_of_though_as_many_were_known(workers: Workers) -> None:
    workers.start("w0", settings=SLOW_BEAT)
    for sets_known in (1, 3):
        job_ids = [put(workers, cpus=1, labels=[f"x{number}!=y"]) for number in range(sets_known)]
        assert {job.state for job in workers.wait(job_ids)} == {"finished"}
        workers.client.flushall()
        others = [put(workers, cpus=1, labels=[f"z{number}!=y"]) for number in range(sets_known)]
        assert {job.state for job in workers.wait(others)} == {"finished"}


def test_a_worker_that_registers_again_knows_the_sets_that_redis_has_then(workers: Workers) -> None:
    workers.start("w0")
    assert workers.wait([put(workers, cpus=1)])[0].state == "finished"
    need, version = parse({"labels": ["x!=y"]}), workers.client.get(keys.SETS_VERSION)
    with workers.client.pipeline() as pipe:  # a state of before, with a version that is as it was
        pipe.flushall()
        pipe.hset(keys.sets("default"), need.digest(), need.canonical())
        pipe.set(keys.SETS_VERSION, version)
        pipe.execute()
    job = Queue(need.queue_of("default"), connection=workers.client).enqueue("rq_jobs.add", 1, 1)
    assert workers.wait([job.id])[0].state == "finished"


def test_a_worker_that_starts_later_takes_what_waits(workers: Workers) -> None:
    workers.start("w0", settings=SLOW_BEAT)
    job = put(workers, labels=["rack=7"])
    did_a_plain_job(workers)
    assert workers.state(job) == "queued"
    workers.start("w1", labels={"rack": "7"}, settings=SLOW_BEAT)
    assert workers.wait([job])[0].worker == "w1"


def test_a_label_that_an_operator_gives_lets_a_worker_take_what_waits(workers: Workers) -> None:
    workers.start("w0", settings=SLOW_BEAT)
    job = put(workers, labels=["rack=7"])
    did_a_plain_job(workers)
    assert workers.state(job) == "queued"
    control.label(workers.client, ["w0"], {"rack": "7"}, [])
    assert workers.wait([job])[0].state == "finished"


def test_a_plain_producer_of_rq_is_rung_for(workers: Workers) -> None:
    workers.start("w0", settings=SLOW_BEAT)
    name = queue_for(workers, cpus=1).name
    did_a_plain_job(workers)
    job = rq.Queue(name, connection=workers.client).enqueue("rq_jobs.add", 1, 1)
    assert workers.wait([job.id])[0].state == "finished"


def test_a_burst_ends_when_nothing_is_left_that_it_could_take(workers: Workers) -> None:
    mine, others = put(workers, cpus=1), put(workers, labels=["rack=7"])
    worker = workers.start("w0", burst=True, wait=False)
    assert worker.wait(60) == 0
    assert (workers.state(mine), workers.state(others)) == ("finished", "queued")


def test_a_worker_until_done_waits_for_the_jobs_of_sublists(workers: Workers, tmp_path: Path) -> None:
    job = put(workers, labels=["rack=7"])
    worker = workers.start("w0", until_done=True)
    did_a_plain_job(workers)
    assert jobs.unfinished(workers.client, ["default"]) == 1
    assert worker.poll() is None
    control.cancel(workers.client, job)
    assert worker.wait(60) == 0


# --- tokens ------------------------------------------------------------------------------------------


def tokens(workers: Workers, **said: Any) -> int:
    found: Any = workers.client.llen(keys.wake(name_of(**said)))
    return int(found)


def test_a_worker_that_does_not_match_takes_no_token(workers: Workers) -> None:
    workers.start("small", **TWO, settings=SLOW_BEAT)
    job = put(workers, cpus=4)
    did_a_plain_job(workers)
    assert tokens(workers, cpus=4) == 1
    workers.start("large", slots=2, resources={"cpus": 4, "memory_bytes": 2**30}, settings=SLOW_BEAT)
    assert workers.wait([job])[0].worker == "large"


def test_a_worker_without_room_leaves_the_token_to_others(workers: Workers, tmp_path: Path) -> None:
    workers.start("busy", **TWO, settings=SLOW_BEAT)
    one = running(workers, tmp_path, "one", cpus=1)
    large = put(workers, cpus=2)
    did_a_plain_job(workers)
    assert (workers.state(large), tokens(workers, cpus=2)) == ("queued", 1)
    calls = evalsha_calls(workers)
    began = workers.client.time()[0]
    workers.until(lambda: workers.client.time()[0] > began + 2, "two seconds have passed")
    assert evalsha_calls(workers) - calls < 200, "it does not take the token again and again"
    workers.start("idle", **TWO, settings=SLOW_BEAT)
    assert workers.wait([large])[0].worker == "idle"
    (tmp_path / "one").touch()
    assert workers.wait([one])[0].state == "finished"


def evalsha_calls(workers: Workers) -> int:
    return int(workers.client.info("commandstats")["cmdstat_evalsha"]["calls"])


def test_room_that_comes_free_is_filled_at_once(workers: Workers, tmp_path: Path) -> None:
    workers.start("w0", **TWO, settings=SLOW_BEAT)
    one = running(workers, tmp_path, "one", cpus=1)
    large = put(workers, cpus=2)
    did_a_plain_job(workers)
    (tmp_path / "one").touch()
    assert [job.state for job in workers.wait([one, large])] == ["finished", "finished"]
    assert workers.wait([put(workers, cpus=2)])[0].state == "finished"
    workers.assert_clean()


# --- what fits ---------------------------------------------------------------------------------------


def test_a_large_job_starts_although_small_ones_keep_coming(workers: Workers) -> None:
    settings = SLOW_BEAT | {"reserve_after_seconds": 0.5}
    workers.start("w0", **TWO, settings=settings)
    small = queue_for(workers, cpus=1)
    sleep = ("time.sleep", 0.1)

    def keep_them_coming() -> bool:
        while len(small) < 6:
            small.enqueue(*sleep)
        return workers.state(large) == "finished"

    for _ in range(6):
        small.enqueue(*sleep)
    large = put(workers, cpus=2)
    workers.until(keep_them_coming, "the large one ran")


def test_an_exclusive_job_is_alone(workers: Workers, tmp_path: Path) -> None:
    workers.start("w0", slots=4, resources={"cpus": 4, "memory_bytes": 2**30}, settings=SLOW_BEAT)
    alone = running(workers, tmp_path, "alone", exclusive=True)
    others = [put(workers, cpus=1), workers.submit("true")]
    ring_again(workers)
    assert {workers.state(job) for job in others} == {"queued"}
    (tmp_path / "alone").touch()
    assert {job.state for job in workers.wait([alone, *others])} == {"finished"}


def ring_again(workers: Workers) -> None:
    """The chores have looked at all queues twice."""
    seen = [workers.client.get(keys.CHORES_SEEN) for _ in range(2)]
    for _ in range(2):
        seen[0] = workers.client.get(keys.CHORES_SEEN)
        workers.until(lambda: workers.client.get(keys.CHORES_SEEN) != seen[0], "chores were done")


# --- ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_comes_back_is_first_in_its_own_list(
    workers: Workers, tmp_path: Path, number: int
) -> None:
    worker = workers.start("w0", **TWO, settings=HASTY | {"stop_grace_seconds": 0.1})
    job = running(workers, tmp_path, "gate", cpus=2)
    behind = put(workers, cpus=2)
    os.kill(worker.pid, number)
    worker.wait(60)
    watcher = workers.start("w1", queues=("other",), settings=HASTY)
    expected = [job.encode(), behind.encode()]
    workers.until(lambda: workers.client.lrange(keys.queue(name_of(cpus=2)), 0, -1) == expected, "back")
    (tmp_path / "gate").touch()
    workers.start("w2", **TWO, settings=HASTY)
    assert [one.state for one in workers.wait([job, behind])] == ["finished", "finished"]
    assert watcher.poll() is None
    workers.assert_clean()


def test_rq_info_shows_sublists_and_changes_nothing(workers: Workers, redis_url: str) -> None:
    workers.start("w0", **TWO)
    done, waiting = put(workers, cpus=1), put(workers, labels=["rack=7"])
    workers.wait([done])
    before = {key: workers.client.dump(key) for key in workers.client.scan_iter("rq:queue*")}
    command = [Path(sys.executable).parent / "rq", "info", "--url", redis_url, "--raw"]
    info = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"queue {name_of(cpus=1)} 0, 0 executing, 1 finished, 0 failed" in info
    assert f"queue {name_of(labels=['rack=7'])} 1, 0 executing" in info
    assert {key: workers.client.dump(key) for key in workers.client.scan_iter("rq:queue*")} == before
    assert workers.state(waiting) == "queued"


def test_rq_requeues_a_failed_job_of_a_set(workers: Workers, redis_url: str, tmp_path: Path) -> None:
    workers.start("w0", **TWO)
    job = queue_for(workers, cpus=1).enqueue("rq_jobs.fail")
    assert workers.wait([job.id])[0].state == "failed"
    first = len(jobs.show(workers.client, job.id).attempts)
    words = ["requeue", "--url", redis_url, "--queue", name_of(cpus=1), job.id]
    subprocess.run([Path(sys.executable).parent / "rq", *words], check=True, capture_output=True)
    workers.until(lambda: len(jobs.show(workers.client, job.id).attempts) > first, "it ran again")
