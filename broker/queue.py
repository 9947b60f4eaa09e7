"""`broker.Queue`: an `rq.Queue` that rings for idle workers and also takes command lines."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import rq
import rq.job

from broker import clock, keys, names, sets
from broker.command import Command
from broker.requirements import NOTHING, parse
from broker.submit import Options, submit_commands

if TYPE_CHECKING:
    from datetime import datetime

    from redis import Redis
    from redis.client import Pipeline

#: the place of `job_id` among what `rq.Queue.create_job` takes
_JOB_ID_AT = 9
#: what `rq.Queue` takes: it passes over anything else in silence
_RQ_OPTIONS = {*inspect.signature(rq.Queue).parameters, "async"}
#: seconds after which what jobs ask for is written down anew: what nobody uses is removed, after a while
_KNOWN_SECONDS = 60.0
#: fields that RQ writes empty, and takes for empty where they are missing: of a new job they are half
_EMPTY = frozenset(
    [
        *(
            "success_callback_name",
            "failure_callback_name",
            "stopped_callback_name",
            "started_at",
            "ended_at",
        ),
        *("last_heartbeat", "worker_name", "group_id"),
    ]
)


class _Job(rq.job.Job):
    """An `rq.job.Job` that is saved for the first time without empty fields, which every claim would read.

    Not under an id that somebody chose: there may be an older job, all of which is to be overwritten.
    """

    #: its id, if that was made for it, until it is saved
    new_id: str | None = None

    def to_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """As RQ."""
        fields: dict[str, Any] = super().to_dict(*args, **options)
        if self.new_id != self.id:
            return fields
        self.new_id = None
        return {name: value for name, value in fields.items() if value or name not in _EMPTY}


class Queue(rq.Queue):
    """An `rq.Queue` whose jobs start at once: pushing a job also wakes an idle worker.

    `Queue(name, connection=...)` takes what `rq.Queue` takes; a plain `rq.Queue` on the same
    name works too, a few milliseconds later. What is given besides, its jobs need of the worker that runs
    them, as `fleet submit` takes it: `cpus`, `memory` ("4G", or bytes), `gpus`, `gpu_memory`, `labels` (a
    dictionary of globs, or a list of "k=glob" and "k!=glob"), `time_request` (seconds, or "2h"), `exclusive`,
    `priority`. Such jobs wait in a sublist of the queue, which is this queue's `name`. Raises UsageError.
    """

    job_class = _Job

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

    def create_job(self, *args: Any, **fields: Any) -> rq.job.Job:
        """As RQ; an id that nobody chose tells that the job comes with a token."""
        is_new = len(args) <= _JOB_ID_AT and not fields.get("job_id")
        if is_new:
            fields["job_id"] = names.new_uuid()
        job = super().create_job(*args, **fields)
        job.description = self.requirements.beside(job.description or "")
        if is_new and isinstance(job, _Job):
            job.new_id = job.id
        self._make_known()
        return job

    def _make_known(self) -> None:
        """Write down what jobs here ask for, before the first is pushed."""
        now = clock.monotonic()
        if self.base != self.name and (self._known_at is None or now - self._known_at > _KNOWN_SECONDS):
            sets.add(self.connection, self.base, self.requirements)
            self._known_at = now

    def enqueue_job(
        self, job: rq.job.Job, pipeline: Pipeline | None = None, at_front: bool = False, unique: bool = False
    ) -> rq.job.Job:
        """As RQ, but in one round trip where the job waits for no other."""
        self._make_known()
        if pipeline is not None or unique or job._dependency_ids or not self.is_async:
            only_once = {"unique": True} if unique else {}  # RQ knows it since 2.7
            return super().enqueue_job(job, pipeline=pipeline, at_front=at_front, **only_once)
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

    def schedule_job(self, job: rq.job.Job, datetime: datetime, *args: Any, **options: Any) -> rq.job.Job:
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
