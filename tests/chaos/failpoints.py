"""Failpoints: a fault at one chosen call to Redis, set in redis-py's connections.

Production code knows nothing of them. A call is named by its command, or its script, and counted: `round#2`
is the second round that this process sends. What can befall it:

    die-before    SIGKILL to this process before it is sent
    die-sent      Redis has done it, and this process is killed before it reads the reply
    die-after     the same just after it has read the reply
    cut           the connection is closed before it is sent
    lose          Redis has done it, and the connection is closed before the reply is read
    term          SIGTERM to this process when Redis has done it: no fault, but an awkward moment
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections import Counter
from typing import Any

from redis import exceptions
from redis.connection import AbstractConnection

from broker import scripts
from tests.chaos.history import History

HOWS = ("die-before", "die-sent", "die-after", "cut", "lose")
#: seconds that Redis gets to do what was sent, where it answers at all: a blocking call does not
_DONE_SECONDS = 0.25
_SHAS = {one.sha.encode(): one.name for one in vars(scripts).values() if isinstance(one, scripts.Script)}


class Failpoints:
    """Names and counts all calls of this process, and lets one of them fail."""

    def __init__(self, history: History, worker: str, call: str = "", how: str = "") -> None:
        self._history, self._worker = history, worker
        self._call, self._how = call, how
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        #: the connection whose next reply is the last thing this process sees
        self._last_words: Any = None
        #: a socket whose replies are lost
        self._lost: Any = None

    def install(self) -> None:
        """Stand between this process and Redis from now on."""
        connections: Any = AbstractConnection
        send, read = connections.send_packed_command, connections.read_response

        def send_packed_command(connection: Any, command: Any, *args: Any, **kwargs: Any) -> None:
            is_hit = self._is_hit(_label(command))
            if is_hit:
                self._before(connection)
            send(connection, command, *args, **kwargs)
            if is_hit:
                self._sent(connection)

        def read_response(connection: Any, *args: Any, **kwargs: Any) -> Any:
            if self._lost is not None and connection._sock is self._lost:
                self._lost = None
                connection.disconnect()
                raise exceptions.ConnectionError("failpoint: the reply was lost")
            try:
                return read(connection, *args, **kwargs)
            finally:
                if connection is self._last_words:
                    self._die()

        connections.send_packed_command = send_packed_command
        connections.read_response = read_response

    def _is_hit(self, label: str) -> bool:
        with self._lock:
            self._counts[label] += 1
            call = f"{label}#{self._counts[label]}"
        self._history.note("call", call=call, thread=threading.current_thread().name)
        return call == self._call

    def _before(self, connection: Any) -> None:
        self._history.note("failpoint", call=self._call, how=self._how)
        if self._how == "die-before":
            self._die()
        if self._how == "cut" and connection._sock is not None:
            connection._sock.shutdown(socket.SHUT_RDWR)

    def _sent(self, connection: Any) -> None:
        if self._how == "die-after":
            self._last_words = connection
            return
        select.select([connection._sock], [], [], _DONE_SECONDS)
        if self._how == "die-sent":
            self._die()
        if self._how == "term":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._lost = connection._sock
        self._lost.shutdown(socket.SHUT_RDWR)

    def _die(self) -> None:
        self._history.note("killed", target="worker", worker=self._worker, wall=wall())
        os.kill(os.getpid(), signal.SIGKILL)


def wall() -> float:
    """The true wall clock, whatever this process is made to believe."""
    return time.clock_gettime(time.CLOCK_REALTIME)


def _label(command: Any) -> str:
    """What a packed command is called: the name of its script, else its first word or two."""
    head = b"".join(command[:4] if isinstance(command, list) else [command])[:200]
    words = head.split(b"\r\n")[2::2]
    verb = words[0].decode().upper()
    if verb == "EVALSHA":
        return _SHAS.get(words[1], "unknown script")
    return f"{verb} {words[1].decode().upper()}" if verb in ("CLIENT", "SCRIPT") else verb
