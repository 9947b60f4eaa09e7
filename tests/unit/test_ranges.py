"""Numbers of tasks as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import ranges
from broker.errors import UsageError


@st.composite
def written(draw: st.DrawFn) -> tuple[str, set[int]]:
    """A text, and the numbers it means."""
    words, numbers = [], set[int]()
    for _ in range(draw(st.integers(1, 6))):
        first, length, step = draw(st.integers(0, 60)), draw(st.integers(0, 40)), draw(st.integers(1, 5))
        part = range(first, first + length + 1, step)
        forms = [f"{first}-{first + length}:{step}"]
        forms += [f"{first}-{first + length}"] if step == 1 else []
        forms += [f"{first}"] if len(part) == 1 else []
        words.append(draw(st.sampled_from(forms)))
        numbers |= set(part)
    return ",".join(words), numbers


@given(written())
def test_a_text_means_its_numbers_each_once_and_in_order(case: tuple[str, set[int]]) -> None:
    text, numbers = case
    found = ranges.parse(text)
    assert list(found) == sorted(numbers)
    assert len(found) == len(numbers)
    assert all((number in found) == (number in numbers) for number in range(110))


@given(written())
def test_what_is_said_of_some_numbers_means_the_same_numbers(case: tuple[str, set[int]]) -> None:
    found = ranges.parse(case[0])
    assert list(ranges.parse(str(found))) == list(found)
    assert list(ranges.from_rows(row.encode() for row in reversed(found.rows()))) == list(found)


@given(st.sets(st.integers(0, 200), min_size=1), st.sets(st.integers(0, 200)))
def test_sets_become_ranges_and_are_subtracted(some: set[int], others: set[int]) -> None:
    assert list(ranges.of(some)) == sorted(some)
    assert list(ranges.of(some) - ranges.of(others)) == sorted(some - others)


def test_a_million_are_one_range() -> None:
    found = ranges.parse("1-1000000")
    assert found.rows() == ["1-1000000:1"]
    assert len(found) == 1_000_000
    assert str(ranges.parse("5-5,1-9:2,3")) == "1,3,5,7,9"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        "1-",
        "-1",
        "3-1",
        "1-9:0",
        "1,,2",
        "1-9:2:3",
        "1..9",
        "100000000",
        "0-99999999",
        "1-4%2",
        "²",
    ],
)
def test_what_names_no_tasks_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        ranges.parse(text)
    assert text.strip() in raised.value.message


def test_a_limit_as_slurm_has_it_is_told_the_option() -> None:
    with pytest.raises(UsageError) as raised:
        ranges.parse("1-100%5")
    assert "--max-parallel" in raised.value.hint
