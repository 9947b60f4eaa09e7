"""A connection for the hot path: a script is asked, and its answer taken in when it has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis
from hiredis import pack_command
from redis import exceptions

from broker import clock
from broker.connection import REPLY_SECONDS
from broker.scripts import Script

_Question = tuple[Script, Sequence[str], Sequence[Any]]


class Line:
    """One connection, one question at a time. Raises what redis-py raises. For one thread."""

    def __init__(self, client: redis.Redis) -> None:
        self._connection: Any = client.connection_pool.make_connection()
        self._asked: _Question | None = None
        self._asked_at = 0.0

    def connect(self) -> None:
        """Open the connection anew; what was asked on the old one will not be answered."""
        self.close()
        self._connection.connect()

    def fileno(self) -> int:
        """For the selector; readable when `receive` has something."""
        sock = self._connection._sock
        if sock is None:
            raise exceptions.ConnectionError("not connected")
        return int(sock.fileno())

    def check(self) -> None:
        """Raise redis.TimeoutError where an answer is overdue: the connection was cut unheard."""
        patience = self._connection.socket_timeout or REPLY_SECONDS
        if self._asked and clock.monotonic() - self._asked_at > patience:
            raise exceptions.TimeoutError("no reply to a script")

    def send(self, script: Script, script_keys: Sequence[str], args: Sequence[Any]) -> None:
        """Ask; `receive` brings the answer."""
        self._asked, self._asked_at = (script, script_keys, args), clock.monotonic()
        # as redis-py does it, which looks at each word beforehand
        packed = pack_command(("EVALSHA", script.sha, len(script_keys), *script_keys, *args))
        self._connection.send_packed_command([packed])

    def receive(self) -> Any:
        """The answer to what was asked; waits for it."""
        if self._asked is None:
            raise exceptions.ConnectionError("the connection was closed, or said something unasked")
        try:
            reply = self._connection.read_response()
        except exceptions.NoScriptError:
            reply = self._ask_again(self._asked)
        finally:
            self._asked = None
        return reply

    def _ask_again(self, question: _Question) -> Any:
        """After NOSCRIPT it is safe to repeat: nothing was run."""
        self._connection.send_command("SCRIPT LOAD", question[0].text)
        self._connection.read_response()
        self.send(*question)
        return self._connection.read_response()

    def close(self) -> None:
        """Close the connection."""
        self._asked = None
        self._connection.disconnect()
