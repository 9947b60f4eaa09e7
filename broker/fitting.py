"""Why workers do not take the jobs of a set, in words and numbers. No Redis here.

`unmatched` says what no worker has at all, `without_room` what those that match have not free now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker import amounts
from broker.requirements import MEBIBYTE, MILLI, LabelRule, Offer, Requirements

#: values of a label that are named before the rest is only counted
_NAMED = 6
#: what is counted -> how the worker that has the most of it is called
_BEST = {
    "cpus": "the largest has",
    "memory": "the largest has",
    "gpus": "the one with the most has",
    "time": "the one that stays longest has",
}


@dataclass(frozen=True)
class Reason:
    """One reason why a job is where it is: `code` for programs, `numbers` what its message says."""

    code: str
    message: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Free:
    """What a worker has left. `gpus`: of each GPU the share that is left, 0 to 1."""

    slots: int
    cpus: float
    memory_bytes: int
    gpus: tuple[float, ...]

    @property
    def milli_cpus(self) -> int:
        return round(self.cpus * MILLI)

    @property
    def mebibytes(self) -> int:
        return self.memory_bytes // MEBIBYTE


# --- nobody could ever run it ----------------------------------------------------------------------


def unmatched(need: Requirements, offers: Sequence[Offer], now: float) -> list[Reason]:
    """What none of `offers` has; none of them matches, at `now`, seconds of the epoch."""
    reasons = list(_labels(need, offers))
    fitting = [offer for offer in offers if all(need.met(rule, offer) for rule in need.labels)]
    chosen = fitting or offers
    who = _who(len(chosen), by_labels=bool(fitting and need.labels))
    has = [_totals(need, offer, now) for offer in chosen]
    lacking = _lacking(need, has)
    reasons += [_too_little("no_match", need, who, what, [row[what] for row in has]) for what in lacking]
    return reasons or [_never_together(need, has, who)]


def _labels(need: Requirements, offers: Sequence[Offer]) -> Iterator[Reason]:
    """Each condition that no worker meets or, where each is met by some, that no worker meets all."""
    met = {rule: sum(need.met(rule, offer) for offer in offers) for rule in need.labels}
    for rule, count in met.items():
        if not count:
            yield _unmet(rule, offers)
    meets_all = any(all(need.met(rule, offer) for rule in need.labels) for offer in offers)
    if all(met.values()) and not meets_all:
        each = ", ".join(f"{count} {_has(count)} {rule}" for rule, count in met.items())
        yield Reason("no_match", f"no worker has all of these labels at once: of {len(offers)}, {each}")


def _unmet(rule: LabelRule, offers: Sequence[Offer]) -> Reason:
    seen = sorted({offer.labels[rule.key] for offer in offers if rule.key in offer.labels})
    named = ", ".join(seen[:_NAMED]) + (f" and {len(seen) - _NAMED} more" if len(seen) > _NAMED else "")
    found = f"seen {'is' if len(seen) == 1 else 'are'} {named}" if seen else f"none has a label {rule.key}"
    return Reason("no_match", f"no worker has {rule}: {found}", {"label": str(rule), "seen": seen})


def _never_together(need: Requirements, has: Sequence[Mapping[str, float]], who: str) -> Reason:
    each = []
    for what, amount in _asked(need).items():
        count = sum(row[what] >= amount for row in has)
        each.append(f"{count} {_has(count)} {_readable(need, what, amount)}")
    return Reason("no_match", f"{who}; none has all that is asked for: {', '.join(each)}")


# --- it has to wait for room -----------------------------------------------------------------------


def fits(need: Requirements, offer: Offer, free: Free) -> bool:
    """Whether a worker has room for it now."""
    idle = not need.exclusive or free.slots == offer.slots
    has, asked = _left(need, offer, free), _asked(need, plain=_plain_cpus(offer))
    return idle and all(has[what] >= amount for what, amount in asked.items() if what != "time")


def beside(held: Requirements, offer: Offer, free: Free) -> Free:
    """What a worker that holds room for a job which asks for `held` gives to others."""
    if held.exclusive:
        return Free(0, 0, 0, ())
    cpus = _plain_cpus(offer) if held.cpus is None else held.cpus
    most_left = sorted(range(len(free.gpus)), key=lambda index: free.gpus[index], reverse=True)
    kept = set(most_left[: math.ceil(held.gpus)])
    gpus = tuple(0.0 if index in kept else left for index, left in enumerate(free.gpus))
    return Free(free.slots - 1, free.cpus - cpus, free.memory_bytes - (held.memory_bytes or 0), gpus)


def without_room(need: Requirements, workers: Sequence[tuple[Offer, Free]]) -> Reason:
    """What those that match have not free now; none of them has room."""
    who = f"{_count(len(workers), 'worker')} {'matches' if len(workers) == 1 else 'match'}, all busy"
    has = [_left(need, offer, free) for offer, free in workers]
    asked = _asked(need, plain=min(_plain_cpus(offer) for offer, _ in workers))
    if not any(row["slots"] for row in has):
        slots = _count(sum(offer.slots for offer, _ in workers), "slot")
        return Reason("busy", f"{who}: none of their {slots} is free", {"workers": len(workers)})
    if need.cpus is None and all(row["cpus"] < asked["cpus"] for row in has):
        return Reason("busy", f"{who}: their CPUs are taken by jobs that asked for them")
    for what in ("cpus", "memory", "gpus"):
        if what in asked and all(row[what] < asked[what] for row in has):
            return _too_little("busy", need, who, what, [row[what] for row in has], "free")
    if need.exclusive:
        return Reason("busy", f"{who}; exclusive: it waits until one of them runs nothing")
    return Reason("busy", f"{who}; none of them has all that is asked for free at once")


def _plain_cpus(offer: Offer) -> float:
    """What a job counts that asks for no CPUs; as fleet/room.py."""
    return min(1000, round(offer.cpus * 1000) // offer.slots) / 1000


# --- what is asked for, and what there is ----------------------------------------------------------


def _asked(need: Requirements, plain: float | None = None) -> dict[str, float]:
    """What is asked for -> how much; `plain`: of a worker that runs other jobs, so many CPUs go to each."""
    asked: dict[str, float | None] = {
        "slots": None if plain is None else 1,
        "cpus": need.cpus if need.cpus is not None else plain,
        "memory": need.memory_bytes,
        "gpus": need.gpus or None,
        "time": need.time_seconds,
    }
    return {what: amount for what, amount in asked.items() if amount is not None}


def _totals(need: Requirements, offer: Offer, now: float) -> dict[str, float]:
    return {
        "cpus": offer.cpus,
        "memory": offer.memory_bytes,
        "gpus": sum(need.gpus_enough(offer)),
        "time": math.inf if offer.ends_at is None else max(0.0, offer.ends_at - now),
    }


def _left(need: Requirements, offer: Offer, free: Free) -> dict[str, float]:
    shares = [left for left, enough in zip(free.gpus, need.gpus_enough(offer), strict=False) if enough]
    whole = sum(left >= 1 for left in shares)
    gpus = max(shares, default=0) if need.gpus < 1 else whole
    return {"slots": free.slots, "cpus": free.cpus, "memory": free.memory_bytes, "gpus": gpus}


def _lacking(need: Requirements, has: Sequence[Mapping[str, float]]) -> list[str]:
    """Of what no worker has enough."""
    return [what for what, amount in _asked(need).items() if all(row[what] < amount for row in has)]


def _too_little(
    code: str, need: Requirements, who: str, what: str, has: Sequence[float], free: str = ""
) -> Reason:
    asked, best = _asked(need, plain=1 if free else None)[what], max(has)
    left = " left" if what == "time" else f" {free}" if free else ""
    there, wanted = _bare(what, best), _readable(need, what, asked)
    if there == wanted and what == "memory":
        there, wanted = amounts.readable_size(int(best)), amounts.readable_size(int(asked))
    words = f"{_BEST[what]} {there}{left} of the {wanted} asked for"
    return Reason(code, f"{who}; {words}", {"what": what, "asked": asked, "largest": best})


def _bare(what: str, amount: float) -> str:
    """An amount beside another one, which says the unit."""
    if what == "memory":
        return amounts.rough_size(amount)
    return amounts.readable_duration(math.floor(amount)) if what == "time" else f"{amount:g}"


def _readable(need: Requirements, what: str, amount: float) -> str:
    if what in ("memory", "time"):
        return _bare(what, amount)
    unit = "CPU" if what == "cpus" else "GPU"
    size = (
        f" of {amounts.rough_size(need.gpu_memory_bytes)}" if unit == "GPU" and need.gpu_memory_bytes else ""
    )
    return f"{amount:g} {unit}{'' if amount == 1 else 's'}{size}"


def _who(count: int, *, by_labels: bool) -> str:
    if by_labels:
        return f"{_count(count, 'worker')} {'matches' if count == 1 else 'match'} the labels"
    return f"{_count(count, 'worker')} on the queue"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _has(count: int) -> str:
    return "has" if count == 1 else "have"
