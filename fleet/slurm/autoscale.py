"""Allocations asked for as the backlog grows: pools, and the pass that looks after them.

One runner of many acts, by a lease in Redis; and were there two, each allocation is written down, under its
pool's bound, before it is asked for, so that there are never more workers than that.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import redis

from broker import clock, names, sets, status
from broker import slurm as records
from broker.errors import UsageError
from broker.requirements import GPU_NAME, SEPARATOR, Offer, Requirements, base_of
from broker.slurm import Pool, PoolState, Submission
from broker.status import FleetStatus, QueueStatus, WorkerStatus
from fleet.slurm import submissions, tools
from fleet.slurm.request import Request
from fleet.slurm.submissions import Seen
from fleet.slurm.tools import SlurmError, Unanswered

log = logging.getLogger("fleet.slurm")

#: failures in a row after which a pool is paused: of submissions, and of allocations that brought no worker
MOST_SUBMIT_FAILURES, MOST_START_FAILURES = 10, 3
#: seconds until the next try after a failure, doubled with each further one
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 15.0, 900.0
#: seconds between two passes; and without one, after which another runner takes over
INTERVAL_SECONDS, LEASE_SECONDS = 10.0, 60.0
_LEASE = "autoscale"
#: more than any worker has: what a script leaves to the cluster is taken for enough
_ENOUGH = 10**6
_LIVES = ("idle", "busy", "connecting")


def add(client: redis.Redis, pool: Pool) -> str:
    """Keep a pool, once Slurm has said that it would take its script; returns what it said.

    Raises UsageError, Conflict, SlurmError.
    """
    names.pool_name(pool.name)
    if pool.max_workers < pool.workers:
        raise UsageError(
            f"--max-workers {pool.max_workers} is less than one allocation brings: {pool.workers}",
            "Raise it, or lower --nodes or --workers-per-node.",
        )
    said = tools.try_out(pool.script)
    records.add_pool(client, pool)
    return said


def offer_of(request: Request, labels: Mapping[str, str]) -> dict[str, Any]:
    """What each worker of such an allocation would have, as far as the request says."""
    gpus = int(request.gpus.rpartition(":")[2]) if request.gpus else 0
    size, unit = (request.mem[:-1], request.mem[-1]) if request.mem[-1:].isalpha() else (request.mem, "M")
    mebibytes = int(size) * {"K": 1 / 1024, "M": 1, "G": 1024, "T": 2**20}[unit] if size else 0
    return {
        "cpus": request.cpus_per_task,
        "memory_bytes": int(mebibytes * 2**20) // request.workers_per_node or None,
        "gpus": gpus // request.workers_per_node,
        "labels": dict(labels),
        "seconds": request.time_seconds,
    }


class Scaler:
    """Looks after all pools, a pass at a time. `now`: seconds of the epoch."""

    def __init__(
        self, client: redis.Redis, *, now: Callable[[], float] = lambda: clock.wall().timestamp()
    ) -> None:
        self._client = client
        self._now = now
        self._who = secrets.token_hex(8)

    def turn(self) -> bool:
        """One pass, if nobody else is at it; says whether it was.

        Raises SlurmError, where Slurm does not say what there is: then nothing is asked for.
        """
        if not self._holds():
            return False
        seen, trouble = submissions.look(self._client)
        if trouble:
            raise SlurmError(trouble, "Nothing is asked for until it answers.")
        if useless := submissions.cancel_idle(self._client, seen):
            log.info("no work remains: cancelled what waits of %s", ", ".join(useless))
        fleet = status.read(self._client)
        seen = [self._noted(one, fleet) for one in seen]
        for pool, state in records.pools(self._client):
            self._look_after(pool, state, [one for one in seen if one.submission.pool == pool.name], fleet)
        return True

    def close(self) -> None:
        """Let another take over at once."""
        records.let_go(self._client, _LEASE, self._who)

    def _holds(self) -> bool:
        return records.hold(self._client, _LEASE, self._who, LEASE_SECONDS)

    def _noted(self, one: Seen, fleet: FleetStatus) -> Seen:
        """With whether a worker of it was seen."""
        submission = one.submission
        if not submission.pool or submission.has_run or not _workers_of(submission, fleet):
            return one
        submission = replace(submission, has_run=True)
        records.record(self._client, submission)
        return replace(one, submission=submission)

    def _look_after(self, pool: Pool, state: PoolState, seen: Sequence[Seen], fleet: FleetStatus) -> None:
        judged = self._judge(state, seen)
        judged = _paused_if_hopeless(judged)
        if judged != state:
            records.note_state(self._client, pool.name, judged)
        if judged.paused:
            if not state.paused:
                log.warning("pool %s is paused: %s", pool.name, judged.paused)
            return
        if self._now() >= judged.not_before:
            self._ask(pool, judged, self._wanted(pool, seen, fleet))

    # -- how earlier ones went -----------------------------------------------------------------

    def _judge(self, state: PoolState, seen: Sequence[Seen]) -> PoolState:
        """The failures, with those of allocations that ended, or hang, since the last pass."""
        for one in seen:
            submission = one.submission
            if submission.is_judged:
                continue
            if hanging := [row for row in one.live if row.hangs]:
                tools.cancel([row.id for row in hanging])
                state = self._failed_to_start(state, hanging[0].reason)
            elif submission.ended_at is None:
                if submission.has_run:
                    state = replace(state, start_failures=0)
                continue
            elif not submission.job_id:
                state = self._failed_to_submit(state, "sbatch did not answer, and Slurm knows of no such job")
            elif submission.end in tools.FAILED and not submission.has_run:
                state = self._failed_to_start(state, f"job {submission.job_id}: {submission.end}")
            records.record(self._client, replace(submission, is_judged=True))
        return state

    def _failed_to_start(self, state: PoolState, why: str) -> PoolState:
        log.warning("an allocation brought no worker: %s", why)
        failures = state.start_failures + 1
        return replace(state, start_failures=failures, error=why, not_before=self._after(failures))

    def _failed_to_submit(self, state: PoolState, why: str) -> PoolState:
        log.warning("could not submit: %s", why)
        failures = state.submit_failures + 1
        return replace(state, submit_failures=failures, error=why, not_before=self._after(failures))

    def _after(self, failures: int) -> float:
        """When to try again after so many."""
        return self._now() + min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1))

    # -- how many more -------------------------------------------------------------------------

    def _wanted(self, pool: Pool, seen: Sequence[Seen], fleet: FleetStatus) -> int:
        """How many allocations to ask for now."""
        there = [one for one in seen if one.submission.ended_at is None]
        # those that wait for nodes, and those whose workers have yet to come, will take some of the backlog
        coming = sum(not _workers_of(one.submission, fleet) for one in there)
        waiting = sum(one.state in ("pending", "submitting") for one in there)
        wanted = math.ceil(self._workers_wanted(pool, fleet) / pool.workers) - coming
        asked = sum(one.submission.workers for one in there)
        # workers are believed rather than a Slurm that has forgotten their allocation
        alive = sum(len(_alive(_workers_of(one.submission, fleet))) for one in seen)
        room = (pool.max_workers - max(asked, alive)) // pool.workers
        return max(0, min(wanted, pool.backlog - waiting, room))

    def _workers_wanted(self, pool: Pool, fleet: FleetStatus) -> float:
        """How many workers would take the jobs that wait, could be run by this pool, and find no room."""
        bases, _ = names.weighted_queues(tuple(pool.queues))
        known = sets.known(self._client, bases).sets
        offer, wanted = self._offer(pool), 0.0
        for queue in fleet.queues:
            base, _, digest = queue.name.partition(SEPARATOR)
            need = known.get(base, {}).get(digest) if digest else Requirements()
            if base not in bases or queue.paused or not queue.queued or need is None:
                continue
            need = replace(need, labels=tuple(rule for rule in need.labels if rule.key != GPU_NAME))
            if need.matches(offer, self._now()):
                jobs = queue.queued - _room_for(queue, need, fleet.workers, self._now())
                wanted += max(0, jobs) / _at_once(need, offer)
        return wanted

    def _offer(self, pool: Pool) -> Offer:
        said = pool.offer
        seconds = said.get("seconds")
        return Offer(
            said.get("labels", {}),
            said.get("cpus") or _ENOUGH,
            said.get("memory_bytes") or _ENOUGH * 2**30,
            (_ENOUGH * 2**30,) * said.get("gpus", 0),
            pool.slots,
            None if seconds is None else self._now() + seconds,
        )

    def _ask(self, pool: Pool, state: PoolState, count: int) -> None:
        """Ask for so many, one after the other, until one fails."""
        for _ in range(count):
            submission = _submission(pool)
            if not self._holds() or not records.intend(self._client, pool, submission):
                return
            try:
                job_id = submissions.asked(pool.script, submission)
            except Unanswered as exc:  # it stays on record, and counts, until Slurm tells
                log.warning("%s", exc.message)
                records.note_state(
                    self._client, pool.name, replace(state, error=exc.message, not_before=self._after(1))
                )
                return
            except SlurmError as exc:
                records.forget(self._client, [submission.name])
                records.note_state(
                    self._client, pool.name, _paused_if_hopeless(self._failed_to_submit(state, exc.message))
                )
                return
            records.record(self._client, replace(submission, job_id=job_id))
            log.info("pool %s: submitted job %s for %d workers", pool.name, job_id, pool.workers)
            state = replace(state, submit_failures=0, error="" if not state.start_failures else state.error)
            records.note_state(self._client, pool.name, state)


def _paused_if_hopeless(state: PoolState) -> PoolState:
    """Paused, after so many failures in a row."""
    if state.paused:
        return state
    if state.submit_failures >= MOST_SUBMIT_FAILURES:
        return replace(state, paused=f"{state.submit_failures} submissions failed: {state.error}")
    if state.start_failures >= MOST_START_FAILURES:
        return replace(state, paused=f"{state.start_failures} allocations brought no worker: {state.error}")
    return state


def _submission(pool: Pool) -> Submission:
    request = Request(nodes=pool.nodes, workers_per_node=pool.workers_per_node, job_name=pool.job_name)
    bases, _ = names.weighted_queues(tuple(pool.queues))
    return submissions.new(request, queues=bases, leaves=True, pool=pool.name)


def _workers_of(submission: Submission, fleet: FleetStatus) -> list[WorkerStatus]:
    """Those that are on record, also such as died."""
    job_id = submission.job_id
    return [worker for worker in fleet.workers if job_id and worker.labels.get("slurm_job_id") == job_id]


def _alive(workers: Sequence[WorkerStatus]) -> list[WorkerStatus]:
    return [worker for worker in workers if worker.state != "offline"]


def _room_for(queue: QueueStatus, need: Requirements, workers: Sequence[WorkerStatus], now: float) -> int:
    """Slots that workers there are have free for jobs of that queue: these take some in a moment."""
    return sum(
        worker.free.slots
        for worker in workers
        if worker.state in _LIVES
        and worker.free
        and base_of(queue.name) in worker.queues
        and need.matches(worker.offer(), now)
    )


def _at_once(need: Requirements, offer: Offer) -> int:
    """How many such jobs a worker takes at once."""
    if need.exclusive:
        return 1
    limits = [float(offer.slots)]
    if need.cpus:
        limits.append(offer.cpus / need.cpus)
    if need.memory_bytes:
        limits.append(offer.memory_bytes / need.memory_bytes)
    if need.gpus:
        limits.append(len(offer.gpus) / need.gpus)
    return max(1, int(min(limits)))


@dataclass(frozen=True)
class PoolSeen:
    """A pool, how it is, and how many allocations and workers of it are on record that have not ended."""

    pool: Pool
    state: PoolState
    allocations: int
    workers: int


def pools(client: redis.Redis) -> list[PoolSeen]:
    """All pools, by name."""
    there = [row for row in records.submissions(client) if row.ended_at is None]
    found = []
    for pool, state in records.pools(client):
        own = [row for row in there if row.pool == pool.name]
        found.append(PoolSeen(pool, state, len(own), sum(row.workers for row in own)))
    return found
