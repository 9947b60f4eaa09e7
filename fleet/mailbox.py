"""How other threads, and signals, reach the worker's loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from queue import SimpleQueue

from broker.work import Beat
from fleet.beater import Denied
from fleet.chores import AllDone
from fleet.sampler import TooLarge

Letter = Beat | Denied | AllDone | TooLarge
_CHUNK = 4096


class Mailbox:
    """Letters from other threads, and a file number that becomes readable with them."""

    def __init__(self) -> None:
        self._letters: SimpleQueue[Letter] = SimpleQueue()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """For the selector."""
        return self._read

    @property
    def wake_fd(self) -> int:
        """For signal.set_wakeup_fd: signals wake the loop too."""
        return self._write

    def post(self, letter: Letter) -> None:
        """Leave a letter; from any thread."""
        self._letters.put(letter)
        try:
            os.write(self._write, b"\0")
        except BlockingIOError:
            return  # full: it is readable already

    def open(self) -> Iterator[Letter]:
        """All letters there are."""
        try:
            while len(os.read(self._read, _CHUNK)) == _CHUNK:
                continue
        except BlockingIOError:
            pass
        while not self._letters.empty():  # nobody else takes any
            yield self._letters.get()
