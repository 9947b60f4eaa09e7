"""What a row of the benchmarks asks of a system."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata

from benchmarks import harness
from benchmarks.harness import Site

COMMAND, NOOP, PROBE = "command", "noop", "probe"


class Missing(Exception):
    """A peer's package or program is not installed."""


class Peer:
    """A system with a queue in Redis and worker processes. Others override `rate`.

    `paces` says roughly how many jobs of each kind it does in a second, so that rounds take as
    long for all; kinds that are not in it cannot be measured. `packages` are those whose versions
    are reported, `programs` what must be on PATH.
    """

    name: str
    paces: Mapping[str, int]
    packages: Sequence[str] = ()
    programs: Sequence[str] = ()

    def check(self) -> None:
        """Raise Missing where a program is not here."""
        for program in self.programs:
            if shutil.which(program) is None:
                raise Missing(f"{self.name}: there is no program {program}")

    def version(self) -> str:
        """What was measured."""
        return ", ".join(f"{package} {metadata.version(package)}" for package in self.packages)

    def jobs(self, work: str, seconds: float) -> int:
        """How many jobs of this kind take about so long."""
        return max(20, int(self.paces[work] * seconds))

    def rate(self, site: Site, work: str, jobs: int, slots: int) -> float:
        """Jobs a second with `slots` processes; the backlog is filled before the workers start."""
        site.fresh()
        self.fill(site, work, jobs)
        with harness.processes(self.workers(site, work, slots), site.log(self.name)):
            return harness.rate_of(lambda: self.done(site), jobs)

    def fill(self, site: Site, work: str, jobs: int) -> None:
        """Submit `jobs` jobs in the fastest way that this system's documentation names."""
        for _ in range(jobs):
            self.submit(site, work)

    def submit(self, site: Site, work: str, *arguments: str) -> None:
        """Submit one job."""
        raise NotImplementedError

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        """The commands that start the workers."""
        raise NotImplementedError

    def done(self, site: Site) -> int:
        """How many jobs have ended and left their result, since Redis was emptied."""
        raise NotImplementedError
