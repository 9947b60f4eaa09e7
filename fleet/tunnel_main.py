"""The tunnel process: `python -I -m fleet.tunnel_main FOLDER` supervises one that forwards.

The supervisor starts the forwarder again when it dies. It holds one end of a pipe, so the forwarder
hears when the supervisor dies, starts another and makes room. Both end when no wish is left in the folder,
or on SIGTERM; the wishes then stay, for the next `fleet up`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

from broker import clock
from fleet import logs
from fleet.tunnel_folder import TunnelFolder

log = logging.getLogger("fleet.tunnel")

#: seconds before a forwarder that died is started again: the first time, and at most
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 10.0
#: seconds after which one that dies is no longer one that cannot start
_LIVED_SECONDS = 30.0
_FORWARD = "--forward"


def main(argv: list[str]) -> int:
    """Be the supervisor, or with --forward its forwarder."""
    logs.set_up()
    logging.getLogger("asyncssh").setLevel(logging.ERROR)  # it tells of every connection
    folder = TunnelFolder(Path(argv[0]))
    if _FORWARD in argv:
        return _forward(folder)
    with folder.lock() as is_ours:
        return _Supervisor(folder).run() if is_ours else 0


class _Supervisor:
    """Keeps a forwarder alive for as long as there are wishes."""

    def __init__(self, folder: TunnelFolder) -> None:
        self._folder = folder
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        signal.signal(signal.SIGTERM, self._stop)

    def run(self) -> int:
        pause = _FIRST_PAUSE_SECONDS
        self._folder.forget_states()
        while self._folder.wishes() and not self._stopping.is_set():
            began = clock.monotonic()
            code = self._run_once()
            self._folder.forget_states()
            if code == 0 or self._stopping.is_set():
                continue
            if clock.monotonic() - began > _LIVED_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            log.warning("the forwarder died (%s): it is started again in %.1f s", code, pause)
            self._stopping.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
        if not self._stopping.is_set():
            self._folder.sweep()
        return 0

    def _run_once(self) -> int:
        """Run a forwarder to its end; its exit code, or the signal that killed it as a negative number."""
        argv = [sys.executable, "-I", "-m", "fleet.tunnel_main", str(self._folder.path), _FORWARD]
        self._child = subprocess.Popen(argv, stdin=subprocess.PIPE)
        if self._stopping.is_set():
            self._child.terminate()
        return self._child.wait()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()
        if self._child:
            self._child.terminate()


def _forward(folder: TunnelFolder) -> int:
    from fleet.tunnel_keeper import Keeper

    log.info("forwarding, pid %s", os.getpid())
    if asyncio.run(Keeper(folder).run()):
        return 0
    log.warning("the supervisor died: another is started")
    folder.start_detached()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
