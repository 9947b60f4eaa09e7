"""`fleet config`: the settings in force."""

from __future__ import annotations

from typing import Any

import click

from cli.context import Context, pass_context, print_json


@click.group()
def config() -> None:
    """Settings: flags, then FLEET_* variables, ./fleet.toml, ~/.config/fleet/config.toml."""


@config.command()
@click.option("--origin", is_flag=True, help="Also where each value came from.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@pass_context
def show(context: Context, origin: bool, as_json: bool) -> None:
    """The settings in force; passwords are left out."""
    from broker import settings
    from broker.connection import redacted

    values = settings.flattened(context.settings)
    if values["redis_url"]:
        values["redis_url"] = redacted(values["redis_url"])
    flags = {"redis_url": context.redis_url} if context.redis_url else {}
    found = settings.origins(flags)
    if as_json:
        print_json({"settings": {name: _row(value, found.get(name)) for name, value in values.items()}})
        return
    for name, value in values.items():
        click.echo(f"{name} = {_toml(value)}" + (f"  # {found.get(name, 'default')}" if origin else ""))


def _row(value: Any, origin: str | None) -> dict[str, Any]:
    return {"value": value, "origin": origin or "default"}


def _toml(value: Any) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:g}" if isinstance(value, float) else str(value)
