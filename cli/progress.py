"""Hosts and steps under way, on stderr: a live table on a terminal, a line for each step elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from broker.printable import printable
from cli.context import Context

if TYPE_CHECKING:
    from rich.table import Table

    from fleet.results import Event, OnEvent

#: rows of the live table; where there are more hosts, only those under way and failed are shown
_ROWS = 40
_MARKS = {"begun": "…", "done": "✓", "failed": "✗"}
_STYLES = {"begun": "yellow", "done": "green", "failed": "bold red"}


@contextmanager
def shown(context: Context, hosts: Sequence[str]) -> Iterator[OnEvent]:
    """Show the events that are handed to the function that this gives."""
    if context.quiet:
        yield lambda _: None
    elif context.messages.is_terminal:
        with _live(context, hosts) as on_event:
            yield on_event
    else:
        yield lambda event: _say(context.say, event)


def _say(say: Callable[[str], None], event: Event) -> None:
    """A line for each step that ended."""
    if event.state == "done":
        detail = f": {_printable(event.detail)}" if event.detail else ""
        say(f"{event.host}: {event.step} ok ({event.seconds:.1f} s){detail}")
    elif event.state == "failed":
        say(f"[FAILED] {event.host}: {event.step}: {_printable(event.detail)}")


def _printable(detail: str) -> str:
    """What a host said, on as many lines."""
    return "\n".join(map(printable, detail.split("\n")))


@contextmanager
def _live(context: Context, hosts: Sequence[str]) -> Iterator[OnEvent]:
    from rich.live import Live

    latest: dict[str, dict[str, Event]] = {host: {} for host in hosts}
    with Live(console=context.messages, refresh_per_second=8, transient=False) as live:

        def on_event(event: Event) -> None:
            latest[event.host][event.step] = event
            live.update(_table(latest))

        live.update(_table(latest))
        yield on_event


def _table(latest: dict[str, dict[str, Event]]) -> Table:
    from rich.table import Table

    steps = list(dict.fromkeys(step for events in latest.values() for step in events))
    table = Table(box=None, pad_edge=False)
    for title in ("HOST", *(step.upper() for step in steps), ""):
        table.add_column(title, no_wrap=True)
    rows = _worth_showing(latest)
    for host in rows:
        events = latest[host]
        table.add_row(host, *(_cell(events.get(step)) for step in steps), _last_detail(events))
    if len(rows) < len(latest):
        table.add_row(f"and {len(latest) - len(rows)} more")
    return table


def _worth_showing(latest: dict[str, dict[str, Event]]) -> list[str]:
    """All hosts, or the first of those under way and failed where all are too many."""
    if len(latest) <= _ROWS:
        return list(latest)
    return [host for host, events in latest.items() if any(e.state != "done" for e in events.values())][
        :_ROWS
    ]


def _cell(event: Event | None) -> str:
    """The mark says it, colour only adds to it."""
    if event is None:
        return "·"
    seconds = f" {event.seconds:.1f} s" if event.state == "done" else ""
    return f"[{_STYLES[event.state]}]{_MARKS[event.state]}[/]{seconds}"


def _last_detail(events: dict[str, Event]) -> str:
    from rich.markup import escape

    details = [event.detail for event in events.values() if event.detail]
    return escape(printable(details[-1].splitlines()[0])) if details else ""
