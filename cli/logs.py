"""`fleet logs`: what a job printed, byte for byte, while it runs or after."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from broker.errors import NotFound
from cli.context import Context, pass_context
from cli.params import JobWord
from cli.tables import size

if TYPE_CHECKING:
    import redis

    from broker.outputs import View
    from broker.selection import Target, Word

#: seconds between two looks at a running job's output; its worker shows it once a second
_LOOK_SECONDS = 0.2


@click.command()
@click.argument("words", metavar="JOB...", type=JobWord(), nargs=-1, required=True)
@click.option("--follow", "-f", "follows", is_flag=True, help="Go on until they have ended.")
@click.option("--stderr", is_flag=True, help="Their stderr, not their stdout.")
@click.option("--failed", is_flag=True, help="Of arrays: only tasks that failed.")
@pass_context
def logs(context: Context, /, words: tuple[Word, ...], follows: bool, stderr: bool, failed: bool) -> None:
    """Print what jobs printed: the end of it, for Redis keeps no more (see docs/cli.md).

    Of an array, or 'ID[3-9]', the tasks that were begun, in order.
    """
    from cli.selected import targets

    with context.redis() as client:
        for target in targets(client, words, failed=failed):
            if not target.is_array:
                _print(context, client, target.job_id, stderr=stderr, follows=follows)
            elif follows:
                follow_tasks(context, client, target, stderr=stderr)
            else:
                _print_tasks(context, client, target, stderr=stderr)


def _print(context: Context, client: redis.Redis, job_id: str, *, stderr: bool, follows: bool) -> None:
    from broker import jobs, outputs

    if follows:
        follow(context, client, job_id, stderr=stderr)
        return
    view = outputs.look(client, job_id)
    if view.state is None:
        raise jobs.not_found(job_id)
    Printer(context, job_id, stderr=stderr).show(view)
    _tell_of_the_other(context, job_id, view, stderr)


def _print_tasks(context: Context, client: redis.Redis, target: Target, *, stderr: bool) -> None:
    from broker import outputs, selection

    for job_id, state in selection.job_ids(client, target):
        if state not in (None, "queued", "deferred"):
            Printer(context, job_id, stderr=stderr).show(outputs.look(client, job_id))


def follow_tasks(
    context: Context, client: redis.Redis, target: Target, *, stderr: bool = False, both: bool = False
) -> None:
    """What the tasks of an array print, one after the other in their order, until the last has ended."""
    from broker import jobs, selection

    for job_id, _ in selection.job_ids(client, target):
        while jobs.states(client, [job_id])[job_id] is None and _is_to_come(client, target.job_id, job_id):
            time.sleep(_LOOK_SECONDS)
        try:
            follow(context, client, job_id, stderr=stderr, both=both)
        except NotFound:
            continue  # canceled before it began, or its output has expired


def _is_to_come(client: redis.Redis, array: str, job_id: str) -> bool:
    """Whether a task that is no job will be one."""
    from broker import ranges, tasks

    number = ranges.parse(job_id.rpartition("-")[2])
    return next(iter(tasks.states(client, array, number).values())) in ("queued", "deferred", "started")


def follow(
    context: Context, client: redis.Redis, job_id: str, *, stderr: bool = False, both: bool = False
) -> None:
    """Print output as it comes, until the job has ended. Raises NotFound where there never was one.

    One stream goes to stdout; `both` sends each to its own.
    """
    from broker import jobs, outputs

    printers = [Printer(context, job_id, stderr=stderr, onto_stderr=stderr and both)]
    if both:
        printers.append(Printer(context, job_id, stderr=not stderr, onto_stderr=not stderr))
    seen: outputs.Mark | None = None
    while True:
        mark = outputs.mark(client, job_id)
        if mark != seen:
            view = outputs.look(client, job_id)
            if seen is None and view.state is None:
                raise jobs.not_found(job_id)
            for printer in printers:
                printer.show(view)
            if view.state is None or view.state in jobs.ENDED:
                return
            seen = mark
        time.sleep(_LOOK_SECONDS)


@dataclass
class Printer:
    """Prints one stream of a job, each byte once, and says on stderr what it could not have."""

    context: Context
    job_id: str
    stderr: bool
    onto_stderr: bool = False
    lease: str = ""
    position: int = 0

    def show(self, view: View) -> None:
        """Print what is new in `view`."""
        if self.lease and view.lease != self.lease:
            self.context.say(f"fleet: job {self.job_id} starts anew")
            self.position = 0
        self.lease = view.lease
        tail, end = view.tails.stream(stderr=self.stderr)
        start = end - len(tail)
        if start > self.position:
            self._say_skipped(start - self.position, end, view.lease)
        _write(tail[max(self.position - start, 0) :], onto_stderr=self.onto_stderr)
        self.position = max(end, self.position)

    def _say_skipped(self, skipped: int, end: int, lease: str) -> None:
        file = f"{self.job_id}.{lease.partition(':')[0]}.{'err' if self.stderr else 'out'}"
        self.context.say(
            f"fleet: {size(skipped)} of {size(end)} skipped; all of it is at the worker, in output/{file}"
        )


def _write(data: bytes, *, onto_stderr: bool) -> None:
    """Bytes as they are, each at once."""
    raw = (sys.stderr if onto_stderr else sys.stdout).buffer
    raw.write(data)
    raw.flush()


def _tell_of_the_other(context: Context, job_id: str, view: View, stderr: bool) -> None:
    """Nothing on the stream asked for: the reason for a failure is often on the other."""
    shown, other = view.tails.stdout_end, view.tails.stderr_end
    if not stderr and not shown and other:
        context.say(f"fleet: nothing on stdout; {size(other)} on stderr: 'fleet logs --stderr {job_id}'")
