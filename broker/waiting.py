"""How an idle worker waits: one connection blocked in BLPOP, one subscribed to channels.

Neither is read by a thread: both give a file number for the worker's selector. Why tokens and
not the queues themselves: docs/decisions/0001-blpop.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import redis
from redis.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from broker import clock, keys, sets
from broker.session import Identity
from broker.sets import News


class Waiter:
    """One BLPOP, outstanding at all times: over the worker's signals, and the tokens of lists it could serve.

    A token popped that is of no use any more must be passed on with `pass_on`.
    """

    def __init__(self, client: redis.Redis, identity: Identity, block_seconds: int) -> None:
        self._client = client
        self._block_seconds = block_seconds
        #: seconds after which a reply that Redis owed us will not come any more
        self._overdue_seconds = client.connection_pool.connection_kwargs["socket_timeout"]
        self._signals = keys.worker_signals(identity.name)
        self._connection: Any = client.connection_pool.make_connection()
        #: of which lists the BLPOP under way would return a token
        self._lists: tuple[str, ...] = ()
        self._outstanding = False
        self._nudged = False
        self._sent_at = 0.0

    def connect(self) -> None:
        """Open the connection; raises what redis-py raises."""
        self._connection.disconnect()
        self._connection.connect()
        self._outstanding = False

    def fileno(self) -> int:
        """For the selector; readable when `receive` has something."""
        sock = self._connection._sock
        if sock is None:
            raise RedisConnectionError("not connected")
        return int(sock.fileno())

    def listen(self, lists: tuple[str, ...]) -> None:
        """Send the BLPOP, for tokens of `lists`, unless one is under way; a change of mind takes effect with
        the next.

        Raises redis.TimeoutError where the reply is overdue: the connection was cut unheard.
        """
        if self._outstanding:
            if clock.monotonic() - self._sent_at > self._block_seconds + self._overdue_seconds:
                raise RedisTimeoutError("no reply to BLPOP")
            return
        self._connection.send_command("BLPOP", self._signals, *map(keys.wake, lists), self._block_seconds)
        self._outstanding, self._nudged, self._lists = True, False, lists
        self._sent_at = clock.monotonic()

    def is_deaf(self, lists: tuple[str, ...]) -> bool:
        """Whether a BLPOP is under way that would miss tokens of some of `lists`: a signal is to end it."""
        return self._outstanding and lists is not self._lists and not set(lists) <= set(self._lists)

    def nudge(self, client: redis.Redis, lists: tuple[str, ...]) -> None:
        """Make a BLPOP that would miss tokens of some of `lists` return, so that the next one does not."""
        if not self._nudged and self.is_deaf(lists):
            self._nudged = True
            client.lpush(self._signals, "{}")
            client.expire(self._signals, 60)

    def receive(self) -> dict[str, Any] | str:
        """What woke it: a message to this worker, the list of which it got a token, '' for nothing at all."""
        reply = self._connection.read_response()
        self._outstanding = False
        if reply is None:
            return ""
        name, value = reply
        return _document(value) if name == self._signals.encode() else keys.woken(name.decode())

    def pass_on(self, client: redis.Redis, lists: Iterable[str]) -> None:
        """Ring for others: this worker took tokens of these lists and has no room for their jobs."""
        with client.pipeline(transaction=False) as pipe:
            for bell in map(keys.wake, lists):
                pipe.lpush(bell, "1")
                pipe.ltrim(bell, 0, 0)
            pipe.execute()

    def close(self) -> None:
        self._connection.disconnect()


class Channels:
    """RQ's own channel to a worker (stop-job, kill-horse and shutdown: rq.command), and news of sets."""

    def __init__(self, client: redis.Redis, identity: Identity) -> None:
        self._pubsub: Any = PubSub(client.connection_pool, ignore_subscribe_messages=True)
        self._channel = keys.pubsub(identity.name)

    def connect(self) -> None:
        """Subscribe; raises what redis-py raises."""
        self._pubsub.close()
        self._pubsub.subscribe(self._channel, keys.NEWS)

    def fileno(self) -> int:
        """For the selector; readable when `receive` may have something."""
        connection: Any = self._pubsub.connection
        if connection is None or connection._sock is None:
            raise RedisConnectionError("not connected")
        return int(connection._sock.fileno())

    def receive(self) -> Iterator[dict[str, Any] | News]:
        """What has arrived: commands, and news; {} for anything else."""
        while self._pubsub.connection is not None and self._pubsub.connection.can_read(0):
            message = self._pubsub.get_message(timeout=0)
            if message and message["type"] == "message":
                document = _document(message["data"])
                is_news = message["channel"] == keys.NEWS.encode()
                yield (sets.news(document) or {}) if is_news else document

    def close(self) -> None:
        self._pubsub.close()


def _document(value: bytes) -> dict[str, Any]:
    """A message from outside, or {} for anything that is none."""
    try:
        document = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
