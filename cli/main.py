"""`fleet`: finds the verb, runs it, turns errors into messages and exit codes.

Verbs are imported when they are called: `fleet --help` pays for none of them. A new verb
is one line in VERBS and one click command in its module. What a verb returns is its exit
code; None is 0.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import click

from broker import __version__
from broker.errors import FleetError
from cli import everywhere
from cli.context import Context, fail
from cli.errors import explained

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: verb -> (module, attribute, one line of help)
VERBS: dict[str, tuple[str, str, str]] = {
    "demo": ("cli.demo", "demo", "See all of it at work on this machine, in a minute."),
    "broker": ("cli.broker", "broker", "The embedded Redis: start, stop, status, backup, restore."),
    "up": ("cli.up", "up", "Start workers on every host of a file."),
    "hosts": ("cli.hosts", "hosts", "The hosts kept for up, status and down."),
    "status": ("cli.status", "status", "Workers, what they run, and the queues."),
    "top": ("cli.top.verb", "top", "The fleet, live on the whole terminal: look, drain, cancel."),
    "drain": ("cli.workers", "drain", "Let workers finish what runs and take nothing new."),
    "undrain": ("cli.workers", "undrain", "Let drained workers take jobs again."),
    "label": ("cli.workers", "label", "Give a worker labels, or take some away."),
    "forget": ("cli.workers", "forget", "Remove the record of a worker that is offline."),
    "collect-logs": ("cli.collect", "collect_logs", "Fetch logs and what jobs wrote from the hosts."),
    "delete-logs": ("cli.collect", "delete_logs", "Remove logs and what jobs wrote at the hosts."),
    "down": ("cli.up", "down", "End the workers of hosts."),
    "submit": ("cli.submit", "submit", "Submit a command as a job; prints its id."),
    "map": ("cli.map", "map_", "Run a command for each of many arguments; prints one id."),
    "jobs": ("cli.jobs", "jobs", "List jobs."),
    "show": ("cli.jobs", "show", "Everything about one job."),
    "explain": ("cli.explain", "explain", "Why a job is not running, with numbers."),
    "logs": ("cli.logs", "logs", "What a job printed, also while it runs."),
    "wait": ("cli.wait", "wait", "Wait until jobs have ended."),
    "cancel": ("cli.jobs", "cancel", "Stop jobs, or take them from their queues."),
    "retry": ("cli.retry", "retry", "Run jobs again that failed, were stopped or canceled."),
    "report": ("cli.report", "report", "What ran where, when and at what cost; --html draws it."),
    "queues": ("cli.queues", "queues", "What waits, runs and has ended, by queue."),
    "pause": ("cli.queues", "pause", "Let queues give out no jobs."),
    "resume": ("cli.queues", "resume", "Let paused queues give out jobs again."),
    "worker": ("cli.worker", "worker", "Run one worker here, in the foreground."),
    "script": ("cli.script", "script", "Print a bash script that starts a worker."),
    "k8s": ("cli.k8s", "k8s", "Print manifests of workers for Kubernetes."),
    "slurm": ("cli.slurm", "slurm", "Workers from Slurm: script, submit, status, cancel, autoscale."),
    "doctor": ("cli.doctor", "doctor", "Check Redis and the workers; says how to mend what is wrong."),
    "metrics": ("cli.metrics", "metrics", "Serve metrics for Prometheus."),
    "config": ("cli.config", "config", "Show the settings in force and where each came from."),
    "completion": ("cli.completion", "completion", "Completion for bash, zsh or fish."),
}
#: new objects after which cycles are looked for, 700 otherwise: what a verb reads it keeps to its end, and to
#: look through 10,000 workers again and again took a quarter of `fleet status`
_OBJECTS_BETWEEN_COLLECTIONS = 50_000
#: what a shell says of a program that was interrupted
_INTERRUPTED = 130


class ReaderGone(Exception):
    """Nobody reads our output any more."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:  # click would exit with 1, as if something had failed
            raise ReaderGone from exc

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, attribute, _ = VERBS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return everywhere.teach(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:  # click looks for similar ones among those that are imported
            similar = " or ".join(map(repr, difflib.get_close_matches(args[0], VERBS, n=2)))
            if not similar:
                raise
            raise click.UsageError(f"{exc.message} Did you mean {similar}?", ctx) from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, _, line) in VERBS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        verbs = [(verb, line) for verb, (_, _, line) in VERBS.items() if verb.startswith(incomplete)]
        if verbs and not incomplete.startswith("-"):
            return [CompletionItem(verb, help=line) for verb, line in verbs]
        return click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    params=everywhere.options(),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="fleet")
def fleet() -> None:
    """Run jobs on the machines you can reach. Nothing lost, nothing done twice."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; exits with the code of docs/cli.md."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        # what cannot be printed here (bytes that are no UTF-8, a terminal of ASCII) is escaped
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    code = _run(arguments, Context())
    gc.freeze()  # or the interpreter looks through everything once more
    sys.exit(code)


def _run(arguments: list[str], context: Context) -> int:
    try:
        result: Any = fleet.main(args=arguments, prog_name="fleet", standalone_mode=False, obj=context)
        sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except (ReaderGone, BrokenPipeError):  # `fleet jobs | head -1`: whoever read has seen enough
        _discard_output()
        return 0
    except Exception as exc:
        error = explained(exc, context)
        if error is None:
            raise
        if isinstance(exc, OSError):  # a full disk under stdout, for one
            _discard_output()
        return _reported(exc, error, context, arguments)
    return result if isinstance(result, int) else 0


def _reported(exc: Exception, error: FleetError, context: Context, arguments: list[str]) -> int:
    """Print the error as people or programs want it; returns the exit code."""
    if context.debug:
        traceback.print_exception(exc)
    if isinstance(exc, click.exceptions.NoArgsIsHelpError):
        click.echo(error.message, err=True)
        return error.exit_code
    as_json = _wants_json(context, arguments)
    return fail(error.message, code=error.code, exit_code=error.exit_code, as_json=as_json, hint=error.hint)


def _wants_json(context: Context, arguments: list[str]) -> bool:
    """As the verb read its options, where it came so far; what follows `--` is never ours."""
    if context.as_json is not None:
        return context.as_json
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def _discard_output() -> None:
    """Let what is still in the buffer of stdout go nowhere: Python writes it out once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
