"""What verbs that reach hosts tell: events while they work, and a result for each host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from broker.errors import FleetError

Step = Literal[
    "connect", "probe", "version", "tunnel", "install", "start", "confirm", "stop", "list", "fetch", "delete"
]
State = Literal["begun", "done", "failed"]
Outcome = Literal[
    "started",
    "running",
    "planned",
    "stopped",
    "not running",
    "collected",
    "deleted",
    "failed",
    "untouched",
    "unconfirmed",
]
#: outcomes that leave a host as it was asked for
GOOD: frozenset[Outcome] = frozenset(
    {"started", "running", "planned", "stopped", "not running", "collected", "deleted"}
)


@dataclass(frozen=True)
class Event:
    """A step began or ended at a host; `seconds` is how long it took."""

    host: str
    step: Step
    state: State
    detail: str = ""
    seconds: float = 0.0


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class WorkerResult:
    """One worker.

    `state`: "started", "running", "left" (what it was started for is done), "would start",
    "would be replaced", "stopped", "killed", "not running", "remains", or "unknown": it was being
    started when that failed, or when a second interrupt waited for nothing any more.
    """

    name: str
    state: str
    pid: int | None = None
    version: str | None = None


@dataclass(frozen=True)
class HostResult:
    """What became of a host. `step` and `error` where it failed; `note` is worth telling anyway."""

    host: str
    outcome: Outcome
    workers: tuple[WorkerResult, ...] = ()
    step: Step | None = None
    error: FleetError | None = None
    note: str = ""
    seconds: float = 0.0
    #: whether the host is among those kept in Redis
    kept: bool = True

    @property
    def good(self) -> bool:
        """Whether the host is as it was asked for."""
        return self.outcome in GOOD


@dataclass(frozen=True)
class Report:
    """All hosts, in the order in which they were named."""

    hosts: tuple[HostResult, ...]
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 all good, 1 none, 3 some; 130 interrupted."""
        return 130 if self.interrupted else exit_code_of([host.good for host in self.hosts])


def exit_code_of(good: Sequence[bool]) -> int:
    """0 if all are good, 1 if none is, 3 if some are."""
    return 0 if all(good) else 3 if any(good) else 1
