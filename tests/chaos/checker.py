"""The offline checker: the ten properties of a fleet, proved from a history and from Redis alone.

It is given what the participants wrote down (`history`), every step that Redis ever took (`journal`) and
what was left at the end (`dump`), and knows nothing of workers, clocks or faults. Each property is a function
that returns what contradicts it; none returns anything for a good history (tests/chaos/test_checker.py feeds
each one bad ones).
"""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from tests.chaos.evidence import Evidence, Execution
from tests.chaos.history import Event
from tests.chaos.story import TERMINAL, Change, JobState, Record, execution_of, fence_of

#: seconds by which two times that were taken by different means may disagree
SLACK = 0.05
#: seconds by which a command may have begun, or ended, later than it says: it reads hundredths, rounded down
_TICK = 0.01
#: the end of an attempt as its worker reports it -> as the job's record has it
_RECORDED = {"retry": "failed"}


@dataclass(frozen=True)
class Violation:
    """What contradicts a property: its number, the job concerned, why, and what shows it."""

    number: int
    job: str
    why: str
    evidence: tuple[Any, ...] = ()

    def __str__(self) -> str:
        shown = "".join(f"\n      {one}" for one in self.evidence[:12])
        name = PROPERTIES[self.number].__name__
        return f"property {self.number} ({name}): job {self.job}: {self.why}{shown}"


Found = Iterator[Violation]


# --- the ten properties ----------------------------------------------------------------------------


def every_acknowledged_job_ends(evidence: Evidence) -> Found:
    """1. Every acknowledged submission reaches a terminal state; expiry, and deletion by a client, count."""
    deleted = {event["job"] for event in evidence.named("deleted")}
    for job in evidence.acknowledged:
        story = evidence.story.get(job)
        if not story:
            yield Violation(1, job, "acknowledged, and never seen in Redis")
        elif not story[-1].after.exists:
            if not (story[-1].before.is_terminal or _completes(story[-1]) or job in deleted):
                yield Violation(1, job, "vanished before it ended", (story[-1],))
        elif not story[-1].after.is_terminal:
            where = ", ".join(story[-1].after.places) or "no place at all"
            yield Violation(1, job, f"never ended: {story[-1].after.status}, in {where}", tuple(story[-3:]))


def one_completion_is_accepted(evidence: Evidence) -> Found:
    """2. Of all completions of a submission exactly one is accepted."""
    for job, story in evidence.story.items():
        done = [change for change in story for _ in range(_completes(change))]
        if len(done) > max(1, evidence.submissions[job]):
            yield Violation(2, job, f"{len(done)} completions were accepted", tuple(done))
    told: dict[str, set[str]] = defaultdict(set)
    for event in evidence.named("reported"):
        if event["accepted"] and event["outcome"] == "finished":
            told[event["job"]].add(event["lease"])
    for job, leases in told.items():
        if len(leases) > max(1, evidence.submissions[job]):
            yield Violation(2, job, "several workers were told that theirs was accepted", tuple(leases))


def executions_are_accounted_for(evidence: Evidence) -> Found:
    """3. Executions <= 1 + recorded losses + retries; retries <= max; losses <= limit.

    A run that was handed back, because its worker had to stop, is recorded as that and counts for nobody.
    """
    for job, runs in evidence.executions.items():
        yield from _executions_of(evidence, job, runs)
    for job in evidence.story:
        retries = sum(_is_retry(change, record) for change, record in evidence.records(job))
        allowed = evidence.intents.get(job, {}).get("retries", 0) * max(1, evidence.submissions[job])
        if retries > allowed:
            yield Violation(3, job, f"{retries} retries, {allowed} allowed")
        worst = max(change.after.losses for change in evidence.story[job])
        if worst > evidence.losses_limit:
            yield Violation(3, job, f"{worst} losses, and still not failed")


def no_stale_write_is_accepted(evidence: Evidence) -> Found:
    """4. No accepted write carries a fence that is not the job's newest."""
    recorded: dict[str, str] = {}
    for change in evidence.changes:
        for record in change.records:
            recorded[record.fence] = record.outcome
            if record.newest is None or record.fence != fence_of(record.newest):
                yield Violation(4, change.job, f"end of fence {record.fence} accepted", (record,))
        for written in change.written:
            if not _is_newest(written.by, written.newest):
                yield Violation(4, change.job, f"{written.what} of {written.by} accepted", (written,))
    yield from _fences_grow(evidence)
    for event in evidence.named("reported"):
        outcome = _RECORDED.get(event["outcome"], event["outcome"])
        if event["accepted"] and recorded.get(fence_of(event["lease"])) not in (outcome, "lost"):
            yield Violation(4, event["job"], "told that its end was accepted, and it is not there", (event,))


def a_job_is_in_one_place(evidence: Evidence) -> Found:
    """5. After every step a job is in exactly one of queued, scheduled, deferred, leased, terminal."""
    for change in evidence.changes:
        places = change.after.places
        if change.after.exists and (len(places) != 1 or not _is_sound(places[0])):
            why = f"in {' and '.join(places)}" if places else f"{change.after.status}, and in no place"
            yield Violation(5, change.job, why, (change,))
    yield from _dump_agrees(evidence)


def no_two_leases(evidence: Evidence) -> Found:
    """6. No two valid leases on one job, no two of its runs at once, nor more tasks of an array than may be.

    Nor does a worker run jobs at once that asked for more CPUs, memory or GPUs than it has. Of a whole host
    that was frozen only one accepted result is promised, which is property 2.
    """
    for change in evidence.changes:
        for given in change.given:
            if given.held is not None:
                yield Violation(6, change.job, f"given away while {given.held} was held", (change,))
        for record in change.records:
            if record.outcome == "lost" and not _was_over(evidence, record):
                yield Violation(6, change.job, "a valid lease was taken away", (record,))
    yield from _too_many_tasks(evidence)
    for job, runs in evidence.executions.items():
        for earlier, later in pairwise(runs):
            if earlier.last_sign > later.start + SLACK and not _was_frozen(evidence, earlier):
                yield Violation(6, job, "ran twice at once", (earlier, later))
    yield from _promised_twice(evidence)


def dependents_wait(evidence: Evidence) -> Found:
    """7. A dependent starts only after its condition is met, and fails without a run only if it cannot be."""
    states: dict[str, JobState] = {}
    for _, together in groupby(evidence.changes, key=lambda change: change.step):
        changes = list(together)  # the end of a parent and the claim of what waited for it may be one step
        states.update((change.job, change.after) for change in changes)
        for change in changes:
            intent = evidence.intents.get(change.job, {})
            if change.given:
                yield from _unmet(change, intent, states)
            if change.after.status == "failed" != change.before.status and not change.records:
                yield from _unblamed(change, intent, states)


def the_worker_is_fit(evidence: Evidence) -> Found:
    """8. What a job asks for is true of the worker at the claim: its queue, its labels, and what it has."""
    workers = {event["who"]: event for event in evidence.named("registered")}
    for event in evidence.named("claimed"):
        worker, intent = workers.get(event["who"]), evidence.intents.get(event["job"], {})
        if worker is None:
            yield Violation(8, event["job"], f"claimed by {event['who']}, which never registered", (event,))
            continue
        base = event["queue"].partition("@")[0]
        queue = intent.get("queue", base)
        if queue != base or queue not in worker["queues"]:
            why = f"of queue {queue}, claimed from {event['queue']}"
            yield Violation(8, event["job"], why, (event, worker))
        for why in _unfit(intent.get("asked", {}), worker):
            yield Violation(8, event["job"], why, (event, worker))


def a_drain_leaves_nothing(evidence: Evidence) -> Found:
    """9. After a drain no lease, execution, wake token or running mark is left behind."""
    if not any(evidence.named("drained")):
        return
    for key in evidence.dump.left:
        yield Violation(9, "-", f"left behind: {key}")
    for job, (status, lease) in evidence.dump.jobs.items():
        if status == "started" or lease is not None:
            yield Violation(9, job, f"left {status} under lease {lease}")


def rq_info_agrees(evidence: Evidence) -> Found:
    """10. The counts of `rq info` equal ours, and running it changes nothing."""
    for event in evidence.named("counted"):
        if event["rq"] != event["ours"]:
            yield Violation(10, "-", "rq info and we count differently", (event,))
    for event in evidence.named("rq-info"):
        if event["before"] != event["after"]:
            yield Violation(10, "-", "rq info changed something", (event,))
    for change in evidence.changes:
        is_held = change.before.lease is not None and change.after.lease == change.before.lease
        if is_held and (change.after.is_terminal or "queue" in " ".join(change.after.places)):
            yield Violation(10, change.job, "moved by somebody while it was leased", (change,))


PROPERTIES: dict[int, Callable[[Evidence], Found]] = {
    1: every_acknowledged_job_ends,
    2: one_completion_is_accepted,
    3: executions_are_accounted_for,
    4: no_stale_write_is_accepted,
    5: a_job_is_in_one_place,
    6: no_two_leases,
    7: dependents_wait,
    8: the_worker_is_fit,
    9: a_drain_leaves_nothing,
    10: rq_info_agrees,
}


def check(evidence: Evidence) -> list[Violation]:
    """Everything that contradicts any of the ten."""
    return [found for judge in PROPERTIES.values() for found in judge(evidence)]


# --- what they are made of -------------------------------------------------------------------------


def _completes(change: Change) -> int:
    """How many completions this step accepted: ends of attempts that end the job, and stray results."""
    ends = sum(
        record.outcome == "finished" or (record.outcome != "handed-back" and change.after.is_terminal)
        for record in change.records
    )
    results = sum(written.what == "result 1" for written in change.written)
    return max(ends, results)


def _unmet(change: Change, intent: Event, states: Mapping[str, JobState]) -> Found:
    for parent in intent.get("after", ()):
        status = states[parent].status if parent in states else "unknown"
        if not (status == "finished" or (status == "failed" and intent.get("allow_failure"))):
            yield Violation(7, change.job, f"given out while {parent} was {status}", (change,))
    for parent in intent.get("after_any", ()):
        if parent not in states or not states[parent].is_terminal:
            yield Violation(7, change.job, f"given out before {parent} had ended", (change,))


def _unblamed(change: Change, intent: Event, states: Mapping[str, JobState]) -> Found:
    found = [states[parent] for parent in intent.get("after", ()) if parent in states]
    if not any(parent.is_terminal and parent.status != "finished" for parent in found):
        yield Violation(7, change.job, "failed for a job that it waits for, and none of them did", (change,))


#: what jobs ask for -> what a worker has of it
_AMOUNTS = {"cpus": "cpus", "memory": "memory_bytes", "gpus": "gpus"}


def _amount(asked: Mapping[str, Any], what: str) -> float:
    """How much of it a job asked for; memory in bytes."""
    value = asked.get(what) or 0
    return int(value[:-1]) * 2**20 if what == "memory" and value else float(value)


def _unfit(asked: Mapping[str, Any], worker: Event) -> Iterator[str]:
    for rule in asked.get("labels", ()):
        label, _, pattern = rule.partition("=")
        value = worker["labels"].get(label.removesuffix("!"))
        if (value is not None and fnmatch.fnmatchcase(value, pattern)) == label.endswith("!"):
            yield f"wants {rule}"
    for what, has in _AMOUNTS.items():
        if _amount(asked, what) > worker.get(has, 0):
            yield f"wants {asked[what]} of {what}"


def _promised_twice(evidence: Evidence) -> Found:
    """Whenever a job begins, what it and those that run beside it asked for must be there."""
    workers = {event["who"]: event for event in evidence.named("registered")}
    runs: dict[str, list[Execution]] = defaultdict(list)
    for executions in evidence.executions.values():
        for run in executions:
            if run.job in evidence.intents and not _was_frozen(evidence, run):
                runs[run.worker].append(run)
    for who, those in runs.items():
        beside: list[Execution] = []
        for run in sorted(those, key=lambda run: run.start):
            beside = [one for one in beside if one.last_sign > run.start + SLACK]
            # that it began first may be its clock's doing: then `run` was over before
            surely = [one for one in beside if run.last_sign > one.start + _TICK]
            yield from _too_much(evidence, workers.get(who), run, surely)
            beside.append(run)


def _too_much(evidence: Evidence, worker: Event | None, run: Execution, beside: Sequence[Execution]) -> Found:
    together = [evidence.intents[one.job].get("asked", {}) for one in (run, *beside)]
    for what, has in _AMOUNTS.items():
        amount = sum(_amount(asked, what) for asked in together)
        if worker and amount > worker.get(has, 0) and _amount(together[0], what):
            yield Violation(6, run.job, f"{amount:g} of {what} promised at once", (worker, run, *beside))
    if beside and any(asked.get("exclusive") for asked in together):
        yield Violation(6, run.job, "beside an exclusive job", (run, *beside))


def _is_sound(place: str) -> bool:
    """Whether it is one of the places where a job may be: the journal has other words for what may not be."""
    return place.startswith("queue ") or place in ("scheduled", "deferred", "leased", *TERMINAL)


def _is_retry(change: Change, record: Record) -> bool:
    return record.outcome == "failed" and not change.after.is_terminal and change.after.exists


def _executions_of(evidence: Evidence, job: str, runs: Sequence[Execution]) -> Found:
    twice = [lease for lease, count in Counter(run.lease for run in runs).items() if count > 1]
    if twice:
        yield Violation(3, job, f"ran twice under one lease: {twice}", tuple(runs))
    unknown = [run for run in runs if run.lease.startswith("unknown:")]
    if unknown and evidence.leases:
        yield Violation(3, job, "ran under a lease that Redis never gave", tuple(unknown))
    records = list(evidence.records(job))
    handed_back = {record.fence for _, record in records if record.outcome == "handed-back"}
    counted = [run for run in runs if fence_of(run.lease) not in handed_back]
    losses = sum(record.outcome == "lost" for _, record in records)
    retries = sum(_is_retry(change, record) for change, record in records)
    allowed = max(1, evidence.submissions[job]) + losses + retries
    if len(counted) > allowed:
        why = f"{len(counted)} executions, {losses} recorded losses, {retries} retries"
        yield Violation(3, job, why, tuple(runs))


def _too_many_tasks(evidence: Evidence) -> Found:
    """Tasks of an array that were leased at one time, more than its max_parallel."""
    leased: dict[str, set[str]] = defaultdict(set)
    for _, together in groupby(evidence.changes, key=lambda change: change.step):
        for change in (changes := list(together)):
            array = evidence.intents.get(change.job, {}).get("array", "")
            (leased[array].add if change.after.lease else leased[array].discard)(change.job)
        for change in changes:
            intent = evidence.intents.get(change.job, {})
            limit, running = intent.get("max_parallel"), leased[intent.get("array", "")]
            if limit and len(running) > limit:
                yield Violation(6, change.job, f"{len(running)} tasks run, {limit} may", (change,))


def _is_newest(by: str, newest: str | None) -> bool:
    """Of a lease or an execution id. What RQ's own worker writes carries no lease at all."""
    return newest is None or by in (newest, execution_of(newest))


def _fences_grow(evidence: Evidence) -> Found:
    """Every claim of the fleet has a higher fence than those before it; within one step they may mix."""
    highest = 0
    for step, given in evidence.given_by_step:
        fences = [int(fence_of(lease)) for _, lease in given]
        for (job, lease), fence in zip(given, fences, strict=True):
            if fence <= highest or fences.count(fence) > 1:
                yield Violation(4, job, f"fence {fence} given after {highest}", (step, lease))
        highest = max(highest, *fences)


def _was_over(evidence: Evidence, record: Record) -> bool:
    """Whether a lease that was taken away had ended: run out, or its worker was dead or gave it up."""
    if record.expiry <= record.at + 0.001:
        return True
    lease, worker, since = evidence.leases.get(record.fence, ("", record.worker, 0.0))
    if lease in evidence.given_up:
        return True
    return any(since - 1 <= wall <= record.at + SLACK for wall in evidence.deaths.get(worker, ()))


def _was_frozen(evidence: Evidence, run: Execution) -> bool:
    """Whether its whole tree of processes stood still while it ran, so that nothing could end it."""
    return any(
        event["worker"] == run.worker
        and event["frozen"]
        and run.start <= event["at"] + event["seconds"] + SLACK
        and run.last_sign >= event["at"]
        for event in evidence.named("stopped")
    )


def _dump_agrees(evidence: Evidence) -> Found:
    """The journal must lead to what is there: else somebody changed Redis past it, or it is not whole."""
    for job, (status, lease) in evidence.dump.jobs.items():
        known = evidence.final.get(job, JobState())
        if (known.status, known.lease) != (status, lease):
            yield Violation(5, job, f"in Redis {status} under {lease}, by its journal not", (known,))
    for queue, ids in evidence.dump.queued.items():
        for job, count in Counter(ids).items():
            if count > 1 or f"queue {queue}" not in evidence.final.get(job, JobState()).places:
                yield Violation(5, job, f"{count} times in the list of queue {queue}", ())
