"""Command lines with places for arguments, as GNU parallel has them; filled in when a task is run.

    {}     the argument; of several, all of them, one word each       {1} {2}  the first, the second
    {.}    without its extension        {/}   without its folders     {1.} {1/} {1//} {1/.}  of the first
    {//}   its folders alone            {/.}  neither                 {#}  the number of the task

An argument goes into the words of the command as it is: no shell reads it. Where the command is a line for a
shell it is quoted for that.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from broker import command
from broker.command import Command, Damaged
from broker.errors import UsageError

_PLACE = re.compile(r"\{(?:(#)|([1-9]\d*)?(//|/\.|/|\.)?)\}", re.ASCII)
_EXTENSION = re.compile(r"\.[^/.]*\Z", re.DOTALL)
_CHANGES: Mapping[str, Callable[[str], str]] = {
    "": lambda text: text,
    ".": lambda text: _EXTENSION.sub("", text),
    "/": lambda text: text.rpartition("/")[2],
    "//": lambda text: text.rpartition("/")[0] or ("/" if text.startswith("/") else "."),
    "/.": lambda text: _EXTENSION.sub("", text.rpartition("/")[2]),
}


def with_place(argv: Sequence[str], sources: int) -> tuple[str, ...]:
    """`argv`, with `{}` at its end where it has no place for an argument.

    Raises UsageError for a place that is for none of so many sources.
    """
    places = [place for word in argv for place in _PLACE.finditer(word)]
    for place in places:
        if place[2] and int(place[2]) > sources:
            raise UsageError(
                f"{place[0]}: there are {sources} sources of arguments",
                "Each ::: begins one; {1} is the first.",
            )
    if any(not place[1] for place in places):
        return tuple(argv)
    return (*argv, "{}")


def filled(argv: Sequence[str], arguments: Sequence[str], number: str, *, for_shell: bool) -> tuple[str, ...]:
    """The words of one task's command."""
    if for_shell:
        return (*argv[:-1], _fill(argv[-1], arguments, number, shlex.quote))
    return tuple(_words(argv, arguments, number))


def _words(argv: Iterable[str], arguments: Sequence[str], number: str) -> Iterator[str]:
    for word in argv:
        if word == "{}":
            yield from arguments
        else:
            yield _fill(word, arguments, number, str)


def _fill(text: str, arguments: Sequence[str], number: str, quoted: Callable[[str], str]) -> str:
    def value(place: re.Match[str]) -> str:
        if place[1]:
            return number
        chosen = arguments[int(place[2]) - 1 :][:1] if place[2] else arguments
        change = _CHANGES[place[3] or ""]
        return " ".join(quoted(change(argument)) for argument in chosen)

    return _PLACE.sub(value, text)


def command_of(job_id: str, fields: Mapping[bytes, bytes]) -> Command | None:
    """The command of a job with that hash, its places filled; None where it is a Python function.

    Raises Damaged.
    """
    found = command.from_data(fields.get(b"data"))
    arguments = fields.get(b"fleet_task_arguments")
    if found is None or not found.template or arguments is None:
        return found
    number, for_shell = job_id.rpartition("-")[2], found.template == "shell"
    try:
        words = filled(found.argv, list(map(str, json.loads(arguments))), number, for_shell=for_shell)
        return replace(found, argv=words, template=None).checked()
    except (ValueError, TypeError, RecursionError, UsageError) as exc:
        raise Damaged(f"the task's arguments cannot be used: {exc}") from exc
