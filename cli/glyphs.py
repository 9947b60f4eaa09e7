"""Bars, sparklines and marks of states, where a terminal can show them; a pipe gets words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_BAR_CELLS = 6
_SPARKS = "▁▂▃▄▅▆▇█"
_ASCII_SPARKS = "_.-=*#"
_MARKS = {
    "busy": "●",
    "started": "●",
    "idle": "○",
    "draining": "◐",
    "connecting": "?",
    "paused": "‖",
    "offline": "✗",
    "stale": "✗",
    "stopped": "✗",
    "unreachable": "✗",
    "down": "✗",
    "running": "●",
    "up": "✓",
}


class Glyphs:
    """What one terminal can show. `plain`: no glyphs at all; `ascii_only`: bars of # and -, no marks."""

    def __init__(self, *, plain: bool = False, ascii_only: bool = False) -> None:
        self._plain = plain
        self._full, self._empty = ("#", "-") if ascii_only else ("█", "░")
        self._sparks = _ASCII_SPARKS if ascii_only else _SPARKS
        self._marks = {} if plain or ascii_only else _MARKS

    @classmethod
    def of(cls, console: Console) -> Glyphs:
        """Those of a console: none on a pipe and on a dumb terminal."""
        plain = not console.is_terminal or console.is_dumb_terminal
        return cls(plain=plain, ascii_only=not console.encoding.lower().startswith("utf"))

    def bar(self, used: float, total: float, cells: int = _BAR_CELLS) -> str:
        """How full something is; what is in use at all shows, and so does what is left."""
        if self._plain or total <= 0:
            return ""
        part = min(max(used / total, 0.0), 1.0)
        count = math.ceil(part * cells) if part < 0.5 else math.floor(part * cells)
        return self._full * count + self._empty * (cells - count)

    def spark(self, values: Sequence[float]) -> str:
        """A sparkline: the highest of `values` is a whole cell, nothing a blank one."""
        most = max(values, default=0)
        if self._plain or most <= 0:
            return ""
        steps = len(self._sparks)
        return "".join(self._sparks[max(0, math.ceil(value / most * steps) - 1)] for value in values)

    def marked(self, word: str) -> str:
        """A state with its mark."""
        mark = self._marks.get(word)
        return f"{mark} {word}" if mark else word
