"""What a worker sees of its own work goes into the history: hooks into the one class that speaks to Redis.

Installed by the harness's own entry, so production code has none. A name that is gone fails loudly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from broker.session import Session
from broker.work import End, Round
from tests.chaos.history import History


def install(history: History) -> None:
    """Write down registrations, claims, and the answers to ends."""
    _around("register", lambda *call: _registered(history, *call))
    _around("begin", lambda _, exchange, __: _begun(history, exchange.ends))
    _around("complete", lambda _, done, args: _settled(history, args[0].ends, done))


def _around(name: str, note: Callable[..., None]) -> None:
    """Call `note(session, result, arguments)` after each call of that method."""
    method = getattr(Session, name)

    def wrapped(session: Session, *args: Any, **kwargs: Any) -> Any:
        result = method(session, *args, **kwargs)
        note(session, result, args)
        return result

    setattr(Session, name, wrapped)


def _registered(history: History, session: Session, taken: str, args: Sequence[Any]) -> None:
    who, record = session.identity, json.loads(args[1])
    if not taken:
        has = {name: record[name] for name in ("labels", "cpus", "memory_bytes")} | {
            "gpus": len(record["gpus"])
        }
        history.note("registered", incarnation=who.incarnation, queues=who.queues, **has)


def _begun(history: History, ends: Sequence[End]) -> None:
    for end in ends:
        if end.outcome == "lost":
            history.note("giving-up", job=end.claim.job_id, lease=end.claim.lease)


def _settled(history: History, ends: Sequence[End], done: Round) -> None:
    for end, accepted in zip(ends, done.accepted, strict=True):
        claim = end.claim
        history.note("reported", job=claim.job_id, lease=claim.lease, outcome=end.outcome, accepted=accepted)
    for claim in done.claims:
        history.note("claimed", job=claim.job_id, lease=claim.lease, queue=claim.queue)
