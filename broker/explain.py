"""`fleet explain`: why a job is where it is, every reason with its numbers.

What can be wrong is looked at in the order in which a worker would come upon it: what holds the job back
by itself (a time, other jobs), who gives out nothing (paused, suspended), who could run it at all, who
of these has room, and what comes before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import redis

from broker import amounts, fitting, jobs, keys, status, tasks
from broker.connection import replies
from broker.errors import NotFound
from broker.fitting import Free, Reason
from broker.jobs import JobView, Related
from broker.ranges import Ranges
from broker.requirements import NOTHING, SEPARATOR, Offer, Requirements, base_of
from broker.status import FleetStatus, WorkerStatus
from broker.tasks import TaskCounts

#: jobs that one waits for which are named one by one
_NAMED = 20


@dataclass(frozen=True)
class Explanation:
    """A job, what it asks for (None: nobody knows), and why it is where it is."""

    job: JobView
    need: Requirements | None
    reasons: tuple[Reason, ...]


def explain(client: redis.Redis, job_id: str) -> Explanation:
    """Ask Redis. Raises NotFound for a job that is not there, and what redis-py raises."""
    job = _find(client, job_id)
    need = _need(client, job.queue)
    return Explanation(job, need, tuple(_reasons(client, job, need)))


def _find(client: redis.Redis, job_id: str) -> JobView:
    """A job; for a task that is none yet its array, under the id of the task."""
    try:
        return jobs.show(client, job_id)
    except NotFound:
        array, _, number = job_id.rpartition("-")
        asked = (
            Ranges((range(int(number), int(number) + 1),)) if number.isascii() and number.isdigit() else None
        )
        state = next(iter(tasks.states(client, array, asked).values())) if array and asked else None
        if state is None:
            raise
        return replace(jobs.show(client, array), id=job_id)


def _array(
    client: redis.Redis, job: JobView, counts: TaskCounts, need: Requirements | None
) -> Iterator[Reason]:
    """Of an array that has not ended, or of a task of it that was not begun."""
    array = job.id if client.exists(keys.array(job.id)) else job.id.rpartition("-")[0]
    fields: list[Any] = client.hmget(keys.array(array), "max_parallel", "held", "after")
    most, held = (int(field or 0) for field in fields[:2])
    if held:
        after = (fields[2] or b"").decode("utf-8", "replace")
        numbers = {"tasks": held, "job": after}
        yield Reason("dependency", f"{held} of its tasks wait for those of {after} to finish", numbers)
    running = {"tasks": counts.running}
    if most and counts.running >= most:
        message = f"{counts.running} of its tasks run, and no more than {most} may at once"
        yield Reason("max_parallel", message, running | {"max_parallel": most})
    elif client.hget(keys.job(array), "status") == b"queued":
        yield from _queued(client, replace(job, id=array, state="queued"), need)
    elif counts.running:
        yield Reason("running", f"{counts.running} of its tasks run", running)


def _need(client: redis.Redis, queue: str) -> Requirements | None:
    """What jobs of that list ask for."""
    base, _, digest = queue.partition(SEPARATOR)
    if not digest:
        return NOTHING
    try:
        return Requirements.from_canonical(client.hget(keys.sets(base), digest) or "")
    except ValueError:
        return None


def _reasons(client: redis.Redis, job: JobView, need: Requirements | None) -> Iterator[Reason]:
    if job.tasks and job.state in ("queued", "started", "deferred") and not job.dependencies:
        yield from _array(client, job, job.tasks, need)
    elif job.state == "queued":
        yield from _queued(client, job, need)
    elif job.state == "deferred":
        yield from _deferred(client, job)
    elif job.state == "scheduled":
        yield from _scheduled(client, job)
    elif job.state == "started":
        yield _running(client, job)
    else:
        yield _ended(job)


# --- it runs, or has ended -------------------------------------------------------------------------


def _running(client: redis.Redis, job: JobView) -> Reason:
    workers = {worker.name: worker for worker in status.read(client).workers}
    worker, numbers = workers.get(job.worker or ""), {"worker": job.worker, "attempt": len(job.attempts)}
    if worker is None or worker.state in ("offline", "connecting"):
        silent = worker.heartbeat_age_seconds if worker else None
        since = "" if silent is None else f" for {amounts.rough_duration(silent)}"
        return Reason(
            "silent",
            f"it was started on {job.worker}, which has been silent{since}; "
            "once its lease has run out the job goes back to the front of its queue",
            numbers,
        )
    since = f" since {_time(job.started_at)}" if job.started_at else ""
    return Reason("running", f"it runs on {job.worker}{since}, attempt {len(job.attempts)}", numbers)


def _ended(job: JobView) -> Reason:
    where = f" on {job.worker}" if job.worker else ""
    when = f" at {_time(job.ended_at)}" if job.ended_at else ""
    why = f": {job.reason}" if job.reason else ""
    how = "was " * (job.state in ("stopped", "canceled"))
    hint = "" if job.state == "finished" else f"; 'fleet retry {job.id}' runs it again"
    numbers = {"worker": job.worker, "exit_code": job.exit_code, "reason": job.reason}
    return Reason("ended", f"it {how}{job.state}{where}{when}{why}{hint}", numbers)


def _time(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC" if at else "?"


# --- it waits for a time, or for others ------------------------------------------------------------


def _scheduled(client: redis.Redis, job: JobView) -> Iterator[Reason]:
    with client.pipeline(transaction=False) as pipe:
        pipe.zscore(keys.of("scheduled", job.queue), job.id)
        pipe.time()
        pipe.get(keys.CHORES)
        at, (seconds, micros), chores = replies(pipe)
    if not isinstance(at, float):
        yield Reason("unlisted", f"it is called scheduled, yet nothing will queue it: {_DOCTOR}")
        return
    left, due = at - seconds - micros / 1e6, datetime.fromtimestamp(at, UTC)
    again = " again, after it failed," if any(one.outcome == "failed" for one in job.attempts) else ""
    if left > 0:
        words = f"it is to run{again} at {_time(due)}, in {amounts.rough_duration(left)}"
        yield Reason("time", words, {"at": due, "in_seconds": left})
    if chores is None:
        yield Reason(
            "no_worker", "no worker is up, and only workers queue what is due: 'fleet up', 'fleet worker'"
        )
    elif left <= 0:
        yield Reason("time", "it is due, and will be queued within a second")


def _deferred(client: redis.Redis, job: JobView) -> Iterator[Reason]:
    members: Any = client.smembers(keys.of("dependencies", job.id))
    ids = sorted(member.decode("utf-8", "replace") for member in members)
    waits_for = [Related(*row) for row in jobs.states(client, ids).items() if row[1] != "finished"]
    for parent in waits_for[:_NAMED]:
        yield Reason("dependency", _parent(parent), {"job": parent.id, "state": parent.state})
    if len(waits_for) > _NAMED:
        yield Reason("dependency", f"it waits for {len(waits_for) - _NAMED} more jobs")
    if not waits_for:
        yield Reason("dependency", f"nothing that it waits for is left, yet it was not queued: {_DOCTOR}")


def _parent(parent: Related) -> str:
    if parent.id.startswith("gate:"):
        return "the rest of its submission is still on its way"
    if parent.state is None:
        return f"it waits for {parent.id}, which is gone: nothing will start it, 'fleet cancel' ends it"
    if parent.state in jobs.ENDED:
        how = parent.state if parent.state == "failed" else f"was {parent.state}"
        return f"it waits for {parent.id} to finish, which {how}: 'fleet retry {parent.id}'"
    return f"it waits for {parent.id}, which is {parent.state}"


_DOCTOR = "'fleet doctor' looks into it"


# --- it waits for a worker -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Queued:
    """What concerns a job that waits in a list."""

    position: int | None
    fleet: FleetStatus
    suspended: bool
    #: list -> the workers that hold room for one of its jobs each
    reserved: Mapping[str, Sequence[str]]
    #: list of the same base -> what its jobs ask for
    needs: Mapping[str, Requirements]


def _queued(client: redis.Redis, job: JobView, need: Requirements | None) -> Iterator[Reason]:
    facts = _look(client, job)
    yield from _held_back(job, facts)
    if facts.position is None:
        yield Reason("unlisted", f"it is called queued, yet stands in no list: {_DOCTOR}")
    elif need is None:
        yield Reason("unknown_set", f"nobody knows what jobs of {job.queue} ask for: no worker will take it")
    else:
        yield from _workers(job, need, facts)
        yield from _before(job, need, facts)


def _look(client: redis.Redis, job: JobView) -> _Queued:
    fleet, base = status.read(client), base_of(job.queue)
    lists = [queue.name for queue in fleet.queues if base_of(queue.name) == base]
    with client.pipeline(transaction=False) as pipe:
        pipe.lpos(keys.queue(job.queue), job.id)
        pipe.exists(keys.SUSPENDED)
        pipe.hgetall(keys.sets(base))
        for name in lists:
            pipe.zrange(keys.of("reserved", name), 0, -1)
        position, suspended, sets, *holders = replies(pipe)
    reserved = {
        name: [worker.decode() for worker in workers]
        for name, workers in zip(lists, holders, strict=True)
        if isinstance(workers, list) and workers
    }
    return _Queued(position, fleet, suspended == 1, reserved, dict(_needs(base, sets)))


def _needs(base: str, sets: Mapping[bytes, bytes]) -> Iterator[tuple[str, Requirements]]:
    yield base, NOTHING
    for digest, text in sets.items():
        try:
            yield f"{base}{SEPARATOR}{digest.decode()}", Requirements.from_canonical(text)
        except ValueError:
            continue


def _held_back(job: JobView, facts: _Queued) -> Iterator[Reason]:
    if facts.suspended:
        yield Reason("suspended", "all workers are suspended: 'rq resume' lets them go on")
    base = base_of(job.queue)
    if any(queue.paused for queue in facts.fleet.queues if queue.name == base):
        yield Reason("paused", f"queue {base} is paused: 'fleet resume {base}' lets it go on")


def _workers(job: JobView, need: Requirements, facts: _Queued) -> Iterator[Reason]:
    """Who could run it, and why these do not."""
    base, now = base_of(job.queue), facts.fleet.at.timestamp()
    # a worker for one sublist alone says so
    listening = [worker for worker in facts.fleet.workers if {base, job.queue} & set(worker.queues)]
    alive = [worker for worker in listening if worker.state != "offline"]
    offers = {worker.name: worker.offer() for worker in alive}
    matching = [worker for worker in alive if need.matches(offers[worker.name], now)]
    if not alive:
        yield _nobody(base, listening, facts.fleet.workers)
    elif not matching:
        yield from fitting.unmatched(need, [offers[worker.name] for worker in alive], now)
        yield from _elsewhere(need, alive, now)
    else:
        held = {
            worker: facts.needs[name]
            for name, workers in facts.reserved.items()
            if name in facts.needs and name != job.queue
            for worker in workers
        }
        yield from _those_that_match(need, matching, offers, held)


def _elsewhere(need: Requirements, workers: Sequence[WorkerStatus], now: float) -> Iterator[Reason]:
    """Workers that would match, had others of their hosts not been promised what they lack."""
    for worker in workers:
        there = dict(worker.elsewhere or {})
        more = {
            "cpus": there.get("cpus", 0),
            "memory": there.get("memory_bytes", 0),
            "gpus": there.get("gpus", 0),
        }
        lacks = need.mismatches(worker.offer(), now)
        if all(
            isinstance(one.has, int | float) and one.asked <= one.has + more.get(one.what, 0) for one in lacks
        ):
            parts = {
                "cpus": f"{more['cpus']} CPUs",
                "memory": f"{amounts.rough_size(more['memory'])} of memory",
                "gpus": f"{more['gpus']} GPUs",
            }
            what = ", ".join(parts[one.what] for one in lacks)
            whose = _some(there.get("workers", ()))
            words = (
                f"{worker.name} would match, but {what} of its host are promised to {whose}, until that ends"
            )
            yield Reason("elsewhere", words, {"worker": worker.name, **there})


def _nobody(base: str, listening: Sequence[WorkerStatus], workers: Sequence[WorkerStatus]) -> Reason:
    if listening:
        message = f"all {len(listening)} workers on queue {base} are offline"
    else:
        others = sorted({queue for worker in workers if worker.state != "offline" for queue in worker.queues})
        elsewhere = f"; there are some on {', '.join(others)}" if others else ""
        message = f"no worker listens on queue {base}{elsewhere}"
    return Reason("no_worker", f"{message}: 'fleet up', or 'fleet worker --queues {base}'")


def _those_that_match(
    need: Requirements,
    matching: Sequence[WorkerStatus],
    offers: Mapping[str, Offer],
    held: Mapping[str, Requirements],
) -> Iterator[Reason]:
    """`held`: worker -> for what it holds room, if that is for others."""
    for state, words in (("draining", "take nothing new"), ("connecting", "have been silent for a while")):
        found = [worker.name for worker in matching if worker.state == state]
        if found:
            yield Reason(
                state,
                f"of {len(matching)} that match {len(found)} {words}: {_some(found)}",
                {"workers": found},
            )
    ready = [worker for worker in matching if worker.state in ("idle", "busy")]
    free = {worker.name: _free(worker) for worker in ready}
    with_room = [name for name, left in free.items() if fitting.fits(need, offers[name], left)]
    open_to_it = [
        name
        for name in with_room
        if name not in held
        or fitting.fits(need, offers[name], fitting.beside(held[name], offers[name], free[name]))
    ]
    if open_to_it:
        said = _when(worker for worker in ready if worker.name in open_to_it)
        words = f"there is room for it on {_some(open_to_it)}{said}: it starts when its turn comes"
        yield Reason("room", words, {"workers": open_to_it})
    elif ready and not with_room:  # else who holds room is told with what comes before it
        yield fitting.without_room(need, [(offers[name], left) for name, left in free.items()])


def _when(workers: Iterable[WorkerStatus]) -> str:
    """How old their news are: what they have taken since is not in it."""
    ages = [worker.heartbeat_age_seconds for worker in workers if worker.heartbeat_age_seconds is not None]
    if not ages:
        return ""
    whose = "by its last heartbeat" if len(ages) == 1 else "by their last heartbeats"
    return f" ({whose}, {max(ages):.0f} s ago{'' if len(ages) == 1 else ' at most'})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _free(worker: WorkerStatus) -> Free:
    """As its last beat said, but for the slots: these are known. One that does not say has room for all."""
    slots = max(0, worker.slots - len(worker.running))
    if worker.free is None:
        return Free(slots, worker.cpus, worker.memory_bytes, (1.0,) * len(worker.gpus))
    return replace(worker.free, slots=min(slots, worker.free.slots))


def _before(job: JobView, need: Requirements, facts: _Queued) -> Iterator[Reason]:
    """What is given out first, and for what room is held."""
    waiting = {queue.name: queue.queued for queue in facts.fleet.queues}
    higher = sum(
        waiting.get(name, 0) for name, other in facts.needs.items() if other.priority > need.priority
    )
    if facts.position:
        yield Reason(
            "ahead", f"{facts.position} that ask for the same came before it", {"jobs": facts.position}
        )
    if higher:
        yield Reason("priority", f"{higher} of its queue have a higher priority", {"jobs": higher})
    for name, workers in facts.reserved.items():
        hold = f"{_some(workers)} {'holds' if len(workers) == 1 else 'hold'} room"
        whose = "the first of those that ask for the same" if name == job.queue else f"the first of {name}"
        yield Reason("reserved", f"{hold} for {whose}", {"workers": workers, "queue": name})
