"""A host that stops at a step of `fleet up` until it is let go on.

    gate = Gate(host)                  # host.gate/python is the Python to name
    gate.shut("start")                 # probe, install, start, detach, or confirm
    gate.reached                       # a file, there once the step is under way
    gate.open()

`detach` is amid the start: the worker's configuration is written, its process is not there. At
`confirm` the worker is there and does not beat, for the lock on its name is taken.
"""

from __future__ import annotations

import fcntl
from typing import IO

from tests.integration.sshd import PYTHON, SshdHost

#: every run of Python at the host goes through this: what is to be done is in its input, or its words
_WRAPPER = """\
#!/bin/sh
step=none input=/dev/null
case " $* " in
  *" -m fleet.detach "*) step=detach ;;
  *" - "*)
    input=$(mktemp -p {folder})
    cat > "$input"
    step=$(sed -n 's/^REQUEST = .*"verb": "\\([a-z]*\\)".*/\\1/p' "$input") ;;
esac
if [ -e {folder}/shut.$step ]; then
  touch {folder}/reached
  until [ -e {folder}/opened ]; do sleep 0.05; done
fi
exec {python} "$@" < "$input"
"""


class Gate:
    """The gate of one host."""

    def __init__(self, host: SshdHost, *, number: int = 0) -> None:
        self._host = host
        self._lock = host.output_dir / f"run/{host.name}-{number}.lock"
        self._held: IO[str] | None = None
        self.folder = host.folder / "gate"
        self.folder.mkdir()
        self.python = self.folder / "python"
        self.python.write_text(_WRAPPER.format(folder=self.folder, python=PYTHON))
        self.python.chmod(0o755)
        self.reached = self.folder / "reached"

    def shut(self, step: str) -> None:
        """The host stops at that step."""
        if step == "confirm":
            self._lock.parent.mkdir(parents=True, mode=0o700)
            self._held = self._lock.open("w")
            fcntl.flock(self._held, fcntl.LOCK_EX)
        (self.folder / f"shut.{step}").touch()

    def open(self) -> None:
        """It goes on, and stops no more."""
        (self.folder / "opened").touch()
        if self._held:
            self._held.close()
