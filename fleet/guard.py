"""The sidecar as the worker's threads use it: always there, replaced when it dies."""

from __future__ import annotations

import logging
import selectors
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fleet.logs import about
from fleet.sidecar import Sidecar, SidecarGone

log = logging.getLogger("fleet.worker")


class Guard:
    """Keeps one sidecar; the loop adds and removes groups, the heartbeat renews."""

    def __init__(self, incarnation: str, lock_fd: int) -> None:
        """Raises OSError."""
        self._sidecar = Sidecar.start(incarnation, lock_fd)
        self._lock = threading.Lock()
        self._selector: selectors.BaseSelector | None = None
        self._killed: set[int] = set()

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Hear what the sidecar says, and of its death, by this selector."""
        self._selector = selector
        selector.register(self._sidecar, selectors.EVENT_READ, self._listen)

    def _listen(self) -> None:
        with self._lock:
            self._hear()

    def _hear(self) -> None:
        self._killed |= self._sidecar.killed()
        for line in self._sidecar.said():
            log.warning("the sidecar says: %s", line, extra=about("sidecar_says"))

    def add(self, pgid: int) -> None:
        """Have a group killed should this worker die or lose its leases."""
        self._tell(Sidecar.add, pgid)

    def remove(self, pgid: int) -> None:
        """A group is gone; called before its leader is reaped."""
        self._tell(Sidecar.remove, pgid)

    def renew(self, deadline: float) -> None:
        """Leases hold until `deadline`, seconds on the boot clock. Called by the heartbeat's thread."""
        self._tell(Sidecar.renew, deadline)

    def is_late(self) -> bool:
        """Whether the leases may be gone: nothing must be started before they are renewed."""
        return self._sidecar.is_late()

    def killed(self) -> set[int]:
        """Groups that were killed since the last call because the leases were about to end."""
        with self._lock:
            if self._sidecar.has_spoken():
                self._hear()
            killed, self._killed = self._killed, set()
        return killed

    def keep_alive(self) -> None:
        """Replace a sidecar that died. Called by the loop, which alone may change its selector."""
        if not self._sidecar.alive():
            self._replace()

    def close(self) -> None:
        """End it, and with it whatever is left of this worker's jobs."""
        self._unwatch()
        self._sidecar.close()

    def _tell(self, message: Callable[[Sidecar, Any], None], value: float) -> None:
        with self._lock:
            try:
                message(self._sidecar, value)
            except SidecarGone:
                # it is remembered by the sidecar's own books, which its successor is given: the loop
                # starts that one in its next turn
                return

    def _replace(self) -> None:
        log.warning("the sidecar died: starting another", extra=about("sidecar_died"))
        self._unwatch()
        with self._lock:
            self._hear()
            try:
                self._sidecar = self._sidecar.successor()
            except (SidecarGone, OSError) as exc:
                log.warning("it could not be started, trying again: %s", exc, extra=about("sidecar_died"))
                return
        if self._selector:
            self._selector.register(self._sidecar, selectors.EVENT_READ, self._listen)

    def _unwatch(self) -> None:
        if self._selector:
            with suppress(KeyError, ValueError):
                self._selector.unregister(self._sidecar)
