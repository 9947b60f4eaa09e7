"""What Slurm granted the worker that runs in one of its jobs: a name, a share of the node, and until when.

Nothing that Slurm says, or fails to say, ends a worker: what cannot be read is as if it had not been said.
"""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from broker import clock
from fleet.ledger import part
from fleet.logs import about
from fleet.resources import visible_gpus
from fleet.slurm import times
from fleet.worker_config import WorkerConfig, this_host

log = logging.getLogger("fleet.worker")

#: epoch seconds at which the job ends by the limit that it was submitted with, as our scripts reckon
END_VARIABLE = "FLEET_ALLOCATION_ENDS_AT"
#: seconds that a worker has ended before Slurm would end it; at most a tenth of what is left
MARGIN_SECONDS = 10.0
#: seconds squeue gets, and how often it is asked
_SQUEUE_SECONDS, _TRIES = 10.0, 2
_ENDLESS = ("UNLIMITED", "NOT_SET")
_MEBIBYTE = 2**20


def is_in_a_job(environ: Mapping[str, str]) -> bool:
    """Whether this process runs at a node of a job of Slurm."""
    return bool(environ.get("SLURM_JOB_ID")) and bool(environ.get("SLURMD_NODENAME"))


def adapted(config: WorkerConfig, environ: MutableMapping[str, str]) -> WorkerConfig:
    """The worker as its task of a job has it; what `config` says of itself stays. Raises UsageError.

    Of GPUs that several tasks of a node share, `environ` names its own alone from then on.
    """
    node = environ.get("SLURMD_NODENAME") or this_host()
    number, tasks = _number(environ, "SLURM_LOCALID") or 0, _tasks_here(environ)
    if gpus := _gpus(environ, number, tasks):
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    share = _share(environ, number, tasks) | {"num_gpus": len(gpus)}
    resources = {**{what: amount for what, amount in share.items() if amount is not None}, **config.resources}
    return replace(
        config,
        name=config.name or f"{node}-{environ.get('SLURM_JOB_ID', '0')}-{number}",
        host=node,
        slots=config.slots or resources.get("cpus", 1),
        resources=resources,
        in_slurm=True,
    ).checked()


def was_requeued(environ: Mapping[str, str]) -> bool:
    """Whether Slurm has started this job before: it was preempted, or requeued."""
    return bool(_number(environ, "SLURM_RESTART_COUNT"))


def ends_at(environ: Mapping[str, str]) -> float | None:
    """Epoch seconds when a worker of this job must have ended; None: never, or nobody knows."""
    now = clock.wall().timestamp()
    end = _end(environ, now)
    if end is None:
        return None
    left = max(0.0, end - now)
    return now + left - min(MARGIN_SECONDS, left / 10)


def _end(environ: Mapping[str, str], now: float) -> float | None:
    """When Slurm ends the job: as it says itself, or by the limit that was asked for."""
    if said := _number(environ, "SLURM_JOB_END_TIME"):
        return float(said)
    for _ in range(_TRIES):
        answer = _time_left(_job_of(environ))
        if answer in _ENDLESS:
            return None
        if (left := times.seconds_left(answer)) is not None:
            return now + left
    if reckoned := _number(environ, END_VARIABLE):
        return float(reckoned)
    log.warning("Slurm does not tell when this job ends: its warning will", extra=about("slurm"))
    return None


def _job_of(environ: Mapping[str, str]) -> str:
    """What Slurm calls this job: the id of an array's last job is that of the whole array."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")


def _time_left(job_id: str) -> str:
    """What squeue says of the time that is left; '' where it does not answer."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%L"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SQUEUE_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        log.warning("squeue: %s", exc, extra=about("slurm"))
        return ""
    said = done.stdout.strip()
    if said not in _ENDLESS and times.seconds_left(said) is None:
        answer = (done.stderr.strip() or said or "nothing")[:200]
        log.warning("squeue told no time that is left: %s", answer, extra=about("slurm"))
    return said


def _share(environ: Mapping[str, str], number: int, tasks: int) -> dict[str, int | None]:
    """CPUs and bytes of memory of this task of so many on this node."""
    on_node, each = _number(environ, "SLURM_CPUS_ON_NODE"), _number(environ, "SLURM_CPUS_PER_TASK")
    if each is None and on_node is not None:
        each = max(1, part(on_node, number, tasks))
    memory, per_cpu = _number(environ, "SLURM_MEM_PER_NODE"), _number(environ, "SLURM_MEM_PER_CPU")
    if not memory and per_cpu and on_node:
        memory = per_cpu * on_node
    return {"cpus": each or None, "memory_bytes": memory * _MEBIBYTE // tasks if memory else None}


def _gpus(environ: Mapping[str, str], number: int, tasks: int) -> list[int]:
    """The numbers of the GPUs of this task, as CUDA counts here: its part, where all tasks see the same."""
    seen = _gpus_seen(environ)
    if len(seen) != (_number(environ, "SLURM_GPUS_ON_NODE") or len(seen)):
        return seen  # Slurm has bound each task to its own
    first = sum(part(len(seen), before, tasks) for before in range(number))
    return seen[first : first + part(len(seen), number, tasks)]


def _gpus_seen(environ: Mapping[str, str]) -> list[int]:
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if (said := environ.get(name)) is not None:
            return visible_gpus(said)
    return []


def _tasks_here(environ: Mapping[str, str]) -> int:
    """How many tasks of this step this node has: `2(x3),1` counts node by node."""
    counts: list[int] = []
    for word in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word):
            counts += [int(found[1])] * min(int(found[2] or 1), 100_000)
    node = _number(environ, "SLURM_NODEID") or 0
    return max(1, counts[node] if node < len(counts) else 1)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    said = environ.get(name, "")
    return int(said) if said.isascii() and said.isdigit() else None
