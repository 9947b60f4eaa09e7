"""What went wrong, as an error of ours that has a message, a hint and an exit code."""

from __future__ import annotations

import sys

import click

from broker.errors import FleetError, UsageError
from cli.context import Context


def explained(exc: Exception, context: Context) -> FleetError | None:
    """`exc` as an error of ours, or None where it can only be a bug."""
    if isinstance(exc, FleetError):
        return exc
    if isinstance(exc, click.ClickException):
        return UsageError(exc.format_message(), _help_hint(exc))
    if "redis" in sys.modules:
        from broker import connection

        if isinstance(exc, connection.REDIS_ERRORS):
            return connection.explained(exc, context.redis_address)
    if isinstance(exc, OSError):
        where = f"{exc.filename}: " if exc.filename else ""
        return FleetError(f"{where}{exc.strerror or exc}")
    return None


def _help_hint(exc: click.ClickException) -> str:
    context = getattr(exc, "ctx", None)
    return f"Try '{context.command_path} --help'." if context else "Try 'fleet --help'."
