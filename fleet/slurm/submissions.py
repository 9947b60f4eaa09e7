"""Submissions from their beginning to their end: made, looked at, cancelled. Records are in Redis."""

from __future__ import annotations

import getpass
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import redis

from broker import clock, jobs
from broker import slurm as records
from broker.errors import NotFound
from broker.slurm import Submission
from fleet.slurm import tools
from fleet.slurm.request import Request
from fleet.slurm.tools import Row, SlurmError, Unanswered
from fleet.worker_config import this_host

#: seconds after which a submission that was never answered, and that Slurm does not know, was not made
UNSURE_SECONDS = 120.0
#: seconds in which one worker alone looks whether allocations wait in vain
_AFTER_WORK_SECONDS = 20.0
#: seconds that Slurm gives jobs between SIGTERM and SIGKILL where it does not tell; and between two looks
_KILL_WAIT_SECONDS, _LOOK_SECONDS = 30.0, 0.5
#: the word for all submissions
ALL = "all"


@dataclass(frozen=True)
class Seen:
    """A submission and its allocations, as Slurm has them now; `rows` is None where it did not say."""

    submission: Submission
    rows: Sequence[Row] | None

    @property
    def state(self) -> str:
        """Of its allocations the best that is true: submitting, pending, running, ended, unknown."""
        if self.submission.ended_at is not None:
            return "ended"
        if self.rows is None:
            return "unknown"
        live = self.live
        if not live:
            return "ended" if self.submission.job_id else "submitting"
        return "pending" if all(row.waits for row in live) else "running"

    @property
    def live(self) -> list[Row]:
        """Allocations that have not ended."""
        return [row for row in self.rows or () if not row.has_ended]


def new(
    request: Request, *, queues: Sequence[str], leaves: bool, pool: str = "", user: str = ""
) -> Submission:
    """A submission that is about to be made, by us."""
    return Submission(
        name=records.new_name(request.job_name),
        user=user or getpass.getuser(),
        host=this_host(),
        nodes=request.nodes,
        workers_per_node=request.workers_per_node,
        allocations=request.allocations,
        queues=tuple(queues),
        submitted_at=clock.wall().timestamp(),
        pool=pool,
        leaves=leaves,
    )


def submit(client: redis.Redis, submission: Submission, script: str) -> Submission:
    """Make it, and have it on record from before that on. Raises SlurmError: then it is not made.

    Where the answer is lost Slurm is asked for a job of that name. Raises Unanswered where nobody knows: it
    stays on record.
    """
    records.record(client, submission)
    try:
        made = replace(submission, job_id=asked(script, submission))
    except Unanswered:
        raise
    except SlurmError:
        records.forget(client, [submission.name])
        raise
    records.record(client, made)
    return made


def asked(script: str, submission: Submission) -> str:
    """The job's id. Raises Unanswered, where it may have been made, and SlurmError, where it was not."""
    try:
        return tools.submit(script, submission.name)
    except Unanswered as exc:
        try:
            rows = tools.allocations([submission.user])
        except SlurmError:
            rows = []
        for row in rows:
            if row.name == submission.name:
                return row.master
        raise Unanswered(
            exc.message,
            f"If it was, its name is {submission.name}, and 'fleet slurm status' finds it.",
        ) from exc


def look(client: redis.Redis) -> tuple[list[Seen], str]:
    """All submissions with what Slurm says of them; and why it does not, else ''.

    What is seen to have ended is on record as such from then on, and so is an id that was not known.
    """
    found = records.submissions(client)
    open_ones = [row for row in found if row.ended_at is None]
    if not open_ones:
        return [Seen(row, ()) for row in found], ""
    try:
        rows = tools.allocations({row.user for row in open_ones})
    except SlurmError as exc:
        return [Seen(row, None if row.ended_at is None else ()) for row in found], exc.message
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    return [_settled(client, one, by_name.get(one.name, [])) for one in found], ""


def _settled(client: redis.Redis, submission: Submission, rows: list[Row]) -> Seen:
    """The submission as it turns out to be."""
    known = submission
    if submission.ended_at is not None:
        return Seen(submission, rows)
    if rows and not known.job_id:
        known = replace(known, job_id=rows[0].master)
    now = clock.wall().timestamp()
    is_over = all(row.has_ended for row in rows)
    if is_over and (known.job_id or now > known.submitted_at + UNSURE_SECONDS):
        known = replace(known, ended_at=now, end=_end(rows))
    if known != submission:
        records.record(client, known)
    return Seen(known, rows)


def _end(rows: Iterable[Row]) -> str:
    """`COMPLETED`, or `FAILED 2, TIMEOUT 1`."""
    counts = Counter(row.state for row in rows)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{state} {count}" for state, count in sorted(counts.items()))


# --- the end ----------------------------------------------------------------------------------------


def cancel(client: redis.Redis, words: Sequence[str], *, pending_only: bool = False) -> dict[str, str]:
    """Cancel submissions named by their names, ids of Slurm, pools, or `all`; what became of each.

    That is "canceled", "ended", or "submitting" where nobody knows yet whether it was made. Raises NotFound,
    before anything is done, for a word that names none, SlurmError.

    Workers are told first, and have as long as Slurm gives jobs between SIGTERM and SIGKILL.
    """
    seen, trouble = look(client)
    if trouble:
        raise SlurmError(trouble, "Nothing is cancelled.")
    chosen = _chosen(seen, words)
    live = {one.submission.name: [row for row in one.live if row.waits or not pending_only] for one in chosen}
    rows = [row for found in live.values() for row in found]
    if running := [row for row in rows if not row.waits]:
        tools.cancel([row.id for row in rows if row.waits], pending_only=True)
        tools.end_steps([row.id for row in running])
        _await_end(running)
    tools.cancel([row.id for row in rows], pending_only=pending_only)
    return {one.submission.name: _outcome(one, live[one.submission.name]) for one in chosen}


def _await_end(rows: Sequence[Row]) -> None:
    """Wait until these have ended, or long enough."""
    wait = tools.kill_wait_seconds()
    deadline = clock.monotonic() + (_KILL_WAIT_SECONDS if wait is None else wait)
    left = {row.id for row in rows}
    while left and clock.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        there = tools.allocations({row.user for row in rows})
        left &= {row.id for row in there if not row.has_ended}


def _outcome(one: Seen, cancelled: Sequence[Row]) -> str:
    if cancelled:
        return "canceled"
    return one.state if one.state != "pending" else "canceled"


def _chosen(seen: Sequence[Seen], words: Sequence[str]) -> list[Seen]:
    if ALL in words:
        return [one for one in seen if one.submission.ended_at is None]
    names = {one.submission.name: one for one in seen}
    for word in words:
        if not any(_is_meant(one.submission, word) for one in names.values()):
            raise NotFound(f"no submission {word}", "'fleet slurm status' lists them.")
    return [one for one in seen if any(_is_meant(one.submission, word) for word in words)]


def _is_meant(submission: Submission, word: str) -> bool:
    return bool(word) and word in (submission.name, submission.job_id, submission.pool)


def after_work(client: redis.Redis) -> None:
    """One of the workers that leave where no work remains cancels what waits for nodes in vain. Raises
    SlurmError, and what redis-py raises."""
    there = [row for row in records.submissions(client) if row.leaves and row.ended_at is None]
    if not any(jobs.unfinished(client, row.queues) == 0 for row in there):
        return
    if records.hold(client, "after-work", records.new_name("worker"), _AFTER_WORK_SECONDS):
        seen, trouble = look(client)
        if trouble:
            raise SlurmError(trouble)
        cancel_idle(client, seen)


def cancel_idle(client: redis.Redis, seen: Iterable[Seen]) -> list[str]:
    """Cancel allocations that wait for nodes where no work remains for them; the names of their submissions.

    Those alone whose workers would leave at once, or after idling. Raises SlurmError.
    """
    waiting = [one for one in seen if one.submission.leaves and any(row.waits for row in one.live)]
    idle: Mapping[tuple[str, ...], bool] = {
        queues: jobs.unfinished(client, queues) == 0
        for queues in {tuple(one.submission.queues) for one in waiting}
    }
    useless = [one for one in waiting if idle[tuple(one.submission.queues)]]
    tools.cancel([row.id for one in useless for row in one.live if row.waits], pending_only=True)
    return [one.submission.name for one in useless]
