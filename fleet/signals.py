"""SIGTERM, SIGINT and SIGHUP, from a worker's first moment to its last."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: the end of a worker's allocation is near. Slurm signals all processes of a job's step, and this one does
#: nothing to those that do not know it
WARNING = signal.SIGURG


@contextmanager
def kept_from_threads() -> Iterator[None]:
    """Threads that are started inside get no signals of this process: the main thread is to hear them.

    Else the kernel gives another thread the end of a child that comes while the main thread starts the
    next one, and wakes it for nothing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_within(seconds: float) -> None:
    """End this process after so long, whatever it waits for; only in the main thread.

    Its jobs the sidecar ends then, and what Redis was not told recovery finds, as after a crash.
    """
    signal.signal(signal.SIGALRM, lambda *_: _leave_now())
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _leave_now() -> None:
    import logging

    logging.getLogger("fleet.worker").error("told twice to stop, and it takes too long: leaving as it is")
    os._exit(1)


def _tell_unless_leaving(dropped: sys.UnraisableHookArgs) -> None:
    """As `fleet.logs` does later."""
    if dropped.exc_type is not SystemExit:
        sys.__unraisablehook__(dropped)


class StopSignals:
    """Ends a process that has nothing to leave behind; remembers for one that has; then tells the loop.

    Light, and installed before all else: the imports of a worker take longer than its registration.
    """

    def __init__(self, exit_code: int = 0) -> None:
        """`exit_code`: of a process that ends because it was told to."""
        self.exit_code = exit_code
        self.was_told = False
        self._may_leave = True
        self._early = 0
        self._stop: Callable[[], None] | None = None
        self._was_warned = False
        self._warn: Callable[[], None] | None = None

    def install(self) -> StopSignals:
        """Hear them from now on; only in the main thread."""
        sys.unraisablehook = _tell_unless_leaving
        for number in _STOPPING:
            signal.signal(number, lambda *_: self._hear())
        signal.signal(WARNING, lambda *_: self._hear_warning())
        return self

    def hold(self) -> None:
        """From now on there is something to take down: a signal is remembered. Raises SystemExit."""
        self._may_leave = False
        if self._early:
            raise SystemExit(self.exit_code)

    def sleep(self, seconds: float) -> None:
        """Wait, amid what is held, where leaving leaves nothing behind. Raises SystemExit if told to stop."""
        self._may_leave = True
        try:
            time.sleep(seconds)
        finally:
            self.hold()

    def hand_to(self, stop: Callable[[], None], wake_fd: int, warn: Callable[[], None] | None = None) -> None:
        """Call `stop` for each from now on, and for those remembered; each makes `wake_fd` readable.

        So does the end of a child. `warn` is called for a warning of the end, also for one remembered.
        """
        signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGIO, lambda *_: None)  # somebody opened a file that we had a lease on
        self._stop, self._warn = stop, warn
        for _ in range(self._early):
            stop()
        if warn and self._was_warned:
            warn()

    def _hear_warning(self) -> None:
        self._was_warned = True
        if self._warn is not None:
            self._warn()

    def _hear(self) -> None:
        self.was_told = True
        if self._stop is not None:
            self._stop()
            return
        self._early += 1
        if self._may_leave:
            # also remembered: Python drops what is raised while it runs a callback of its own
            raise SystemExit(self.exit_code)
