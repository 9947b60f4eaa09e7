"""The Lua scripts, each a file of its own: `round.lua` is `Script("round")`.

Every script is preceded by `_lib.lua`, `_array.lua`, by what else it names, and by the key templates of
`broker.keys`, so keys are spelled in one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from typing import Any

import redis
from redis.exceptions import NoScriptError

from broker import keys

_CONSTANTS = (
    *("QUEUES", "WORKERS", "SUSPENDED", "FENCE", "LEASES", "FLEET_WORKERS", "PAUSED", "COUNTERS"),
    *("SETTLING", "ARRAYS", "LAST", "SETS_VERSION", "SETS_IDLE", "NEWS"),
)


class Script:
    """One script, loaded into a server when it is first found missing there."""

    def __init__(self, name: str, *parts: str) -> None:
        self.name = name
        self._parts = ("_lib", "_array", *parts)

    @cached_property
    def text(self) -> str:
        """The whole text that is sent: keys, library, script, and the writes that these put off."""
        body = ("local function script()", _read(self.name), "end")
        end = ("local reply = script()", "flush()", "return reply")
        return "\n".join((_keys_in_lua(), *map(_read, self._parts), *body, *end))

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
    return resources.files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")


def _keys_in_lua() -> str:
    """`local K = {...}`: of broker/keys.py, the templates as functions and the constants, for Lua."""
    rows = [f"  {kind} = {_function(template)}," for kind, template in keys.LUA_TEMPLATES.items()]
    rows += [f'  {name} = "{getattr(keys, name)}",' for name in _CONSTANTS]
    return "\n".join(("local K = {", *rows, "}"))


def _function(template: str) -> str:
    """`rq:job:%s:x` as a function that joins the parts: a third of what string.format costs."""
    parts = [f'"{part}"' for part in template.split("%s")]
    joined = " .. ".join(f"{part} .. {name}" for part, name in zip(parts[:-1], "ab", strict=False))
    return f"function(a, b) return {joined} .. {parts[-1]} end"


ROUND = Script("round", "_place")
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
ADD_SET = Script("add_set")
RETIRE_SETS = Script("retire_sets")
CANCEL = Script("cancel")
CANCEL_ARRAY = Script("cancel_array")
RETRY_ARRAY = Script("retry_array")
MEND_ARRAY = Script("mend_array")
RETRY = Script("retry")
OUTPUT = Script("output")
