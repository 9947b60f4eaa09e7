"""Many workers that are records and beats alone: what Redis has of them is all real.

    python -m benchmarks.crowd COUNT [--jobs N] [--beat-seconds S]

Registers COUNT workers, lets each claim a job while there are some (`--jobs`), prints `ready`, and
beats for all of them, spread evenly, until it is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

import redis

from benchmarks.harness import URL_VARIABLE
from broker import __version__, clock
from broker.connection import connect
from broker.line import Line
from broker.session import Identity, Session
from broker.worker_settings import WorkerSettings

_GIB = 1024**3


def main() -> None:
    """Register, say so, beat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--beat-seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    client = connect(os.environ[URL_VARIABLE], timeout_seconds=120)
    settings = WorkerSettings(
        heartbeat_seconds=arguments.beat_seconds, lease_seconds=3 * arguments.beat_seconds
    )
    sessions = [_registered(client, number, settings) for number in range(arguments.count)]
    line = Line(client)
    leases: list[dict[str, str]] = [{} for _ in sessions]
    for session, held in zip(sessions[: arguments.jobs], leases, strict=False):
        held.update(_claimed(line, session))
    print("ready", flush=True)
    _beat(client, sessions, leases, arguments.beat_seconds)


def _registered(client: redis.Redis, number: int, settings: WorkerSettings) -> Session:
    host = f"host{number // 8:04}"
    session = Session(Identity(f"{host}-{number % 8}", host, ("default",), 1000 + number, "3.11.7"), settings)
    taken = session.register(client, _record(session))
    if taken:
        sys.exit(f"{session.identity.name} is taken: {taken}")
    return session


def _record(session: Session) -> str:
    """As fleet/worker.py writes it."""
    who, now = session.identity, clock.wall().isoformat()
    return json.dumps(
        {
            "name": who.name, "host": who.host, "pid": who.pid, "incarnation": who.incarnation,
            "lock": f"{who.host}:1:{who.pid}", "queues": list(who.queues), "slots": 4,
            "labels": {"zone": "a", "disk": "ssd"}, "version": __version__, "cpus": 32,
            "memory_bytes": 128 * _GIB, "gpus": [], "ephemeral": False,
            "heartbeat_seconds": session.settings.heartbeat_seconds, "started_at": now,
            "at": now, "finished": 0, "failed": 0, "notice": "",
        }
    )  # fmt: skip


def _claimed(line: Line, session: Session) -> dict[str, str]:
    """lease -> job of one claim."""
    exchange = session.begin([], 1)
    session.send(line, exchange)
    claims = session.complete(exchange, line.receive()).claims
    session.settle(exchange)
    return {claim.lease: claim.job_id for claim in claims}


def _beat(
    client: redis.Redis, sessions: Sequence[Session], leases: Sequence[dict[str, str]], seconds: float
) -> None:
    """Beat for all, each once in `seconds`, for ever."""
    while True:
        for session, held in zip(sessions, leases, strict=True):
            session.beat(client, _record(session), held, session.claims_settled)
            time.sleep(seconds / len(sessions))


if __name__ == "__main__":
    main()
