"""What every worker of the fleet agrees on.

A plain dataclass, so that a worker, which should be small and quick to start, reads its settings
without pydantic; `broker.settings` fills the same class from flags, environment and files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_type_hints

from broker.errors import ConfigError


class _Bound(NamedTuple):
    """What a number must be at least ("ge"), or above ("gt").

    pydantic reads it as it reads those of annotated_types, which would stay in an idle worker.
    """

    kind: Literal["ge", "gt"]
    limit: int

    def __get_pydantic_core_schema__(
        self, source: Any, handler: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        return handler(source) | {self.kind: self.limit}

    def fault(self, value: float) -> str:
        """What is wrong with `value`, or ''."""
        if value > self.limit or (value == self.limit and self.kind == "ge"):
            return ""
        return f"must be {'above' if self.kind == 'gt' else 'at least'} {self.limit}"


Seconds = Annotated[float, _Bound("gt", 0)]
Count = Annotated[int, _Bound("ge", 1)]


@dataclass(frozen=True)
class WorkerSettings:
    """See the field comments for units. Raises ValueError where two of them do not fit."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    #: seconds between two heartbeats
    heartbeat_seconds: Seconds = 10.0
    #: seconds after the last heartbeat when a worker is lost; also the length of a lease
    lease_seconds: Seconds = 30.0
    #: workers that may register, or come back after an outage, in one second
    registrations_per_second: Annotated[float, _Bound("gt", 0)] = 50.0
    #: times a job may be lost with its worker before it fails as WorkerLost
    losses_limit: Annotated[int, _Bound("ge", 0)] = 3
    #: seconds running jobs get to end when a worker stops, then they are handed back
    stop_grace_seconds: Annotated[float, _Bound("ge", 0)] = 30.0
    #: seconds between SIGTERM and SIGKILL for a job that ran out of time or was stopped
    kill_grace_seconds: Annotated[float, _Bound("ge", 0)] = 10.0
    #: bytes of output of a job kept in Redis, for each of stdout and stderr
    output_tail_bytes: Annotated[int, _Bound("ge", 0)] = 65536
    #: bytes of a function's return value, or of its traceback, that Redis is given
    max_result_bytes: Count = 64 * 1024 * 1024
    #: seconds the result of a job is kept, unless its producer said otherwise
    result_ttl_seconds: Count = 7 * 86400
    #: bytes that must be free where output is written, or the worker takes no jobs
    min_free_disk_bytes: Annotated[int, _Bound("ge", 0)] = 64 * 1024 * 1024
    #: seconds between two samples of what the host and its jobs use; 0: none are taken
    sample_seconds: Annotated[float, _Bound("ge", 0)] = 5.0
    #: bytes of samples that the workers of one name keep at their host
    series_max_bytes: Count = 64 * 1024 * 1024
    #: jobs an executor runs before it is replaced by a fresh one
    executor_max_jobs: Count = 100_000
    #: resident bytes of an executor above which it is replaced after its job
    executor_max_rss_bytes: Count = 2 * 1024**3
    #: seconds without a function after which an executor ends: the next one waits until another has started
    executor_idle_seconds: Annotated[float, _Bound("ge", 0)] = 300.0

    #: seconds for which a level of priority is passed over that lift it by 1
    priority_ageing_seconds: Seconds = 60.0
    #: seconds that a job waits which smaller ones pass by, until a worker holds room for it
    reserve_after_seconds: Annotated[float, _Bound("ge", 0)] = 600.0

    def __post_init__(self) -> None:
        if self.lease_seconds < 2 * self.heartbeat_seconds:
            raise ValueError("lease_seconds must be at least twice heartbeat_seconds")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WorkerSettings:
        """What a worker was started with: JSON values that `broker.settings` wrote. Raises ConfigError."""
        hints = get_type_hints(cls, include_extras=True)
        for name, value in values.items():
            if name not in cls.__dataclass_fields__:
                raise ConfigError(f"setting worker.{name}: there is no such setting, got {value!r}")
            fault = _fault(value, *hints[name].__metadata__, whole=hints[name].__origin__ is int)
            if fault:
                raise ConfigError(f"setting worker.{name}: {fault}, got {value!r}")
        try:
            return cls(**values)
        except ValueError as exc:
            raise ConfigError(f"setting worker: {exc}") from exc


def _fault(value: object, bound: _Bound, *, whole: bool) -> str:
    """What is wrong with a value, or ''."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return "must be a whole number" if whole else "must be a number"
    return bound.fault(value)
