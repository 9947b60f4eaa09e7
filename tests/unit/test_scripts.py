"""The texts of the Lua scripts: a module is loaded late, so what is asked of it is looked up here."""

from __future__ import annotations

import re

import pytest

from broker import keys, scripts

SCRIPTS = [script for script in vars(scripts).values() if isinstance(script, scripts.Script)]


def told(module: str) -> set[str]:
    """The names that a module returns."""
    return set(re.findall(r"(\w+) =", scripts._read(f"_{module}").rpartition("return {")[2]))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_what_a_script_asks_of_a_module_is_there(script: scripts.Script) -> None:
    code = re.sub("--.*", "", script.text)
    for module in script._modules:
        asked = set(re.findall(rf"\b{module}\.(\w+)", code))
        assert asked <= told(module), module


def test_a_key_is_the_one_that_python_has() -> None:
    text = scripts._KEY.sub(scripts._key_in_lua, "key('job', id) key('output', f.id) key('execution', id, e)")
    assert text == "('rq:job:' .. id) ('fleet:output:' .. f.id) ('rq:execution:' .. id .. ':' .. e)"
    assert keys.job("1") == "rq:job:1"
    assert (
        scripts._KEY.sub(scripts._key_in_lua, "key('worker_beat', w)") == "('fleet:worker:' .. w .. ':beat')"
    )
