"""What `fleet status` costs: as many round trips for many workers as for few."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import redis

from broker import keys, status


class _Counting(redis.Connection):
    """A connection that counts how often something is sent: a pipeline goes at once."""

    sent = 0

    def send_packed_command(self, *arguments: object, **options: object) -> None:
        _Counting.sent += 1
        super().send_packed_command(*arguments, **options)


@pytest.fixture
def counted(redis_url: str) -> Iterator[redis.Redis]:
    pool = redis.ConnectionPool.from_url(redis_url, connection_class=_Counting)
    with redis.Redis(connection_pool=pool) as client:
        client.ping()
        yield client


def _add(client: redis.Redis, workers: range) -> None:
    for number in workers:
        name = f"w{number:03}"
        client.sadd(keys.FLEET_WORKERS, name)
        client.set(keys.worker_record(name), json.dumps({"name": name, "host": "h", "pid": 1}))
        client.hset(keys.worker_leases(name), f"job{number}", "1:x 1")


def _round_trips(client: redis.Redis) -> int:
    before = _Counting.sent
    status.read(client)
    return _Counting.sent - before


def test_many_workers_cost_no_more_round_trips_than_few(counted):
    client = counted
    _add(client, range(2))
    few = _round_trips(client)
    _add(client, range(2, 300))
    assert _round_trips(client) == few <= 3
    found = status.read(client).workers
    assert [worker.name for worker in found] == [f"w{number:03}" for number in range(300)]
    assert [worker.running for worker in found[:2]] == [("job0",), ("job1",)]


def test_the_queues_can_be_read_without_the_workers(counted):
    client = counted
    _add(client, range(3))
    client.sadd(keys.QUEUES, keys.queue("q"))
    client.rpush(keys.queue("q"), "a", "b")
    before = client.info("commandstats").get("cmdstat_hkeys", {}).get("calls", 0)
    (queue,) = status.read_queues(client)
    assert (queue.name, queue.queued) == ("q", 2)
    assert client.info("commandstats").get("cmdstat_hkeys", {}).get("calls", 0) == before
