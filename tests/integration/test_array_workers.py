"""Arrays on real workers: they are stopped in time, and kept to their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker import arrays, jobs, keys, ranges, selection, tasks
from broker.arrays import Tasks
from broker.command import Command
from broker.requirements import Requirements
from broker.submit import Options, Submission


def submit(workers: Any, argv: tuple[str, ...], text: str, retries: int = 0, **how: Any) -> str:
    options = Options(retries=retries, retry_delay_seconds=0)
    return arrays.submit(
        workers.client, Submission(Command(argv), options), Tasks(ranges.parse(text), **how)
    ).id


def running(workers: Any, array: str) -> int:
    return int(tasks.counts(workers.client, [array])[array].running)


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    return tmp_path / "pids"


def test_what_runs_of_a_canceled_array_is_stopped_and_waits_for_no_beat(
    workers: Any, pids: Path, is_alive: Any
) -> None:
    for name in ("w0", "w1"):
        workers.start(name, slots=3, settings={"heartbeat_seconds": 300, "lease_seconds": 600})
    array = submit(workers, ("sh", "-c", f"echo $$ >>{pids}; exec sleep 300"), "1-1000")
    workers.until(lambda: pids.exists() and len(pids.read_text().split()) == 6, "six run")
    (target,) = selection.targets_of(workers.client, [array])
    assert selection.cancel(workers.client, target) == "stopping"
    workers.until(lambda: not any(map(is_alive, map(int, pids.read_text().split()))), "all were stopped")
    workers.wait([array])
    assert len(pids.read_text().split()) == 6, "none was begun after that"
    assert jobs.show(workers.client, array).state == "canceled"
    workers.until(lambda: not any(workers.leftovers().values()), "nothing is left")


def test_never_more_run_at_once_than_may(workers: Any, tmp_path: Path) -> None:
    for name in ("w0", "w1"):
        workers.start(name, slots=4)
    inside, seen = tmp_path / "inside", tmp_path / "seen"
    inside.mkdir()
    script = f"mkdir {inside}/$$; ls {inside} | wc -l >>{seen}; sleep 0.05; rmdir {inside}/$$; "
    script += "exit $((FLEET_FENCE % 3 == 0))"
    array = submit(workers, ("sh", "-c", script), "1-40", retries=5, max_parallel=3)
    workers.wait([array])
    found = list(map(int, seen.read_text().split()))
    assert len(found) > 40, "some ran again"
    assert max(found) <= 3
    workers.until(lambda: not any(workers.leftovers().values()), "nothing is left")


def test_a_worker_that_leaves_when_all_is_done_waits_for_arrays(workers: Any, run_fleet: Any) -> None:
    array = submit(workers, ("true",), "1-20", max_parallel=1)
    follower = arrays.submit(
        workers.client, Submission(Command(("true",))), Tasks(ranges.Ranges(()), after=array)
    ).id
    run_fleet("--redis", workers.url, "worker", "--burst", "--name", "w0", "--slots", "2")
    assert [jobs.show(workers.client, one).state for one in (array, follower)] == ["finished", "finished"]
    assert workers.client.zcard(keys.ARRAYS) == 0


def test_each_task_is_given_what_the_array_asks_for(workers: Any, tmp_path: Path) -> None:
    workers.start("w0", slots=4, resources={"cpus": 2})
    options = Options(requirements=Requirements(cpus=1.0))
    out = tmp_path / "out"
    command = Command(("sh", "-c", f"echo $FLEET_QUEUE $FLEET_TASK_ID >>{out}; sleep 0.1"))
    array = arrays.submit(workers.client, Submission(command, options), Tasks(ranges.parse("1-6"))).id
    (view,) = workers.wait([array])
    assert (view.state, view.requirements) == ("finished", "cpus=1")
    assert sorted(line.split()[1] for line in out.read_text().splitlines()) == list("123456")
