"""What one worker still has for jobs: its slots, CPUs, memory and GPUs, never promised twice.

For one thread. CPUs and shares of GPUs are counted in thousandths, memory in MiB, as the scripts
do that give out jobs, so that both come to the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker.fitting import Free
from broker.requirements import MEBIBYTE, MILLI, Requirements
from fleet.resources import Resources


@dataclass(frozen=True)
class Grant:
    """What a job was given.

    GPUs by their index on the host; `gpu_share`: how much of each, below 1 where others share it.
    `cpu_ids` are the job's alone; none where it asked for no whole number of CPUs, or the worker knows none.
    `cpus`, `memory_bytes`: None where it asked for none, so that nothing limits it.
    """

    cpus: float | None = None
    cpu_ids: tuple[int, ...] = ()
    memory_bytes: int | None = None
    gpu_ids: tuple[int, ...] = ()
    gpu_share: float = 1


@dataclass(frozen=True)
class _Holding:
    milli_cpus: int
    mebibytes: int
    milli_gpu: int
    exclusive: bool
    grant: Grant = field(default_factory=Grant)


class Room:
    """The packing of one worker.

    `cpu_ids`: the CPUs that it may pin jobs to, at least `total.cpus` of them, or none.
    `gpu_ids`: the indices on the host of `total.gpus`; none: from 0 on.
    """

    def __init__(
        self, total: Resources, slots: int, cpu_ids: Sequence[int] = (), gpu_ids: Sequence[int] = ()
    ) -> None:
        self._slots = slots
        self.hold(total, cpu_ids, gpu_ids)
        #: by lease; made anew with each change, so that other threads may ask what is free
        self._held: dict[str, _Holding] = {}
        #: how many jobs there are besides that ask for nothing: counted, not listed, for they are many
        self.plain = 0

    def hold(self, total: Resources, cpu_ids: Sequence[int] = (), gpu_ids: Sequence[int] = ()) -> None:
        """It has this from now on, no less than before: jobs keep what they were given."""
        #: index on the host -> GPU
        self._gpus = dict(zip(gpu_ids or range(len(total.gpus)), total.gpus, strict=True))
        self.call_gpus([gpu.name for gpu in total.gpus])
        self._milli_cpus = round(total.cpus * MILLI)
        self._mebibytes = total.memory_bytes // MEBIBYTE
        self._cpu_ids = tuple(cpu_ids)[: math.floor(total.cpus)] if len(cpu_ids) >= total.cpus else ()
        #: what a job counts that asks for no CPUs
        self.plain_milli_cpus = min(MILLI, self._milli_cpus // self._slots)

    def call_gpus(self, models: Sequence[str | None]) -> None:
        """Of each GPU the label `gpu_name`, None: it has none; its own name, if nothing is said."""
        self._models = dict(zip(self._gpus, models, strict=True))

    def __contains__(self, lease: str) -> bool:
        return lease in self._held

    def __len__(self) -> int:
        """How many jobs have taken something."""
        return len(self._held)

    @property
    def is_used(self) -> bool:
        """Whether there is any job at all."""
        return bool(self._held or self.plain)

    # --- what is left ----------------------------------------------------------------------------

    def free(self) -> Free:
        """What is left, nothing at all beside an exclusive job."""
        if self.is_closed:
            return Free(0, 0, 0, (0,) * len(self._gpus))
        plain_milli_cpus = self.plain * self.plain_milli_cpus
        return Free(
            max(0, self._slots - len(self._held) - self.plain),
            max(0, self._milli_cpus - self._taken_milli_cpus() - plain_milli_cpus) / MILLI,
            (self._mebibytes - sum(held.mebibytes for held in self._held.values())) * MEBIBYTE,
            tuple(milli / MILLI for milli in self._free_gpus().values()),
        )

    def fits(self, need: Requirements) -> bool:
        """Whether such a job can start now."""
        free = self.free()
        return (
            free.slots > 0
            and not (need.exclusive and self.is_used)
            and self.milli_cpus_of(need) <= free.milli_cpus
            and mebibytes_of(need) <= free.mebibytes
            and self._choose_gpus(need) is not None
        )

    def most_plain(self) -> int:
        """How many jobs that ask for nothing can run at once beside the others."""
        if not self._held:
            return self._slots
        if self.is_closed:
            return 0
        slots = self._slots - len(self._held)
        left = self._milli_cpus - self._taken_milli_cpus()
        return min(slots, left // self.plain_milli_cpus if self.plain_milli_cpus else slots)

    def gpus_fit(self, need: Requirements, held: Requirements | None = None) -> bool:
        """Whether its GPUs alone are free; `held`: of a job for which some are kept."""
        return self._choose_gpus(need, held) is not None

    # --- taking and giving back ------------------------------------------------------------------

    def take(self, lease: str, need: Requirements, held: Requirements | None = None) -> Grant:
        """Give `lease` what it needs, not the GPUs kept for a job that asks for `held` if others will do.

        Raises ValueError where it does not fit, or the lease holds some.
        """
        if lease in self._held or not self.fits(need):
            raise ValueError(f"no room for {lease}: {need.readable() or 'a plain job'}")
        gpus = (self._choose_gpus(need, held) or self._choose_gpus(need) or ()) if need.gpus else ()
        grant = self._whole_worker(need, gpus) if need.exclusive else self._grant(need, gpus)
        share = _milli_gpus(need) if 0 < need.gpus < 1 else MILLI
        holding = _Holding(self.milli_cpus_of(need), mebibytes_of(need), share, need.exclusive, grant)
        self._held = {**self._held, lease: holding}
        return grant

    def give_back(self, lease: str) -> None:
        """The job ended; one that holds nothing changes nothing."""
        self._held = {other: held for other, held in self._held.items() if other != lease}

    def _grant(self, need: Requirements, gpus: tuple[int, ...]) -> Grant:
        return Grant(
            need.cpus,
            self._choose_cpus(need),
            need.memory_bytes,
            gpus,
            need.gpus if 0 < need.gpus < 1 else 1,
        )

    def _whole_worker(self, need: Requirements, gpus: tuple[int, ...]) -> Grant:
        """An exclusive job has all CPUs and GPUs, but where it asked for fewer."""
        asked = self._grant(need, gpus)
        return Grant(
            asked.cpus or self._milli_cpus / MILLI,
            self._cpu_ids if need.cpus is None else asked.cpu_ids,
            asked.memory_bytes,
            asked.gpu_ids or tuple(self._gpus),
            asked.gpu_share,
        )

    # --- choosing --------------------------------------------------------------------------------

    def milli_cpus_of(self, need: Requirements) -> int:
        """What a job counts."""
        return self.plain_milli_cpus if need.cpus is None else round(need.cpus * MILLI)

    def _choose_cpus(self, need: Requirements) -> tuple[int, ...]:
        """Whole CPUs are the job's own: all of them together are never more than there are."""
        if need.cpus is None or need.cpus != int(need.cpus):
            return ()
        taken = {cpu for held in self._held.values() for cpu in held.grant.cpu_ids}
        return tuple(cpu for cpu in self._cpu_ids if cpu not in taken)[: int(need.cpus)]

    def _choose_gpus(self, need: Requirements, held: Requirements | None = None) -> tuple[int, ...] | None:
        """The GPUs for it, None where they are not free: those alone that need not be kept for `held`."""
        share, count = _milli_gpus(need), math.ceil(need.gpus)
        left = self._free_gpus()
        kept = self._keep_gpus(held, left) if held and held != need else {}
        fit = [index for index in self._suited_gpus(need, left) if left[index] - kept.get(index, 0) >= share]
        return tuple(sorted(fit[:count])) if len(fit) >= count else None

    def _keep_gpus(self, held: Requirements, left: dict[int, int]) -> dict[int, int]:
        """How much of which GPUs is kept for a job that asks for `held`: of those that most is left of.

        Nobody else takes of that, so it only ever grows.
        """
        suited = self._suited_gpus(held, left)
        return dict.fromkeys(suited[max(0, len(suited) - math.ceil(held.gpus)) :], _milli_gpus(held))

    def _suited_gpus(self, need: Requirements, left: dict[int, int]) -> list[int]:
        """Those that will do for it, also where they are taken.

        Best fit comes first: those with the least left, then with the least memory, so that whole GPUs, and
        large ones, are kept for those who need them.
        """
        suited = (
            index
            for index, gpu in self._gpus.items()
            if need.gpu_is_enough(gpu.memory_bytes, self._models[index])
        )
        return sorted(suited, key=lambda index: (left[index], self._gpus[index].memory_bytes, index))

    def _free_gpus(self) -> dict[int, int]:
        left = dict.fromkeys(self._gpus, MILLI)
        for held in self._held.values():
            for index in held.grant.gpu_ids:
                left[index] -= held.milli_gpu
        return left

    def _taken_milli_cpus(self) -> int:
        return sum(held.milli_cpus for held in self._held.values())

    @property
    def is_closed(self) -> bool:
        """Whether an exclusive job has it all."""
        return bool(self._held) and any(held.exclusive for held in self._held.values())


def mebibytes_of(need: Requirements) -> int:
    """What a job counts."""
    return (need.memory_bytes or 0) // MEBIBYTE


def _milli_gpus(need: Requirements) -> int:
    """What it needs of each GPU it gets."""
    return round(min(need.gpus, 1) * MILLI)
