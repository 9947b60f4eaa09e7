"""docs/cli.md names every verb, option and setting there is, and no verb that there is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from broker import settings
from cli.main import VERBS, fleet

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def options() -> Iterator[tuple[str, str]]:
    """(verb, its longest option), of all verbs and those below them."""
    root = click.Context(fleet)
    for verb in VERBS:
        command = fleet.get_command(root, verb)
        assert command is not None
        for one in _with_those_below(command):
            for param in one.params:
                if isinstance(param, click.Option):
                    yield verb, max(param.opts, key=len)


def _with_those_below(command: click.Command) -> Iterator[click.Command]:
    yield command
    for below in getattr(command, "commands", {}).values():
        yield from _with_those_below(below)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_there(verb):
    assert f"`fleet {verb}" in DOCS


def test_every_verb_below_broker_is_there():
    broker = fleet.get_command(click.Context(fleet), "broker")
    assert isinstance(broker, click.Group)
    for name in broker.commands:
        assert f"| `{name}" in _about("broker"), name


@pytest.mark.parametrize(("verb", "option"), sorted(set(options())))
def test_every_option_is_there(verb, option):
    assert re.search(re.escape(option) + r"\b", _about(verb) + _everywhere()), f"{option} of {verb}"


def _about(verb: str) -> str:
    """What stands where a verb is explained: to the next heading."""
    return "".join(
        part for part in re.split(r"\n(?=#|- `fleet)", DOCS) if re.match(rf"(### |- ).*`fleet {verb}\b", part)
    ) + ("" if verb != "down" else _about("up"))


def _everywhere() -> str:
    return DOCS[DOCS.index("## Everywhere") : DOCS.index("## Jobs")]


def test_no_verb_is_promised_that_does_not_exist():
    assert set(re.findall(r"`fleet ([a-z][a-z0-9-]*)", DOCS)) - {"*"} <= set(VERBS)


@pytest.mark.parametrize("name", settings.flattened(settings.Settings.model_construct()))
def test_every_setting_is_there_with_its_default(name):
    value = settings.flattened(settings.Settings.model_construct())[name]
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    row = next(line for line in DOCS.splitlines() if line.startswith(f"| `{name}`"))
    assert value is None or f"| {shown} |" in row
