"""The Lua scripts, each a file of its own: `round.lua` is `Script("round")`.

Every script is preceded by `_lib.lua`, `_array.lua`, and the key templates of `broker.keys`, so keys are
spelled in one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from typing import Any

import redis
from redis.exceptions import NoScriptError

from broker import keys

_CONSTANTS = (
    *("QUEUES", "WORKERS", "SUSPENDED", "FENCE", "LEASES", "FLEET_WORKERS", "PAUSED", "COUNTERS"),
    *("SETTLING", "ARRAYS", "LAST", "SETS_VERSION", "SETS_IDLE", "NEWS", "HISTORIES"),
)


class Script:
    """One script, loaded into a server when it is first found missing there.

    Redis runs the whole text at each call, and to define a function takes it as long as to call a small one.
    So what a busy script seldom needs is only run when it first asks for it: `seldom` names parts, each with
    what it is called and the Lua expression that it then is.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[str] = ("_lib", "_array"),
        seldom: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.name = name
        self._parts = parts
        self._seldom = seldom or {}

    @property
    def text(self) -> str:
        """The whole text that is sent: keys, library, script, and the writes that these put off.

        Made anew each time: it is seldom sent, and all of them would stay in an idle worker, 100 KiB each.
        """
        seldom = (_when_asked_for(name, *part) for name, part in self._seldom.items())
        body = ("local function script()", _read(self.name), "end")
        end = ("local reply = script()", "flush()", "write_history()", "return reply")
        parts = map(_read, self._parts)
        return "\n".join((_keys_in_lua(), *parts, *seldom, *body, *end))

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


def _when_asked_for(name: str, part: str, expression: str) -> str:
    body = (f"local {name} = seldom(function()", _read(part), f"return {expression}", "end)")
    return "\n".join(body)


def _keys_in_lua() -> str:
    """`local K, AFTER`: of broker/keys.py the constants and, of each template, what comes before and after
    the name; between two names is a colon."""
    parts = {kind: template.split("%s") for kind, template in keys.LUA_TEMPLATES.items()}
    before = [f'  {kind} = "{part[0]}",' for kind, part in parts.items()]
    before += [f'  {name} = "{getattr(keys, name)}",' for name in _CONSTANTS]
    after = [f'  {kind} = "{part[-1]}",' for kind, part in parts.items() if part[-1]]
    return "\n".join(("local K = {", *before, "}", "local AFTER = {", *after, "}"))


ROUND = Script(
    "round",
    ["_lib"],
    seldom={
        "place": ("_place", "place"),
        "arrays": (
            "_array",
            "{claim_tasks = claim_tasks, may_run_again = may_run_again, settle_arrays = settle_arrays}",
        ),
    },
)
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
