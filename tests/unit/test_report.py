"""What a report makes of jobs and samples, and the page that is drawn of it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.past import Attempt, Past, PastJob
from broker.requirements import Requirements
from broker.usage import Usage
from fleet import report, report_page
from fleet.report import Report, grouped, host_of
from fleet.report_figures import Intervals, distribution, round_bytes, suggestion
from fleet.resources import GpuUse
from fleet.series import About, HostSample, JobSample, Series

_GIB = 2**30
_KEPT = {"queued": 7, "finished": 1}


def job(number: int = 0, *attempts: Attempt, **changes: Any) -> PastJob:
    at = float(number)
    attempts = attempts or (Attempt(1, "here-0", at + 1, at + 2, "finished"),)
    fields = {"state": "finished", "submitted": at, "queued": at, "reason": "", "usage": None, "need": None}
    return PastJob(
        f"j{number}", changes.pop("name", "true"), "default", **(fields | changes), attempts=attempts
    )


def made(*jobs: PastJob, samples: tuple[Path, ...] = (), at: float = 1000.0, **how: Any) -> Report:
    return report.make(Past(iter(jobs), _KEPT, how.pop("left_out", 0)), samples, at, **how)


def page(found: Report) -> str:
    return report_page.render(found, "127.0.0.1:6379")


def svgs(text: str) -> list[ET.Element]:
    """The drawings, which must be well-formed."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


# --- what is made of jobs --------------------------------------------------------------------------


def test_nothing_has_run():
    found = made()
    assert (found.states, found.waiting, found.running, found.rows) == ({}, None, None, ())
    text = page(found)
    assert "Nothing has run" in text
    assert "7 queued" in text
    assert svgs(text)


def test_jobs_their_attempts_and_where_they_ran():
    lost = Attempt(1, "here-1", 10.0, 14.0, "lost")
    found = made(
        job(5, lost, Attempt(2, "there-0", 16.0, 21.0, "failed"), state="failed", reason="exit code 3"),
        job(8, Attempt(3, "here-0", 12.0, None, None), state="started"),
        job(9),
        at=30.0,
    )
    assert found.states == {"failed": 1, "started": 1, "finished": 1}
    assert found.outcomes == {"lost": 1, "failed": 1, "running": 1, "finished": 1}
    assert (found.began, found.ended, found.workers, found.hosts) == (10.0, 30.0, 3, 2)
    assert found.busy_seconds == 4 + 5 + 18 + 1
    assert sum(found.running_jobs) * 20 / len(found.running_jobs) == pytest.approx(28)
    assert [row.name for row in found.rows] == ["here-0", "here-1", "there-0"]
    (bar,) = found.rows[1].bars
    assert (bar.job, bar.outcome, bar.started, bar.ended) == ("j5", "lost", 10.0, 14.0)
    assert found.rows[0].most_at_once == 1
    assert [slow.job for slow in found.slowest] == ["j5", "j9"]
    (failures,) = found.failures
    assert (failures.reason, failures.count, failures.jobs) == ("exit code 3", 1, ["j5"])


def test_what_ended_before_is_left_out():
    found = made(job(10), job(500), since=400.0)
    assert (found.states, found.began) == ({"finished": 1}, 501.0)
    assert made(job(10), since=400.0).states == {}


def test_what_was_claimed_ahead_and_went_back_is_no_attempt():
    back = Attempt(1, "here-0", 1.0, 1.1, "handed-back")
    late = Attempt(2, "here-0", 2.0, 9.0, "handed-back")
    assert made(job(0, back, late, Attempt(3, "here-0", 10.0, 11.0, "finished"))).outcomes == {
        "handed-back": 1,
        "finished": 1,
    }
    assert made(job(0, back, state="queued")).states == {}


def test_what_failed_without_being_run_is_among_the_failures():
    never = job(3)._replace(attempts=(), state="failed", reason="dependency j1 failed")
    found = made(never, job(4))
    assert found.failures[0].reason == "dependency JOB failed"
    assert found.failures[0].workers == set()
    assert "not run" in page(found)


def test_a_great_fleet_is_shown_by_host_and_the_rest_is_told():
    jobs = [
        job(n, Attempt(1, f"h{n % 60}-{n % 2}", n / 10, n / 10 + 1 + n % 60, "finished")) for n in range(600)
    ]
    found = made(*jobs)
    assert (found.row_kind, len(found.rows), found.more_rows) == ("host", 40, 20)
    assert [row.name for row in found.rows] == [f"h{n}" for n in range(20, 60)], "by number, the busiest"
    assert "<b>20 more hosts</b>" in page(found)


def test_jobs_beyond_those_that_are_read_are_told_of():
    assert "<b>left out</b>" in page(made(job(), left_out=5))
    assert "left out</b>" not in page(made(job()))


def _many(count: int) -> Iterator[PastJob]:
    for n in range(count):
        at, worker = float(n % 5000), f"h{n % 31}-0"
        state = "failed" if n % 50 == 0 else "finished"
        attempt = Attempt(n, worker, at + 1, at + 2 + n % 97, state)
        usage, need = Usage(1.0, (n % 1000) << 20), Requirements(memory_bytes=8 * _GIB)
        reason = f"ValueError: {'x' * 150} no. {n}" if state == "failed" else ""
        name = f"program{n % 100} --very-long-option {n} " + "y" * 300
        yield job(n, attempt, name=name, state=state, usage=usage, need=need, reason=reason)


def test_a_hundred_thousand_jobs_make_a_small_page():
    found = report.make(Past(_many(100_000), _KEPT, 0), (), 6000.0)
    assert not found.has_bars
    assert sum(found.states.values()) == 100_000
    assert sum(row.attempts for row in found.rows) == 100_000
    assert sum(sum(row.failures) for row in found.rows) == 2000
    assert len(found.slowest) == len(found.memory) == 20
    assert found.more_memory == 80
    text = page(found)
    assert len(text) < 2_000_000
    assert "<b>80 more kinds of jobs</b>" in text
    assert svgs(text)


@given(st.lists(st.tuples(st.floats(-50, 150), st.floats(0, 100)), max_size=30))
def test_intervals_lose_no_time(spans):
    counted = Intervals(0.0, 100.0, 7)
    for began, length in spans:
        counted.add(began, began + length)
    inside = sum(max(0.0, min(100.0, began + length) - max(0.0, began)) for began, length in spans)
    assert sum(counted.means()) * 100 / 7 == pytest.approx(inside, abs=1e-6)
    assert all(mean >= -1e-9 for mean in counted.means())


@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=200))
def test_a_distribution_counts_each_once(seconds):
    found = distribution(seconds)
    assert found is not None
    assert sum(found.counts) == found.count == len(seconds)
    assert found.p50 <= found.p90 <= found.p99 <= found.longest == max(seconds)
    assert sum(one <= found.p90 for one in seconds) >= 0.9 * len(seconds)
    assert found.counts[0]
    assert found.counts[-1]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("exit code 3", "exit code 3"),
        ("killed by SIGSEGV", "killed by SIGSEGV"),
        ("Timeout: ran longer than 60 s", "Timeout: ran longer than N s"),
        ("OutOfMemory: its processes had 300 MiB", "OutOfMemory: its processes had N MiB"),
        ("KeyError: 0xdeadbeef1", "KeyError: N"),
        ("a fed cafe is no number", "a fed cafe is no number"),
        ("  ", "no reason is known"),
    ],
)
def test_reasons_are_the_same_but_for_numbers(reason, expected):
    assert grouped(reason) == expected


def test_a_host_is_what_its_workers_are_named_after():
    assert [host_of(name) for name in ("gpu-7-12", "here", "a-b")] == ["gpu-7", "here", "a-b"]


@pytest.mark.parametrize(
    ("asked", "p99", "ran_out", "suggested", "words"),
    [
        (8 * _GIB, int(1.2 * _GIB), 0, int(1.5 * _GIB), "15% of what it asked for is used"),
        (2 * _GIB, int(1.4 * _GIB), 0, None, "asks for what it needs"),
        (2 * _GIB, int(1.99 * _GIB), 0, 3 * _GIB, "no room left"),
        (2 * _GIB, _GIB, 3, 3 * _GIB, "3 ran out of memory"),
        (None, _GIB, 0, int(1.5 * _GIB), "asked for nothing"),
        (None, 5 << 20, 0, None, "next to nothing"),
    ],
)
def test_what_to_ask_for(asked, p99, ran_out, suggested, words):
    found, why = suggestion(asked, p99, ran_out)
    assert found == suggested
    assert words in why


@given(st.floats(0, 2**50))
def test_round_sizes_are_no_less_and_not_much_more(size):
    assert size <= round_bytes(size) <= max(64 * 2**20, 1.5 * size)


# --- samples ---------------------------------------------------------------------------------------


def _samples(folder: Path, worker: str, host: str, cpus: float) -> None:
    one = Series(folder / host / "log", About(host, worker, 4, 8 * _GIB), 2**20, 1e9)
    for at in range(100, 200, 5):
        one.note_host(float(at), HostSample(cpus, _GIB, 1.0, None, 2.0, 3.0), [GpuUse(0, cpus / 4, 1)])
        one.note_job(float(at), "j1", 7, JobSample(1.0, at << 20, 1))
    one.close()


def test_hosts_are_added_up_and_what_is_there_twice_counts_once(tmp_path):
    _samples(tmp_path, "a-0", "a", 1.0)
    _samples(tmp_path, "b-0", "b", 3.0)
    (tmp_path / "c.series.1.sqlite").write_text("damaged")
    slow = job(1, Attempt(7, "a-0", 101.0, 199.0, "finished"))
    files = tuple(report.series_files([tmp_path, tmp_path]))
    found = made(slow, samples=files, at=200.0)
    assert found.fleet is not None
    assert [(host.name, host.mean_cpus, host.most_cpus) for host in found.fleet.hosts] == [
        ("a", 1, 1),
        ("b", 3, 3),
    ]
    cpus = [value for value in found.fleet.lines["cpus"] if value is not None]
    assert set(cpus) == {4.0}
    assert len(cpus) > 200, "between two samples it was as the later one says"
    assert set(found.fleet.lines["write_rate"]) == {None}
    assert {value for value in found.fleet.gpus if value is not None} == {0.5}, "the mean of all"
    (problem,) = found.fleet.problems
    assert "c.series.1.sqlite" in problem
    memory = found.slowest[0].memory
    assert memory == tuple(sorted(memory))
    assert memory[-1] == 195 << 20
    text = page(found)
    assert "CPUs of 8, 2 hosts" in text
    assert "1 file of samples could not be read" in text
    assert 'class="spark"' in text
    assert "GPUs busy" in text
    assert "25 %" in text


def test_a_host_that_nobody_sampled_for_long_is_not_known(tmp_path):
    _samples(tmp_path, "a-0", "a", 1.0)
    long = job(1, Attempt(7, "a-0", 0.0, 1000.0, "finished"))
    found = made(long, samples=tuple(report.series_files([tmp_path])))
    assert found.fleet is not None
    known = [value is not None for value in found.fleet.lines["cpus"]]
    assert 0 < sum(known) < 30
    assert found.fleet.lines["cpus"][-1] is None


# --- the page --------------------------------------------------------------------------------------


def test_names_and_reasons_are_text_whatever_they_hold():
    evil = "<script>alert('x')</script>\"'&{{ 7 * 7 }}"
    text = page(
        made(
            job(0, Attempt(1, evil, 1.0, 2.0, "failed"), name=evil, state="failed", reason=evil),
            job(1)._replace(queue=evil, id=evil, usage=Usage(1.0, _GIB)),
        )
    )
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert svgs(text)


def test_control_characters_are_spelled_out():
    odd = "a\x1b[31m\x07\x00\x9b\x7f\u202e\udcff"
    text = page(
        made(
            job(0, Attempt(1, odd, 1.0, 2.0, "failed"), name=odd, state="failed", reason=odd),
            job(1)._replace(queue=odd, id=odd, usage=Usage(1.0, _GIB)),
        )
    )
    assert "a\\x1b[31m\\x07\\x00\\x9b\\x7f\\u202e\\xff" in text
    assert all(char.isprintable() or char == "\n" for char in text)
    assert svgs(text)


def test_the_page_names_no_address_and_has_no_script():
    text = page(made(job()))
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|\son[a-z]+=", text.replace("http-equiv", ""))
    assert "default-src 'none'" in text


def test_each_attempt_has_a_bar_whose_look_is_not_its_colour_alone():
    outcomes = ["finished", "failed", "lost", "handed-back", "stopped", None]
    jobs = [
        job(n, Attempt(1, "here-0", n, None if o is None else n + 1.0, o)) for n, o in enumerate(outcomes)
    ]
    text = page(made(*jobs, at=10.0))
    looks = [
        svg.get("class", "").split()[1]
        for one in svgs(text)
        for svg in one.iter("rect")
        if svg.find("title") is not None and svg.get("class", "").startswith("b ")
    ]
    assert sorted(looks) == ["failed", "finished", "lost", "lost", "running", "stopped"]
    for words in ("(slit)", "(hollow)", "(thin)", "(dashed)"):
        assert words in text


@pytest.mark.parametrize("length", [0.01, 3.0, 50.0, 3000.0, 90_000.0, 3e6, 4e8])
def test_a_time_axis_has_a_few_round_times(length):
    began = 1_795_291_590.0
    found = report_page.ticks(began, began + length)
    assert 1 <= len(found) <= 7
    assert len({tick.label for tick in found}) == len(found)
    assert all(0 <= tick.at <= 100 for tick in found)


def test_numbers_in_words():
    assert [report_page.duration(s) for s in (0, 0.0042, 1.5, 90, 5400, 200_000)] == [
        "0 s",
        "4.2 ms",
        "1.5 s",
        "1.5 min",
        "1.5 h",
        "2.3 d",
    ]
    assert [report_page.size(b) for b in (0, 512, 1536, 5 * _GIB)] == ["0 B", "512 B", "1.5 KiB", "5 GiB"]
    assert [report_page.number(n) for n in (0, 0.001, 0.25, 12, 1234567)] == [
        "0",
        "< 0.01",
        "0.25",
        "12",
        "1,234,567",
    ]
