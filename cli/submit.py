"""`fleet submit`: one command line as a job, or the jobs of a file."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from broker.requirements import NOTHING
from cli import tasks
from cli.context import Context, pass_context, print_json
from cli.params import (
    Duration,
    JobId,
    QueueName,
    files,
    json_option,
    pairs,
    requirement_options,
    requirements,
)
from cli.submit_file import refuse_other_options, submit_file
from cli.target import TARGETS, for_here, see_to_it

if TYPE_CHECKING:
    import redis

    from broker.command import Template
    from broker.submit import Options, Submission, Submitted

Given = dict[str, Any]


def job_options(command: Any) -> Any:
    """What is said of one job, for a verb that submits; `submission_of` reads them."""
    for option in reversed(_JOB_OPTIONS):
        command = option(command)
    return command


_JOB_OPTIONS = (
    click.option("--queue", type=QueueName(), default="default", show_default=True, help="Where it waits."),
    click.option("--name", metavar="TEXT", help="What 'fleet jobs' calls it; default: the command."),
    click.option(
        "--timeout", type=Duration(), help="End it, failed, after so long (90, 5m, 2h); default: never."
    ),
    click.option(
        "--retries", type=click.IntRange(0, 1000), default=0, help="Run it again so often if it fails."
    ),
    click.option(
        "--retry-delay",
        type=Duration(zero=True),
        default=1.0,
        help="Before the first retry; doubles; default 1s.",
    ),
    click.option("--env", "env", multiple=True, metavar="K=V", help="A variable for it; may be repeated."),
    click.option(
        "--cwd", metavar="DIR", help="Run it there, not in a folder of its own; relative: from here."
    ),
    click.option(
        "--id", "job_id", type=JobId(), help="Its id; refused where a job has it. Default: a new one."
    ),
    click.option(
        "--after",
        metavar="ID",
        multiple=True,
        type=JobId(),
        help="Not before that job has finished; repeatable.",
    ),
    click.option(
        "--after-any",
        metavar="ID",
        multiple=True,
        type=JobId(),
        help="Not before that one has ended, somehow.",
    ),
    click.option(
        "--on-failed-dependency",
        type=click.Choice(["fail", "wait"]),
        help="Where a job of --after does not finish: fail at once, or wait for its retry; default fail.",
    ),
)


@click.command(context_settings={"allow_interspersed_args": False})
@job_options
@click.option(
    "--file",
    metavar="FILE",
    shell_complete=files,
    help="The jobs of a file: .toml, .yaml or .json; '-' reads stdin.",
)
@requirement_options
@tasks.options
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="worker",
    show_default=True,
    help="Who runs it: any worker, this machine, or this machine where no worker can.",
)
@click.option("--wait", is_flag=True, help="Wait until it has ended; exit code 1 if it did not finish.")
@click.option("--follow", is_flag=True, help="Wait, and print what it prints while it runs.")
@json_option
@click.argument(
    "argv", metavar="[--] COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED, shell_complete=files
)
@pass_context
def submit(context: Context, /, argv: tuple[str, ...], **given: Any) -> int:
    """Submit a command; prints the job's id alone.

    What follows COMMAND is the command's own, options included:
    fleet submit --timeout 1h -- ./simulate --seed 42

    With --array, --each-line or --from-json: one task for each, all under one id; their numbers are in
    FLEET_TASK_ID.

    With --file: all jobs of a file, or none; prints 'NAME ID' for each.
    """
    from broker import arrays
    from broker.submit import submit_all

    if given["file"] is not None:
        refuse_other_options(argv)
        return submit_file(context, given["file"], wait=given["wait"], as_json=given["as_json"])
    if given["follow"] and given["as_json"]:
        raise UsageError(
            "--follow and --json exclude each other", "'fleet submit --wait --json' says how it ended."
        )
    submission = submission_of(context, argv, given)
    array = tasks.read(given)
    with context.redis(start=True) as client:
        here = for_here(context, client, submission, given["target"])
        submission = here or submission
        job = arrays.submit(client, submission, array) if array else submit_all(client, [submission])[0]
        if here:
            see_to_it(context, client, job.id, here)
        return told(context, client, job, {**given, "is_here": here is not None})


def submission_of(
    context: Context, argv: tuple[str, ...], given: Given, template: Template | None = None
) -> Submission:
    """The job that the options of `job_options` describe. Raises UsageError."""
    from broker import selection
    from broker.command import Command
    from broker.submit import Submission

    if given["job_id"] in (selection.LAST, selection.ALL):
        raise UsageError(
            f"--id {given['job_id']} would be no id", "'last' and 'all' are words of other verbs."
        )
    command = Command(argv, pairs("--env", given["env"]), _folder(given["cwd"]), template)
    return Submission(command, _options(context, given), given["queue"], given["job_id"]).checked()


def _options(context: Context, given: Given) -> Options:
    from broker.submit import Options

    if given["name"] == "":
        raise UsageError("--name is empty", "Leave it out: then it is the command.")
    timeout = given["timeout"]
    return Options(
        name=given["name"],
        # RQ counts whole seconds
        timeout_seconds=None if timeout is None else math.ceil(timeout),
        retries=given["retries"],
        retry_delay_seconds=given["retry_delay"],
        after=given["after"],
        after_any=given["after_any"],
        requirements=requirements(given),
        on_failed_dependency=given["on_failed_dependency"] or context.settings.jobs.on_failed_dependency,
    )


def _folder(cwd: str | None) -> str | None:
    """Absolute, for the job runs elsewhere. Raises UsageError."""
    if cwd == "":
        raise UsageError("--cwd is empty", "Leave it out: then the job gets a folder of its own.")
    return None if cwd is None else str(Path.cwd() / cwd)


def told(context: Context, client: redis.Redis, job: Submitted, given: Given) -> int:
    """Say the id, wait where asked to; returns the exit code."""
    from broker import keys

    job_id = job.id
    waits = given["wait"] or given["follow"]
    if given["follow"]:
        context.say(f"Job {job_id}")  # stdout is the job's
    elif not given["as_json"]:
        click.echo(job_id)
        sys.stdout.flush()
    elif not waits:
        print_json({"id": job_id, "state": job.state, "queue": given["queue"]})
    if waits:
        return _wait(context, client, job_id, given)
    if job.state == "failed":
        context.say(f"Job {job_id} failed at once, for one that it was to wait for did not finish.")
    if given.get("is_here"):
        return 0
    if requirements(given) != NOTHING:
        _warn_without_worker(context, client, job_id, given)
    elif not client.scard(keys.of("queue_workers", given["queue"])):
        _say_nobody_listens(context, given["queue"])
    return 0


def _wait(context: Context, client: redis.Redis, job_id: str, given: Given) -> int:
    from broker import control, jobs
    from cli.wait import bar, exit_code

    if not given.get("is_here"):
        _warn_without_worker(context, client, job_id, given)
    try:
        if given["follow"]:
            _follow(context, client, job_id)
        with bar(context) as progress:
            control.wait(client, [job_id], progress=progress)
    except KeyboardInterrupt:
        context.say(f"Job {job_id} goes on; 'fleet cancel {job_id}' ends it.")
        raise
    job = jobs.show(client, job_id)
    if given["as_json"]:
        fields: Given = {"exit_code": job.exit_code, "reason": job.reason}
        fields |= {"tasks": asdict(job.tasks)} if job.tasks else {}
        print_json({"id": job_id, "state": job.state, "queue": job.queue, **fields})
    elif job.state != "finished":
        context.say(f"Job {job_id} {job.state}" + (f": {job.reason}" if job.reason else ""))
    return exit_code({job_id: job.state}, {job_id: job.tasks} if job.tasks else {})


def _follow(context: Context, client: redis.Redis, job_id: str) -> None:
    from broker import selection
    from cli.logs import follow, follow_tasks

    (target,) = selection.targets_of(client, [job_id])
    if target.is_array:
        follow_tasks(context, client, target, both=True)
    else:
        follow(context, client, job_id, both=True)


def _warn_without_worker(context: Context, client: redis.Redis, job_id: str, given: Given) -> None:
    """A job that nobody will take is no reason to wait in silence."""
    from broker import status

    found, need = status.read(client), requirements(given)
    workers = [worker for worker in found.workers if given["queue"] in worker.queues]
    if all(worker.state == "offline" for worker in workers):
        _say_nobody_listens(context, given["queue"])
    elif not any(need.matches(worker.offer(), found.at.timestamp()) for worker in workers):
        context.say(
            f"No worker has what it asks for; the job waits for one. 'fleet explain {job_id}' tells more."
        )


def _say_nobody_listens(context: Context, queue: str) -> None:
    context.say(
        f"No worker listens on queue {queue} yet; the job waits for one. "
        f"'fleet worker --queues {queue}' starts one here, 'fleet up HOSTS' elsewhere."
    )
