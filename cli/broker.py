"""`fleet broker`: the embedded Redis of this user."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.context import Context, pass_context, print_json

if TYPE_CHECKING:
    from fleet.embedded import EmbeddedBroker
    from fleet.embedded_server import BrokerStatus

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def broker() -> None:
    """The embedded Redis: append-only file on, nothing evicted, on loopback, with a password.

    Its data and its password are in $XDG_STATE_HOME/rq-fleet/broker (~/.local/state/...).
    """


@broker.command()
@click.option("--host", metavar="ADDR", help="Listen on this address too, so that other machines reach it.")
@click.option("--port", type=click.IntRange(1, 65535), help="The port tried first; by default the last one.")
@pass_context
def start(context: Context, host: str | None, port: int | None) -> None:
    """Start it, or say that it is running.

    It comes back where it listened last, with all its data: workers look for it there.
    --host 127.0.0.1 has it listen on loopback alone again.
    """
    _broker().start(host=host, port=port, say=context.say)


@broker.command()
@click.option("--force", is_flag=True, help="Even when its last changes could not be written to disk.")
@pass_context
def stop(context: Context, force: bool) -> None:
    """Write the data and stop; it is kept for the next start."""
    stopped = _broker().stop(force=force, say=context.say)
    if stopped is None:
        context.say("The embedded Redis is not running.")
    else:
        context.say(f"Stopped the embedded Redis (pid {stopped.pid}); its data stays in {stopped.data_dir}.")


@broker.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Whether it runs (exit code 0, else 1), where, and whether its data is safe."""
    embedded = _broker()
    found = embedded.status()
    fields = {"running": found is not None, **(_fields(found) if found else {}), **_paths(embedded)}
    if as_json:
        print_json(fields)
    else:
        _print_table(fields)
    ctx.exit(0 if found else 1)


@broker.command()
@click.option("--redis-host", metavar="NAME", help="The URL for those who call this machine by that name.")
def url(redis_host: str | None) -> None:
    """Print its URL, which holds its PASSWORD: for RQ's tools and your own programs.

    export RQ_REDIS_URL=$(fleet broker url)
    """
    if redis_host is None:
        click.echo(_broker().url())
        return
    from fleet import endpoint

    click.echo(endpoint.embedded_url(redis_host))


@broker.command()
@click.argument("file", type=_FILE)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@pass_context
def backup(context: Context, file: Path, force: bool) -> None:
    """Copy all its data, as it is now, to FILE (an RDB) while it runs."""
    size = _broker().backup(file, force=force, say=context.say)
    context.say(f"Wrote {file} ({size} bytes).")


@broker.command()
@click.argument("file", type=_FILE)
@pass_context
def restore(context: Context, file: Path) -> None:
    """Make FILE, a backup, its data; what it had is kept aside. It must be stopped."""
    keys, kept = _broker().restore(file, say=context.say)
    context.say(f"Restored {keys} keys from {file}; 'fleet broker start' starts with them.")
    if kept:
        context.say(f"What was there before is kept in {kept}.")


def _broker() -> EmbeddedBroker:
    from fleet.embedded import EmbeddedBroker, state_dir

    return EmbeddedBroker(state_dir())


def _fields(found: BrokerStatus) -> dict[str, Any]:
    """The status as a flat record; the password is left out."""
    running = found.broker
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "broker"}
    return {
        "address": running.address,
        "hosts": list(running.hosts),
        "port": running.port,
        "pid": running.pid,
        "program": running.program.path,
        **values,
    }


def _paths(embedded: EmbeddedBroker) -> dict[str, str]:
    folder = embedded.folder
    paths = {"data_dir": folder.data_dir, "password_file": folder.password_file, "log": folder.log}
    return {name: str(path) for name, path in paths.items()}


def _print_table(fields: dict[str, Any]) -> None:
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        click.echo(f"{name.replace('_', ' '):{width}}  {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
