"""The options that every verb takes, before the verb or after it: declared once, here."""

from __future__ import annotations

from typing import Any

import click

from cli.context import Context

_EPILOG = "Also: --redis URL, --no-color, -q/--quiet, --debug; 'fleet --help' says what they do."


def _note(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Remember a value that was given in the Context, which all levels share."""
    if ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE:
        setattr(ctx.ensure_object(Context), param.name or "", value)
    return value


def options(*, hidden: bool = False) -> list[click.Option]:
    """Fresh options that note what they are given in the Context and pass nothing to the verb."""
    common: dict[str, Any] = {"expose_value": False, "is_eager": True, "callback": _note, "hidden": hidden}
    return [
        click.Option(
            ["--redis", "redis_url"], metavar="URL", help="Redis to use (or FLEET_REDIS_URL).", **common
        ),
        click.Option(["--no-color"], is_flag=True, help="No colour, even on a terminal.", **common),
        click.Option(["--quiet", "-q"], is_flag=True, help="Only data and errors.", **common),
        click.Option(["--debug"], is_flag=True, help="Show tracebacks.", **common),
    ]


def teach(command: click.Command) -> click.Command:
    """Let `command`, and whatever is below it, take them too; its own options win. Returns it."""
    own = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    command.params += [option for option in options(hidden=True) if not own & {*option.opts}]
    for param in command.params:
        if "--json" in param.opts:
            _listen(param)
    command.epilog = command.epilog or _EPILOG
    for below in getattr(command, "commands", {}).values():
        teach(below)
    return command


def _listen(param: click.Parameter) -> None:
    """Have `--json` known as soon as it is read: errors that come later are JSON too."""

    def note(ctx: click.Context, _: click.Parameter, value: Any) -> Any:
        ctx.ensure_object(Context).as_json = bool(value)
        return value

    param.is_eager, param.callback = True, note
