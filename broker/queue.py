"""`broker.Queue`: an `rq.Queue` that rings for idle workers and also takes command lines."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import rq

from broker import clock, keys, names, sets
from broker.command import Command
from broker.requirements import NOTHING, parse
from broker.submit import Options, submit_commands

if TYPE_CHECKING:
    from datetime import datetime

    from redis import Redis
    from redis.client import Pipeline
    from rq.job import Job


#: the place of `job_id` among what `rq.Queue.create_job` takes
_JOB_ID_AT = 9
#: what `rq.Queue` takes: it passes over anything else in silence
_RQ_OPTIONS = {*inspect.signature(rq.Queue).parameters, "async"}
#: seconds after which what jobs ask for is written down anew: what nobody uses is removed, after a while
_KNOWN_SECONDS = 60.0


class Queue(rq.Queue):
    """An `rq.Queue` whose jobs start at once: pushing a job also wakes an idle worker.

    `Queue(name, connection=...)` takes what `rq.Queue` takes; a plain `rq.Queue` on the same
    name works too, a few milliseconds later. What is given besides, its jobs need of the worker that runs
    them, as `fleet submit` takes it: `cpus`, `memory` ("4G", or bytes), `gpus`, `gpu_memory`, `labels` (a
    dictionary of globs, or a list of "k=glob" and "k!=glob"), `time_request` (seconds, or "2h"), `exclusive`,
    `priority`. Such jobs wait in a sublist of the queue, which is this queue's `name`. Raises UsageError.
    """

    def __init__(
        self, name: str = "default", connection: Redis | None = None, *args: Any, **options: Any
    ) -> None:
        asked = {name: options.pop(name) for name in options.keys() - _RQ_OPTIONS}
        self.requirements = parse(asked)
        self.base = name
        self._known_at: float | None = None
        if self.requirements != NOTHING:
            name = self.requirements.queue_of(names.queue_name(name))
        super().__init__(name, connection, *args, **options)

    def create_job(self, *args: Any, **fields: Any) -> Job:
        """As RQ; an id that nobody chose tells that the job comes with a token."""
        is_new = len(args) <= _JOB_ID_AT and not fields.get("job_id")
        if is_new:
            fields["job_id"] = names.new_uuid()
        job = super().create_job(*args, **fields)
        job.description = self.requirements.beside(job.description or "")
        if is_new:
            job.to_dict = partial(_first_fields, job)  # type: ignore[method-assign]
        self._make_known()
        return job

    def _make_known(self) -> None:
        """Write down what jobs here ask for, before the first is pushed."""
        now = clock.monotonic()
        if self.base != self.name and (self._known_at is None or now - self._known_at > _KNOWN_SECONDS):
            sets.add(self.connection, self.base, self.requirements)
            self._known_at = now

    def enqueue_job(
        self, job: Job, pipeline: Pipeline | None = None, at_front: bool = False, unique: bool = False
    ) -> Job:
        """As RQ, but in one round trip where the job waits for no other."""
        self._make_known()
        if pipeline is not None or unique or job._dependency_ids or not self.is_async:
            return super().enqueue_job(job, pipeline=pipeline, at_front=at_front, unique=unique)
        with self.connection.pipeline() as pipe:
            super().enqueue_job(job, pipeline=pipe, at_front=at_front)
            pipe.execute()
        return job

    def push_job_id(self, job_id: str, pipeline: Pipeline | None = None, at_front: bool = False) -> None:
        """Push the job and one token, in the caller's transaction where there is one."""
        self._make_known()
        bell = keys.wake(self.name)
        with self.connection.pipeline() as own:
            pipe = pipeline if pipeline is not None else own
            super().push_job_id(job_id, pipeline=pipe, at_front=at_front)
            pipe.rpush(bell, "1")
            pipe.ltrim(bell, 0, 0)
            if self.base != self.name:
                heads = keys.heads(self.base, self.requirements.priority)
                pipe.zadd(heads, {self.requirements.digest(): clock.wall().timestamp() * 1000}, nx=True)
            own.execute()

    def schedule_job(self, job: Job, datetime: datetime, *args: Any, **options: Any) -> Job:
        """As RQ."""
        self._make_known()
        return super().schedule_job(job, datetime, *args, **options)

    def submit(self, argv: Sequence[str], *, job_id: str | None = None, **how: Any) -> str:
        """Submit one command line and return the job's id.

        `how`: `env`, `cwd`, and the fields of `Options`. Raises UsageError for a command or an
        option that cannot be, Conflict where `job_id` is taken.
        """
        command = Command(tuple(argv), how.pop("env", {}), how.pop("cwd", None))
        options = Options(**how, requirements=self.requirements)
        return submit_commands(self.connection, self.base, [(job_id, command)], options)[0]


def _first_fields(job: Job, **how: Any) -> dict[str, Any]:
    """In place of `job.to_dict`, once: what that returns but for the empty fields, half of a new job's.

    RQ takes one that is missing for empty. Under an id that somebody chose there may be an older job, all of
    which is to be overwritten.
    """
    del job.to_dict
    return {name: value for name, value in job.to_dict(**how).items() if value != ""}
