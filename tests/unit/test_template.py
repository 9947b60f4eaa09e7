"""Commands with places: no argument ever becomes more or less than the one word it is."""

from __future__ import annotations

import subprocess

from hypothesis import given, settings
from hypothesis import strategies as st

from broker import template
from broker.command import Command, from_data

ARGUMENTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@given(ARGUMENTS, ARGUMENTS)
def test_each_argument_is_one_word_as_it_is(one: str, two: str) -> None:
    argv = ("cmd", "{}", "a{1}b", "{2}")
    words = template.filled(argv, [one, two], "7", for_shell=False)
    assert words == ("cmd", one, two, f"a{one}b", two)


@settings(max_examples=25, deadline=None)
@given(ARGUMENTS, ARGUMENTS)
def test_a_shell_reads_each_argument_as_it_is(one: str, two: str) -> None:
    argv = ("/bin/sh", "-c", r"printf '%s\0' {} {#} {2}")
    words = template.filled(argv, [one, two], "7", for_shell=True)
    told = subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout
    assert told.split(b"\0") == [one.encode(), two.encode(), b"7", two.encode(), b""]


def test_a_command_keeps_its_places_on_the_way() -> None:
    sent = Command(("a", "{}"), template="words")
    assert from_data(sent.to_data()) == sent
    fields = {b"data": sent.to_data(), b"fleet_task_arguments": b'["\\udcff"]'}
    assert template.command_of("x-7", fields) == Command(("a", "\udcff"))


def test_a_command_without_places_is_left_alone() -> None:
    sent = Command(("awk", "{}"))
    assert template.command_of("x-7", {b"data": sent.to_data()}) == sent
