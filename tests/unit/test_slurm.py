"""What is asked of Slurm is checked first, and what it grants is read as it is meant."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from broker.errors import UsageError
from fleet.endpoint import Endpoint
from fleet.rendering import Template
from fleet.slurm import granted, script, times, tools
from fleet.slurm.request import Request
from fleet.slurm.script import Orders
from fleet.worker_config import WorkerConfig

GOLDEN = Path(__file__).parents[1] / "golden"
ORDERS = Orders(
    "/opt/fleet/bin/python",
    ["--queues", "gpu,default", "--label", "what=it's $(here)", "--startup-delay-seconds", "8"],
    {"FLEET_WORKER__STOP_GRACE_SECONDS": "25"},
    Endpoint("redis://login-ib:6379/0", "/home/me/secret"),
    setup="module load python\n",
)
REQUEST = Request(
    nodes=4,
    workers_per_node=2,
    allocations=3,
    cpus_per_task=8,
    time="01:30:00",
    account="physics",
    partition="gpu,long",
    qos="high",
    mem="64G",
    gpus="a100:4",
    constraint="[rack1|rack2]&nvme",
    extra=("--exclusive", "--reservation=exam_1"),
    job_name="sim.1",
    output_dir="/scratch/me/out",
)


def test_the_script_is_the_golden_one():
    """It is executed in tests/integration/test_slurm.py."""
    assert script.render(REQUEST, ORDERS) == (GOLDEN / "sbatch.sh").read_text()


def test_the_script_is_clean_to_bash():
    text = script.render(REQUEST, ORDERS)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.needs("shellcheck")
def test_the_script_is_clean_to_shellcheck():
    text = script.render(REQUEST, replace(ORDERS, words=["--queues", "default"]))
    done = subprocess.run(["shellcheck", "-"], input=text, text=True, capture_output=True, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("account", "a b"),
        ("account", "x;rm -rf /"),
        ("partition", "-p"),
        ("partition", "a,,b"),
        ("qos", "q\n#SBATCH --uid=0"),
        ("qos", "q\n"),
        ("mem", "4GB"),
        ("mem", "-1"),
        ("mem", "1.5G"),
        ("gpus", "two"),
        ("gpus", "a100:"),
        ("constraint", "a b"),
        ("constraint", "$(x)"),
        ("job_name", "a/b"),
        ("job_name", "%x"),
        ("job_name", ""),
        ("output_dir", "relative"),
        ("output_dir", "/with blank"),
        ("output_dir", "/%u"),
        ("nodes", 99_999_999_999),
        ("workers_per_node", 65_534),
        ("cpus_per_task", 65_534),
        ("allocations", 4_000_002),
        ("time", "2h"),
        ("time", "1:2:3:4"),
        ("time", "0"),
        ("time", "00:00:00"),
        ("time", "90\n"),
        ("time", "٣"),
        ("extra", ("pmix;rm -rf /",)),
        ("extra", ("--mpi=pmix;rm -rf /",)),
        ("extra", ("-A physics",)),
        ("extra", ("--comment=two words",)),
        ("extra", ("--mpi=pmix\n#SBATCH --uid=0",)),
        ("extra", ("--mpi=pmix\n",)),
        ("extra", ("--comment=`id`",)),
        ("extra", ("--comment='x'",)),
        ("extra", ("--array=0-9",)),
        ("extra", ("--arr=0-9",)),
        ("extra", ("--wrap=id",)),
    ],
)
def test_what_sbatch_might_take_for_something_else_is_refused(field, value):
    with pytest.raises(UsageError) as caught:
        replace(REQUEST, **{field: value}).checked()
    assert f"--{field.replace('_', '-')}" in caught.value.message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30", 1800), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216_000), ("1-0:30", 88_200)),
        *(("1-02:03:04", 93_784), ("", None), ("x", None), ("1-", None), ("-5", None), ("1:2:3:4", None)),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, seconds):
    assert times.seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("2:31", 151), ("1:02:31", 3751), ("3-01:02:31", 262_951), ("0:00", 0), ("INVALID", None)),
        *(("UNLIMITED", None), ("NOT_SET", None), ("", None), ("31", None), ("N/A", None)),
    ],
)
def test_the_time_that_is_left_is_read_as_squeue_writes_it(text, seconds):
    assert times.seconds_left(text) == seconds


def test_slurm_counts_whole_minutes_and_warns_short_allocations_later():
    assert replace(REQUEST, time="00:00:30").time_seconds == 60
    assert replace(REQUEST, time="00:03:00").warning_seconds == 30
    assert replace(REQUEST, time="02:00:00").warning_seconds == 120
    assert replace(REQUEST, time="UNLIMITED").warning_seconds == 120


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("echo\n", "mine:1: a batch script begins with #!"),
        ("#!/bin/sh\n{{ nothing }}\n", "mine:2: 'nothing'"),
    ],
)
def test_a_template_that_cannot_be_is_told_with_its_line(text, told):
    with pytest.raises(UsageError) as caught:
        script.render(REQUEST, replace(ORDERS, template=Template("mine", text)))
    assert caught.value.message.startswith(told)


# --- what is granted --------------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "77", "SLURMD_NODENAME": "n7", "SLURM_LOCALID": "0"}
CONFIG = WorkerConfig(name="", host="", redis_url="redis://x", output_dir="/x", slots=0)


def test_a_worker_by_itself_has_all_that_the_node_was_asked_for():
    environ = JOB | {"SLURM_CPUS_ON_NODE": "6", "SLURM_MEM_PER_CPU": "100"}
    found = granted.adapted(CONFIG, environ)
    assert (found.name, found.host, found.slots, found.in_slurm) == ("n7-77-0", "n7", 6, True)
    assert found.resources == {"cpus": 6, "memory_bytes": 600 << 20, "num_gpus": 0}


def test_workers_of_a_node_divide_what_it_was_asked_for():
    node = JOB | {
        "SLURM_CPUS_ON_NODE": "7",
        "SLURM_MEM_PER_NODE": "300",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2),3",
        "SLURM_NODEID": "2",
        "CUDA_VISIBLE_DEVICES": "2,5,6,7",
    }
    gpus = []
    for number in range(3):
        environ = node | {"SLURM_LOCALID": str(number)}
        found = granted.adapted(CONFIG, environ)
        assert found.name == f"n7-77-{number}"
        assert found.resources["cpus"] == (3, 2, 2)[number]
        assert found.resources["memory_bytes"] == 100 << 20
        gpus.append(environ["CUDA_VISIBLE_DEVICES"])
    assert gpus == ["2,5", "6", "7"]


def test_gpus_to_which_slurm_has_bound_a_task_are_its_own():
    """With --extra --gpus-per-task=1, say."""
    environ = JOB | {
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_GPUS_ON_NODE": "2",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    assert granted.adapted(CONFIG, environ).resources["num_gpus"] == 1
    assert environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_gpus_that_slurm_names_by_their_uuids_are_granted(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU-8932f937\\nGPU-8ac10b2e\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environ = JOB | {"CUDA_VISIBLE_DEVICES": "GPU-8ac10b2e"}
    assert granted.adapted(CONFIG, environ).resources["num_gpus"] == 1
    assert environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_what_the_worker_is_told_outranks_what_slurm_says():
    told = replace(CONFIG, name="mine", slots=2, resources={"cpus": 1})
    found = granted.adapted(told, JOB | {"SLURM_CPUS_PER_TASK": "8"})
    assert (found.name, found.slots, found.resources["cpus"]) == ("mine", 2, 1)


@pytest.mark.parametrize("nonsense", ["", "x", "-1", "(null)", "1e3", "٣"])
def test_nonsense_in_the_environment_is_as_if_it_was_not_there(nonsense):
    names = ("CPUS_ON_NODE", "CPUS_PER_TASK", "MEM_PER_NODE", "LOCALID", "STEP_TASKS_PER_NODE", "NODEID")
    environ = JOB | {f"SLURM_{name}": nonsense for name in names} | {"CUDA_VISIBLE_DEVICES": nonsense}
    found = granted.adapted(CONFIG, environ)
    assert (found.name, found.slots, found.resources) == ("n7-77-0", 1, {"num_gpus": 0})


def test_it_is_in_a_job_only_at_a_node():
    """Not in the shell of `salloc`, say."""
    assert granted.is_in_a_job(JOB)
    assert not granted.is_in_a_job({"SLURM_JOB_ID": "77"})


# --- what Slurm's commands answer -------------------------------------------------------------------


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """`answers("squeue", "echo x")`: such a program comes first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(program: str, body: str) -> None:
        file = tmp_path / program
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    return make


@pytest.mark.parametrize(
    "body",
    [
        "echo INVALID",
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        "exec sleep 60",
        "echo gibberish; exit 0",
        "kill -9 $$",
    ],
)
def test_a_worker_reckons_its_end_where_squeue_does_not_tell(answers, monkeypatch, body):
    monkeypatch.setattr(granted, "_SQUEUE_SECONDS", 0.3)
    answers("squeue", body)
    found = granted.ends_at(JOB | {granted.END_VARIABLE: "4000000000"})
    assert found == pytest.approx(4000000000 - granted.MARGIN_SECONDS)
    assert granted.ends_at(JOB) is None


def test_squeue_tells_when_a_worker_has_to_go(answers):
    answers("squeue", 'case "$*" in *--jobs=77*) echo 1:40 ;; esac')
    left = granted.ends_at(JOB) - granted.clock.wall().timestamp()
    assert 85 < left <= 90
    answers("squeue", 'case "$*" in *--jobs=75_2*) echo 1:40 ;; esac')
    assert granted.ends_at(JOB | {"SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "2"}) is not None
    answers("squeue", "echo UNLIMITED")
    assert granted.ends_at(JOB | {granted.END_VARIABLE: "4000000000"}) is None


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("echo 'sbatch: error: Invalid partition name specified' >&2; exit 1", tools.SlurmError),
        (
            "echo 'Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1",
            tools.Unanswered,
        ),
        ("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", tools.Unanswered),
        ("exec sleep 60", tools.Unanswered),
        ("kill -9 $$", tools.Unanswered),
        ("echo what?", tools.Unanswered),
    ],
)
def test_a_refusal_is_told_from_an_answer_that_was_lost(answers, monkeypatch, body, error):
    monkeypatch.setattr(tools, "LIMIT_SECONDS", 0.3)
    answers("sbatch", body)
    with pytest.raises(tools.SlurmError) as caught:
        tools.submit("#!/bin/sh\n", "x")
    assert type(caught.value) is error


def test_the_id_is_read_also_of_a_federation(answers):
    answers("sbatch", "echo '4711;cluster'")
    assert tools.submit("#!/bin/sh\n", "x") == "4711"


def test_no_secret_and_nothing_of_another_job_goes_along(answers, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEET_REDIS_URL", "redis://:not-to-be-seen@x")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    answers("sbatch", f"env > {tmp_path}/env; echo 1")
    tools.submit("#!/bin/sh\n", "x")
    text = (tmp_path / "env").read_text()
    assert "not-to-be-seen" not in text
    assert "SLURM_MEM_PER_CPU" not in text
    assert "SLURM_CONF=/etc/x" in text


def test_where_there_is_no_slurm_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tools.SlurmError, match="sbatch cannot be run: No such file"):
        tools.submit("#!/bin/sh\n", "x")


def test_lines_of_squeue_that_are_none_are_passed_over(answers):
    answers("squeue", "printf 'warning: x\\n12_3|14|12|RUNNING|None|1:00|2|me|fleet-a|b\\n'")
    (row,) = tools.allocations(["me"])
    assert (row.id, row.job_id, row.master, row.state, row.seconds_left, row.name) == (
        *("12_3", "14", "12", "RUNNING", 60),
        "fleet-a|b",
    )
