"""`fleet submit --target`: jobs for this machine."""

from __future__ import annotations

import json
import threading

import pytest

from broker import jobs, status
from fleet.launchers import agent
from fleet.outputs import Folders
from fleet.worker_config import default_output_dir, this_host
from tests.conftest import fleet_script
from tests.integration import fleets

NOBODY = "No worker"


@pytest.fixture
def submit_here(fleet, eventually):
    """`submit_here("true", target="auto")`: submits, and has the workers gone at the test's end."""
    run_dir = Folders(str(default_output_dir())).run

    def run(*argv, target="local", options=(), **how):
        words = ("submit", "--target", target, *options, "--", *argv)
        return fleet(*words, **{"env": fleets.FAST, **how})

    yield run

    def are_gone():
        names = {path.name.removesuffix(".config.json") for path in run_dir.glob("*.config.json")}
        return not any(agent.living(run_dir, name) for name in names)

    eventually(are_gone, timeout_seconds=60, message="workers have left")


def workers_there(client):
    return [worker for worker in status.read(client).workers if worker.state != "offline"]


def test_a_worker_starts_here_runs_it_and_leaves(submit_here, submit, fleet, redis_client, eventually):
    other = submit("true")
    done = submit_here("sh", "-c", "echo $FLEET_WORKER", options=("--follow",))
    name = done.stdout.strip()
    assert name.startswith(f"{this_host()}-local-")
    assert f"Worker {name} runs it here, and leaves when it is done." in done.stderr
    assert NOBODY not in done.stderr
    eventually(lambda: not workers_there(redis_client), message="it left")
    assert jobs.states(redis_client, [other]) == {other: "queued"}


def test_a_worker_that_lives_here_runs_it(submit_here, fleet, spawn, redis_client, eventually):
    worker = spawn([fleet_script(), "worker", "--name", "w0"])
    eventually(lambda: workers_there(redis_client))
    for target in ("local", "auto"):
        done = submit_here("true", target=target, options=("--wait", "--json"))
        assert done.stderr == ""
        job = jobs.show(redis_client, json.loads(done.stdout)["id"])
        assert (job.state, job.worker) == ("finished", "w0")
    worker.terminate()
    worker.wait(60)


def test_what_this_machine_cannot_run_is_refused(submit_here, redis_client):
    done = submit_here("true", options=("--cpus", "5000"), code=1)
    assert done.stderr.startswith("fleet: this machine cannot run it now: it has ")
    assert "of 5000 CPUs" in done.stderr
    assert redis_client.keys("rq:*") == []


def test_auto_is_here_where_no_worker_can_run_it(submit_here, spawn, redis_client, eventually):
    worker = spawn([fleet_script(), "worker", "--name", "w0", "--num-cpus", "1", "--queues", "other"])
    eventually(lambda: workers_there(redis_client))
    done = submit_here("true", target="auto", options=("--wait", "--json"))
    job = jobs.show(redis_client, json.loads(done.stdout)["id"])
    assert job.worker.startswith(f"{this_host()}-local-")
    nowhere = submit_here("true", target="auto", options=("--label", "site=mars"))
    assert "No worker can run it now, nor this machine: it has not site=mars." in nowhere.stderr
    assert jobs.states(redis_client, [nowhere.stdout.strip()]) == {nowhere.stdout.strip(): "queued"}
    worker.terminate()
    worker.wait(60)


def test_jobs_one_after_another_and_at_once_all_run(submit_here, redis_client):
    ids = []

    def some() -> None:
        for _ in range(3):
            ids.append(submit_here("true", options=("--wait",)).stdout.strip())

    threads = [threading.Thread(target=some) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    assert len(ids) == 6
    assert set(jobs.states(redis_client, ids).values()) == {"finished"}


def test_it_may_wait_for_others(submit_here, submit, burst, redis_client, eventually):
    first = submit("true")
    job = submit_here("true", options=("--after", first)).stdout.strip()
    burst()
    eventually(lambda: jobs.states(redis_client, [job])[job] == "finished")


def test_where_no_worker_can_be_started_the_job_is_named(fleet, redis_client):
    folder = default_output_dir()
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    done = fleet("submit", "--target", "local", "--", "true", code=1)
    (job,) = jobs.listed(redis_client)
    assert f"no worker can be started here for job {job.id}: Not a directory" in done.stderr
    assert job.state == "queued"
