"""How an idle worker waits: one connection blocked in BLPOP, one subscribed to RQ's commands.

Neither is read by a thread: both give a file number for the worker's selector. Why tokens and
not the queues themselves: docs/decisions/0001-blpop.md.
"""

from __future__ import annotations

import json
from typing import Any

import redis
from redis.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from broker import clock, keys
from broker.session import Identity


class Waiter:
    """One BLPOP, outstanding at all times: over the worker's signals, and the wake lists if it wants jobs.

    A token popped while no slot is free must be passed on with `pass_on`.
    """

    def __init__(self, client: redis.Redis, identity: Identity, block_seconds: int) -> None:
        self._client = client
        self._block_seconds = block_seconds
        #: seconds after which a reply that Redis owed us will not come any more
        self._overdue_seconds = client.connection_pool.connection_kwargs["socket_timeout"]
        self._signals = keys.worker_signals(identity.name)
        self._bells = [keys.wake(queue) for queue in identity.queues]
        self._connection: Any = client.connection_pool.make_connection()
        #: whether the BLPOP under way would return a token
        self.wants_jobs = False
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

    def listen(self, *, wants_jobs: bool) -> None:
        """Send the BLPOP unless one is under way; a change of mind takes effect with the next.

        Raises redis.TimeoutError where the reply is overdue: the connection was cut unheard.
        """
        if self._outstanding:
            if clock.monotonic() - self._sent_at > self._block_seconds + self._overdue_seconds:
                raise RedisTimeoutError("no reply to BLPOP")
            return
        lists = [self._signals, *(self._bells if wants_jobs else [])]
        self._connection.send_command("BLPOP", *lists, self._block_seconds)
        self._outstanding, self._nudged, self.wants_jobs = True, False, wants_jobs
        self._sent_at = clock.monotonic()

    @property
    def is_deaf(self) -> bool:
        """Whether a BLPOP is under way that would return no token: a signal is to end it."""
        return self._outstanding and not self.wants_jobs

    def nudge(self, client: redis.Redis) -> None:
        """Make a BLPOP that would return no token return, so that the next one does."""
        if self.is_deaf and not self._nudged:
            self._nudged = True
            client.lpush(self._signals, "{}")
            client.expire(self._signals, 60)

    def receive(self) -> dict[str, Any] | bool:
        """What woke it: a message to this worker, True for a token, False for nothing at all."""
        reply = self._connection.read_response()
        self._outstanding = False
        if reply is None:
            return False
        name, value = reply
        return _document(value) if name == self._signals.encode() else True

    def pass_on(self, client: redis.Redis) -> None:
        """Ring for others: this worker took a token that it has no slot for."""
        with client.pipeline(transaction=False) as pipe:
            for bell in self._bells:
                pipe.lpush(bell, "1")
                pipe.ltrim(bell, 0, 0)
            pipe.execute()

    def close(self) -> None:
        self._connection.disconnect()


class RqCommands:
    """RQ's own channel to a worker: stop-job, kill-horse and shutdown (rq.command)."""

    def __init__(self, client: redis.Redis, identity: Identity) -> None:
        self._pubsub: Any = PubSub(client.connection_pool, ignore_subscribe_messages=True)
        self._channel = keys.pubsub(identity.name)

    def connect(self) -> None:
        """Subscribe; raises what redis-py raises."""
        self._pubsub.close()
        self._pubsub.subscribe(self._channel)

    def fileno(self) -> int:
        """For the selector; readable when `receive` may have something."""
        connection: Any = self._pubsub.connection
        if connection is None or connection._sock is None:
            raise RedisConnectionError("not connected")
        return int(connection._sock.fileno())

    def receive(self) -> list[dict[str, Any]]:
        """The commands that have arrived; what is no command is left out."""
        arrived = []
        while self._pubsub.connection is not None and self._pubsub.connection.can_read(0):
            message = self._pubsub.get_message(timeout=0)
            if message and message["type"] == "message":
                arrived.append(_document(message["data"]))
        return arrived

    def close(self) -> None:
        self._pubsub.close()


def _document(value: bytes) -> dict[str, Any]:
    """A message from outside, or {} for anything that is none."""
    try:
        document = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
