"""`fleet doctor`: is everything as it must be, and if not, what to do."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from broker.printable import printable
from cli import tables
from cli.context import Context, pass_context, print_json
from cli.params import json_option

if TYPE_CHECKING:
    from broker.findings import Finding

#: the longest level
_LEVELS = len("warning")


@click.command()
@json_option
@pass_context
def doctor(context: Context, /, as_json: bool) -> int:
    """Check Redis, clocks and workers; say how to mend what is wrong.

    Exit code 0: no error (there may be warnings); 1: errors; 6: Redis is not reachable.
    """
    from broker import doctor as checks
    from broker.connection import redacted

    with context.redis() as client:
        findings = checks.examine(client)
    healthy = all(finding.level != "error" for finding in findings)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        print_json({"redis": {"url": redacted(context.url())}, "healthy": healthy, "checks": rows})
    else:
        click.echo(f"Redis at {context.redis_address}")
        _print(context, findings)
    return 0 if healthy else 1


def _print(context: Context, findings: list[Finding]) -> None:
    from rich.text import Text

    names = max(len(finding.name) for finding in findings)
    for finding in findings:
        indent = " " * (_LEVELS + names + 4)
        head = Text(f"{finding.level:<{_LEVELS}}", style=tables.STYLES.get(finding.level, ""))
        head.append(f"  {finding.name:<{names}}  ", style="none")
        mend = f"-> {finding.mend}" if finding.mend and finding.level != "ok" else ""
        for text in (printable(finding.found), mend):
            for line in _wrapped(context, text, len(indent)):
                tables.print_line(context.console, head.append(line, style="none"))
                head = Text(indent)


def _wrapped(context: Context, text: str, indent: int) -> list[str]:
    """Lines that fit beside the first columns; off a terminal a text is one line."""
    if not context.console.is_terminal:
        return [text] if text else []
    return textwrap.wrap(text, max(context.console.width - indent, 30), break_on_hyphens=False)
