"""What a job was given, made what it is held to: CPUs, memory, GPUs.

CPUs: it is bound to those that are its alone; one with a part of a CPU yields to others in proportion.
Memory: by a cgroup of its own (`fleet/cgroup.py`); where there can be none it is watched
(`fleet/sampler.py`), and RLIMIT_DATA stops a leap that no watching would see in time. GPUs: by the
variables that CUDA and ROCm read.
"""

from __future__ import annotations

import logging
import math
import resource
import shutil
from collections.abc import Mapping
from typing import Any

from broker import clock
from broker.usage import Usage
from broker.work import Claim
from fleet import cgroup
from fleet.logs import about
from fleet.room import Grant

log = logging.getLogger("fleet.worker")

_MIB = 2**20
#: what may be reserved beyond the limit, for that is not had yet: stacks of threads, arenas of allocators
_RESERVED_BYTES = 1 << 30
#: each step of nice counts for so much: sched(7)
_NICE_STEP = 1.25
_LEAST_NICE = 19
_NICE = shutil.which("nice")
#: sh's words; $0 is the file to enter by, or the number of KiB
_ENTER = 'echo 0 > "$0" && exec "$@"'
_CAPPED = 'ulimit -d "$0" && exec "$@"'


class Limit:
    """What one attempt is held to, and what was seen of it."""

    def __init__(self, grant: Grant, groups: cgroup.Groups | None, group: cgroup.Group | None) -> None:
        self.grant = grant
        #: before any process of the job began, seconds on the boot clock
        self.made_at = clock.boottime()
        self._groups = groups
        self._group = group
        #: the most that was seen by looking, bytes
        self.seen_bytes = 0
        self.seen_gpu_bytes: int | None = None

    # -- what the job finds ------------------------------------------------------------------

    @property
    def cpu_ids(self) -> tuple[int, ...]:
        """The CPUs that it is bound to; none: any."""
        return self.grant.cpu_ids

    @property
    def nice(self) -> int:
        """How far it yields to others: a job with half a CPU gets half of what another gets."""
        cpus = self.grant.cpus
        if self.cpu_ids or not cpus or cpus >= 1:
            return 0
        return min(_LEAST_NICE, round(math.log(1 / cpus, _NICE_STEP)))

    @property
    def memory_bytes(self) -> int | None:
        """What all of its processes may have together."""
        return self.grant.memory_bytes

    def variables(self) -> dict[str, str]:
        """For its environment; whoever asked for no GPU is told nothing of GPUs."""
        grant, found = self.grant, {}
        if grant.cpus is not None:
            found["FLEET_CPUS"] = f"{grant.cpus:g}"
        if grant.memory_bytes is not None:
            found["FLEET_MEMORY_BYTES"] = str(grant.memory_bytes)
        if grant.gpu_ids:
            found["FLEET_GPUS"] = f"{grant.gpu_share if grant.gpu_share < 1 else len(grant.gpu_ids):g}"
            # else CUDA counts from the fastest one
            found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
                found[name] = ",".join(map(str, grant.gpu_ids))
        return found

    def command(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        """The command, begun within its limits: before it does anything it is in them."""
        if self.nice and _NICE:
            argv = (_NICE, "-n", str(self.nice), *argv)
        if self._group:
            return ("/bin/sh", "-c", _ENTER, self._group.entrance, *argv)
        if self._data_bytes:
            return ("/bin/sh", "-c", _CAPPED, str(self._data_bytes >> 10), *argv)
        return argv

    def for_executor(self) -> Mapping[str, Any]:
        """What `fleet/executor_main.py` does to the process of a function before it begins."""
        return {
            "entrance": self._group.entrance if self._group else "",
            "data_bytes": self._data_bytes,
            "cpu_ids": list(self.cpu_ids),
            "nice": self.nice,
            "variables": self.variables(),
        }

    @property
    def _data_bytes(self) -> int:
        """RLIMIT_DATA, which counts what is reserved, of each process; 0: none."""
        memory, (_, most) = self.memory_bytes, resource.getrlimit(resource.RLIMIT_DATA)
        if memory is None or self._group:
            return 0
        wanted = memory + memory // 2 + _RESERVED_BYTES
        return wanted if most == resource.RLIM_INFINITY else min(wanted, most)

    # -- while it runs -----------------------------------------------------------------------

    @property
    def is_watched(self) -> bool:
        """Whether its processes must be looked at, for nobody else holds it to its memory."""
        return self.memory_bytes is not None and self._group is None

    @property
    def has_gpus(self) -> bool:
        """Whether it has GPUs to itself."""
        return bool(self.grant.gpu_ids) and self.grant.gpu_share == 1

    @property
    def ran_out(self) -> bool:
        """Whether it was killed, or must be, for having too much memory."""
        if self._group:
            return self._group.kills() > 0
        return self.memory_bytes is not None and self.seen_bytes > self.memory_bytes

    # -- in the end --------------------------------------------------------------------------

    def usage(self, cpu_seconds: float | None, largest_bytes: int) -> Usage:
        """What it used; `largest_bytes`: what one of its processes had at most."""
        peak = (self._group and self._group.peak_bytes()) or max(self.seen_bytes, largest_bytes)
        return Usage(cpu_seconds, peak or None, self.seen_gpu_bytes)

    def verdict(self, usage: Usage) -> str:
        """Why it failed, if it ran out of memory."""
        had = f"its processes had {(usage.memory_bytes or 0) / _MIB:.0f} MiB"
        return f"OutOfMemory: {had}, its limit is {(self.memory_bytes or 0) / _MIB:.0f} MiB"

    def explained(self, reason: str, usage: Usage) -> str:
        """The same reason, with what it had where it was memory that it lacked."""
        if self.memory_bytes is None:
            return reason
        return f"{self.verdict(usage)}; {reason.removeprefix('OutOfMemory: ')}"

    def close(self) -> None:
        """It has ended, and its usage was asked for."""
        if self._groups and self._group:
            self._groups.remove(self._group)


class Limits:
    """Makes limits of grants. For one thread."""

    def __init__(self) -> None:
        self._groups: cgroup.Groups | None = None
        self._looked = False

    def of(self, claim: Claim, grant: Grant | None) -> Limit | None:
        """None for a job that asked for nothing."""
        if grant is None or grant == Grant():
            return None
        group = self._group(claim, grant.memory_bytes)
        return Limit(grant, self._groups, group)

    def _group(self, claim: Claim, memory_bytes: int | None) -> cgroup.Group | None:
        if memory_bytes is None:
            return None
        if not self._looked:
            self._looked, self._groups = True, cgroup.prepared()
            how = "by cgroups" if self._groups else "by watching, for cgroups are not ours to make"
            log.info("limits of memory are kept %s", how, extra=about("memory_limits"))
        if self._groups is None:
            return None
        try:
            return self._groups.make(f"{claim.job_id}.{claim.fence}", memory_bytes)
        except OSError as exc:
            said = "job %s: no cgroup for it, it is watched: %s"
            log.warning(said, claim.job_id, exc, extra=about("memory_limits", claim))
            return None

    def close(self) -> None:
        """No job runs any more."""
        if self._groups:
            self._groups.close()
