"""A process that imports everything once and forks the participants: a worker is born in milliseconds.

    python -m tests.chaos.nursery        requests on standard input, answers on standard output, as JSON lines
    {"role": ..., "who": ..., "log": PATH, "history": PATH, ...}   ->  {"born": PID, "who": ...}
                                                               ->  {"dead": PID, "who": ..., "status": N}

It is single-threaded, so forking is safe; its children die with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import traceback
from typing import Any

from tests.chaos import roles
from tests.chaos.history import VARIABLE

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until standard input ends."""
    waker, ringer = os.pipe()
    os.set_blocking(waker, False)
    os.set_blocking(ringer, False)
    signal.set_wakeup_fd(ringer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, str] = {}
    rest = b""
    while True:
        ready, _, _ = select.select([0, waker], [], [])
        if waker in ready:
            os.read(waker, 4096)
        _bury(children)
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                break
            lines = (rest + data).split(b"\n")
            rest = lines.pop()
            for line in lines:
                order = json.loads(line)
                children[_fork(order)] = order["who"]
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        _be(order)
    _say(born=pid, who=order["who"])
    return pid


def _bury(children: dict[int, str]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say(dead=pid, who=children.pop(pid), status=os.waitstatus_to_exitcode(status))


def _say(**answer: Any) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _be(order: dict[str, Any]) -> None:
    """Become a participant; never returns."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 256)
        os.environ[VARIABLE] = order["history"]
        code = roles.ROLES[order["role"]](order)
    except BaseException as exc:
        if isinstance(exc, SystemExit):
            code = exc.code if isinstance(exc.code, int) else int(bool(exc.code))
        else:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
