"""The metrics of a snapshot of the fleet: their names, labels and units.

By https://prometheus.io/docs/practices/naming/. What grows with users is capped: the queues used first have a
label each, the others share `(other)`; workers have one only where asked for. docs/cli.md lists them.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.utils import floatToGoString

from broker.history import BOUNDS_SECONDS, OTHER, REASONS, Times, Totals
from broker.metrics import Snapshot
from broker.printable import printable
from broker.requirements import base_of
from broker.status import QueueStatus, WorkerStatus

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.samples import Sample

_WORKER_STATES = ("idle", "busy", "draining", "connecting", "offline")
#: RQ's name of a state -> where QueueStatus has it
_JOB_STATES = {
    "queued": "queued",
    "started": "running",
    "scheduled": "scheduled",
    "deferred": "deferred",
    "finished": "finished",
    "failed": "failed",
    "canceled": "canceled",
}
_MIB = 2**20
_ENDPOINTS = (*map(floatToGoString, BOUNDS_SECONDS), "+Inf")


@dataclass(frozen=True)
class Choices:
    """What is told beside the rest: of each worker, of each set of requirements, and as rq-exporter does;
    and how many queues have a label of their own."""

    per_worker: bool
    per_set: bool
    rq_names: bool
    most_queues: int


def gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value))


def counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(name, help_text, value=float(value))


def told(snapshot: Snapshot, choices: Choices) -> Iterator[Metric]:
    """The metrics of a snapshot."""
    for metric in _told(snapshot, choices):
        metric.samples = [_shown(sample) for sample in metric.samples]
        yield metric


def _shown(sample: Sample) -> Sample:
    """Names may be anybody's: what is none to show, as a control character, is spelled out."""
    if all(map(str.isprintable, sample.labels.values())):
        return sample
    return sample._replace(labels={name: printable(value) for name, value in sample.labels.items()})


def _told(snapshot: Snapshot, choices: Choices) -> Iterator[Metric]:
    yield from _workers(snapshot.fleet.workers)
    yield from _jobs(snapshot, choices)
    yield from _history(_by_label(snapshot.totals, _labels(snapshot, choices)))
    yield from _bootstrap(snapshot)
    yield from _redis(snapshot)
    if choices.per_worker:
        yield from _each_worker(snapshot.fleet.workers)
    if choices.rq_names:
        yield from _rq(snapshot)


# --- workers ---------------------------------------------------------------------------------------


def _workers(workers: Iterable[WorkerStatus]) -> Iterator[Metric]:
    states: Counter[str] = Counter(worker.state for worker in workers)
    family = GaugeMetricFamily("fleet_workers", "Workers by state.", labels=["state"])
    for state in _WORKER_STATES:
        family.add_metric([state], states[state])
    yield family
    alive = [worker for worker in workers if worker.state != "offline"]
    ages = [worker.heartbeat_age_seconds or 0.0 for worker in alive] or [0.0]
    yield gauge("fleet_hosts", "Hosts with a worker that lives.", len({worker.host for worker in alive}))
    for name, help_text, have, left in _RESOURCES:
        total = sum(map(have, alive))
        used = total - sum(left(worker) for worker in alive)
        stem, unit = name.removesuffix("_bytes"), "_bytes" if name.endswith("_bytes") else ""
        yield gauge(f"fleet_{name}", f"{help_text} of workers that live.", total)
        yield gauge(f"fleet_{stem}_used{unit}", f"{help_text} of workers that live, given to jobs.", used)
    yield gauge(
        "fleet_heartbeat_age_max_seconds", "Since the last heartbeat of the worker that is latest.", max(ages)
    )
    yield gauge(
        "fleet_heartbeat_age_median_seconds", "Since the last heartbeat, median.", statistics.median(ages)
    )


def _slots_left(worker: WorkerStatus) -> float:
    return worker.slots - min(worker.slots, len(worker.running))


def _cpus_left(worker: WorkerStatus) -> float:
    return worker.free.cpus if worker.free else worker.cpus


def _memory_left(worker: WorkerStatus) -> float:
    """What is given out is counted in MiB, so that what is left beside it never is exact."""
    left = worker.free.memory_bytes if worker.free else worker.memory_bytes
    return left if worker.memory_bytes - left >= _MIB else worker.memory_bytes


def _gpus_left(worker: WorkerStatus) -> float:
    return sum(worker.free.gpus) if worker.free else len(worker.gpus)


#: what of it there is at a worker, and what is left: of all but slots as of the last heartbeat
_RESOURCES: tuple[tuple[str, str, Callable[[WorkerStatus], float], Callable[[WorkerStatus], float]], ...] = (
    ("slots", "Slots", lambda worker: worker.slots, _slots_left),
    ("cpus", "CPUs", lambda worker: worker.cpus, _cpus_left),
    ("memory_bytes", "Memory", lambda worker: worker.memory_bytes, _memory_left),
    ("gpus", "GPUs", lambda worker: len(worker.gpus), _gpus_left),
)


def _each_worker(workers: Iterable[WorkerStatus]) -> Iterator[Metric]:
    """With --per-worker: series that come and go with workers."""
    by = ["worker", "host"]
    state = GaugeMetricFamily("fleet_worker_state", "1 for the state that it is in.", labels=[*by, "state"])
    slots = GaugeMetricFamily("fleet_worker_slots", "Slots.", labels=by)
    running = GaugeMetricFamily("fleet_worker_running_jobs", "Jobs that it holds.", labels=by)
    age = GaugeMetricFamily("fleet_worker_heartbeat_age_seconds", "Since its last heartbeat.", labels=by)
    finished = CounterMetricFamily("fleet_worker_jobs_finished", "Jobs finished since its start.", labels=by)
    failed = CounterMetricFamily("fleet_worker_jobs_failed", "Jobs failed since its start.", labels=by)
    for worker in workers:
        who = [worker.name, worker.host]
        state.add_metric([*who, worker.state], 1)
        slots.add_metric(who, worker.slots)
        running.add_metric(who, len(worker.running))
        age.add_metric(who, worker.heartbeat_age_seconds or 0.0)
        finished.add_metric(who, worker.finished)
        failed.add_metric(who, worker.failed)
    yield from (state, slots, running, age, finished, failed)


# --- queues ----------------------------------------------------------------------------------------


def _labels(snapshot: Snapshot, choices: Choices) -> dict[str, str]:
    """base -> its label: the queues that were used first keep theirs."""
    known = [base for base in snapshot.totals if base != OTHER]
    others = sorted({base_of(queue.name) for queue in snapshot.fleet.queues} - set(known))
    own = [*known, *others][: choices.most_queues]
    return {base: base for base in own}


def _by_label(totals: Mapping[str, Totals], labels: Mapping[str, str]) -> dict[str, Totals]:
    """Also of queues of which nothing is known yet: who counts must have seen the 0."""
    found = dict.fromkeys(labels.values(), Totals())
    for base, each in totals.items():
        label = labels.get(base, OTHER)
        found[label] = found[label] + each if label in found else each
    return found


def _jobs(snapshot: Snapshot, choices: Choices) -> Iterator[Metric]:
    labels = _labels(snapshot, choices)
    groups: dict[str, list[QueueStatus]] = {}
    for queue in snapshot.fleet.queues:
        label = queue.name if choices.per_set else labels.get(base_of(queue.name), OTHER)
        groups.setdefault(label, []).append(queue)
    jobs = GaugeMetricFamily("fleet_jobs", "Jobs by queue and state.", labels=["queue", "state"])
    oldest = GaugeMetricFamily(
        "fleet_oldest_job_age_seconds",
        "For how long the first job of a queue that gives out jobs waits; 0: none does.",
        labels=["queue"],
    )
    unplaceable = GaugeMetricFamily(
        "fleet_unplaceable_jobs", "Queued jobs that no worker there is would ever take.", labels=["queue"]
    )
    paused = GaugeMetricFamily("fleet_paused_queues", "Queues that are paused.", labels=["queue"])
    for label, queues in groups.items():
        for state, where in _JOB_STATES.items():
            jobs.add_metric([label, state], sum(getattr(queue, where) for queue in queues))
        ages = [queue.oldest_age_seconds or 0.0 for queue in queues if not queue.paused]
        oldest.add_metric([label], max(ages, default=0.0))
        unplaceable.add_metric([label], sum(snapshot.unplaceable.get(queue.name, 0) for queue in queues))
        paused.add_metric(
            [label], sum(queue.paused and base_of(queue.name) == queue.name for queue in queues)
        )
    yield from (jobs, oldest, unplaceable, paused)


# --- what became of jobs ---------------------------------------------------------------------------

#: metric, help, and how many there were of it
_COUNTS: tuple[tuple[str, str, Callable[[Totals], int]], ...] = (
    ("fleet_claims", "Jobs given to workers.", lambda totals: totals.claims),
    ("fleet_jobs_finished", "Jobs that finished.", lambda totals: totals.finished),
    ("fleet_leases_lost", "Attempts whose worker was lost.", lambda totals: totals.lost),
    ("fleet_jobs_recovered", "Lost jobs that were queued again.", lambda totals: totals.recovered.count),
    ("fleet_jobs_handed_back", "Claimed jobs that came back.", lambda totals: totals.handed_back),
    ("fleet_stale_writes_refused", "Reports that came too late.", lambda totals: totals.stale),
)


def _history(totals: Mapping[str, Totals]) -> Iterator[Metric]:
    for name, help_text, count in _COUNTS:
        family = CounterMetricFamily(name, help_text, labels=["queue"])
        for label, each in totals.items():
            family.add_metric([label], count(each))
        yield family
    failed = CounterMetricFamily(
        "fleet_jobs_failed", "Jobs that failed for good.", labels=["queue", "reason"]
    )
    retried = CounterMetricFamily(
        "fleet_jobs_retried", "Failed attempts that are repeated.", labels=["queue", "reason"]
    )
    for label, each in totals.items():
        for reason in REASONS:
            failed.add_metric([label, reason], each.failed.get(reason, 0))
            retried.add_metric([label, reason], each.retried.get(reason, 0))
    yield from (failed, retried)
    waiting = HistogramMetricFamily("fleet_job_waiting_seconds", "From queued to claimed.", labels=["queue"])
    running = HistogramMetricFamily(
        "fleet_job_running_seconds", "Attempts that ended.", labels=["queue", "outcome"]
    )
    for label, each in totals.items():
        _observe(waiting, [label], each.waited)
        _observe(running, [label, "finished"], each.ran)
        _observe(running, [label, "failed"], each.ran_in_vain)
    yield from (waiting, running)
    recovery = HistogramMetricFamily(
        "fleet_recovery_seconds", "From the end of a lost lease to the job being queued again.", labels=[]
    )
    _observe(recovery, [], sum((each.recovered for each in totals.values()), Times()))
    yield recovery


def _observe(family: HistogramMetricFamily, labels: list[str], times: Times) -> None:
    buckets = list(zip(_ENDPOINTS, accumulate(times.counts), strict=True))
    family.add_metric(labels, buckets, sum_value=times.total_seconds)


def _bootstrap(snapshot: Snapshot) -> Iterator[Metric]:
    took = HistogramMetricFamily(
        "fleet_bootstrap_step_seconds", "Steps of 'fleet up' at hosts.", labels=["step"]
    )
    failed = CounterMetricFamily("fleet_bootstrap_failures", "Hosts at which a step failed.", labels=["step"])
    for step, times in snapshot.bootstraps.done.items():
        _observe(took, [step], times)
        failed.add_metric([step], snapshot.bootstraps.failed[step])
    yield from (took, failed)
    for name, what, help_text in _COUNTERS:
        yield counter(name, help_text, snapshot.counters.get(what, 0))


_COUNTERS = (
    ("fleet_worker_registrations", "registrations", "Workers that entered the registry, or came back to it."),
    ("fleet_damaged_keys", "damaged", "Keys passed over, for somebody made something else of them."),
)


# --- Redis -----------------------------------------------------------------------------------------


def _redis(snapshot: Snapshot) -> Iterator[Metric]:
    info = snapshot.server
    server = InfoMetricFamily("fleet_redis", "The Redis of the fleet.")
    policy, role = str(info.get("maxmemory_policy", "")), str(info.get("role", ""))
    server.add_metric([], {"version": snapshot.fleet.redis_version, "maxmemory_policy": policy, "role": role})
    yield server
    yield gauge(
        "fleet_redis_append_only", "Whether it writes an append-only file.", info.get("aof_enabled") == 1
    )
    yield gauge(
        "fleet_redis_may_evict", "Whether it may throw away keys when it is full.", policy != "noeviction"
    )
    for name, help_text, fields in _WRITES:
        is_ok = all(info.get(one, "ok") == "ok" for one in fields)
        yield gauge(f"fleet_redis_{name}_ok", help_text, is_ok)
    for name, (one, help_text) in _NUMBERS.items():
        yield gauge(f"fleet_redis_{name}", help_text, float(info.get(one, 0)))
    yield counter(
        "fleet_redis_evicted_keys", "Keys thrown away for want of memory.", info.get("evicted_keys", 0)
    )


_WRITES = (
    (
        "append_only_write",
        "Whether the append-only file could be written, and rewritten, last.",
        ("aof_last_write_status", "aof_last_bgrewrite_status"),
    ),
    ("snapshot", "Whether the last snapshot could be written.", ("rdb_last_bgsave_status",)),
)
_NUMBERS = {
    "last_snapshot_timestamp_seconds": ("rdb_last_save_time", "When the last snapshot was written."),
    "unsaved_changes": ("rdb_changes_since_last_save", "Changes since the last snapshot."),
    "memory_used_bytes": ("used_memory", "Memory used."),
    "memory_limit_bytes": ("maxmemory", "maxmemory; 0: no limit."),
    "replicas": ("connected_slaves", "Replicas connected."),
}


# --- rq-exporter's names ---------------------------------------------------------------------------


def _rq(snapshot: Snapshot) -> Iterator[Metric]:
    """As https://github.com/mdawar/rq-exporter has them, sets of requirements summed."""
    by = ["name", "queues"]
    workers = GaugeMetricFamily("rq_workers", "RQ workers", labels=["name", "state", "queues"])
    success = CounterMetricFamily("rq_workers_success", "RQ workers success count", labels=by)
    failed = CounterMetricFamily("rq_workers_failed", "RQ workers fail count", labels=by)
    seconds = CounterMetricFamily("rq_workers_working_time", "RQ workers spent seconds", labels=by)
    for worker in snapshot.fleet.workers:
        if worker.state == "offline":
            continue  # RQ forgets them with their last heartbeat
        queues = ",".join(worker.queues)
        workers.add_metric([worker.name, _rq_state(worker), queues], 1)
        success.add_metric([worker.name, queues], worker.finished)
        failed.add_metric([worker.name, queues], worker.failed)
        seconds.add_metric([worker.name, queues], worker.seconds_worked)
    yield from (workers, success, failed, seconds)
    jobs = GaugeMetricFamily("rq_jobs", "RQ jobs by state", labels=["queue", "status"])
    counts: Counter[tuple[str, str]] = Counter()
    for queue in snapshot.fleet.queues:
        for state, where in _JOB_STATES.items():
            counts[base_of(queue.name), state] += getattr(queue, where)
    for (base, state), count in counts.items():
        jobs.add_metric([base, state], count)
    yield jobs


def _rq_state(worker: WorkerStatus) -> str:
    """In RQ's words, which knows neither draining nor connecting."""
    return "busy" if worker.running else "idle"
