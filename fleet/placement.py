"""Which jobs this worker may be given: the sets of requirements that it satisfies, and what fits now.

A set is judged when it is first seen. With a claim goes what that came to, packed for the scripts
(broker/scripts/_place.lua), and what is free; a worker that satisfies no set says nothing, and pays nothing.
For one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from broker import clock
from broker.fitting import Free
from broker.requirements import SEPARATOR, Offer, Requirements
from broker.sets import Known, News
from broker.work import NO_PLACES, Places
from broker.worker_settings import WorkerSettings
from fleet.room import Grant, Room, mebibytes_of

#: a reservation holds for so many beats; each claim renews it
_HOLD_BEATS = 2
_FOREVER = float("inf")


@dataclass(frozen=True)
class _Mine:
    """A sublist that the worker satisfies, and what a job of it counts: in thousandths of a CPU, and MiB."""

    base: str
    digest: str
    need: Requirements
    milli_cpus: int
    mebibytes: int


class NoRoom(Exception):
    """A job came for which there is no room any more; another worker may have some."""


class Placement:
    """The worker's side of placement; `room` is shared with nobody."""

    def __init__(
        self, bases: Sequence[str], offer: Offer, room: Room, settings: WorkerSettings, only_set: str = ""
    ) -> None:
        """`only_set`: the digest of the one set of which it takes jobs; '': of all, and plain ones."""
        self._bases = tuple(bases)
        self._only_set = only_set
        self._offer = offer
        self.room = room
        self.room.call_gpus(offer.models)
        self._settings = settings
        self._known: dict[str, dict[str, Requirements]] = {base: {} for base in bases}
        self._mine: dict[str, _Mine] = {}
        #: of the sets that it knows
        self.version = 0
        #: the list for whose first job room is held, or ''
        self.held = ""
        self._packed: Mapping[str, str] | None = None
        #: the lists of which a job would fit, and the room for which that is true
        self._lists: tuple[str, ...] | None = None
        self._room_of_lists: tuple[Free, bool, str] | None = None
        #: when the first of its sets asks for more time than is left, seconds of the epoch
        self._until = _FOREVER

    # --- sets ------------------------------------------------------------------------------------

    def learn(self, found: Known) -> None:
        """Forget what was known, and know these."""
        self.version = found.version
        self._known = {base: dict(found.sets.get(base, {})) for base in self._bases}
        self._judge()

    def hear(self, news: News) -> bool:
        """One set more, or less. False: something was missed, and all must be read anew."""
        if news.version != self.version + 1:
            return news.version <= self.version and self._is_known(news)
        self.version = news.version
        if news.base in self._known and news.need is None:
            self._known[news.base].pop(news.digest, None)
            self._judge()
        elif news.base in self._known and news.need:
            self._known[news.base][news.digest] = news.need
            self._judge_one(news.base, news.digest, news.need, clock.wall().timestamp())
        return True

    def _is_known(self, news: News) -> bool:
        """Whether it tells what was learned before it came; else Redis has lost what it had."""
        return news.base not in self._known or self._known[news.base].get(news.digest) == news.need

    def offer(self, offer: Offer) -> None:
        """The worker is something else from now on: its labels have changed, or `room` has become more."""
        self._offer = offer
        self.room.call_gpus(offer.models)
        self._judge()

    def _judge(self) -> None:
        self._mine, self._packed, self._lists, self._until = {}, None, None, _FOREVER
        now = clock.wall().timestamp()
        for base, sets in self._known.items():
            for digest, need in sets.items():
                self._judge_one(base, digest, need, now)

    def _judge_one(self, base: str, digest: str, need: Requirements, now: float) -> None:
        self._packed = self._lists = None
        if self._only_set not in ("", digest):
            return
        if not need.matches(self._offer, now):
            return
        cost = self.room.milli_cpus_of(need), mebibytes_of(need)
        self._mine[f"{base}{SEPARATOR}{digest}"] = _Mine(base, digest, need, *cost)
        if need.time_seconds and self._offer.ends_at is not None:
            self._until = min(self._until, self._offer.ends_at - need.time_seconds)

    def _keep_time(self) -> None:
        """Drop the sets for which too little is left of this worker's life."""
        if clock.wall().timestamp() > self._until:
            self._judge()

    def sublists(self) -> Iterable[str]:
        """Those that the worker serves."""
        return self._mine.keys()

    @property
    def is_useless(self) -> bool:
        """Whether it was started for one set, and does not satisfy it."""
        return bool(self._only_set and self.version and not self._mine)

    # --- claims ----------------------------------------------------------------------------------

    def places(self, popped: Iterable[str]) -> Places:
        """What to say with a claim; `popped`: lists of which tokens were taken."""
        self._keep_time()
        if not self._mine and not self._only_set:
            return NO_PLACES
        if self._packed is None:
            self._packed = {base: self._pack(base) for base in self._bases}
        return Places(self._free(), tuple(popped), self._packed)

    def _pack(self, base: str) -> str:
        levels: dict[int, list[str]] = {}
        for mine in self._mine.values():
            if mine.base == base:
                entry = f"{mine.digest}={mine.milli_cpus},{mine.mebibytes},{self._kind(mine.need)};"
                levels.setdefault(mine.need.priority, []).append(entry)
        return "|".join(f"{priority};{''.join(entries)}" for priority, entries in levels.items())

    def _kind(self, need: Requirements) -> str:
        """As _place.lua has it."""
        if not need.takes_room():
            return "a"
        if need.exclusive:
            return "x"
        if need.gpus:
            return "g" if self.room.gpus_fit(need, self._held_need()) else "G"
        return "r"

    def _held_need(self) -> Requirements | None:
        """What the job asks for that room is held for."""
        held = self._mine.get(self.held)
        return held.need if held else None

    def _free(self) -> str:
        """The first argument of place.begin."""
        free, plain = self.room.free(), self.room.plain_milli_cpus
        words = [
            free.milli_cpus,
            free.mebibytes,
            free.milli_cpus + plain * bool(self.room.plain),
            int(self.room.is_used),
            "-" if self._only_set else f"{plain},0,a",
            int(self._settings.priority_ageing_seconds * 1000),
            int(self._settings.reserve_after_seconds * 1000),
            int(self._settings.heartbeat_seconds * 1000 * _HOLD_BEATS),
        ]
        if held := self._mine.get(self.held):
            words += [self.held, f"{held.milli_cpus},{held.mebibytes},{self._kind(held.need)}"]
        return " ".join(map(str, words))

    def hold(self, queue: str) -> bool:
        """Room is to be held for the first job of that list; '': for none. Says whether that is new."""
        if queue == self.held:
            return False
        self.held, self._packed = queue, None
        return True

    # --- waiting ---------------------------------------------------------------------------------

    def lists(self) -> tuple[str, ...]:
        """The lists of which one more job could begin now: tokens of others would be of no use."""
        if not self._mine:
            return () if self._only_set else self._bases
        self._keep_time()
        room = self.room.free(), self.room.is_used, self.held
        if self._lists is None or room != self._room_of_lists:
            self._room_of_lists, self._lists = room, tuple(self._fitting())
        return self._lists

    def _fitting(self) -> Iterator[str]:
        free = self.room.free()
        slots, milli_cpus, mebibytes = free.slots, free.milli_cpus, free.mebibytes
        if held := self._mine.get(self.held):
            slots, milli_cpus, mebibytes = slots - 1, milli_cpus - held.milli_cpus, mebibytes - held.mebibytes
            if held.need.exclusive:
                return
        if slots < 1:
            return
        if self.room.plain_milli_cpus <= milli_cpus and not self._only_set:
            yield from self._bases
        for queue, mine in self._mine.items():
            if mine.milli_cpus <= milli_cpus and mine.mebibytes <= mebibytes and self._is_open_to(mine.need):
                yield queue

    def _is_open_to(self, need: Requirements) -> bool:
        if need.exclusive:
            return not self.room.is_used
        return not need.gpus or self.room.gpus_fit(need, self._held_need())

    # --- jobs ------------------------------------------------------------------------------------

    def count(self, jobs: int) -> None:
        """So many jobs run here, or are held to run."""
        self.room.plain = max(0, jobs - len(self.room))

    def take(self, lease: str, queue: str) -> Grant | None:
        """Take room for a job of that list; None where it counts as any other. Raises NoRoom."""
        if SEPARATOR not in queue:
            return None
        base, _, digest = queue.partition(SEPARATOR)
        need = self._known.get(base, {}).get(digest)
        if need is None or not need.takes_room():
            return None
        self._forget_gpus()
        try:
            return self.room.take(lease, need, self._held_need())
        except ValueError as exc:
            raise NoRoom(str(exc)) from exc

    def give_back(self, lease: str) -> None:
        """The job has ended, or will not begin here."""
        if lease in self.room:
            self.room.give_back(lease)
            self._forget_gpus()

    def _forget_gpus(self) -> None:
        """Those that were packed as free may be so no longer, and the other way round."""
        if self._offer.gpus:
            self._packed = None

    def free(self) -> Mapping[str, object]:
        """What is left, for the worker's record. Safe in other threads."""
        return asdict(self.room.free())
