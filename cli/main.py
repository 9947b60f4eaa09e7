"""`fleet`: finds the verb, runs it, turns errors into messages and exit codes.

Verbs are imported when they are called: `fleet --help` pays for none of them. A new verb
is one line in VERBS and one click command in its module.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from broker import __version__
from broker.errors import FleetError
from cli.context import Context, fail

#: verb -> (module, attribute, one line of help)
VERBS: dict[str, tuple[str, str, str]] = {
    "worker": ("cli.worker", "worker", "Run one worker here, in the foreground."),
    "broker": ("cli.broker", "broker", "The embedded Redis: start, stop, status, backup, restore."),
    "up": ("cli.up", "up", "Start workers on every host of a file."),
    "down": ("cli.up", "down", "End the workers of hosts."),
    "hosts": ("cli.hosts", "hosts", "The hosts kept for up, status and down."),
    "config": ("cli.config", "config", "Show the settings in force and where each came from."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, attribute, _ = VERBS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, _, line) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleet")
@click.option("--redis", "redis_url", metavar="URL", help="Redis to use (or FLEET_REDIS_URL).")
@click.option("--no-color", is_flag=True, help="No colour, even on a terminal.")
@click.option("--quiet", "-q", is_flag=True, help="Only data and errors.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def fleet(ctx: click.Context, redis_url: str | None, no_color: bool, quiet: bool, debug: bool) -> None:
    """Run jobs on the machines you can reach. Nothing lost, nothing done twice."""
    ctx.obj = Context(redis_url=redis_url, no_color=no_color, quiet=quiet, debug=debug)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; exits with the code of docs/cli.md."""
    arguments = sys.argv[1:] if argv is None else argv
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        result: Any = fleet.main(args=arguments, prog_name="fleet", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        sys.exit(fail(exc.format_message(), code="usage", exit_code=2, as_json=as_json, hint=_help_hint(exc)))
    except FleetError as exc:
        if debug:
            raise
        sys.exit(fail(exc.message, code=exc.code, exit_code=exc.exit_code, as_json=as_json, hint=exc.hint))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(result if isinstance(result, int) else 0)


def _help_hint(exc: click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    return f"Try '{context.command_path} --help'." if context else "Try 'fleet --help'."
