"""A deep queue, quickly: copies of a job that the real submission made, written inside Redis."""

from __future__ import annotations

from typing import cast

from benchmarks import harness
from benchmarks.harness import Site
from broker import keys

_AT_ONCE = 10_000
_MODEL, _COPIES = "bench:model", "bench:copies"
#: KEYS 1 the job copied  2 the queue   ARGV 1 first number  2 last number, of the ids
_COPY = """
local fields = redis.call('HGETALL', KEYS[1])
for number = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local id = 'copy-' .. number
  redis.call('HSET', 'rq:job:' .. id, unpack(fields))
  redis.call('RPUSH', KEYS[2], id)
end
"""


def take_model(site: Site, queue: str = "default") -> None:
    """Keep a copy of the queue's last job, for `deepen`."""
    last = cast(bytes, site.client.lindex(keys.queue(queue), -1)).decode()
    site.client.copy(keys.job(last), _MODEL, replace=True)


def deepen(site: Site, depth: int, queue: str = "default") -> None:
    """Copy the model until `depth` jobs wait; returns when the append-only file rests."""
    client, key = site.client, keys.queue(queue)
    while (wanted := min(_AT_ONCE, depth - int(client.llen(key)))) > 0:
        last = int(client.incrby(_COPIES, wanted))
        client.eval(_COPY, 2, _MODEL, key, last - wanted + 1, last)
    harness.until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], 300)
