"""How many jobs a worker may claim ahead of its slots, by how long jobs took lately."""

from __future__ import annotations

#: seconds for which a job may be held that is claimed ahead of the slots: a worker with nothing to do must
#: not wait for what another hoards; and seconds of work that are claimed, less, for jobs vary
AHEAD_SECONDS = 0.05
_WORK_SECONDS = 0.025
#: jobs for each slot that may be claimed ahead, however short they are
MOST_AHEAD = 128
#: what the newest job counts for
_WEIGHT = 0.2
_UNKNOWN = float("inf")


class Pace:
    """Running means of what jobs took, and of what those that waited for a slot waited for each before them.

    The second tells more where a slot stands empty between two jobs, but only of jobs that waited.
    Seconds; nothing is known of the first.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._ran = self._waited = _UNKNOWN

    def ran(self, seconds: float) -> None:
        """A job took so long."""
        self._ran = _mean(self._ran, seconds)

    def waited(self, seconds: float, before: int) -> None:
        """A job began after so long, when so many that were before it had begun."""
        if before >= self._slots:  # the first of many say little of how fast the rest will go
            self._waited = _mean(self._waited, seconds / before)

    def forget(self) -> None:
        """Jobs are not as short as they were."""
        self._ran = self._waited = _UNKNOWN

    def stock(self) -> int:
        """How many jobs may wait for a slot at once."""
        each = self._ran / self._slots
        if self._waited != _UNKNOWN:
            each = max(each, self._waited)
        return min(MOST_AHEAD * self._slots, int(_WORK_SECONDS / max(each, 1e-6)))


def _mean(known: float, seconds: float) -> float:
    return seconds if known == _UNKNOWN else (1 - _WEIGHT) * known + _WEIGHT * seconds
