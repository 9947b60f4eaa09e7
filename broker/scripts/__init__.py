"""The Lua scripts, each a file of its own: `round.lua` is `Script("round")`.

Every script is preceded by `_lib.lua` and by the key templates of `broker.keys`, so keys are
spelled in one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from typing import Any, Protocol

from redis.exceptions import NoScriptError

from broker import keys

_CONSTANTS = ("QUEUES", "WORKERS", "SUSPENDED", "FENCE", "LEASES", "FLEET_WORKERS", "PAUSED", "COUNTERS")


class Runner(Protocol):
    """Who can run a script: a client of redis-py, or a `broker.connection.Line`."""

    def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> Any: ...

    def script_load(self, script: str) -> Any: ...


class Script:
    """One script, loaded into a server when it is first found missing there."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def text(self) -> str:
        """The whole text that is sent: keys, library, script."""
        return "\n".join((_keys_in_lua(), _read("_lib"), _read(self.name)))

    @cached_property
    def sha(self) -> str:
        """What EVALSHA calls it."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, client: Runner, script_keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run it; raises what redis-py raises. After NOSCRIPT it is safe to repeat: nothing was run."""
        try:
            return client.evalsha(self.sha, len(script_keys), *script_keys, *args)
        except NoScriptError:
            client.script_load(self.text)
            return client.evalsha(self.sha, len(script_keys), *script_keys, *args)


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")


def _keys_in_lua() -> str:
    """`local K = {...}`: the templates and constants of broker/keys.py, for Lua."""
    rows = [f'  {kind} = "{template}",' for kind, template in keys.LUA_TEMPLATES.items()]
    rows += [f'  {name} = "{getattr(keys, name)}",' for name in _CONSTANTS]
    return "\n".join(("local K = {", *rows, "}"))


ROUND = Script("round")
REGISTER = Script("register")
RETIRE = Script("retire")
BEAT = Script("beat")
EXPIRED = Script("expired")
LOSE = Script("lose")
DUE = Script("due")
RING = Script("ring")
SWEEP = Script("sweep")
SUBMIT = Script("submit")
CANCEL = Script("cancel")
OUTPUT = Script("output")
