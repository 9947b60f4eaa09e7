"""What the jobs of all systems do: nothing, one command, or tell when they began."""

from __future__ import annotations

import socket
import subprocess
import time


def noop() -> int:
    """Nothing, with a result: some store none where the result is None."""
    return 1


def command() -> int:
    """Run `true` as a queue of Python functions would, its output captured."""
    return subprocess.run(["true"], capture_output=True, check=False).returncode


def probe(address: str) -> int:
    """Say on the datagram socket `address` when this was reached; clock: CLOCK_MONOTONIC, ns."""
    began = time.monotonic_ns()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(str(began).encode(), address)
    return 1
