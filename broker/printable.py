"""Names and texts of anybody's, made harmless to whatever shows them: a terminal, a page, a scrape."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, with whatever could move the cursor or colour the terminal spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _spelled(c) for c in text)


def _spelled(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte that is no UTF-8, as Python carries it
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
