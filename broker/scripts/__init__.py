"""The Lua scripts, each a file of its own: `round.lua` is `Script("round")`.

Redis runs the whole text of a script at each call, and to define a function takes it about as long as to call
a small one; the longer, the more of its neighbours are referred to. So a text has three layers: `_lib.lua`,
what most scripts need; in it modules, each of which is run when the first of its functions is asked for; and
beside these the script. A module is called by its name: `lists.enqueue(...)` is in `_lists.lua`.

Keys are spelled in `broker.keys` alone: a script has `K.LEASES`, or `key('job', id)`, and both are written
out when the text is made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import redis
from redis.exceptions import NoScriptError

from broker import keys

_MODULES = ("lists", "dependents", "setbacks", "arrays", "history")
_CONSTANT = re.compile(r"\bK\.([A-Z_]+)\b")
_NAME = r"([\w.]+(?:\[\w+\])?)"
_KEY = re.compile(rf"\bkey\('(\w+)', {_NAME}(?:, {_NAME})?\)")


class Script:
    """One script, loaded into a server when it is first found missing there."""

    def __init__(self, name: str, *more: str) -> None:
        """`more`: modules of which it alone has use."""
        self.name = name
        self._modules = (*_MODULES, *more)

    @property
    def text(self) -> str:
        """The whole text that is sent.

        Made anew each time: it is seldom sent, and all of them would stay in an idle worker, 100 KiB each.
        """
        layers = (
            _templates(),
            f"local {', '.join(self._modules)}",
            _read("_lib"),
            "local function modules_and_script()",
            *(f"{name} = seldom(function()\n{_read(f'_{name}')}\nend)" for name in self._modules),
            "local function script()",
            _read(self.name),
            "end",
            "local reply = script()",
            "flush()",  # the writes that all these put off
            "if counted[1] then history.write_history() end",
            "return reply",
            "end",
            "return modules_and_script()",
        )
        return "\n".join(layers)

    @cached_property
    def sha(self) -> str:
        """What EVALSHA calls it."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, client: redis.Redis, script_keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run it; raises what redis-py raises. After NOSCRIPT it is safe to repeat: nothing was run."""
        try:
            return client.evalsha(self.sha, len(script_keys), *script_keys, *args)
        except NoScriptError:
            client.script_load(self.text)
            return client.evalsha(self.sha, len(script_keys), *script_keys, *args)


def _read(name: str) -> str:
    text = Path(__file__).with_name(f"{name}.lua").read_text(encoding="utf-8")
    return _KEY.sub(_key_in_lua, _CONSTANT.sub(lambda found: f"'{getattr(keys, found[1])}'", text))


def _key_in_lua(call: re.Match[str]) -> str:
    """`('rq:job:' .. id)` for `key('job', id)`; between two names is a colon."""
    kind, *names = call.groups()
    before, *_, after = keys.LUA_TEMPLATES[kind].split("%s")
    parts = (f"'{before}'", " .. ':' .. ".join(filter(None, names)), f"'{after}'" if after else None)
    return f"({' .. '.join(filter(None, parts))})"


def _templates() -> str:
    """For a kind that only the script knows: what comes before the name, or names, and what after."""
    parts = {kind: template.split("%s") for kind, template in keys.LUA_TEMPLATES.items()}
    rows = (f"  {kind} = {{'{part[0]}', '{part[-1]}'}}," for kind, part in parts.items())
    return "\n".join(("local function key_templates()", "return {", *rows, "}", "end"))


ROUND = Script("round", "place")
REGISTER = Script("register")
RETIRE = Script("retire")
BEAT = Script("beat")
ELECT = Script("elect")
EXPIRED = Script("expired")
LOSE = Script("lose")
DUE = Script("due")
RING = Script("ring")
RESUME = Script("resume")
FORGET = Script("forget")
SWEEP = Script("sweep")
TIDY = Script("tidy")
PRUNE_GROUPS = Script("prune_groups")
SUBMIT = Script("submit")
SETTLE = Script("settle")
DEFERRED = Script("deferred")
OPEN_ARRAY = Script("open_array")
FOLLOW_ARRAY = Script("follow_array")
SLURM_INTEND = Script("slurm_intend")
SLURM_LEASE = Script("slurm_lease")
ADD_SET = Script("add_set")
RETIRE_SETS = Script("retire_sets")
CANCEL = Script("cancel")
CANCEL_ARRAY = Script("cancel_array")
RETRY_ARRAY = Script("retry_array")
MEND_ARRAY = Script("mend_array")
RETRY = Script("retry")
OUTPUT = Script("output")
