"""What the checks of `broker.doctor` share: what they look at, and what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import redis
from redis import exceptions

from broker import status

Level = Literal["ok", "warning", "error", "unknown"]

#: names shown in one finding
_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it where it is not ok."""

    name: str
    level: Level
    found: str
    mend: str = ""


class Patient:
    """What several checks look at, asked once, when first needed."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client

    @cached_property
    def info(self) -> Mapping[str, Any]:
        """What Redis says of itself; nothing where it does not tell."""
        return ask(self.client.info) or {}

    @cached_property
    def fleet(self) -> status.FleetStatus:
        """Workers and queues."""
        return status.read(self.client)


def ask(ask: Callable[[], Any]) -> Any:
    """The answer, or None where Redis does not know the command or does not let us."""
    try:
        return ask()
    except exceptions.ResponseError:
        return None


def setting(client: redis.Redis, name: str) -> str | None:
    found = ask(lambda: client.config_get(name))
    return found.get(name) if found else None


def some(names: Iterable[str]) -> str:
    ordered = list(names)
    more = len(ordered) - _NAMED
    return ", ".join(ordered[:_NAMED]) + (f" and {more} more" if more > 0 else "")
