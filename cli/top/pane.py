"""Widgets that show a window of very many lines: only what is seen is ever made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from rich.text import Text
from textual import events
from textual.binding import Binding
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from broker.printable import printable
from cli.tables import Cell, Column, Layout

Row = TypeVar("Row")


class Pane(Widget, can_focus=True):
    """Lines, of which `offset` is the first that is shown below `heads` fixed ones."""

    heads = 0
    BINDINGS = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup,ctrl+b", "page(-1)", show=False),
        Binding("pagedown,ctrl+f,space", "page(1)", show=False),
        Binding("home,g", "move(-1000000000)", show=False),
        Binding("end,G", "move(1000000000)", show=False),
    ]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.first = 0
        self._drawn: list[Text] | None = None

    @property
    def page_lines(self) -> int:
        """How many lines there is room for."""
        return max(1, self.size.height - self.heads)

    def count(self) -> int:
        """How many lines there are."""
        raise NotImplementedError

    def draw(self) -> list[Text]:
        """The heads and the lines from `first` on that there is room for."""
        raise NotImplementedError

    def redraw(self) -> None:
        """Something changed."""
        self.first = max(0, min(self.first, self.count() - self.page_lines))
        self._drawn = None
        self.refresh()

    def action_move(self, lines: int) -> None:
        self.first += lines
        self.redraw()

    def action_page(self, pages: int) -> None:
        self.action_move(pages * self.page_lines)

    def on_mouse_scroll_down(self) -> None:
        self.action_move(3)

    def on_mouse_scroll_up(self) -> None:
        self.action_move(-3)

    def on_resize(self) -> None:
        self.redraw()

    def render_line(self, y: int) -> Strip:
        if self._drawn is None:
            self._drawn = self.draw()
        line = self._drawn[y] if y < len(self._drawn) else Text()
        strip = Strip(line.render(self.app.console, end=""), line.cell_len)
        return strip.crop_extend(0, self.size.width, self.rich_style).apply_style(self.rich_style)


class Table(Pane, Generic[Row]):
    """Rows with a cursor, which stays on its row wherever that moves to."""

    heads = 1

    class HeadClicked(Message):
        def __init__(self, column: int) -> None:
            super().__init__()
            self.column = column

    class Moved(Message):
        """The cursor is on another row; `by_hand`: not because the rows changed."""

        def __init__(self, by_hand: bool) -> None:
            super().__init__()
            self.by_hand = by_hand

    class Chosen(Message):
        """Enter was pressed, or the row under the cursor clicked once more."""

    BINDINGS = [Binding("enter", "choose", show=False)]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rows: Sequence[Row] = ()
        self.cursor = 0
        self._identity: Callable[[Row], str] = str
        self._cells: Callable[[Row], list[Cell]] = lambda row: [str(row)]
        self._layout = Layout(())
        self._titles: Sequence[str] = ()
        self._told = ""

    def be(
        self, columns: Sequence[Column], cells: Callable[[Row], list[Cell]], identity: Callable[[Row], str]
    ) -> None:
        """Show rows of another kind from now on."""
        self._layout, self._cells, self._identity = Layout(columns), cells, identity
        self.rows, self.first, self.cursor = (), 0, 0

    def show(self, rows: Sequence[Row], titles: Sequence[str]) -> None:
        """These rows, under these titles; the cursor stays on its row."""
        here = self.row
        self._titles = titles
        above = self.cursor - self.first
        self.rows = rows
        if here is not None and self.cursor > 0:  # at the top it stays at the top
            name = self._identity(here)
            at = next((i for i, row in enumerate(rows) if self._identity(row) == name), self.cursor)
            self.cursor, self.first = at, at - above
        self._settle(by_hand=False)

    @property
    def row(self) -> Row | None:
        """The row under the cursor."""
        return self.rows[self.cursor] if self.cursor < len(self.rows) else None

    def shown(self) -> Sequence[Row]:
        """The rows that are seen."""
        return self.rows[self.first : self.first + self.page_lines]

    def count(self) -> int:
        return len(self.rows)

    def _settle(self, *, by_hand: bool = True) -> None:
        """Keep the cursor where there is a row, and in sight."""
        self.cursor = max(0, min(self.cursor, len(self.rows) - 1))
        self.first = min(max(self.first, self.cursor - self.page_lines + 1), self.cursor)
        name = self._identity(self.row) if self.row is not None else ""
        if name != self._told:
            self._told = name
            self.post_message(self.Moved(by_hand))
        self.redraw()

    def action_move(self, lines: int) -> None:
        self.cursor += lines
        self._settle()

    def action_choose(self) -> None:
        if self.row is not None:
            self.post_message(self.Chosen())

    def on_mouse_scroll_down(self) -> None:
        self._scroll(3)

    def on_mouse_scroll_up(self) -> None:
        self._scroll(-3)

    def _scroll(self, lines: int) -> None:
        """Move the window, and the cursor no more than it takes to be in it."""
        self.first = max(0, min(self.first + lines, self.count() - self.page_lines))
        self.cursor = min(max(self.cursor, self.first), self.first + self.page_lines - 1)
        self._settle()

    def on_click(self, event: events.Click) -> None:
        if event.y < self.heads:
            column = self._layout.column_at(event.x)
            if column is not None:
                self.post_message(self.HeadClicked(column))
            return
        at = self.first + event.y - self.heads
        if at >= len(self.rows):
            return
        if at == self.cursor and event.chain > 1:
            self.action_choose()
        self.cursor = at
        self._settle()

    def draw(self) -> list[Text]:
        width = self.size.width
        lines = self._layout.lines(map(self._cells, self.shown()), width, self._titles)
        here = self.heads + self.cursor - self.first
        for i, line in enumerate(lines):
            line.truncate(width, pad=True)
            if i == 0:
                line.stylize("bold underline")
            elif i == here:  # the same with colours and without
                line.spans = []
                line.stylize("reverse")
        return lines


class Lines(Pane):
    """Text that grows, of which the end is shown for as long as nobody moves away from it."""

    #: lines kept; more are at the worker
    MOST = 20_000

    BINDINGS = [
        Binding("left,h", "shift(-16)", show=False),
        Binding("right,l", "shift(16)", show=False),
    ]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._lines: list[str] = []
        self._open = ""
        self._left = 0
        self.follows = True

    def count(self) -> int:
        return len(self._lines) + bool(self._open)

    def clear(self) -> None:
        self._lines, self._open, self.follows = [], "", True
        self.redraw()

    def feed(self, text: str) -> None:
        """More of it; what is not a whole line yet is shown as it is, and changes."""
        *whole, self._open = (self._open + text).split("\n")
        self._lines += [_last_state(line) for line in whole]
        # a progress bar that never ends a line must not grow for ever
        self._open = self._open[self._open.rfind("\r", 0, -1) + 1 :] if "\r" in self._open else self._open
        del self._lines[: -self.MOST]
        self.redraw()

    def redraw(self) -> None:
        if self.follows:
            self.first = self.count()
        super().redraw()

    def action_move(self, lines: int) -> None:
        self.follows = False
        self.first = max(0, min(self.first + lines, self.count() - self.page_lines))
        self.follows = self.first >= self.count() - self.page_lines
        self.redraw()

    def action_shift(self, cells: int) -> None:
        self._left = max(0, self._left + cells)
        self.redraw()

    def draw(self) -> list[Text]:
        lines = self._lines[self.first : self.first + self.page_lines]
        if self._open and len(lines) < self.page_lines:
            lines.append(_last_state(self._open))
        return [Text(_shown(line)[self._left :]) for line in lines]


#: what colours a terminal or moves its cursor (ECMA-48), and what names its window
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")


def _shown(line: str) -> str:
    return printable(_ESCAPES.sub("", line).expandtabs())


def _last_state(line: str) -> str:
    """What a terminal would show of a line on which the cursor returned to its beginning."""
    return line.rstrip("\r").rpartition("\r")[2]
