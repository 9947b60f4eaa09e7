"""`broker.Queue`: an `rq.Queue` that rings for idle workers and also takes command lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import rq

from broker import keys
from broker.command import Command
from broker.submit import Options, submit_commands

if TYPE_CHECKING:
    from redis.client import Pipeline


class Queue(rq.Queue):
    """An `rq.Queue` whose jobs start at once: pushing a job also wakes an idle worker.

    `Queue(name, connection=...)` takes what `rq.Queue` takes; a plain `rq.Queue` on the same
    name works too, a few milliseconds later.
    """

    def push_job_id(self, job_id: str, pipeline: Pipeline | None = None, at_front: bool = False) -> None:
        """Push the job and one token, in the caller's transaction where there is one."""
        bell = keys.wake(self.name)
        with self.connection.pipeline() as own:
            pipe = pipeline if pipeline is not None else own
            super().push_job_id(job_id, pipeline=pipe, at_front=at_front)
            pipe.rpush(bell, "1")
            pipe.ltrim(bell, 0, 0)
            own.execute()

    def submit(self, argv: Sequence[str], *, job_id: str | None = None, **how: Any) -> str:
        """Submit one command line and return the job's id.

        `how`: `env`, `cwd`, and the fields of `Options`. Raises UsageError for a command or an
        option that cannot be, Conflict where `job_id` is taken.
        """
        command = Command(tuple(argv), how.pop("env", {}), how.pop("cwd", None))
        return submit_commands(self.connection, self.name, [(job_id, command)], Options(**how))[0]
