"""A view that is shown anew every so often, in place on a terminal, until q or Ctrl-C."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Look = Callable[[], Sequence["Text"]]


def watch(console: Console, look: Look, seconds: float) -> None:
    """Show what `look` gives now, and again each `seconds`; returns when q was pressed.

    On a terminal that is a screen of its own, drawn anew when its size changes; what was there is there
    again afterwards, however it ends. Elsewhere, and on a dumb terminal, a block of lines after another.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        while True:
            click.echo("\n".join(line.plain for line in look()) + "\n")
            time.sleep(seconds)
    from rich.live import Live

    with (
        _keys() as wait,
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
    ):
        while True:
            live.update(_page(console, look(), seconds), refresh=True)
            if wait(seconds) in ("q", "Q"):
                return


def _page(console: Console, lines: Sequence[Text], seconds: float) -> Any:
    """As many lines as fit, and the last one saying what one may press."""
    from rich.console import Group
    from rich.text import Text

    room = console.height - 1
    shown = list(lines)[:room]
    for line in shown:
        line.no_wrap, line.overflow = True, "ellipsis"
    every = f"{seconds:g} s" if seconds != 1 else "second"
    return Group(
        *shown, *[Text()] * (room - len(shown)), Text(f"q quits; shown anew each {every}", style="dim")
    )


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """`wait(seconds)`: the key that was pressed, '' for none, or when the size of the terminal changed."""
    import termios
    import tty

    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    told_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {
        signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda *_: None),
        # so that the terminal is put in order on the way out
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)),
    }
    terminal = sys.stdin.fileno() if sys.stdin.isatty() else None
    modes = termios.tcgetattr(terminal) if terminal is not None else None
    if terminal is not None:
        tty.setcbreak(terminal)

    def wait(seconds: float) -> str:
        watched = [reader] if terminal is None else [reader, terminal]
        ready, _, _ = select.select(watched, [], [], seconds)
        if reader in ready:
            os.read(reader, 4096)
        return (
            os.read(terminal, 1).decode(errors="replace")
            if terminal in ready and terminal is not None
            else ""
        )

    try:
        yield wait
    finally:
        if terminal is not None and modes is not None:
            termios.tcsetattr(terminal, termios.TCSADRAIN, modes)
        signal.set_wakeup_fd(told_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
