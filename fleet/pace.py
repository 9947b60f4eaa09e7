"""How many jobs a worker may claim ahead of its slots, by how long jobs took lately."""

from __future__ import annotations

#: seconds for which a job may be held that is claimed ahead of the slots: a worker with nothing to do must
#: not wait for what another hoards; and seconds of work that are claimed, less, for jobs vary
AHEAD_SECONDS = 0.05
_WORK_SECONDS = 0.025
#: jobs for each slot that may be claimed ahead, however short they are
MOST_AHEAD = 32
#: what the newest job counts for
_WEIGHT = 0.2
_UNKNOWN = float("inf")


class Pace:
    """A running mean of what jobs took, in seconds; nothing is known of the first."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._seconds = _UNKNOWN

    def note(self, seconds: float) -> None:
        """A job took so long."""
        known = self._seconds != _UNKNOWN
        self._seconds = (1 - _WEIGHT) * self._seconds + _WEIGHT * seconds if known else seconds

    def forget(self) -> None:
        """Jobs are not as short as they were."""
        self._seconds = _UNKNOWN

    def stock(self) -> int:
        """How many jobs may wait for a slot at once."""
        return min(MOST_AHEAD * self._slots, int(_WORK_SECONDS * self._slots / max(self._seconds, 1e-6)))
