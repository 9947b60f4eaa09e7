"""What is rendered is whole, quoted where that was asked for, and an error tells its line."""

from __future__ import annotations

import json
import subprocess

import pytest

from broker.errors import UsageError
from fleet import rendering
from fleet.rendering import Template

WORDS = ["plain", "", "two words", "a'b\"c", "$(touch x)`y`;z", "new\nline", "-n", "\\", "~", "*", "ü"]


@pytest.mark.parametrize("word", WORDS)
def test_a_quoted_value_is_one_word_to_a_shell(word):
    script = Template("t", "printf '%s' {{ word | sh }}").render({"word": word})
    assert subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout.decode() == word


def test_a_value_as_json_is_that_value():
    text = Template("t", "{{ value | json }}").render({"value": {"a<b": ["ü", 1, True]}})
    assert json.loads(text) == {"a<b": ["ü", 1, True]}


def test_lines_of_blocks_leave_no_empty_lines():
    text = "{% for n in numbers %}\n{% if n > 1 %}\nline {{ n }}\n{% endif %}\n{% endfor %}\nend\n"
    assert Template("t", text).render({"numbers": [1, 2, 3]}) == "line 2\nline 3\nend\n"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("fine\n{{ nobody }}\n", 2, "'nobody' is undefined"),
        ("fine\n{{ nobody | sh }}\n", 2, "'nobody' is undefined"),
        ("{% if nobody %}x{% endif %}\n", 1, "'nobody' is undefined"),
        ("\n\n{{ nothing }}\n", 3, "a value that is not set"),
        ("\n{{ nothing | sh }}\n", 2, "a value that is not set"),
        ("\n{{ 1 + word }}\n", 2, "unsupported operand"),
        ("a\n{% if %}\n", 2, "Expected an expression"),
        ("{{ word | loud }}\n", 1, "No filter named 'loud'"),
    ],
)
def test_a_template_that_cannot_be_rendered_tells_its_line(text, line, told):
    with pytest.raises(UsageError) as caught:
        Template("my.sh.j2", text).render({"nothing": None, "word": "w"})
    assert caught.value.message.startswith(f"my.sh.j2:{line}: ")
    assert told in caught.value.message


def test_a_template_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the template .*none\.j2: No such file"):
        rendering.from_file(tmp_path / "none.j2")


def test_a_template_of_the_users_is_read(tmp_path):
    (tmp_path / "mine.j2").write_text("hello {{ who }}\n")
    assert rendering.from_file(tmp_path / "mine.j2").render({"who": "you"}) == "hello you\n"
