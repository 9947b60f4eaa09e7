"""`fleet demo`: the whole thing on this machine, as a play with a terminal for its stage."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import click

from cli.context import Context, pass_context

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@click.command()
@click.option("--keep", is_flag=True, help="Leave the demo's Redis and hosts running; says how to end them.")
@pass_context
def demo(context: Context, keep: bool) -> int:
    """Redis, three hosts over SSH, 300 jobs, a worker killed, nothing lost; all on this machine.

    Needs no root, no Docker and no server; touches nothing of yours and cleans up after itself,
    also after Ctrl-C.
    """
    from fleet.demo import Demo, uninterrupted

    for number in (signal.SIGTERM, signal.SIGHUP):
        # SIGINT's own handler, which raises KeyboardInterrupt: they end the demo as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    stage = _Terminal(context)
    play = Demo(stage)
    try:
        play.play(keep=keep)
    except KeyboardInterrupt:
        keep = False
        raise
    finally:
        stage.close()
        if keep:
            click.echo(play.how_to_go_on())
        else:
            with uninterrupted():
                context.say("Cleaning up ...")
                play.close()
    return 0


class _Terminal:
    """The demo's stage: titles, commands as one would type them, and a progress bar."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def scene(self, title: str) -> None:
        self.close()
        self._print(f"\n[bold]# {title}[/bold]")

    def command(self, line: str) -> None:
        self._print(f"[bold cyan]$ {_escaped(line)}[/bold cyan]")

    def note(self, text: str) -> None:
        self._print(f"[dim]{_escaped(text)}[/dim]")

    def progress(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar, self._task = _progress_bar(self._context, total)
        if self._task is not None:
            self._bar.update(self._task, completed=done)
        if done == total:
            self.close()

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        console = self._bar.console if self._bar else self._context.console
        console.print(text)
        sys.stdout.flush()


def _progress_bar(context: Context, total: int) -> tuple[Progress, TaskID]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=context.console)
    bar.start()
    return bar, bar.add_task("jobs", total=total)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
