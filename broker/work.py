"""What passes between a worker and Redis: a claim, the end of an attempt, a round of both.

What is made for each job is a named tuple: a frozen dataclass takes three times as long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from broker.usage import Usage

_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

#: what became of an attempt: the first three and `retry` are the job's own doing
Outcome = Literal["finished", "failed", "stopped", "retry", "handed-back", "lost"]


def fence_of(lease: str) -> int:
    """The fence of a lease as a number; 0 where somebody has damaged it."""
    digits = lease.partition(":")[0]
    return int(digits) if digits.isdecimal() else 0


class Claim(NamedTuple):
    """A job given to this worker. `lease` is FENCE:EXECUTION; `fields` the job's hash as it is now."""

    job_id: str
    queue: str
    lease: str
    fields: Mapping[bytes, bytes]

    @property
    def fence(self) -> str:
        """The fencing token: every claim of the fleet has a higher one than those before it."""
        return self.lease.partition(":")[0]

    @property
    def execution_id(self) -> str:
        """What RQ calls this attempt: 32 hexadecimal digits, never used twice."""
        return self.lease.partition(":")[2]


class Tails(NamedTuple):
    """The last bytes of a job's output, and how many bytes there were in all."""

    stdout: bytes = b""
    stderr: bytes = b""
    stdout_end: int = 0
    stderr_end: int = 0

    def stream(self, *, stderr: bool) -> tuple[bytes, int]:
        """One of both: its last bytes, and how many there were."""
        return (self.stderr, self.stderr_end) if stderr else (self.stdout, self.stdout_end)


class End(NamedTuple):
    """The end of an attempt, as its worker reports it.

    `duration_seconds` is None where it never started; `callback_seconds` passed after it, before this
    report. `return_value` and `exc_string` come as
    RQ stores them (base64 of the serialised value; base64 of the deflated text).
    `retry` is (max, intervals in seconds) of an `rq.Retry` that a function returned.
    """

    claim: Claim
    outcome: Outcome
    reason: str = ""
    duration_seconds: float | None = None
    exit_code: int | None = None
    return_value: str | None = None
    exc_string: str | None = None
    retry: tuple[int, list[int]] | None = None
    uncounted: bool = False
    tails: Tails = Tails()
    callback_seconds: float = 0.0
    usage: Usage | None = None

    def arguments(self) -> list[str | bytes | float]:
        """The arguments of round.lua for it."""
        claim, tails, duration = self.claim, self.tails, self.duration_seconds
        arguments: list[str | bytes | float] = [
            claim.job_id,
            claim.lease,
            claim.queue,
            self.outcome,
            "" if duration is None else duration,
            self.return_value or self.exc_string or "",
        ]
        more = self._more()
        # no \u escapes: half a pair, as names that are no UTF-8 give it, is an error to Redis's decoder
        arguments.append(_compact(more).encode("utf-8", "replace") if more else "")
        arguments.append(self.usage.to_json() if self.usage else "")
        if "stdout_end" in more:
            arguments += [tails.stdout, tails.stderr]
        return arguments

    def size(self) -> int:
        """Roughly how many bytes its arguments have."""
        tails = self.tails
        return len(self.return_value or self.exc_string or "") + len(tails.stdout) + len(tails.stderr) + 1000

    def _more(self) -> dict[str, Any]:
        """What a function that ends well has none of."""
        more: dict[str, Any] = {}
        if self.reason:
            more["reason"] = self.reason
        if self.callback_seconds:
            more["callback"] = self.callback_seconds
        if self.exit_code is not None:
            more["exit_code"] = self.exit_code
        if self.retry:
            more["retry_max"], more["retry_intervals"] = self.retry
        if self.uncounted:
            more["uncounted"] = True
        if self.tails.stdout_end or self.tails.stderr_end:
            more["stdout_end"], more["stderr_end"] = self.tails.stdout_end, self.tails.stderr_end
        return more


@dataclass(frozen=True)
class Places:
    """What a worker that satisfies sets of requirements says with a claim, packed for round.lua.

    `free`: what it has free, '' where it satisfies none; `popped`: lists of which it took tokens since it
    last claimed; `sets`: queue -> the sets that it satisfies.
    """

    free: str = ""
    popped: tuple[str, ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)


NO_PLACES = Places()


@dataclass(frozen=True)
class Exchange:
    """A round trip under way: the ends it reports, how many jobs it asks for, and what is sent."""

    number: int
    ends: tuple[End, ...]
    wanted: int
    ahead: int
    keys: Sequence[str]
    arguments: Sequence[Any]


@dataclass(frozen=True)
class Round:
    """What came of a round trip: which ends were accepted, and what to run next.

    `more`: other jobs may fit, now that it is known which GPUs are taken; `held`: the list for whose first
    job room is to be held, or ''.
    """

    accepted: tuple[bool, ...]
    claims: tuple[Claim, ...]
    registered: bool
    draining: bool
    suspended: bool
    more: bool = False
    held: str = ""


@dataclass(frozen=True)
class Beat:
    """What a heartbeat brought back.

    `lost`: leases that are no longer ours; `stop`: leases of jobs that an operator wants stopped;
    `foreign`: (job, lease) that an earlier life of this name left behind; `workers`: how many
    there are in the fleet; `labels`: those that operators gave it, None where Redis has no word of them;
    `sets_version`: see `broker.sets`.
    """

    state: Literal["ok", "gone", "taken"]
    lost: frozenset[str] = frozenset()
    stop: frozenset[str] = frozenset()
    foreign: tuple[tuple[str, str], ...] = ()
    draining: bool = False
    suspended: bool = False
    workers: int = 1
    labels: Mapping[str, str] | None = None
    sets_version: int = 0
