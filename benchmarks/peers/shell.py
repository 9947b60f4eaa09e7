"""`xargs -P` and GNU parallel: the machine's own speed at starting processes, and its usual price.

Promised: nothing beyond the command itself. xargs captures no output; parallel groups it, each
job's through a temporary file (its default). Neither knows other machines, a queue, or what was
done when it is killed; so both are bounds, not rivals.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

from benchmarks.harness import Site
from benchmarks.peers.base import COMMAND, Peer


class Shell(Peer):
    """A program that runs a command for each line it reads."""

    def __init__(self, name: str, argv: Sequence[str], pace: int) -> None:
        self.name = name
        self.programs = (argv[0],)
        self.paces = {COMMAND: pace}
        self._argv = argv

    def rate(self, site: Site, work: str, jobs: int, slots: int) -> float:
        lines = "".join(f"{number}\n" for number in range(jobs))
        argv = [part.format(slots=slots) for part in self._argv]
        started = time.perf_counter()
        subprocess.run(argv, input=lines, text=True, check=True, stdout=subprocess.DEVNULL)
        return jobs / (time.perf_counter() - started)

    def version(self) -> str:
        said = subprocess.run([self._argv[0], "--version"], capture_output=True, text=True, check=True)
        return said.stdout.splitlines()[0]


PEERS = {
    "xargs": Shell("xargs", ("xargs", "-P{slots}", "-n1", "true"), 1500),
    # --will-cite: no notice on stderr
    "parallel": Shell("parallel", ("parallel", "--will-cite", "-j{slots}", "true"), 250),
}
