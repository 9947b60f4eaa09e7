"""Durations, sizes and numbers as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import amounts
from broker.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512M", 512 * 2**20),
        ("4G", 4 * 2**30),
        ("4gb", 4 * 2**30),
        ("4 GiB", 4 * 2**30),
        ("1.5T", 1536 * 2**30),
        (".5k", 512),
        (4096, 4096),
    ],
)
def test_sizes(text, size_bytes):
    assert amounts.size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "4", "G", "-1G", "1e3M", "nanG", "0G", "2000P", 0, -1, True, "1 2G", "٣G"]
)
def test_what_is_no_size(text):
    with pytest.raises(UsageError):
        amounts.size(text)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-1", None, True, [1]])
def test_what_is_no_number(text):
    with pytest.raises(UsageError):
        amounts.number(text)


@given(st.integers(1, 2**40))
def test_a_size_reads_as_it_was_written(mebibytes):
    assert amounts.size(amounts.readable_size(mebibytes * 2**20)) == mebibytes * 2**20


@given(st.integers(1, 10**9))
def test_a_duration_reads_as_it_was_written(milliseconds):
    text = amounts.readable_duration(milliseconds / 1000)
    assert round(amounts.duration(text) * 1000) == milliseconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(7200, "2h"), (5400, "90m"), (45, "45s"), (0.5, "0.5s"), (86400, "1d")]
)
def test_how_a_duration_reads(seconds, text):
    assert amounts.readable_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(45.4, "45s"), (125, "2m"), (7500, "2h05m"), (90000, "25h00m")]
)
def test_how_a_duration_reads_roughly(seconds, text):
    assert amounts.rough_duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(64 * 2**30 - 1, "63.9G"), (64 * 2**30, "64G"), (3 * 2**19, "1M"), (2**50, "1P")]
)
def test_how_a_size_reads_roughly(size_bytes, text):
    assert amounts.rough_size(size_bytes) == text
