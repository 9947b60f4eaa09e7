"""Jobs that are to run on this very machine: a worker for them alone, if none lives here that takes them.

Such a worker is like any other (leases, records, output), but for this: it takes jobs of one set of
requirements, one at a time, has of the machine no more than these ask for, and leaves when none is left.
It outlives whoever started it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis

from broker import clock, jobs, keys, status
from broker.errors import Conflict
from broker.requirements import LabelRule, Mismatch, Requirements
from fleet import ledger
from fleet.launchers import agent
from fleet.offer import Offering
from fleet.outputs import Folders
from fleet.worker_config import WorkerConfig, default_output_dir, state_dir, this_host

#: seconds a worker gets until it is registered, and between two looks
_START_SECONDS, _LOOK_SECONDS = 30.0, 0.05
#: workers started in a row that leave without the job
_MOST_STARTS = 3
_LIVES = ("idle", "busy", "connecting")
#: states of a job that has not been begun
_WAITS = ("queued", "deferred", "scheduled", None)


@dataclass(frozen=True)
class Orders:
    """How a worker is started here: `settings` are those of WorkerSettings, as JSON values; `log_format` and
    `log_level` of fleet.logs."""

    redis_url: str
    settings: Mapping[str, Any]
    folder: str
    log_format: str = "human"
    log_level: str = "info"


def bound(need: Requirements) -> Requirements:
    """The same, and on this machine."""
    return replace(need, labels=(*need.labels, LabelRule("host", this_host())))


def is_served(client: redis.Redis, queue: str, need: Requirements) -> bool:
    """Whether some worker there is now takes, or will take, jobs of `queue` that ask for this."""
    now = clock.wall().timestamp()
    return any(
        worker.state in _LIVES and queue in worker.queues and need.matches(worker.offer(), now)
        for worker in status.read(client).workers
    )


def missing(need: Requirements) -> list[Mismatch]:
    """What this machine lacks, or has promised to others, of what `need`, which is `bound`, asks for."""
    try:
        share = ledger.look(ledger.path(state_dir()))
    except OSError:
        return []  # the worker will say so
    config = _config("x", "default", need, Orders("", {}, "/"))
    return need.mismatches(Offering(config, share).offer(), clock.wall().timestamp())


def see_to_it(client: redis.Redis, job_id: str, queue: str, need: Requirements, orders: Orders) -> str | None:
    """Have a worker here for a job that was submitted to `queue` with `need`, which is `bound`.

    Returns the name of the worker that is there for such jobs alone, None where another takes it. Raises
    Conflict where none could be started.
    """
    if is_served(client, queue, need):
        return None
    name = f"{this_host()}-local-{need.digest()}"
    config = _config(name, queue, need, orders)
    folders = Folders(config.output_dir)
    try:
        folders.create()
    except OSError as exc:
        raise _not_started(job_id, exc.strerror or str(exc), folders.root) from exc
    deadline, starts = clock.monotonic() + _START_SECONDS, 0
    # what beats will look for jobs once more when it leaves, so it sees this one
    while not client.exists(keys.worker_beat(name)):
        if jobs.states(client, [job_id])[job_id] not in _WAITS:
            return name
        if starts > _MOST_STARTS or clock.monotonic() > deadline:
            log = folders.log / f"{name}.log"
            raise _not_started(job_id, _last_line(log), log)
        try:
            starts += _start(folders, config)
        except (agent.Failed, OSError) as exc:
            raise _not_started(job_id, str(exc), folders.root) from exc
        time.sleep(_LOOK_SECONDS)
    return name


def _config(name: str, queue: str, need: Requirements, orders: Orders) -> WorkerConfig:
    asked = {
        "cpus": math.ceil(need.cpus or 1),
        "memory_bytes": need.memory_bytes or 0,
        "num_gpus": math.ceil(need.gpus),
    }
    if need.gpu_memory_bytes:
        del asked["num_gpus"]  # which of them will do the worker finds
    return WorkerConfig(
        name=name,
        host=this_host(),
        redis_url=orders.redis_url,
        output_dir=str(default_output_dir()),
        queues=(queue,),
        paths=(orders.folder,),
        until_done=True,
        only_set=need.digest(),
        resources={} if need.exclusive else asked,
        is_modest=True,
        settings=orders.settings,
        log_format=orders.log_format,
        log_level=orders.log_level,
    )


def _start(folders: Folders, config: WorkerConfig) -> int:
    """Start it unless it lives; returns how many were started. Raises agent.Failed, OSError."""
    with agent.lock(folders.run / f".{config.name}.lock", _START_SECONDS):
        found = agent.start_one(folders.run, sys.executable, dataclasses.asdict(config))
    return int(found["fresh"])


def _not_started(job_id: str, why: str, where: Path) -> Conflict:
    return Conflict(
        f"no worker can be started here for job {job_id}: {why}",
        f"See {where}. The job waits; 'fleet cancel {job_id}' removes it.",
    )


def _last_line(log: Path) -> str:
    try:
        return (log.read_text(errors="replace").splitlines() or ["it said nothing"])[-1]
    except OSError as exc:
        return f"it has no log: {exc.strerror}"
