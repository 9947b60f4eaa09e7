"""Records of workers that are not there, as workers write them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import redis

from broker import keys

GIB = 2**30


def add_worker(client: redis.Redis, name: str, *, alive: bool = True, running: int = 0) -> None:
    """One with 4 slots, 8 CPUs, 64 GiB and two GPUs."""
    beat = datetime.now(UTC) - timedelta(seconds=0 if alive else 3600)
    record = {
        "name": name,
        "host": name.rpartition("-")[0],
        "pid": 1,
        "queues": ["default"],
        "slots": 4,
        "cpus": 8,
        "memory_bytes": 64 * GIB,
        "gpus": [{"index": index, "name": "NVIDIA A100", "memory_bytes": 40 * GIB} for index in range(2)],
        "free": {"slots": 4 - running, "cpus": 6.5, "memory_bytes": 48 * GIB, "gpus": [1, 0.5]},
        "version": "0.1.0",
        "at": beat.isoformat(),
        "heartbeat_seconds": 3600,
    }
    with client.pipeline() as pipe:
        pipe.sadd(keys.FLEET_WORKERS, name)
        pipe.set(keys.worker_record(name), json.dumps(record))
        if alive:
            pipe.set(keys.worker_beat(name), "incarnation")
        for number in range(running):
            pipe.hset(keys.worker_leases(name), f"{number:016x}", f"{number}:x 1")
        pipe.execute()
