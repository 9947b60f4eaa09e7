"""What every verb that reaches hosts takes, and what becomes of it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.context import Context
from cli.params import Count

if TYPE_CHECKING:
    from fleet.launchers.ssh import SshOptions

Command = Callable[..., Any]
Result = TypeVar("Result")


def ssh_options(command: Command) -> Command:
    """How hosts are reached, and `--json`: each of these verbs reports."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON document."),
        click.option(
            "--ssh-config", type=click.Path(path_type=Path), metavar="FILE", help="Not ~/.ssh/config."
        ),
        click.option(
            "--connect-timeout",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="To reach a host; default: its ConnectTimeout in ssh_config, else 30.",
        ),
        click.option("--max-parallel-ssh", type=Count(), metavar="N", help="Hosts at once; default 10."),
    ):
        command = option(command)
    return command


def ssh_from(context: Context, options: Mapping[str, Any]) -> SshOptions:
    """How hosts are reached, by the options and the settings. Raises UsageError."""
    from fleet.launchers.ssh import SshOptions

    settings = context.settings.ssh
    return SshOptions(
        config=options["ssh_config"],
        connect_timeout_seconds=options["connect_timeout"],
        default_connect_timeout_seconds=settings.connect_timeout_seconds,
        command_timeout_seconds=settings.command_timeout_seconds,
    ).checked()


def max_parallel(context: Context, options: Mapping[str, Any]) -> int:
    """How many hosts at once."""
    asked: int | None = options["max_parallel_ssh"]
    return asked or context.settings.ssh.max_parallel


async def interruptible(context: Context, work: Coroutine[Any, Any, Result]) -> Result:
    """Each Ctrl-C, and each SIGTERM, is for `work`, which then tells what it has done."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

    def interrupt() -> None:
        context.say("Interrupted: what cannot be cut is waited for; a second Ctrl-C waits for nothing.")
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        context.say("No host was reached: nothing was done.")
        raise KeyboardInterrupt from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
