"""What an attempt at a job used, as its worker measured it."""

from __future__ import annotations

import json
from typing import NamedTuple

_NUMBER = (int, float)


class Usage(NamedTuple):
    """CPU time of all its processes, seconds; the most memory they had, bytes. None: not known.

    `gpu_memory_bytes`: the most that was taken on the GPUs that it had to itself.
    """

    cpu_seconds: float | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None

    def to_json(self) -> str:
        """For a job's hash; written out, for it is made once for each job."""
        cpu = "null" if self.cpu_seconds is None else f"{self.cpu_seconds:.6f}"
        memory = "null" if self.memory_bytes is None else self.memory_bytes
        gpus = "" if self.gpu_memory_bytes is None else f',"gpu_memory_bytes":{self.gpu_memory_bytes}'
        return f'{{"cpu_seconds":{cpu},"memory_bytes":{memory}{gpus}}}'


def from_json(text: str) -> Usage | None:
    """What `to_json` wrote; None where there is nothing, or somebody's damage."""
    try:
        found = Usage(**json.loads(text))
    except (ValueError, TypeError):
        return None
    numbers = [value for value in found if value is not None]
    return found if all(isinstance(value, _NUMBER) and value >= 0 for value in numbers) else None
