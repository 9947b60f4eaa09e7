"""redis-py without what a worker never asks of it: its asyncio half, and the means to look up its version.

Both come with `import redis` and are a tenth of an idle worker's memory. Here they are modules that load
themselves when somebody asks for what is in them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any


class Late(ModuleType):
    """A module that is not loaded yet; what lies below it, if it is a package, can be."""

    def __init__(self, name: str, path: Iterable[str] | None = None) -> None:
        super().__init__(name)
        if path is not None:
            self.__path__ = list(path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the interpreter asks of any module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def import_redis() -> None:
    """To be called before anything else imports redis-py."""
    found = PathFinder.find_spec("redis")
    folders = (found and found.submodule_search_locations) or ()
    sys.modules.setdefault("importlib.metadata", Late("importlib.metadata"))
    sys.modules.setdefault(
        "redis.asyncio", Late("redis.asyncio", (f"{folder}/asyncio" for folder in folders))
    )
    try:
        import redis  # noqa: F401
    except ImportError:  # a version that needs it after all
        for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
            del sys.modules[name]
