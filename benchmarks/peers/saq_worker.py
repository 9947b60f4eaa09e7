"""saq: two worker processes, Redis lists, results in the job's own key.

Promised: a job is moved, not popped, so it stays known while it runs, and a sweep finds what is
stuck: it is aborted then, and run again where retries were asked for. Results are stored. Not
promised: one accepted result. Each process runs ten jobs at once, the default; functions are
coroutines, its fastest form, on uvloop; commands run in as many threads as there are slots.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import uvloop
from saq import Queue
from saq.types import SettingsDict

from benchmarks import harness, work
from benchmarks.harness import URL_VARIABLE, Site
from benchmarks.peers.base import COMMAND, NOOP, PROBE, Peer

_URL = os.environ.get(URL_VARIABLE, "redis://")
_runner = asyncio.Runner()
_queues: list[Queue] = []


async def _noop(_: Any) -> int:
    return work.noop()


async def _probe(_: Any, *, address: str) -> int:
    return work.probe(address)


def _command(_: Any) -> int:
    return work.command()


def settings() -> SettingsDict[Any]:
    """What the worker runs with; it is made in the worker's own process."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    functions = [(COMMAND, _command), (NOOP, _noop), (PROBE, _probe)]
    one_at_a_time = {"concurrency": 1} if os.environ.get("FLEET_BENCH_WORK") == COMMAND else {}
    return {"queue": Queue.from_url(_URL), "functions": functions, **one_at_a_time}


class Saq(Peer):
    name = "saq"
    packages = ("saq", "uvloop")
    paces = {COMMAND: 600, NOOP: 2000, PROBE: 50}
    _submitted = 0

    def fill(self, site: Site, work: str, jobs: int) -> None:
        self._submitted = jobs
        _runner.run(_enqueue(work, jobs))

    def submit(self, site: Site, work: str, *arguments: str) -> None:
        _runner.run(_one(work, arguments))

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        command = harness.python("-m", "saq", f"{__name__}.settings")
        return [["env", f"FLEET_BENCH_WORK={work}", *command]] * slots

    def done(self, site: Site) -> int:
        left = int(site.client.zcard("saq:default:incomplete"))
        return self._submitted - left


def _queue() -> Queue:
    if not _queues:
        _queues.append(Queue.from_url(_URL))
    return _queues[0]


async def _one(kind: str, arguments: tuple[str, ...]) -> None:
    fields = {"address": arguments[0]} if arguments else {}
    await _queue().enqueue(kind, ttl=3600, **fields)


async def _enqueue(kind: str, jobs: int) -> None:
    for start in range(0, jobs, 50):
        await asyncio.gather(*(_one(kind, ()) for _ in range(min(50, jobs - start))))


PEERS = {"saq": Saq()}
