"""taskiq: two worker processes on a Redis stream with a consumer group, results in Redis.

Promised: a message is acknowledged when its result is saved (the default); those of a dead worker
are claimed by others after ten minutes of idleness. Results are stored. Not promised: one accepted
result. Its worker takes 100 messages at a time and runs 100 coroutines at once, both defaults;
uvloop and orjson are installed, as its documentation recommends for speed. Functions are
coroutines, its fastest form; commands are run from them in as many threads as there are slots.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from taskiq.serializers import ORJSONSerializer
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from benchmarks import harness, work
from benchmarks.harness import URL_VARIABLE, Site
from benchmarks.peers.base import COMMAND, NOOP, PROBE, Peer

_URL = os.environ.get(URL_VARIABLE, "redis://")
broker = (
    RedisStreamBroker(_URL, consumer_id="0")
    .with_result_backend(RedisAsyncResultBackend(_URL, result_ex_time=3600))
    .with_serializer(ORJSONSerializer())
)
_runner = asyncio.Runner()


async def _noop() -> int:
    return work.noop()


async def _probe(address: str) -> int:
    return work.probe(address)


_TASKS: dict[str, Any] = {
    kind: broker.task(task_name=kind)(function)
    for kind, function in ((COMMAND, work.command), (NOOP, _noop), (PROBE, _probe))
}


class Taskiq(Peer):
    name = "taskiq"
    packages = ("taskiq", "taskiq-redis", "uvloop")
    paces = {COMMAND: 800, NOOP: 3500, PROBE: 50}

    def fill(self, site: Site, work: str, jobs: int) -> None:
        _runner.run(_kick(work, jobs))

    def submit(self, site: Site, work: str, *arguments: str) -> None:
        _runner.run(_TASKS[work].kiq(*arguments))

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        options = ["--workers", str(slots), "--max-threadpool-threads", "1", "--log-level", "WARNING"]
        return [harness.python("-m", "taskiq", "worker", *options, f"{__name__}:broker")]

    def done(self, site: Site) -> int:
        others = site.client.exists("taskiq", "autoclaim:taskiq:taskiq")
        return max(0, int(site.client.dbsize()) - int(others))


async def _kick(kind: str, jobs: int) -> None:
    for start in range(0, jobs, 50):
        await asyncio.gather(*(_TASKS[kind].kiq() for _ in range(min(50, jobs - start))))


PEERS = {"taskiq": Taskiq()}
