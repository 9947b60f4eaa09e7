"""A command line as an RQ job: JSON, never pickle.

RQ keeps (function, instance, args, kwargs) in a job's `data`; a command is that in JSON with
the function `fleet.command` and one argument, the document below. Any RQ tool can list,
cancel or delete such a job.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from broker.errors import UsageError

#: where a command has places for arguments: in all of its words, or in the line for a shell
Template = Literal["words", "shell"]

#: what stands where RQ has the name of a function
FUNCTION = "fleet.command"
#: longest argument or variable: what Linux gives to one string of execve (MAX_ARG_STRLEN)
LONGEST_ARGUMENT = 131071
#: of `data` that is worth remembering
_SHORT_BYTES = 1024


class Damaged(Exception):
    """The data of a job cannot be read."""


@dataclass(frozen=True)
class Command:
    """What to run: `argv` as execve takes it, `env` added to the worker's, `cwd` or its own folder.

    `template`: the words have places for arguments, or the last one has, which a shell reads; see
    broker/template.py.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    template: Template | None = None

    def checked(self) -> Command:
        """Return itself. Raises UsageError for what no machine could run."""
        if not self.argv or not self.argv[0]:
            raise UsageError("no command given", "fleet submit -- ./simulate 42")
        for part in (*self.argv, *self.env, *self.env.values(), self.cwd or ""):
            if "\0" in part:
                raise UsageError(f"a NUL byte in {part!r}", "No program can be given one.")
            if len(part.encode("utf-8", "surrogateescape")) > LONGEST_ARGUMENT:
                raise UsageError(
                    f"an argument of {len(part)} characters is too long",
                    f"At most {LONGEST_ARGUMENT} bytes; put it in a file.",
                )
        for name in self.env:
            if not name or "=" in name:
                raise UsageError(f"{name!r} is no name of a variable", "Use --env NAME=VALUE.")
        return self

    def to_data(self) -> bytes:
        """The `data` of a job's hash."""
        document: dict[str, Any] = {"argv": list(self.argv)}
        if self.env:
            document["env"] = dict(self.env)
        if self.cwd is not None:
            document["cwd"] = self.cwd
        if self.template:
            document["template"] = self.template
        return zlib.compress(json.dumps([FUNCTION, None, [document], {}]).encode(), 1)


def inflated(data: bytes) -> bytes:
    """The serialised call in a job's `data`, which old clients of RQ left uncompressed."""
    try:
        return zlib.decompress(data)
    except zlib.error:
        return data


def from_data(data: bytes | None) -> Command | None:
    """The command in a job's `data`, or None where it is a Python function.

    Raises Damaged where it is neither.
    """
    if not data:
        raise Damaged("the job has no data")
    return _read_short(data) if len(data) <= _SHORT_BYTES else _read(data)


def _read(data: bytes) -> Command | None:
    call = inflated(data)
    if call[:1] == b"\x80":  # pickle, protocol 2 or later: RQ's default serialiser
        return None
    try:
        function, _, args, _ = json.loads(call)
        if function != FUNCTION:
            return None
        document = args[0]
        env = {str(name): str(value) for name, value in document.get("env", {}).items()}
        template = document.get("template")
        return Command(tuple(map(str, document["argv"])), env, document.get("cwd"), template).checked()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, UsageError) as exc:
        raise Damaged(f"the job's data cannot be read: {exc}") from exc


#: tasks of an array, and most jobs of a loop, have the same
_read_short = functools.lru_cache(maxsize=16)(_read)
