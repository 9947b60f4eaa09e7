"""Workers in a real Slurm: they know what was granted and when it ends, and lose no job with it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker import slurm as records
from fleet.slurm import submissions
from fleet.slurm.autoscale import Scaler
from fleet.slurm.request import Request
from fleet.slurm.tools import SlurmError
from tests.conftest import fleet_script
from tests.integration.slurm import NODES, SlurmCluster

pytestmark = [pytest.mark.root, pytest.mark.needs("slurmctld", "munged")]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    made = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield made.start()
    finally:
        made.stop()


class Slurm:
    """The cluster, and `fleet` of one test beside it."""

    def __init__(self, cluster: SlurmCluster, run_fleet: Callable[..., Any], folder: Path, wait: Any) -> None:
        self.cluster = cluster
        self.folder = folder
        self.eventually = wait
        self._run_fleet = run_fleet
        self.done = folder / "done"
        self.done.touch()

    def fleet(self, *words: str, **options: Any) -> str:
        """What `fleet` prints; it must succeed."""
        done = self._run_fleet(*words, **options)
        assert done.returncode == 0, done.stderr
        text: str = done.stdout.strip()
        return text

    def json(self, *words: str) -> Any:
        return json.loads(self.fleet(*words, "--json"))

    def submit(self, *words: str) -> str:
        """Workers, all at once; the id of their job in Slurm."""
        return self.fleet("slurm", "submit", "--no-stagger", *words)

    def workers(self) -> list[dict[str, Any]]:
        """Those that live."""
        found = self.json("status")["workers"]
        return [worker for worker in found if worker["state"] != "offline"]

    def await_workers(self, count: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        def are_there() -> bool:
            found[:] = self.workers()
            return len(found) == count

        self.eventually(are_there, message=f"{count} workers are there")
        return found

    def array(self, count: int, seconds: float) -> str:
        """Tasks that each take so long and leave a line."""
        return self._array(count, f"sleep {seconds}")

    def held_array(self, count: int) -> str:
        """Tasks that do not end before `let_go`."""
        return self._array(count, f"until [ -e {self.folder}/go ]; do sleep 0.1; done")

    def let_go(self) -> None:
        (self.folder / "go").touch()

    def _array(self, count: int, first: str) -> str:
        command = f'{first}; echo "$FLEET_TASK_ID" >> {self.done}'
        return self.fleet("submit", "--array", f"1-{count}", "--", "sh", "-c", command)

    def ran(self) -> list[int]:
        """The tasks that came to their end, in order, each time they did."""
        return sorted(map(int, self.done.read_text().split()))

    def attempts(self, job_id: str) -> Counter[str]:
        """How the attempts at a job, or the tasks of an array, ended."""
        shown = json.loads(self.fleet("show", f"{job_id}", "--json"))
        rows = shown.get("jobs", [shown])
        return Counter(attempt["outcome"] for row in rows for attempt in row["attempts"])

    def logs(self) -> str:
        """What workers and srun said."""
        folder = Path(os.environ["XDG_STATE_HOME"]) / "rq-fleet" / "work" / "log"
        return "\n".join(path.read_text() for path in folder.glob("slurm-*"))

    def end_of(self, job_id: str) -> str | None:
        """How Slurm calls the end of what was submitted as this."""
        rows = self.json("slurm", "status")["submissions"]
        (end,) = (row["end"] for row in rows if row["job_id"] == job_id)
        return str(end) if end else None


@pytest.fixture
def slurm(
    cluster: SlurmCluster,
    fleet_redis_url: str,
    run_fleet: Any,
    tmp_path: Path,
    eventually: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Slurm]:
    """Nothing runs, `fleet` finds Slurm and Redis, and a beat is seen soon."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("FLEET_WORKER__HEARTBEAT_SECONDS", "1")
    yield Slurm(cluster, run_fleet, tmp_path, eventually)
    cluster.clear()


def test_what_the_walltime_cuts_short_ends_in_the_next_allocation_exactly_once(slurm):
    """A thousand jobs; the warning of the end comes in the middle, as Slurm sends it to the batch shell."""
    jobs = slurm.array(1000, 0.02)
    first = slurm.submit("--nodes", "4", "--time", "00:03:00")
    names = [worker["name"] for worker in slurm.await_workers(4)]
    assert sorted(names) == [f"{node}-{first}-0" for node in NODES]
    slurm.eventually(lambda: len(slurm.ran()) > 100)
    slurm.cluster.run("scancel", "--signal=TERM", "--batch", first)
    slurm.eventually(lambda: not slurm.cluster.queue(), message="workers left, and so the job ended")
    assert 100 < len(slurm.ran()) < 1000
    assert slurm.workers() == []
    slurm.submit("--nodes", "4", "--time", "00:03:00", "--until-done")
    slurm.fleet("wait", jobs, "--timeout", "100s")
    assert slurm.ran() == list(range(1, 1001))
    (queue,) = slurm.json("queues")["queues"]
    assert (queue["finished"], queue["failed"], queue["running"]) == (1001, 0, 0)


def test_workers_have_what_slurm_granted_and_not_what_the_node_has(slurm):
    job = slurm.submit(
        *("--nodes", "1", "--workers-per-node", "2", "--time", "10", "--cpus-per-task", "2"),
        *("--mem", "500", "--gpus", "2", "--label", "site=here"),
    )
    workers = slurm.await_workers(2)
    node = workers[0]["host"]
    assert node in NODES
    assert [worker["name"] for worker in workers] == [f"{node}-{job}-0", f"{node}-{job}-1"]
    for number, worker in enumerate(workers):
        assert (worker["cpus"], worker["slots"], worker["memory_bytes"]) == (2, 2, 250 << 20)
        assert [gpu["index"] for gpu in worker["gpus"]] == [number]
        assert worker["labels"]["slurm_job_id"] == job
        assert worker["labels"]["site"] == "here"
    seen = slurm.fleet(
        "submit",
        "--gpus",
        "1",
        "--label",
        f"host={node}",
        "--follow",
        "--",
        "printenv",
        "CUDA_VISIBLE_DEVICES",
    )
    assert seen in ("0", "1")


def test_no_job_is_taken_that_declares_more_time_than_is_left(slurm):
    slurm.submit("--nodes", "1", "--time", "10", "--cpus-per-task", "1")
    (worker,) = slurm.await_workers(1)
    assert worker["ends_at"] is not None
    long = slurm.fleet("submit", "--time-request", "11m", "--", "true")
    slurm.fleet("submit", "--time-request", "8m", "--wait", "--", "true")
    assert slurm.json("show", long)["state"] == "queued"
    (reason,) = slurm.json("explain", long)["reasons"]
    assert (reason["code"], reason["what"]) == ("no_match", "time")


def test_a_worker_has_left_before_its_walltime_ends(slurm, tmp_path):
    """Slurm tells the end in the environment, from 23.02 on; a job that cannot end before goes back, and has
    time to save what it has."""
    (tmp_path / "setup").write_text("export SLURM_JOB_END_TIME=$(($(date +%s) + 12))\n")
    saved = tmp_path / "saved"
    job = slurm.fleet(
        *(
            "submit",
            "--",
            "sh",
            "-c",
            f"trap 'echo saved > {saved}; exit 0' TERM; while :; do sleep 0.1; done",
        )
    )
    allocation = slurm.submit("--nodes", "1", "--time", "10", "--setup", str(tmp_path / "setup"))
    slurm.eventually(lambda: slurm.json("show", job)["state"] == "started")
    slurm.eventually(lambda: not slurm.cluster.queue(), message="it left long before the ten minutes")
    assert slurm.end_of(allocation) == "COMPLETED"
    assert saved.read_text() == "saved\n"
    assert slurm.json("show", job)["state"] == "queued"
    assert slurm.attempts(job) == {"handed-back": 1}


def test_what_is_cancelled_is_handed_back_with_time_to_save_and_none_has_failed(slurm, tmp_path):
    """SIGTERM comes to all processes of the allocation at once, those of jobs included."""
    saved = tmp_path / "saved"
    # what it runs dies of the signal, too, and maybe first
    script = f"trap 'sleep 0.3; echo saved > {saved}; exit 0' TERM; while :; do sleep 0.1; done"
    saving = slurm.fleet("submit", "--", "sh", "-c", script)
    jobs = slurm.array(40, 0.4)
    job = slurm.submit("--nodes", "4", "--time", "10", "--cpus-per-task", "2")
    slurm.eventually(lambda: len(slurm.ran()) > 5)
    slurm.fleet("slurm", "cancel", job)
    slurm.eventually(lambda: not slurm.cluster.queue())
    assert saved.exists(), slurm.logs()
    assert slurm.attempts(saving) == {"handed-back": 1}
    slurm.fleet("cancel", saving)
    slurm.submit("--nodes", "4", "--time", "10", "--cpus-per-task", "2", "--until-done")
    slurm.fleet("wait", jobs, "--timeout", "100s")
    ends = slurm.attempts(f"{jobs}[1-40]")
    assert ends["finished"] == 40
    assert ends["failed"] == ends["lost"] == 0
    assert set(slurm.ran()) == set(range(1, 41))
    assert len(slurm.ran()) <= 40 + ends["handed-back"]


def test_scancel_by_hand_loses_no_job_and_fails_none(slurm, monkeypatch):
    """srun may hear of it first, and kill workers outright: then their jobs run again as those of any."""
    monkeypatch.setenv("FLEET_WORKER__LEASE_SECONDS", "8")
    jobs = slurm.array(40, 0.3)
    job = slurm.submit("--nodes", "4", "--time", "10")
    slurm.eventually(lambda: len(slurm.ran()) > 5)
    slurm.cluster.run("scancel", job)
    slurm.eventually(lambda: not slurm.cluster.queue())
    slurm.submit("--nodes", "4", "--time", "10", "--until-done")
    slurm.fleet("wait", jobs, "--timeout", "120s")
    ends = slurm.attempts(f"{jobs}[1-40]")
    assert (ends["finished"], ends["failed"]) == (40, 0)
    assert set(slurm.ran()) == set(range(1, 41))


def test_python_functions_of_a_cancelled_allocation_are_no_failures(slurm, redis_client):
    import rq

    queue = rq.Queue("default", connection=redis_client)
    job = queue.enqueue("time.sleep", 60)
    allocation = slurm.submit("--nodes", "1", "--time", "10")
    slurm.eventually(lambda: slurm.json("show", job.id)["state"] == "started")
    slurm.eventually(lambda: any(worker["running"] for worker in slurm.workers()))
    slurm.fleet("slurm", "cancel", allocation)
    slurm.eventually(lambda: not slurm.cluster.queue())
    assert slurm.json("show", job.id)["state"] == "queued"
    assert slurm.attempts(job.id) == {"handed-back": 1}


def test_a_job_array_is_so_many_allocations(slurm):
    jobs = slurm.held_array(60)
    job = slurm.submit("--allocations", "3", "--time", "10", "--until-done")
    slurm.await_workers(3)
    # the warning of one is for that one alone, also where its number is that of the array
    (last,) = (task for task, number in map(str.split, slurm.cluster.queue("%i %A")) if number == job)
    slurm.cluster.run("scancel", "--signal=TERM", "--batch", last)
    slurm.eventually(lambda: "draining" in [worker["state"] for worker in slurm.workers()])
    assert sorted(worker["state"] for worker in slurm.workers()) == ["busy", "busy", "draining"]
    slurm.let_go()
    slurm.fleet("wait", jobs, "--timeout", "100s")
    assert slurm.ran() == list(range(1, 61))
    slurm.eventually(lambda: not slurm.cluster.queue())
    (row,) = slurm.json("slurm", "status")["submissions"]
    assert (row["job_id"], row["workers"], row["state"], row["end"]) == (job, 3, "ended", "COMPLETED")
    assert [one["id"] for one in row["allocations"]] == [f"{job}_{number}" for number in range(3)]


def test_a_requeued_allocation_starts_again_and_no_job_is_lost(slurm):
    jobs = slurm.array(30, 0.3)
    job = slurm.submit("--nodes", "2", "--time", "10", "--until-done")
    slurm.eventually(lambda: len(slurm.ran()) > 5)
    slurm.cluster.run("scontrol", "requeue", job)
    slurm.eventually(lambda: slurm.cluster.queue("%T") == ["PENDING"], message="it waits again")
    assert slurm.attempts(f"{jobs}[1-30]")["failed"] == 0
    # Slurm waits for two minutes before it starts such a one again
    slurm.cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
    slurm.fleet("wait", jobs, "--timeout", "100s")
    assert "Restarts=1" in slurm.cluster.run("scontrol", "show", "job", job)
    assert set(slurm.ran()) == set(range(1, 31))
    assert slurm.attempts(f"{jobs}[1-30]")["finished"] == 30


def test_an_allocation_that_is_preempted_hands_its_jobs_back(slurm):
    jobs = slurm.array(20, 0.3)
    job = slurm.submit("--nodes", "4", "--time", "10", "--extra", "--exclusive")
    slurm.eventually(lambda: len(slurm.ran()) > 3)
    slurm.cluster.run(
        *("sbatch", "-p", "urgent", "--exclusive", "--nodes=4", "--time=5", "-o", "/dev/null"),
        *("--wrap", "sleep 100"),
    )
    slurm.eventually(lambda: f"{job} PENDING" in slurm.cluster.queue(), message="it was requeued")
    (queue,) = slurm.json("queues")["queues"]
    ends = slurm.attempts(f"{jobs}[1-20]")
    assert (queue["failed"], ends["failed"]) == (0, 0)
    assert (
        queue["queued"] + queue["running"] == 20 - ends["finished"]
    )  # of one that was killed the lease runs on


def _runs_after(slurm: Slurm, job: str, lost: int) -> bool:
    ends = [attempt["outcome"] for attempt in slurm.json("show", job)["attempts"]]
    return ends == ["lost"] * lost + [None]


def test_what_an_earlier_life_of_a_requeued_worker_held_is_nobodys_loss(
    slurm, spawn, redis_client, monkeypatch
):
    """Where Slurm killed it outright: SLURM_RESTART_COUNT says whose doing that was."""
    for name, value in (("SLURM_JOB_ID", "77"), ("SLURMD_NODENAME", "n7"), ("SLURM_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    job = slurm.fleet("submit", "--", "sleep", "100")
    for lost in range(5):
        worker = spawn([fleet_script(), "worker"], stderr=subprocess.DEVNULL)
        slurm.eventually(partial(_runs_after, slurm, job, lost), message="it runs again")
        worker.kill()
    assert slurm.json("show", job)["state"] == "started"
    assert redis_client.hget(f"rq:job:{job}", "fleet_losses") in (None, b"0")


def test_a_node_that_goes_down_takes_no_job_with_it(slurm, monkeypatch):
    """The other nodes of the allocation work on."""
    monkeypatch.setenv("FLEET_WORKER__LEASE_SECONDS", "5")  # one is to be lost
    jobs = slurm.array(60, 0.2)
    slurm.submit("--nodes", "4", "--time", "10", "--until-done")
    slurm.await_workers(4)
    slurm.cluster.run("scontrol", "update", "nodename=n3", "state=down", "reason=test")
    slurm.fleet("wait", jobs, "--timeout", "100s")
    assert set(slurm.ran()) == set(range(1, 61))
    ends = slurm.attempts(f"{jobs}[1-60]")
    assert (ends["finished"], ends["failed"]) == (60, 0)


def test_no_secret_is_in_what_others_can_read(slurm, own_redis, monkeypatch):
    """Neither in the script, nor in what Slurm keeps of it, nor in arguments, nor in jobs' environment."""
    password = "not-to-be-seen"
    server = own_redis("--requirepass", password)
    monkeypatch.setenv("FLEET_REDIS_URL", f"redis://:{password}@127.0.0.1:{server.port}/0")
    assert password not in slurm.fleet("slurm", "script", "--nodes", "1")
    job = slurm.submit("--nodes", "1", "--time", "10")
    slurm.await_workers(1)
    assert password not in slurm.cluster.run("scontrol", "write", "batch_script", job, "-")
    assert password not in slurm.cluster.run("scontrol", "show", "job", "-dd", job)
    assert password not in slurm.fleet("submit", "--follow", "--", "env")
    for process in psutil.process_iter(["cmdline"]):
        assert password not in " ".join(process.info["cmdline"] or ()) or "--requirepass" in str(process.info)
    for spooled in (slurm.cluster.folder / "state").rglob("*"):
        assert not spooled.is_file() or password.encode() not in spooled.read_bytes()
    (kept,) = (Path(os.environ["XDG_STATE_HOME"]) / "rq-fleet" / "passwords").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_what_waits_is_cancelled_where_no_work_remains(slurm):
    slurm.submit("--nodes", "4", "--time", "10", "--extra", "--exclusive", "--idle-timeout", "2s")
    waiting = slurm.submit("--nodes", "4", "--time", "10", "--extra", "--exclusive", "--idle-timeout", "2s")
    rows = {row["job_id"]: row for row in slurm.json("slurm", "status")["submissions"]}
    assert rows[waiting]["state"] == "pending"
    slurm.eventually(lambda: not slurm.cluster.queue(), message="idle workers left, and cancelled the rest")
    assert slurm.end_of(waiting) == "CANCELLED"


def test_status_and_cancel_know_what_the_fleet_has_submitted_and_nothing_else(slurm):
    stranger = slurm.cluster.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 100")
    one, two = slurm.submit("--time", "10"), slurm.submit("--time", "10")
    slurm.await_workers(2)
    assert {row["job_id"] for row in slurm.json("slurm", "status")["submissions"]} == {one, two}
    slurm.fleet("slurm", "cancel", one)
    slurm.eventually(lambda: one not in slurm.cluster.queue("%A"))
    slurm.fleet("slurm", "cancel", "--all")
    slurm.eventually(lambda: slurm.cluster.queue("%A") == [stranger])
    states = {row["job_id"]: row["state"] for row in slurm.json("slurm", "status")["submissions"]}
    assert states == {one: "ended", two: "ended"}


def test_a_script_submitted_by_hand_does_the_same(slurm, tmp_path):
    """With a setup that fails, blanks and quotes where they may be, and a template of the user's."""
    (tmp_path / "setup").write_text('module load nothing-here\nexport SITE="it\'s; $HOME"\n')
    text = slurm.fleet(
        *(
            "slurm",
            "script",
            "--nodes",
            "2",
            "--time",
            "5",
            "--setup",
            str(tmp_path / "setup"),
            "--no-stagger",
        ),
        *("--label", 'what=it\'s $(touch /tmp/x); `y` "z"', "--until-done", "--path", "/a b/c;d"),
    )
    jobs = slurm.array(10, 0.05)
    (tmp_path / "job.sh").write_text(text)
    slurm.cluster.run("sbatch", str(tmp_path / "job.sh"))
    (first, *_) = slurm.eventually(slurm.workers)
    assert first["labels"]["what"] == 'it\'s $(touch /tmp/x); `y` "z"'
    slurm.fleet("wait", jobs, "--timeout", "60s")
    assert slurm.ran() == list(range(1, 11))


def test_a_template_of_the_users_is_what_is_submitted(slurm, tmp_path):
    template = tmp_path / "mine.j2"
    template.write_text(
        "#!/bin/bash\n{% for line in directives %}\n#SBATCH {{ line }}\n{% endfor %}\n"
        f"echo '{{{{ request.nodes }}}} nodes' > {tmp_path}/said\n"
    )
    slurm.submit("--nodes", "3", "--template", str(template))
    slurm.eventually((tmp_path / "said").exists)
    slurm.eventually(lambda: (tmp_path / "said").read_text() == "3 nodes\n")


# --- autoscale --------------------------------------------------------------------------------------


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`instead("sbatch", body)`: a shell script in its place, for what a well one never says. $REAL: it."""
    folder = tmp_path / "instead"
    folder.mkdir()
    path = os.environ["PATH"]

    def put(program: str, body: str) -> None:
        file = folder / program
        file.write_text(f"#!/bin/sh\nREAL={shutil.which(program, path=path)}\n{body}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{path}")

    return put


class Clock:
    """Seconds of the epoch that a test moves on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scaler(slurm: Slurm, redis_client: Any, clock: Clock) -> Scaler:
    """A runner that makes a pass when it is told to."""
    return Scaler(redis_client, now=clock)


def _add(slurm: Slurm, *words: str) -> None:
    slurm.fleet("slurm", "autoscale", "add", "--no-stagger", "--time", "10", *words)


def _pool(slurm: Slurm) -> dict[str, Any]:
    (found,) = slurm.json("slurm", "autoscale", "list")["pools"]
    return dict(found)


def test_allocations_follow_the_backlog_and_never_go_beyond_the_bound(slurm, spawn, monkeypatch):
    """Under two runners at once; in the end all of it goes by itself."""
    _add(slurm, "--max-workers", "3", "--backlog", "2", "--idle-timeout", "2s")
    runners = [
        spawn([fleet_script(), "slurm", "autoscale", "run", "--interval", "200ms"], stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    jobs = slurm.array(60, 0.2)
    most = 0

    def are_done() -> bool:
        nonlocal most
        most = max(most, len(slurm.cluster.queue()))
        return len(slurm.ran()) == 60

    slurm.eventually(are_done)
    assert 1 <= most <= 3
    slurm.fleet("wait", jobs)
    slurm.eventually(lambda: not slurm.cluster.queue(), message="idle workers left")
    slurm.eventually(lambda: _pool(slurm)["workers"] == 0, timeout_seconds=90, message="it is on record")
    for runner in runners:
        runner.terminate()
    assert [runner.wait(60) for runner in runners] == [0, 0]


def test_one_runner_acts_and_another_takes_over(slurm, scaler, redis_client):
    other = Scaler(redis_client)
    assert scaler.turn()
    assert not other.turn()
    scaler.close()
    assert other.turn()


def test_the_bound_holds_whatever_runners_believe(slurm, redis_client, scaler):
    """Each writes down an allocation before it asks for it, and Redis counts."""
    _add(slurm, "--max-workers", "4", "--nodes", "2")
    ((pool, _),) = records.pools(redis_client)
    made = [
        submissions.new(Request(nodes=2), queues=["default"], leaves=True, pool=pool.name) for _ in range(3)
    ]
    assert [records.intend(redis_client, pool, one) for one in made] == [True, True, False]
    records.forget(redis_client, [made[0].name])
    records.pause_pool(redis_client, pool.name, "now")
    assert not records.intend(redis_client, pool, made[2])
    records.resume_pool(redis_client, pool.name)
    assert records.intend(redis_client, pool, made[2])


def test_a_submission_whose_answer_was_lost_is_found_and_not_made_again(slurm, scaler, instead, clock):
    _add(slurm, "--max-workers", "8", "--backlog", "4")
    slurm.array(1, 0)
    lost = "Batch job submission failed: Socket timed out on send/recv operation"
    instead("sbatch", f'"$REAL" "$@" >/dev/null; echo "{lost}" >&2; exit 1')
    scaler.turn()
    (job,) = slurm.cluster.queue("%A")
    (row,) = slurm.json("slurm", "status")["submissions"]
    assert row["job_id"] == job
    # and where squeue says nothing at all, nothing is asked for
    slurm.fleet("slurm", "cancel", "--all")
    slurm.eventually(lambda: not slurm.cluster.queue())
    instead("squeue", "exit 1")
    with pytest.raises(SlurmError):
        scaler.turn()
    assert slurm.cluster.queue() == []


def test_a_submission_of_which_slurm_knows_nothing_was_not_made(slurm, scaler, instead, clock, monkeypatch):
    """Until that is known it counts."""
    _add(slurm, "--max-workers", "1")
    slurm.array(1, 0)
    instead("sbatch", "echo 'Unable to contact slurm controller' >&2; exit 1")
    scaler.turn()
    clock.ahead += 30
    scaler.turn()
    (row,) = slurm.json("slurm", "status")["submissions"]
    assert (row["state"], row["job_id"], _pool(slurm)["workers"]) == ("submitting", None, 1)
    monkeypatch.setattr(submissions, "UNSURE_SECONDS", 0.0)
    instead("sbatch", 'exec "$REAL" "$@"')
    scaler.turn()
    assert (_pool(slurm)["submit_failures"], _pool(slurm)["workers"]) == (1, 0)
    clock.ahead += 60
    scaler.turn()
    assert len(slurm.cluster.queue()) == 1
    assert _pool(slurm)["submit_failures"] == 0


def test_a_pool_is_paused_after_ten_failed_submissions_with_pauses_between(slurm, scaler, instead, clock):
    _add(slurm, "--max-workers", "2")
    slurm.array(1, 0)
    instead("sbatch", f"echo x >> {slurm.folder}/tries; echo 'error: Job violates policy' >&2; exit 1")
    tries = slurm.folder / "tries"
    scaler.turn()
    scaler.turn()
    assert len(tries.read_text().split()) == 1
    for _ in range(12):
        clock.ahead += 1000
        scaler.turn()
    assert len(tries.read_text().split()) == 10
    pool = _pool(slurm)
    assert (pool["state"], pool["workers"]) == ("paused", 0)
    assert pool["paused"] == "10 submissions failed: sbatch refused: error: Job violates policy"
    instead("sbatch", 'exec "$REAL" "$@"')
    slurm.fleet("slurm", "autoscale", "resume", "default")
    scaler.turn()
    assert len(slurm.cluster.queue()) == 1
    assert _pool(slurm)["state"] == "active"


def test_a_pool_is_paused_after_three_allocations_that_brought_no_worker(slurm, scaler, clock):
    _add(slurm, "--max-workers", "2", "--python", "/there/is/none")
    slurm.array(1, 0)
    for count in range(1, 4):
        clock.ahead += 1000
        scaler.turn()
        slurm.eventually(lambda: not slurm.cluster.queue())
        scaler.turn()
        assert _pool(slurm)["start_failures"] == count
    assert _pool(slurm)["state"] == "paused"
    assert "3 allocations brought no worker" in _pool(slurm)["paused"]


def test_nothing_is_asked_for_jobs_that_it_could_not_run(slurm, scaler):
    _add(slurm, "--max-workers", "4", "--cpus-per-task", "2", "--label", "site=here")
    for words in (["--cpus", "3"], ["--label", "site=there"], ["--time-request", "1h"], ["--gpus", "1"]):
        slurm.fleet("submit", *words, "--", "true")
    scaler.turn()
    assert slurm.cluster.queue() == []
    slurm.fleet("submit", "--cpus", "2", "--label", "site=here", "--", "true")
    scaler.turn()
    assert len(slurm.cluster.queue()) == 1


def test_a_pool_that_slurm_would_not_take_is_not_kept(slurm, run_fleet):
    done = run_fleet("slurm", "autoscale", "add", "--max-workers", "4", "--partition", "nowhere")
    assert done.returncode == 1
    assert "sbatch would refuse" in done.stderr
    assert "Invalid partition" in done.stderr
    done = run_fleet("slurm", "autoscale", "add", "--max-workers", "4", "--nodes", "5")
    assert (done.returncode, "--max-workers 4 is less" in done.stderr) == (2, True)
    done = run_fleet("slurm", "autoscale", "add", "--max-workers", "4", "--name", "a/b")
    assert (done.returncode, "'a/b' is no pool name" in done.stderr) == (2, True)
    assert slurm.json("slurm", "autoscale", "list") == {"schema": 1, "pools": []}


def test_a_pool_is_paused_and_removed_by_hand(slurm, scaler, run_fleet):
    _add(
        slurm,
        "--name",
        "big",
        "--max-workers",
        "8",
        "--nodes",
        "4",
        "--extra",
        "--exclusive",
        "--backlog",
        "2",
    )
    slurm.fleet("slurm", "autoscale", "pause", "big")
    slurm.array(8, 30)
    scaler.turn()
    assert slurm.cluster.queue() == []
    slurm.fleet("slurm", "autoscale", "resume", "big")
    scaler.turn()
    slurm.eventually(lambda: sorted(slurm.cluster.queue("%T")) == ["PENDING", "RUNNING"])
    slurm.fleet("slurm", "autoscale", "remove", "big")
    slurm.eventually(lambda: slurm.cluster.queue("%T") == ["RUNNING"])
    assert run_fleet("slurm", "autoscale", "pause", "big").returncode == 4
