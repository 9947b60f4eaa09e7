"""What passes between a worker and Redis: a claim, the end of an attempt, a round of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: what became of an attempt: the first three and `retry` are the job's own doing
Outcome = Literal["finished", "failed", "stopped", "retry", "handed-back", "lost"]


@dataclass(frozen=True)
class Claim:
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


@dataclass(frozen=True)
class Tails:
    """The last bytes of a job's output, and how many bytes there were in all."""

    stdout: bytes = b""
    stderr: bytes = b""
    stdout_end: int = 0
    stderr_end: int = 0


@dataclass(frozen=True)
class End:
    """The end of an attempt, as its worker reports it.

    `duration_seconds` is None where it never started. `return_value` and `exc_string` come as
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

    def arguments(self) -> list[str | bytes]:
        """The three arguments of round.lua for it."""
        # no \u escapes: half a pair, as names that are no UTF-8 give it, is an error to Redis's decoder
        document = json.dumps(self._document(), ensure_ascii=False).encode("utf-8", "replace")
        return [document, self.tails.stdout, self.tails.stderr]

    def _document(self) -> dict[str, Any]:
        retry_max, intervals = self.retry or (None, None)
        document = {
            "job": self.claim.job_id,
            "queue": self.claim.queue,
            "lease": self.claim.lease,
            "outcome": self.outcome,
            "reason": self.reason or None,
            "duration": self.duration_seconds,
            "exit_code": self.exit_code,
            "return_value": self.return_value,
            "exc_string": self.exc_string,
            "retry_max": retry_max,
            "retry_intervals": intervals,
            "uncounted": self.uncounted or None,
            "stdout_end": self.tails.stdout_end or None,
            "stderr_end": self.tails.stderr_end or None,
        }
        return {name: value for name, value in document.items() if value is not None}


@dataclass(frozen=True)
class Round:
    """What came of round trip `number`: which ends were accepted, and what to run next."""

    number: int
    accepted: tuple[bool, ...]
    claims: tuple[Claim, ...]
    registered: bool
    draining: bool
    suspended: bool


@dataclass(frozen=True)
class Beat:
    """What a heartbeat brought back.

    `lost`: leases that are no longer ours; `stop`: leases of jobs that an operator wants stopped;
    `foreign`: (job, lease) that an earlier life of this name left behind; `workers`: how many
    there are in the fleet.
    """

    state: Literal["ok", "gone", "taken"]
    lost: frozenset[str] = frozenset()
    stop: frozenset[str] = frozenset()
    foreign: tuple[tuple[str, str], ...] = ()
    draining: bool = False
    suspended: bool = False
    workers: int = 1
