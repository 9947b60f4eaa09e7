"""`fleet logs`: what a job printed, byte for byte, while it runs or after."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cli.context import Context, pass_context
from cli.params import JobId
from cli.tables import size

if TYPE_CHECKING:
    import redis

    from broker.outputs import View

#: seconds between two looks at a running job's output; its worker shows it once a second
_LOOK_SECONDS = 0.2


@click.command()
@click.argument("job_id", metavar="JOB", type=JobId())
@click.option("--follow", "-f", "follows", is_flag=True, help="Go on until the job has ended.")
@click.option("--stderr", is_flag=True, help="Its stderr, not its stdout.")
@pass_context
def logs(context: Context, /, job_id: str, follows: bool, stderr: bool) -> None:
    """Print what a job printed: the end of it, for Redis keeps no more (see docs/cli.md)."""
    from broker import jobs, outputs

    with context.redis() as client:
        if follows:
            follow(context, client, job_id, stderr=stderr)
            return
        view = outputs.look(client, job_id)
        if view.state is None:
            raise jobs.not_found(job_id)
        Printer(context, job_id, stderr=stderr).show(view)
        _tell_of_the_other(context, job_id, view, stderr)


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
        tail = view.tails.stderr if self.stderr else view.tails.stdout
        end = view.tails.stderr_end if self.stderr else view.tails.stdout_end
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
