"""What an attempt at a job used, as its worker measured it."""

from __future__ import annotations

import json
from typing import NamedTuple

_NUMBER = (int, float)


class Usage(NamedTuple):
    """CPU time of all its processes, seconds; the most memory they had, bytes. None: not known.

    `gpu_memory_bytes`: the most that was taken on the GPUs that it had to itself. What follows is known of
    those that ran long enough to be sampled: the mean of its memory, the most processes at once, bytes that
    it read from disks and wrote to them, and how busy its GPUs were on average, from 0 to 1.
    """

    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    mean_memory_bytes: int | None = None
    processes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    gpu_use: float | None = None

    def to_json(self) -> str:
        """For a job's hash; written out, for it is made once for each job."""
        cpu = "null" if self.cpu_seconds is None else f"{self.cpu_seconds:.6f}"
        memory = "null" if self.memory_bytes is None else self.memory_bytes
        gpus = "" if self.gpu_memory_bytes is None else f',"gpu_memory_bytes":{self.gpu_memory_bytes}'
        seen = "" if self.mean_memory_bytes is None else self._seen()
        return f'{{"cpu_seconds":{cpu},"memory_bytes":{memory}{gpus}{seen}}}'

    def _seen(self) -> str:
        """What samples told, as more fields of the same object."""
        known = {name: value for name, value in self._asdict().items() if value is not None}
        return "".join(f',"{name}":{json.dumps(known[name])}' for name in _SAMPLED if name in known)


_SAMPLED = ("mean_memory_bytes", "processes", "read_bytes", "written_bytes", "gpu_use")


def from_json(text: str) -> Usage | None:
    """What `to_json` wrote; None where there is nothing, or somebody's damage."""
    try:
        found = Usage(**json.loads(text))
    except (ValueError, TypeError):
        return None
    numbers = [value for value in found if value is not None]
    return found if all(isinstance(value, _NUMBER) and value >= 0 for value in numbers) else None
