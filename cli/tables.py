"""Tables for people: as wide as the terminal where there is one, whole and plain elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from broker.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: what is printed: a text, or a text and its style
Cell = str | tuple[str, str]

_GAP = "  "
#: how each state looks; its word says the same without colour
STYLES = {
    "busy": "cyan",
    "started": "cyan",
    "idle": "green",
    "finished": "green",
    "ok": "green",
    "failed": "bold red",
    "offline": "bold red",
    "down": "bold red",
    "error": "bold red",
    "unreachable": "bold red",
    "stale": "bold red",
    "running": "green",
    "connecting": "yellow",
    "draining": "yellow",
    "stopped": "yellow",
    "canceled": "yellow",
    "paused": "yellow",
    "warning": "yellow",
    "unknown": "magenta",
}


@dataclass(frozen=True)
class Column:
    """One column. `least`: it may be cut to so many characters; None: never cut.

    `in_middle`: it is cut there, for names whose ends tell them apart.

    `separator` parts a cell into words: such a cell is cut between two of them, and says how
    many more there are. Where a terminal is too narrow even so, the column with the highest
    `rank` is left out first; those of rank 0 stay.
    """

    title: str
    rank: int = 0
    right: bool = False
    least: int | None = None
    separator: str = ""
    in_middle: bool = False


def state(word: str, shown: str = "") -> Cell:
    """A state, in its colour; `shown`: as what."""
    return shown or word, STYLES.get(word, "")


def show(console: Console, columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table on stdout."""
    print_lines(console, lines(columns, rows, console.width if console.is_terminal else None))


def print_lines(console: Console, texts: Iterable[Text]) -> None:
    """Print lines, cut at the terminal's edge and nowhere else."""
    if console.is_terminal:
        for text in texts:
            print_line(console, text)
    else:  # at once: click.echo flushes
        click.echo("\n".join(text.plain for text in texts))


def print_line(console: Console, line: Text) -> None:
    """Print one line, likewise."""
    if console.is_terminal:
        console.print(line, no_wrap=True, overflow="ellipsis")
    else:
        click.echo(line.plain)


def lines(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], width: int | None) -> list[Text]:
    """The lines of a table that is at most `width` wide; None: as wide as it is."""
    return Layout(columns).lines(rows, width)


class Layout:
    """The widths of a table's columns, which only grow, so that nothing jumps about when it is shown anew."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self._natural = [_width(column.title) for column in columns]
        self._used = [column.rank == 0 for column in columns]
        #: of each column that was shown last, by its index
        self.sizes: dict[int, int] = {}

    def lines(
        self, rows: Iterable[Sequence[Cell]], width: int | None, titles: Sequence[str] = ()
    ) -> list[Text]:
        """The lines of a table that is at most `width` wide, the head first; it may have other `titles`."""
        head = [(title, "bold") for title in titles or (column.title for column in self.columns)]
        filled = [_Filled.of(cells) for cells in zip(head, *rows, strict=True)]
        for i, column in enumerate(filled):
            self._used[i] = self._used[i] or any(column.texts[1:])
            self._natural[i] = max(self._natural[i], column.widest)
        chosen = [i for i, is_used in enumerate(self._used) if is_used]
        self.sizes = _fit(self.columns, self._natural, chosen, width)
        return _lines([filled[i].fitted(self.columns[i], size) for i, size in self.sizes.items()])

    def column_at(self, x: int) -> int | None:
        """Which column is shown at that cell of a line."""
        at = 0
        for i, size in self.sizes.items():
            at += size + len(_GAP)
            if x < at:
                return i
        return None


@dataclass(frozen=True)
class _Filled:
    """The cells of one column, which are looked at together where that is enough: there may be 10,000."""

    texts: Sequence[str]
    #: of those that have one, by row
    styles: Mapping[int, str]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> _Filled:
        """Of what is to be shown, made printable."""
        texts = [cell if isinstance(cell, str) else cell[0] for cell in cells]
        if not "".join(texts).isprintable():
            texts = [printable(text) for text in texts]
        styles = {row: cell[1] for row, cell in enumerate(cells) if not isinstance(cell, str) and all(cell)}
        return cls(texts, styles)

    @property
    def widest(self) -> int:
        return max(map(_width_of(self.texts), self.texts))

    def fitted(self, column: Column, size: int) -> _Fitted:
        """Each of them in a cell of `size`, cut where it is wider."""
        width, texts = _width_of(self.texts), self.texts
        if self.widest > size:
            texts = [text if width(text) <= size else _short(text, column, size) for text in texts]
            width = _width
        blanks = [" " * (size - width(text)) for text in texts]
        pairs = zip(blanks, texts, strict=True) if column.right else zip(texts, blanks, strict=True)
        return _Fitted(list(map("".join, pairs)), texts, self.styles, right=column.right)


@dataclass(frozen=True)
class _Fitted:
    """The same, all as wide as the column, and the texts that stand in these `cells`."""

    cells: Sequence[str]
    texts: Sequence[str]
    styles: Mapping[int, str]
    right: bool

    def start(self, row: int) -> int:
        """Where in its cell the text begins."""
        return len(self.cells[row]) - len(self.texts[row]) if self.right else 0


def _width_of(texts: Sequence[str]) -> Callable[[str], int]:
    """What measures each of them."""
    return len if "".join(texts).isascii() else _width


def _width(text: str) -> int:
    """Cells of a terminal that printable `text` takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _fit(
    columns: Sequence[Column], natural: Sequence[int], chosen: list[int], width: int | None
) -> dict[int, int]:
    """The width of each column that is shown, by its index."""
    if width is None:
        return {i: natural[i] for i in chosen}
    chosen = list(chosen)
    while _total(_least(columns, natural, chosen)) > width and (rank := max(columns[i].rank for i in chosen)):
        chosen.remove(max(i for i in chosen if columns[i].rank == rank))
    sizes = _least(columns, natural, chosen)
    spare = width - _total(sizes)
    # first those that always stay, then who lacks little, so that as many as can be are whole
    for i in sorted(chosen, key=lambda i: (columns[i].rank > 0, natural[i] - sizes[i])):
        more = min(natural[i] - sizes[i], max(spare, 0))
        sizes[i] += more
        spare -= more
    return sizes


def _least(columns: Sequence[Column], natural: Sequence[int], chosen: Iterable[int]) -> dict[int, int]:
    return {i: min(natural[i], columns[i].least or natural[i]) for i in chosen}


def _total(sizes: dict[int, int]) -> int:
    return sum(sizes.values()) + len(_GAP) * (len(sizes) - 1)


def _lines(columns: Sequence[_Fitted]) -> list[Text]:
    """One Text a row, its cells marked by spans: a Text for each cell takes seconds for 10,000 rows."""
    from rich.text import Span, Text

    rows = zip(*(column.cells for column in columns), strict=True)
    lines = [Text(_GAP.join(row).rstrip()) for row in rows]
    for i, column in enumerate(columns):
        for row, style in column.styles.items():
            at = column.start(row) + sum(len(left.cells[row]) + len(_GAP) for left in columns[:i])
            lines[row].spans.append(Span(at, at + len(column.texts[row]), style))
    return lines


def _short(text: str, column: Column, size: int) -> str:
    return _cut(_shortened(text, column.separator, size), size, in_middle=column.in_middle)


def _cut(text: str, size: int, *, in_middle: bool = False) -> str:
    if _width(text) <= size:
        return text
    from rich.cells import set_cell_size

    end = text[len(text) - (size - 1) // 2 :] if in_middle else ""
    while _width(end) > size // 2:
        end = end[1:]
    return set_cell_size(text, size - 1 - _width(end)) + "…" + end


def _shortened(text: str, separator: str, size: int) -> str:
    """As many words as fit, and how many more there are: "a,b +3"; a first word that is too long is kept."""
    words = text.split(separator) if separator else [text]
    for count in range(len(words), 0, -1):
        more = f" +{len(words) - count}" if count < len(words) else ""
        short = separator.join(words[:count]) + more
        if len(short) <= size:
            return short
    return text


def age(seconds: float | None) -> str:
    """How long ago, in one or two units: 4s, 12m, 3h, 5d."""
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def duration(seconds: float | None) -> str:
    """How long something took: 4ms, 1.2s, 12s, 3m12s, 2h05m."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f}ms"
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def size(count: int) -> str:
    """Bytes for people: 512 B, 3.8 GiB."""
    power = _power(count)
    return f"{_amount(count, power)} {_UNITS[power]}"


def size_of(part: int, whole: int) -> str:
    """Bytes of so many, for people: 2.0/64.0 GiB."""
    power = _power(whole)
    return f"{_amount(part, power) if part else 0}/{size(whole)}"


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def _power(count: int) -> int:
    return min((max(count, 1).bit_length() - 1) // 10, 4)


def _amount(count: int, power: int) -> str:
    amount = count / 1024**power
    return f"{amount:.{0 if power == 0 or amount >= 100 else 1}f}"
