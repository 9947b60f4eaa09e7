"""What a run came to, in numbers: from the same evidence that the checker judges by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.chaos.checker import Violation
from tests.chaos.evidence import Evidence, Execution
from tests.chaos.story import Record, fence_of


@dataclass(frozen=True)
class Figures:
    """Counts, and seconds. `lost` and `accepted_twice` are jobs that contradict properties 1 and 2.

    An execution is extra if no end of the job's own doing (finished, failed, retried) belongs to it: a fault
    took it along. `extra_after_deaths` are those whose worker died; the others had a worker that was
    stopped, cut off or told to leave. A worker with n slots may take n of them along, and n more that it
    had run and not reported yet.
    """

    submitted: int
    acknowledged: int
    ended: dict[str, int]
    lost: int
    accepted_twice: int
    violations: int
    executions: int
    extra_executions: int
    extra_after_deaths: int
    worker_deaths: int
    faults: dict[str, int]
    recorded_losses: int
    recoveries: int
    recovery_p50_seconds: float | None
    recovery_p99_seconds: float | None
    recovery_max_seconds: float | None
    #: of those that no outage of Redis met, after which recovery waits for one lease
    recoveries_without_outage: int
    recovery_p99_without_outage_seconds: float | None


def of(evidence: Evidence, violations: Sequence[Violation], outage_seconds: float = 9.0) -> Figures:
    """The figures of a run that was judged; an outage and the pause after it take so long at most."""
    spans = list(_recoveries(evidence))
    recoveries = sorted(end - start for start, end in spans)
    outages = [event["wall"] for event in evidence.named("fault") if event["fault"] == "redis"]
    undisturbed = sorted(
        end - start
        for start, end in spans
        if not any(start - outage_seconds <= outage <= end for outage in outages)
    )
    extra = [run for job in evidence.executions for run in _extra(evidence, job)]
    return Figures(
        submitted=len(evidence.intents),
        acknowledged=len(evidence.acknowledged),
        ended=dict(Counter(state.status for state in evidence.final.values() if state.exists)),
        lost=_jobs(violations, 1),
        accepted_twice=_jobs(violations, 2),
        violations=len(violations),
        executions=sum(map(len, evidence.executions.values())),
        extra_executions=len(extra),
        extra_after_deaths=sum(_died(evidence, run) for run in extra),
        worker_deaths=_worker_deaths(evidence),
        faults=_faults(evidence),
        recorded_losses=sum(_count(evidence, job, "lost") for job in evidence.story),
        recoveries=len(recoveries),
        recovery_p50_seconds=quantile(recoveries, 0.5),
        recovery_p99_seconds=quantile(recoveries, 0.99),
        recovery_max_seconds=recoveries[-1] if recoveries else None,
        recoveries_without_outage=len(undisturbed),
        recovery_p99_without_outage_seconds=quantile(undisturbed, 0.99),
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _jobs(violations: Sequence[Violation], number: int) -> int:
    return len({violation.job for violation in violations if violation.number == number})


def _worker_deaths(evidence: Evidence) -> int:
    return sum(event["status"] != 0 for event in evidence.named("died"))


def _faults(evidence: Evidence) -> dict[str, int]:
    return dict(Counter(event["fault"] for event in evidence.named("fault")))


def _count(evidence: Evidence, job: str, outcome: str) -> int:
    return sum(record.outcome == outcome for _, record in evidence.records(job))


def _extra(evidence: Evidence, job: str) -> list[Execution]:
    """Runs of a job beyond the one that each end of its own doing needs."""
    taken = ("lost", "handed-back")
    own = {record.fence for _, record in evidence.records(job) if record.outcome not in taken}
    return [run for run in evidence.executions[job] if fence_of(run.lease) not in own]


def _died(evidence: Evidence, run: Execution) -> bool:
    """Whether the worker of this run died before its lease was over."""
    fence = fence_of(run.lease)
    records = (record for _, record in evidence.records(run.job) if record.fence == fence)
    return any(_death_under(evidence, record) is not None for record in records)


def _recoveries(evidence: Evidence) -> Iterator[tuple[float, float]]:
    """From the death of a worker to the end of each lease that it held, by the wall clock."""
    for job in evidence.story:
        for _, record in evidence.records(job):
            death = _death_under(evidence, record)
            if record.outcome == "lost" and death is not None:
                yield death, record.at


def _death_under(evidence: Evidence, record: Record) -> float | None:
    """When the worker died that had this lease, if it died of it."""
    _, worker, since = evidence.leases.get(record.fence, ("", "", 0.0))
    deaths = evidence.deaths.get(worker, [])
    return min((wall for wall in deaths if since - 0.05 <= wall <= record.at), default=None)
