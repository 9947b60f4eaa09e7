"""Redis's own journal, its append-only file, as the steps that it ever took.

Redis writes down every change it makes, with the changes of one script or one transaction between MULTI
and EXEC. The journal must be whole: no rewrite (`auto-aof-rewrite-percentage 0`), and nothing that was
acknowledged forgotten (`appendfsync always`, where Redis itself is killed).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

Command = tuple[bytes, ...]
#: what Redis did in one atomic step
Transaction = list[Command]


def files(folder: Path) -> list[Path]:
    """The parts of the append-only file of a Redis whose data are in `folder`, in order.

    Raises ValueError where it was rewritten: what had been before is gone.
    """
    parts = sorted(folder.glob("appendonlydir/*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
    bases = [path for path in folder.glob("appendonlydir/*.base.*") if ".1.base." not in path.name]
    if bases:
        raise ValueError(f"the journal was rewritten: {bases}")
    return parts or sorted(folder.glob("appendonly.aof"))


def transactions(paths: Iterable[Path]) -> Iterator[tuple[int, Transaction]]:
    """All steps that were taken, each with the number of its database."""
    database = 0
    for path in paths:
        with open(path, "rb") as file:
            open_step: Transaction | None = None
            for command in _commands(file):
                verb = command[0].upper()
                if verb == b"SELECT":
                    database = int(command[1])
                elif verb == b"MULTI":
                    open_step = []
                elif verb == b"EXEC":
                    yield database, open_step or []
                    open_step = None
                elif open_step is None:
                    yield database, [command]
                else:
                    open_step.append(command)


def _commands(file: BinaryIO) -> Iterator[Command]:
    """The commands of one file; a torn one at its end never took effect."""
    while head := file.readline():
        if head[:1] == b"#":  # annotations: times
            continue
        if head[:1] != b"*":
            raise ValueError(f"not a journal of commands: {head[:40]!r}")
        parts = []
        for _ in range(int(head[1:])):
            size = int(file.readline()[1:] or -1)
            parts.append(file.read(size + 2)[:-2] if size >= 0 else b"")
            if size < 0 or len(parts[-1]) != size:
                return
        yield tuple(parts)
