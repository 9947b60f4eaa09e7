"""What the live views are made of: bars, sparklines, names cut in the middle, the order of rows."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from broker.running import Details, RunningJob
from broker.status import FleetStatus
from cli import tables
from cli.glyphs import Glyphs
from cli.tables import Column
from cli.top.reader import Seen
from cli.top.views import JOBS, Chosen, natural

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("used", "total", "bar"),
    [(0, 8, "░░░░"), (0.01, 8, "█░░░"), (4, 8, "██░░"), (7.99, 8, "███░"), (8, 8, "████"), (9, 8, "████")],
)
def test_a_bar_tells_nothing_from_little_and_much_from_all(used, total, bar):
    assert Glyphs().bar(used, total, 4) == bar


def test_there_are_no_glyphs_where_nothing_can_show_them():
    assert Glyphs(plain=True).bar(1, 2) == Glyphs().bar(0, 0) == Glyphs().spark([0, 0]) == ""
    assert Glyphs(ascii_only=True).bar(1, 2, 4) == "##--"
    assert Glyphs(ascii_only=True).marked("busy") == "busy"
    assert Glyphs().marked("busy") == "● busy"


def test_a_sparkline_is_as_high_as_its_highest_value():
    assert Glyphs().spark([0, 1, 4, 8]) == "▁▁▄█"


@pytest.mark.parametrize(
    ("text", "size", "cut"),
    [
        ("gpu1.example.com-0", 9, "gpu1…om-0"),
        ("日本語の名前", 7, "日本…前"),
        ("short", 9, "short"),
        ("ab", 1, "…"),
    ],
)
def test_names_are_cut_in_the_middle(text, size, cut):
    _, row = tables.lines([Column("", in_middle=True, least=size)], [[text]], size)
    assert row.plain.rstrip() == cut


def test_names_are_in_the_order_of_their_numbers():
    assert sorted(["gpu10-0", "gpu2-1", "gpu2-0", "a"], key=natural) == ["a", "gpu2-0", "gpu2-1", "gpu10-0"]


def jobs_seen() -> Seen:
    def job(name: str, minute: int | None) -> RunningJob:
        details = None if minute is None else Details(f"train {name}", "q", NOW.replace(minute=minute))
        return RunningJob(name, f"w{name}", "h", details)

    jobs = [job("young", 30), job("unread", None), job("old", 10)]
    return Seen(FleetStatus(NOW, "", (), ()), jobs, {}, [], "", [])


def test_jobs_are_sorted_and_filtered_and_those_not_read_yet_come_last():
    def ids(chosen: Chosen) -> list[str]:
        return [job.id for job in chosen.rows(jobs_seen())]

    longest = Chosen(JOBS, "FOR")
    assert ids(longest) == ["old", "young", "unread"]
    assert ids(longest.sorted_by("FOR")) == ["unread", "young", "old"]
    assert ids(longest.sorted_by("JOB")) == ["old", "unread", "young"]
    assert longest.sorted_by_next(-1).sorted_by_next(1) == longest
    assert longest.sorted_by("FOR").titles()[:2] == ["JOB", "FOR↑"]
    assert ids(Chosen(JOBS, "JOB", filter="TRAIN wold")) == ["old"]
