"""What workers are told that scripts and manifests start, and the arguments that it becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from broker import names
from cli.params import Duration, labels

_OPTIONS = (
    click.option(
        "--queues", default="default", show_default=True, help="Most urgent first; or with weights: a:3,b:1."
    ),
    click.option("--label", "labels", multiple=True, metavar="K=V", help="A label of workers; repeatable."),
    click.option("--until-done", is_flag=True, help="Workers leave when no work remains."),
    click.option(
        "--idle-timeout", type=Duration(), help="Workers leave after idling for so long (90, 5m, 2h)."
    ),
    click.option("--executor-python", metavar="PYTHON", help="Interpreter for Python functions; needs rq."),
    click.option(
        "--path", "paths", multiple=True, metavar="DIR", help="First on the path of Python functions."
    ),
)


def worker_options(command: Any) -> Any:
    """The options of a verb that writes down how workers are started; `worker_words` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def worker_words(options: Mapping[str, Any], startup_delay_seconds: float) -> list[str]:
    """Arguments of `fleet worker` that say the same. Raises UsageError."""
    queues = options["queues"].replace(" ", "")
    names.weighted_queues(tuple(queues.split(",")))
    return ["--queues", queues, *_words(options), *_number("--startup-delay-seconds", startup_delay_seconds)]


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in labels("--label", options["labels"]).items():
        yield from ("--label", f"{name}={value}")
    if options["until_done"]:
        yield "--until-done"
    yield from _number("--idle-timeout", options["idle_timeout"])
    if options["executor_python"]:
        yield from ("--executor-python", options["executor_python"])
    for path in options["paths"]:
        yield from ("--path", path)


def _number(option: str, seconds: float | None) -> tuple[str, ...]:
    return (option, f"{seconds:.6g}") if seconds else ()
