"""Options that make an array of one command: which tasks it has, and how many may run or fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import UsageError
from cli.params import JobId, files

if TYPE_CHECKING:
    from broker.arrays import Tasks

_AN_ARRAY = "It must be an array: [1, 2, 3]."
_SOURCES = {"array": "--array", "each_line": "--each-line", "from_json": "--from-json"}


def options(command: Any) -> Any:
    """`--array`, `--each-line`, `--from-json`, and the limits; `read` understands them."""
    for option in (
        click.option(
            "--from-json",
            metavar="FILE",
            shell_complete=files,
            help="A task for each element of a JSON array: FLEET_TASK_JSON; '-' reads stdin.",
        ),
        click.option(
            "--each-line",
            metavar="FILE",
            shell_complete=files,
            help="A task for each line, the first is number 1: FLEET_TASK_LINE; '-' reads stdin.",
        ),
        click.option(
            "--after-array",
            metavar="ID",
            type=JobId(),
            help="Task N not before task N of that array has finished; default: its numbers.",
        ),
        click.option("--array", metavar="RANGE", help="A task for each number: 1-100, 1-9:2, 1,4-6."),
    ):
        command = option(command)
    return limits(command)


def limits(command: Any) -> Any:
    """`--max-fails` and `--max-parallel`."""
    for option in (
        click.option(
            "--max-fails",
            type=click.IntRange(min=0),
            metavar="N",
            help="End the array once more tasks than that have failed.",
        ),
        click.option(
            "--max-parallel",
            "-j",
            type=click.IntRange(min=1),
            metavar="N",
            help="Never run more of its tasks at once.",
        ),
    ):
        command = option(command)
    return command


def read(given: Mapping[str, Any]) -> Tasks | None:
    """The tasks that the options ask for; None: it is to be one job. Raises UsageError."""
    from broker import ranges
    from broker.arrays import Tasks

    named = [option for name, option in _SOURCES.items() if given[name] is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other")
    how = {"after": given["after_array"]} | {name: given[name] for name in ("max_fails", "max_parallel")}
    if given["array"] is not None:
        return Tasks(ranges.parse(given["array"]), **how)
    if given["each_line"] is not None:
        items = lines(content(given["each_line"]))
        return Tasks(ranges.first(len(items)), items, "line", **how).checked()
    if given["from_json"] is not None:
        items = _elements(given["from_json"])
        return Tasks(ranges.first(len(items)), items, "json", **how).checked()
    if given["after_array"] is not None:
        return Tasks(ranges.Ranges(()), **how)
    if given["max_fails"] is not None or given["max_parallel"] is not None:
        hint = "--array, --each-line or --from-json makes one."
        raise UsageError("--max-fails and --max-parallel are for arrays", hint)
    return None


def lines(text: bytes) -> list[bytes]:
    """The lines, empty ones too, so that the numbers of tasks are those of the lines."""
    return text.removesuffix(b"\n").split(b"\n") if text else []


def content(path: str) -> bytes:
    """What is in a file, or comes from stdin. Raises UsageError."""
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as exc:
        raise UsageError(
            f"{path}: {exc.strerror or exc}", "Name a file that can be read, or '-' for stdin."
        ) from exc


def _elements(path: str) -> list[bytes]:
    """Each as JSON, in as few bytes as it takes. Raises UsageError."""
    name = "stdin" if path == "-" else path
    compact: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    try:
        document = json.loads(content(path))
    except json.JSONDecodeError as exc:
        raise UsageError(
            f"{name}:{exc.lineno}: no JSON: {exc.msg}", "It must be an array: [1, 2, 3]."
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{name}: no JSON: {exc}", _AN_ARRAY) from exc
    if not isinstance(document, list):
        raise UsageError(
            f"{name}: a JSON array is asked for, this is {_KINDS.get(type(document), 'a value')}",
            'Each element is a task: [{"seed": 1}, {"seed": 2}].',
        )
    return [compact(element).encode("utf-8", "backslashreplace") for element in document]


_KINDS: Mapping[type, str] = {dict: "an object", str: "a text", int: "a number", float: "a number"}
