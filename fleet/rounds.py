"""The worker's round trips: ends out, claims in; sent and not waited for, one at a time.

While one is under way jobs go on ending, and are reported together by the next. Where more work is
at hand, ends wait a moment for company: a round costs Redis and the worker more than a job in it.
"""

from __future__ import annotations

import logging

import redis

from broker import clock, failures
from broker.connection import is_refusal
from broker.line import Line
from broker.session import Session
from broker.work import NO_PLACES, End, Exchange, Places, Round
from fleet.logs import about
from fleet.slots import Slots

log = logging.getLogger("fleet.worker")

#: a connection that dies so often under the same large end, of so many bytes, has been closed because of it
_CUTS = 5
_LARGE_BYTES = 1 << 20
#: how many ends are enough company, and jobs enough to claim ahead at once, lest one round be long; and how
#: many seconds the first end waits for company
_COMPANY = 64
_GATHER_SECONDS = 0.01


class Rounds:
    """At most one round trip under way. Raises what redis-py raises."""

    def __init__(self, session: Session, line: Line, slots: Slots) -> None:
        self._session = session
        self._line = line
        self._slots = slots
        self._under_way: Exchange | None = None
        #: how many ends are to be sent one by one, to find which of them Redis refuses
        self._alone = 0
        #: lease of the large end that was sent alone when the connection died, and how often it did
        self._cut = ("", 0)

    @property
    def under_way(self) -> bool:
        """Whether an answer is awaited."""
        return self._under_way is not None

    def is_due(self, *, wants_jobs: bool) -> bool:
        """Whether the next should be sent now."""
        if self.under_way:
            return False
        if self._slots.is_stocked():
            return self._slots.unreported >= _COMPANY or clock.monotonic() >= self._gathered_at()
        return wants_jobs or self._slots.unreported > 0

    def next_time(self) -> float:
        """When one falls due without anything else happening; monotonic seconds."""
        return float("inf") if self.under_way else self._gathered_at()

    def _gathered_at(self) -> float:
        return self._slots.oldest_end + _GATHER_SECONDS

    def send(self, wanted: int, ahead: int, *, is_deaf: bool, places: Places = NO_PLACES) -> None:
        """Report what ended and claim up to `wanted` jobs, and `ahead` more."""
        ends = sorted(self._slots.ends, key=_newest_first)[:_COMPANY]
        ahead = min(ahead, _COMPANY)
        if self._alone and ends:
            ends, wanted, ahead = ends[:1], 0, 0
        self._under_way = self._session.begin(ends, wanted, ahead, is_deaf=is_deaf, places=places)
        self._session.send(self._line, self._under_way)

    def receive(self) -> tuple[Exchange, Round] | None:
        """What was sent, and what came of it, to be settled with the session; None if it was refused."""
        exchange = self._under_way
        try:
            reply = self._line.receive()
        except redis.ResponseError as exc:
            if exchange is None or not exchange.ends or not is_refusal(exc):
                raise
            self._refused(exchange, str(exc))
            return None
        if exchange is None:
            raise RuntimeError("an answer to no round")
        self._under_way = None
        self._alone = max(0, self._alone - len(exchange.ends))
        return exchange, self._session.complete(exchange, reply)

    def abandon(self, exc: Exception) -> None:
        """The connection is gone, and with it the answer: a beat may give back what was claimed."""
        exchange, self._under_way = self._under_way, None
        if exchange:
            self._session.settle(exchange)
            if type(exc) is redis.ConnectionError:
                self._suspect(exchange.ends)

    def _suspect(self, ends: tuple[End, ...]) -> None:
        """Redis hangs up on who sends what is too large for it, and says nothing."""
        large = [end for end in ends if end.size() > _LARGE_BYTES]
        if not large:
            return
        self._alone = max(self._alone, len(ends))
        if len(ends) > 1:
            return
        lease, cuts = large[0].claim.lease, self._cut[1] + 1
        self._cut = (lease, cuts if lease == self._cut[0] else 1)
        if self._cut[1] >= _CUTS:
            self._replace(large[0], f"it closed the connection {_CUTS} times")

    def _refused(self, exchange: Exchange, why: str) -> None:
        """Find which of the ends it was; the one it was fails its job, and not all others for ever."""
        count = len(exchange.ends)
        log.warning("Redis refused a report of %d ends: %s", count, why, extra=about("report_refused"))
        self._under_way = None
        self._session.settle(exchange)
        if len(exchange.ends) > 1:
            self._alone = len(exchange.ends)
        else:
            self._replace(exchange.ends[0], why)

    def _replace(self, end: End, why: str) -> None:
        reason = f"ResultRefused: Redis did not take the end of this job: {why[:500]}"
        if end.reason.startswith("ResultRefused: "):  # not even that: its lease will run out
            log.error("job %s: %s", end.claim.job_id, reason, extra=about("report_refused", end.claim))
            self._slots.settled(end)
        else:
            text = failures.encoded(reason)
            self._slots.replace(End(end.claim, "failed", reason, end.duration_seconds, exc_string=text))


def _newest_first(end: End) -> int:
    """What is handed back goes to the front of its queue, so the newest claim goes first."""
    return -int(end.claim.fence) if end.outcome == "handed-back" else 0
