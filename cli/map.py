"""`fleet map`: one command for each of several arguments, as GNU parallel has it."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import click

from broker.errors import UsageError
from cli import tasks
from cli.context import Context, pass_context
from cli.params import json_option, requirement_options
from cli.submit import job_options, submission_of, told

_HINT = "fleet map 'gzip -k {}' ::: a.txt b.txt, or: ls | fleet map 'gzip -k {}' -"
_ARGUMENTS, _FILES = ":::", "::::"
#: what a line for a shell may hold: quoted parts, and characters that are escaped
_QUOTED = re.compile(r"""'[^']*'|"((?:\\.|[^"\\])*)"|\\.""", re.DOTALL)
#: what a shell would do more about than to split words
_FOR_A_SHELL = re.compile(r"[|&;<>()$`\n*?]|(?:^|\s)[#~]")
_OPERATORS = frozenset(("|", "||", "&", "&&", ";", ">", ">>", "<", "2>"))


@click.command(context_settings={"allow_interspersed_args": False})
@job_options
@requirement_options
@tasks.limits
@click.option("--shell", is_flag=True, help="Let /bin/sh read COMMAND at the worker; arguments are quoted.")
@click.option(
    "--wait",
    "-k",
    "--keep-order",
    is_flag=True,
    help="Wait, and print what the tasks print, in the order of the arguments.",
)
@click.option("--dry-run", is_flag=True, help="Print the commands, and submit nothing.")
@json_option
@click.argument(
    "words", metavar="COMMAND... (::: ARG... | :::: FILE... | -)", nargs=-1, type=click.UNPROCESSED
)
@pass_context
def map_(context: Context, /, words: tuple[str, ...], **given: Any) -> int:
    """Run a command once for each argument; prints the id of the array alone.

    In COMMAND {} is the argument, {.} it without its extension, {/} without its folders, {//} its folders,
    {/.} the bare name, {#} the number of the task; {1} {2.} are those of several ::: or ::::, which give each
    combination. Without any {} the argument comes last. :::: takes the lines of a file, - those of stdin.
    """
    from broker import arrays, ranges

    command, sources = _split(words)
    argv = _argv(command, len(sources), for_shell=given["shell"])
    count = math.prod(map(len, sources))
    if count > ranges.MOST_TASKS:
        raise UsageError(f"these are {count:,} tasks; at most {ranges.MOST_TASKS:,} go into one array")
    rows = itertools.product(*sources)
    if given["dry_run"]:
        return _print(argv, rows, for_shell=given["shell"])
    items = [json.dumps(row).encode() for row in rows]
    how = {name: given[name] for name in ("max_fails", "max_parallel")}
    array = arrays.Tasks(ranges.first(count), items, "arguments", **how).checked()
    given["name"] = argv[-1] if given["shell"] and given["name"] is None else given["name"]
    submission = submission_of(context, argv, given, "shell" if given["shell"] else "words")
    given["follow"] = given["wait"] and not given["as_json"]
    with context.redis(start=True) as client:
        return told(context, client, arrays.submit(client, submission, array), given)


def _split(words: Sequence[str]) -> tuple[tuple[str, ...], list[list[str]]]:
    """The command, and the arguments of each source. Raises UsageError."""
    marks = [at for at, word in enumerate(words) if word in (_ARGUMENTS, _FILES)]
    linked = next((word for word in words if word in (":::+", "::::+")), None)
    if linked:
        raise UsageError(f"{linked} is not there", "Write the pairs as lines: fleet map 'cmd {}' :::: FILE")
    if not marks and words[-1:] == ("-",):
        return tuple(words[:-1]), [_lines("-")]
    if not marks:
        raise UsageError("there are no arguments", _HINT)
    sources = []
    for at, end in itertools.pairwise([*marks, len(words)]):
        given = list(words[at + 1 : end])
        sources += [given] if words[at] == _ARGUMENTS else [_lines(path) for path in given]
        if not given or not sources[-1]:
            raise UsageError(f"{words[at]} has no arguments", _HINT)
    return tuple(words[: marks[0]]), sources


def _lines(path: str) -> list[str]:
    found = tasks.lines(tasks.content(path))
    if not found:
        raise UsageError(f"{'stdin' if path == '-' else path}: no lines, so there are no arguments")
    return [os.fsdecode(line) for line in found]


def _argv(command: Sequence[str], sources: int, *, for_shell: bool) -> tuple[str, ...]:
    """The words of the command with places for arguments. Raises UsageError."""
    from broker import template

    if not command:
        raise UsageError("no command given", _HINT)
    if for_shell:
        return ("/bin/sh", "-c", " ".join(template.with_place([" ".join(command)], sources)))
    if len(command) == 1:
        return template.with_place(_words(command[0]), sources)
    if _OPERATORS & set(command):
        raise _needs_shell(" ".join(command))
    return template.with_place(command, sources)


def _words(line: str) -> list[str]:
    """A command in one word, as one writes it for GNU parallel, split as a shell does, if that is all."""
    try:
        words = shlex.split(line)
    except ValueError as exc:
        raise UsageError(f"{line!r}: {str(exc).lower()}", _HINT) from exc
    # in double quotes a shell would still put in variables and outputs
    bare = _QUOTED.sub(lambda quoted: "".join(re.findall(r"[$`]", quoted[1] or "")), line)
    if _FOR_A_SHELL.search(bare):
        raise _needs_shell(line)
    if not words:
        raise UsageError("no command given", _HINT)
    return words


def _needs_shell(line: str) -> UsageError:
    return UsageError(
        f"{line!r} is for a shell, and none reads it",
        "--shell runs it in one; or quote what is meant literally.",
    )


def _print(argv: Sequence[str], rows: Iterator[tuple[str, ...]], *, for_shell: bool) -> int:
    from broker import template

    for number, row in enumerate(rows, 1):
        words = template.filled(argv, row, str(number), for_shell=for_shell)
        click.echo(os.fsencode(words[-1] if for_shell else shlex.join(words)))
    return 0
