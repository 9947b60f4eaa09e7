"""What a command finds of the process that started it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which signals are ignored")

_SPAWNS = """
import os, signal
from fleet import process
signal.signal(signal.SIGTERM, lambda *_: None)
null, home = os.open("/dev/null", os.O_RDONLY), os.open(".", os.O_RDONLY)
env = {os.fsencode(name): os.fsencode(value) for name, value in os.environ.items()}
pid = process.spawn(("grep", "SigIgn", "/proc/self/status"), env, "/", (null, 1, 2), home)
os.waitpid(pid, 0)
"""
#: signals 32 and 33, which glibc keeps to itself and ignores in what it spawns
_OF_THE_C_LIBRARY = 0b11 << 31


def ignored_here() -> int:
    """What whoever started the tests ignores; what Python does, `subprocess` undoes."""
    found = re.search(r"SigIgn:\s*(\w+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1], 16) & ~(1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


@pytest.mark.parametrize(("trap", "ignored"), [(":", 0), ("trap '' HUP USR1", 1 << 0 | 1 << 9)])
def test_signals_are_ignored_that_were_before_the_worker_and_no_others(trap, ignored):
    """Python ignores SIGPIPE and SIGXFSZ; what is handled here is not ignored there."""
    shell = f'{trap}; exec "$@"'
    command = ["/bin/sh", "-c", shell, "sh", sys.executable, "-c", _SPAWNS]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = int(said.stdout.split()[1], 16)
    assert found & ~_OF_THE_C_LIBRARY == (ignored | ignored_here()) & ~_OF_THE_C_LIBRARY
