"""What every verb that reaches hosts takes, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.context import Context
from cli.params import Count

if TYPE_CHECKING:
    from fleet.launchers.ssh import SshOptions

Command = Callable[..., Any]


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
