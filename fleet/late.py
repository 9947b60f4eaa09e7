"""redis-py without what a worker never asks of it: its asyncio half, asyncio, what looks up its version.

All come with `import redis` and are a seventh of an idle worker's memory. Here they are modules that load
themselves when somebody asks for what is in them. TLS is left out where Redis is not spoken to by it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, cast


class Late(ModuleType):
    """A module that is not loaded yet; what lies below it, if it is a package, can be.

    `homes`: names of it that are had from the module below in which they are, the rest not loaded.
    """

    def __init__(
        self, name: str, path: Iterable[str] | None = None, homes: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(name)
        self._homes = homes or {}
        if path is not None:
            self.__path__ = list(path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the interpreter asks of any module
            raise AttributeError(name)
        if name in self._homes:
            return getattr(import_module(f"{self.__name__}.{self._homes[name]}"), name)
        if sys.modules.get(self.__name__) is self:
            if self._has_below(name):
                return import_module(f"{self.__name__}.{name}")
            self._load()
        return getattr(import_module(self.__name__), name)

    def _has_below(self, name: str) -> bool:
        path = self.__dict__.get("__path__")
        return path is not None and PathFinder.find_spec(f"{self.__name__}.{name}", path) is not None

    def _load(self) -> None:
        """Put the real one in its place, which knows what lies below it and is there already."""
        del sys.modules[self.__name__]
        spec = find_spec(self.__name__)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(self.__name__, name=self.__name__)
        module = module_from_spec(spec)
        below = f"{self.__name__}."
        vars(module).update(
            {name: each for name, each in vars(self).items() if sys.modules.get(below + name) is each}
        )
        sys.modules[self.__name__] = module
        spec.loader.exec_module(module)
        parent, _, last = self.__name__.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, module)


#: what redis-py names of asyncio when it is imported
_HOMES = {"IncompleteReadError": "exceptions", "StreamReader": "streams", "Lock": "locks"}


def import_redis_of_worker(*, tls: bool) -> None:
    """The same with nothing of asyncio but what redis-py names; without `tls` it speaks no rediss://."""
    sys.modules.setdefault("asyncio", Late("asyncio", _folders("asyncio"), _HOMES))
    _import_hashes()
    with nullcontext() if tls else _none_of("ssl"):
        import_redis()


def _import_hashes() -> None:
    """hashlib and hmac with the interpreter's own hashes, where it has all of them, and not OpenSSL."""
    if any(map(_is_missing, ("_md5", "_sha1", "_sha3"))) or all(map(_is_missing, ("_sha2", "_sha256"))):
        return
    with _none_of("_hashlib"):
        import hashlib  # noqa: F401
        import hmac  # noqa: F401


def _is_missing(name: str) -> bool:
    return find_spec(name) is None


def import_redis() -> None:
    """To be called before anything else imports redis-py."""
    below = [f"{folder}/asyncio" for folder in _folders("redis")]
    sys.modules.setdefault("importlib.metadata", Late("importlib.metadata"))
    sys.modules.setdefault("redis.asyncio", Late("redis.asyncio", below))
    try:
        import redis  # noqa: F401
    except ImportError:  # a version that needs it after all
        for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
            del sys.modules[name]


@contextmanager
def _none_of(name: str) -> Iterator[None]:
    """As on a system that has no such module, unless it is loaded already."""
    is_ours = sys.modules.setdefault(name, cast(ModuleType, None)) is None
    try:
        yield
    finally:
        if is_ours:
            del sys.modules[name]


def _folders(package: str) -> list[str]:
    found = PathFinder.find_spec(package)
    return list((found and found.submodule_search_locations) or ())
