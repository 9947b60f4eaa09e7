"""A way to Redis that can be cut without a word: what is sent is swallowed, nobody hears an error."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial


class Passage:
    """A port of loopback that leads to another; what happens on the way is for others to say."""

    def __init__(self, port: int) -> None:
        self._far_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # or who waits to read from it keeps it open
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._far_port))
                self._sockets += [near, far]
                for way in self._ways(near, far):
                    threading.Thread(target=way, daemon=True).start()

    def _ways(self, near: socket.socket, far: socket.socket) -> Iterable[Callable[[], None]]:
        """What carries a new connection there and back, each in a thread of its own."""
        raise NotImplementedError


class Proxy(Passage):
    """Lets everything through until it is cut.

    What is connected when it is cut, or connects until it is joined, never hears anything again.
    """

    def __init__(self, port: int) -> None:
        self._is_cut = False
        self._era = 0
        super().__init__(port)

    def cut(self) -> None:
        """Swallow everything from now on."""
        self._is_cut = True

    def join(self) -> None:
        """Let new connections through; those from before stay dead."""
        self._era += 1
        self._is_cut = False

    def _ways(self, near: socket.socket, far: socket.socket) -> Iterable[Callable[[], None]]:
        era = self._era
        return (partial(self._carry, near, far, era), partial(self._carry, far, near, era))

    def _carry(self, source: socket.socket, target: socket.socket, era: int) -> None:
        is_dead = False
        with suppress(OSError):
            while data := source.recv(65536):
                is_dead = is_dead or self._is_cut or era != self._era
                if not is_dead:
                    target.sendall(data)
            if not is_dead:
                target.shutdown(socket.SHUT_WR)


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """A proxy for as long as the block lasts."""
    made = Proxy(port)
    try:
        yield made
    finally:
        made.close()
