"""All there is to judge by: the history, the story of each job, and what was left in Redis; indexed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tests.chaos.history import Event
from tests.chaos.story import Change, JobState, Record, execution_of, fence_of, final_states


@dataclass(frozen=True)
class Dump:
    """What is in Redis at the end: state and lease of each job, who is listed where, what a drain leaves."""

    jobs: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    queued: dict[str, list[str]] = field(default_factory=dict)
    #: keys that must not be there when all is drained
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Execution:
    """One run of a job: from its start to the last sign of life that it gave."""

    job: str
    lease: str
    worker: str
    start: float
    last_sign: float


@dataclass(frozen=True)
class Evidence:
    """All there is to judge by. `losses_limit` is the fleet's setting."""

    events: Sequence[Event]
    changes: Sequence[Change]
    dump: Dump = Dump()
    losses_limit: int = 3

    def named(self, name: str) -> Sequence[Event]:
        """The events of that name, in order."""
        return self._by_name.get(name, ())

    @cached_property
    def _by_name(self) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            found[event["event"]].append(event)
        return dict(found)

    @cached_property
    def intents(self) -> dict[str, Event]:
        return {event["job"]: event for event in self.named("intent")}

    @cached_property
    def acknowledged(self) -> list[str]:
        return [job for event in self.named("ack") for job in event["jobs"]]

    @cached_property
    def submissions(self) -> Counter[str]:
        """How many times each job was submitted: anew with each requeue and repeat."""
        counts = Counter({job: 1 + event.get("repeats", 0) for job, event in self.intents.items()})
        counts.update(event["job"] for event in self.named("requeued"))
        return counts

    @cached_property
    def story(self) -> dict[str, list[Change]]:
        found: dict[str, list[Change]] = defaultdict(list)
        for change in self.changes:
            found[change.job].append(change)
        return found

    @cached_property
    def final(self) -> dict[str, JobState]:
        return final_states(self.changes)

    @cached_property
    def leases(self) -> dict[str, tuple[str, str, float]]:
        """Execution, and fence, of every lease ever given -> (lease, worker, when)."""
        found = {}
        for change in self.changes:
            for given in change.given:
                row = (given.lease, given.worker, change.at)
                found[execution_of(given.lease)] = found[fence_of(given.lease)] = row
        return found

    @cached_property
    def executions(self) -> dict[str, list[Execution]]:
        """Each job's runs in order of their start."""
        signs: dict[tuple[str, str], float] = {}
        for event in self.events:
            if event["event"] in ("tick", "end") and "job" in event:
                signs[event["job"], _run(event)] = event["at"]
        found: dict[str, list[Execution]] = defaultdict(list)
        for event in self.named("start"):
            job, run = event["job"], _run(event)
            lease = self.leases.get(run, (f"unknown:{run}", "", 0.0))[0]
            last = max(event["at"], signs.get((job, run), 0.0))
            found[job].append(Execution(job, lease, event.get("worker", ""), event["at"], last))
        for runs in found.values():
            runs.sort(key=lambda run: run.start)
        return found

    @cached_property
    def given_by_step(self) -> list[tuple[int, list[tuple[str, str]]]]:
        """For each step that gave leases: (job, lease) of each."""
        found: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for change in self.changes:
            for given in change.given:
                found[change.step].append((change.job, given.lease))
        return list(found.items())

    @cached_property
    def given_up(self) -> set[str]:
        """Leases whose own worker said that they are lost."""
        return {event["lease"] for event in self.named("giving-up")}

    @cached_property
    def deaths(self) -> dict[str, list[float]]:
        """When each worker was killed, or ended by itself, by the wall clock."""
        found: dict[str, list[float]] = defaultdict(list)
        for event in self.events:
            if event["event"] == "died" or (event["event"] == "killed" and event["target"] == "worker"):
                found[event["worker"]].append(event["wall"])
        return found

    def records(self, job: str) -> Iterator[tuple[Change, Record]]:
        for change in self.story.get(job, ()):
            for record in change.records:
                yield change, record


def _run(event: Event) -> str:
    """What tells one run from another: RQ's execution id, or the fence."""
    return str(event.get("execution") or event.get("fence"))
