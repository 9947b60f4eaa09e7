"""What words may be, and how tables, times and sizes read."""

from __future__ import annotations

import click
import pytest
from rich.cells import cell_len

from broker.printable import printable
from cli import tables
from cli.params import Duration
from cli.tables import Column


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), (" 1 d ", 86400), (".5", 0.5), ("100ms", 0.1)],
)
def test_durations(text, seconds):
    assert Duration().convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "1e3", "nan", "inf", "0", "-1", "1 2", "٣", "1w", "36501d", "9" * 400]
)
def test_what_is_no_duration(text):
    with pytest.raises(click.BadParameter):
        Duration().convert(text, None, None)


def test_nothing_is_a_duration_where_it_makes_sense():
    assert Duration(zero=True).convert("0", None, None) == 0
    with pytest.raises(click.BadParameter):
        Duration(zero=True).convert("-0.1", None, None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (-3, "0s"), (4.4, "4s"), (119, "119s"), (125, "2m"), (1e6, "12d")]
)
def test_ages(seconds, text):
    assert tables.age(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.04, "40ms"),
        (1.25, "1.2s"),
        (12, "12s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (59.7, "1m00s"),
    ],
)
def test_how_long_things_took(seconds, text):
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (200 * 2**20, "200 MiB"), (2**51, "2048 TiB")],
)
def test_sizes(count, text):
    assert tables.size(count) == text


COLUMNS = (
    Column("ID"),
    Column("NAME", least=8),
    Column("IDS", rank=1, least=6, separator=" "),
    Column("LEFT", rank=2, right=True),
    Column("EMPTY", rank=3),
)
ROWS = [["1", "a long name of 日本語", "aaa bbb ccc ddd", "7", ""], ["22", "b", "", "12345", ""]]


@pytest.mark.parametrize("width", [*range(12, 80)])
def test_a_table_is_never_wider_than_it_may_be(width):
    assert max(cell_len(line.plain) for line in tables.lines(COLUMNS, ROWS, width)) <= width


def test_a_table_without_limit_is_whole():
    head, first, second = (line.plain for line in tables.lines(COLUMNS, ROWS, None))
    assert head.split() == ["ID", "NAME", "IDS", "LEFT"]
    assert first == "1   a long name of 日本語  aaa bbb ccc ddd      7"
    assert second == "22  b                                       12345"
    assert cell_len(head) == cell_len(first) == cell_len(second)


def test_colours_are_where_the_words_are_beside_wide_letters_too():
    rows = [[("日本", "green"), "語", "", ("7", "red"), ("", "red")], ["22", ("b", "blue"), "", "12345", ""]]
    head, *lines = tables.lines(COLUMNS, rows, 40)
    found = [[(line.plain[span.start : span.end], span.style) for span in line.spans] for line in lines]
    assert found == [[("日本", "green"), ("7", "red")], [("b", "blue")]]
    assert [head.plain[span.start : span.end] for span in head.spans] == ["ID", "NAME", "LEFT"]


def test_where_it_is_narrow_columns_of_a_high_rank_go_first():
    def titles(width: int) -> str:
        return tables.lines(COLUMNS, ROWS, width)[0].plain

    assert titles(29).split() == ["ID", "NAME", "IDS", "LEFT"]
    assert titles(22).split() == ["ID", "NAME", "IDS"]
    assert titles(14).split() == ["ID", "NAME"]


def test_a_list_says_how_many_more_there_are():
    rows = [["1", "x", "aaa bbb ccc ddd", "7", ""]]
    assert "aaa bbb +2" in tables.lines(COLUMNS, rows, 27)[1].plain
    assert "aaa +3" in tables.lines(COLUMNS, rows, 22)[1].plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é", "plain é"),
        ("a\nb", "a\\nb"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\udcff", "\\xff"),
        ("\u202e", "\\u202e"),
    ],
)
def test_nothing_printed_can_move_the_cursor(text, shown):
    assert printable(text) == shown
