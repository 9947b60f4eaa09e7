"""What a worker offers jobs: its share of its host, its labels, and until when."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

from broker import clock
from broker.requirements import GPU_NAME, Offer, gpu_label, gpu_names
from fleet.ledger import Elsewhere, Promise, Share
from fleet.resources import Gpu
from fleet.worker_config import WorkerConfig


class Offering:
    """Labels and share may change while it runs; each change is one assignment, so that threads may look.

    `ends_at`: seconds of the epoch when the worker has to be gone, None where it stays.
    """

    def __init__(
        self,
        config: WorkerConfig,
        share: Share,
        ends_at: float | None = None,
        promise: Promise | None = None,
    ) -> None:
        """`promise`: that `share` is of, where it may become more."""
        self.share = share
        self.ends_at = ends_at
        self._promise = promise
        self._config = config
        self._automatic = automatic_labels(config, share.total.gpus)
        self._given = config.labels
        #: what operators said of it, as it heard last
        self.operators: Mapping[str, str] = {}
        self.labels: Mapping[str, str] = self._all({})

    def heard(self, operators: Mapping[str, str]) -> bool:
        """What operators say of it now, which outranks what it was started with; whether that is news."""
        if operators == self.operators:
            return False
        self.operators = operators
        self.labels = self._all(operators)
        return True

    def grown(self) -> bool:
        """Take what others of its host have left; says whether that is anything."""
        if not self._promise or not self._promise.grow():
            return False
        self.share = self._promise.share
        self._automatic = automatic_labels(self._config, self.share.total.gpus)
        self.labels = self._all(self.operators)
        return True

    @property
    def elsewhere(self) -> Elsewhere | None:
        """What others of its host have, that it wanted."""
        return self._promise.elsewhere if self._promise else None

    def _all(self, operators: Mapping[str, str]) -> dict[str, str]:
        """Those that somebody gave come first."""
        given = {**self._given, **operators}
        return given | {name: value for name, value in self._automatic.items() if name not in given}

    def offer(self) -> Offer:
        """What sets of requirements are judged by."""
        total = self.share.total
        names = gpu_names(self.labels, (gpu.name for gpu in total.gpus))
        memories = tuple(gpu.memory_bytes for gpu in total.gpus)
        return Offer(
            self.labels, total.cpus, total.memory_bytes, memories, self._config.slots, self.ends_at, names
        )


def ends_at(limit_seconds: float | None) -> float | None:
    """Seconds of the epoch when a worker that begins now has lived for so long."""
    return None if limit_seconds is None else clock.wall().timestamp() + limit_seconds


def automatic_labels(
    config: WorkerConfig, gpus: tuple[Gpu, ...], environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The labels that each worker has: `host`, `os`, `arch`, `python`; where it applies `gpu_name` (all of
    them, each once) and `slurm_job_id`."""
    found = {
        "host": config.host,
        "os": platform.system().lower(),
        "arch": platform.machine(),
        "python": platform.python_version(),
        GPU_NAME: gpu_label(gpu.name for gpu in gpus),
        "slurm_job_id": environ.get("SLURM_JOB_ID", ""),
    }
    return {name: value for name, value in found.items() if value}
