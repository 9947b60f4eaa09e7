"""`fleet submit --target`: jobs for workers, for this machine, or for it where no worker can run them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from broker import amounts
from broker.errors import Conflict
from cli.context import Context

if TYPE_CHECKING:
    import redis

    from broker.requirements import Mismatch
    from broker.submit import Submission

TARGETS = ("worker", "local", "auto")


def for_here(context: Context, client: redis.Redis, submission: Submission, target: str) -> Submission | None:
    """The submission as this machine is to run it; None: it is for any worker.

    Raises Conflict for `local` where this machine cannot run it.
    """
    if target == "worker":
        return None
    from fleet import here

    need = submission.options.requirements
    if target == "auto" and here.is_served(client, submission.queue, need):
        return None
    need = here.bound(need)
    lacking = [] if here.is_served(client, submission.queue, need) else here.missing(need)
    if lacking and target == "local":
        raise Conflict(
            f"this machine cannot run it now: {_words(lacking)}",
            "What other workers here have promised is not free; with --target worker it waits for a worker.",
        )
    if lacking:
        context.say(f"No worker can run it now, nor this machine: {_words(lacking)}. It waits for a worker.")
        return None
    return replace(submission, options=replace(submission.options, requirements=need))


def see_to_it(context: Context, client: redis.Redis, job_id: str, submission: Submission) -> None:
    """Have a worker here for a job that `for_here` gave. Raises FleetError where none can be started."""
    from fleet import here

    settings = context.settings
    orders = here.Orders(
        context.url(), asdict(settings.worker), str(Path.cwd()), settings.log_format, settings.log_level
    )
    need = submission.options.requirements
    try:
        worker = here.see_to_it(client, job_id, submission.queue, need, orders)
    except KeyboardInterrupt:
        context.say(f"Job {job_id} is submitted; 'fleet cancel {job_id}' ends it.")
        raise
    if worker:
        context.say(f"Worker {worker} runs it here, and leaves when it is done.")


def _words(lacking: Iterable[Mismatch]) -> str:
    return "it has " + ", ".join(map(_one, lacking))


def _one(lacking: Mismatch) -> str:
    has, asked = lacking.has or 0, lacking.asked
    if lacking.what == "label" or isinstance(asked, str) or isinstance(has, str):
        return f"not {asked}"
    if lacking.what == "memory":
        return f"{amounts.rough_size(has)} of {amounts.rough_size(float(asked))} of memory"  # type: ignore[arg-type]
    if lacking.what == "gpu_memory":
        return f"{has:g} GPUs with so much memory"
    unit = {"cpus": "CPUs", "gpus": "GPUs"}.get(lacking.what, lacking.what)
    return f"{has:g} of {asked:g} {unit}"
