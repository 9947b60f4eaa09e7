"""What a job needs of the worker that runs it. No Redis here.

Jobs that need the same, at the same priority, form a **set**: they wait in a list of their own beside
that of their queue, `default@DIGEST`. The digest is of the set's canonical form, so that every
producer finds the same one. A worker judges a set once, when it first sees it, by its `Offer`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from broker import amounts
from broker.errors import UsageError

#: names for priorities
PRIORITIES = {"low": -10, "normal": 0, "high": 10, "urgent": 20, "critical": 30}
_LARGEST_PRIORITY = 1_000_000_000
#: memory is counted in these, also by the scripts: what is asked for is rounded up, what is there down
MEBIBYTE = 2**20
#: CPUs and shares of a GPU are counted in thousandths
MILLI = 1000
_DIGITS = 3
_MOST = 1_000_000
#: between a queue's name and the digest of a set
SEPARATOR = "@"
_DIGEST_CHARACTERS = 10
_SUBLIST = re.compile(rf"[^{SEPARATOR}]+{SEPARATOR}[a-z2-7]{{{_DIGEST_CHARACTERS}}}")

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_RULE = re.compile(r"([^=!]*)(!?)=(.*)", re.DOTALL)
_LONGEST_GLOB = 200


#: the label of which rules hold for each GPU that is given
GPU_NAME = "gpu_name"


def gpu_label(names: Iterable[str]) -> str:
    """The label of a worker with GPUs of these names: each once."""
    return ",".join(dict.fromkeys(names))


def gpu_names(labels: Mapping[str, str], names: Iterable[str]) -> tuple[str, ...]:
    """What rules on `gpu_name` are judged by: names of the GPUs; none where somebody gave another label."""
    found = tuple(names)
    return found if labels.get(GPU_NAME) == gpu_label(found) else ()


@dataclass(frozen=True, order=True)
class LabelRule:
    """`key=glob`, or, negated, `key!=glob`. Globs as in a shell, and their case counts.

    `key=*` needs the label to be there, whatever it is; `key!=glob` holds where it is not there.
    """

    key: str
    glob: str
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.key}{'!' * self.negated}={self.glob}"

    def holds(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        return (value is not None and fnmatchcase(value, self.glob)) != self.negated


@dataclass(frozen=True)
class Offer:
    """What one worker is and has in all: memory in bytes; of each GPU its memory, 0: not known.

    `ends_at`: seconds of the epoch at which the worker has to go, None: it stays. `gpu_names`: see the
    function of that name.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 1
    memory_bytes: int = 0
    gpus: tuple[int, ...] = ()
    slots: int = 1
    ends_at: float | None = None
    gpu_names: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str | None, ...]:
        """Of each GPU what its label `gpu_name` is; None: it has none."""
        return self.gpu_names or (self.labels.get(GPU_NAME),) * len(self.gpus)


@dataclass(frozen=True)
class Mismatch:
    """One thing that an offer lacks.

    `what` is `label`, `cpus`, `memory`, `gpus`, `gpu_memory` or `time`, in that order; `asked` the rule, or
    the number of CPUs, bytes, GPUs or seconds; `has` the label's value, or the number that there is (for
    `gpus` and `gpu_memory`: how many will do), None where there is none.
    """

    what: str
    asked: LabelRule | float
    has: str | float | None


@dataclass(frozen=True)
class Requirements:
    """One set. Numbers are brought to their canonical form here; raises UsageError for what cannot be.

    `cpus`, `memory_bytes`: None where not said. `gpus`: a whole number, or a share of one below 1.
    `gpu_memory_bytes`: what each GPU given has in all; alone it means one GPU. `time_seconds`: the least that
    is left of the worker's life. `exclusive`: nothing else runs on that worker meanwhile.
    """

    cpus: float | None = None
    memory_bytes: int | None = None
    gpus: float = 0
    gpu_memory_bytes: int | None = None
    labels: tuple[LabelRule, ...] = ()
    time_seconds: float | None = None
    exclusive: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        gpus = self.gpus or (1 if self.gpu_memory_bytes else 0)
        settled = {
            "cpus": None if self.cpus is None else _checked_cpus(self.cpus),
            "memory_bytes": _whole_mebibytes(self.memory_bytes),
            "gpus": _checked_gpus(gpus),
            "gpu_memory_bytes": _whole_mebibytes(self.gpu_memory_bytes),
            "labels": tuple(sorted(set(self.labels))),
            "time_seconds": _short(self.time_seconds) if self.time_seconds else None,
            "priority": _checked_priority(self.priority),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    # --- the same for everybody ------------------------------------------------------------------

    def canonical(self) -> str:
        """JSON, the same for equal sets whoever writes it: sorted, without blanks and defaults."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        said["labels"] = [str(rule) for rule in self.labels]
        kept = {name: value for name, value in said.items() if value not in (None, False, 0, [])}
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_canonical(cls, text: str | bytes) -> Requirements:
        """What `canonical` wrote. Raises ValueError for anything else, as a newer producer may write."""
        try:
            said = json.loads(text)
            said["labels"] = tuple(label_rule(word) for word in said.get("labels", ()))
            return cls(**said)
        except (TypeError, AttributeError, KeyError, UsageError) as exc:
            raise ValueError(f"no set of requirements: {text!r}") from exc

    def digest(self) -> str:
        """Ten characters that stand for the set; '' where nothing is asked for."""
        canonical = self.canonical()
        if canonical == "{}":
            return ""
        hashed = hashlib.sha256(canonical.encode()).digest()
        return base64.b32encode(hashed)[:_DIGEST_CHARACTERS].decode().lower()

    def queue_of(self, base: str) -> str:
        """The name of the list in which jobs of this set wait, beside those of queue `base`."""
        digest = self.digest()
        return f"{base}{SEPARATOR}{digest}" if digest else base

    # --- for people ------------------------------------------------------------------------------

    def readable(self) -> str:
        """`cpus=2 memory=4G gpu_type=a100* priority=high`; '' where nothing is asked for."""
        words = [f"cpus={self.cpus}"] if self.cpus is not None else []
        if self.memory_bytes:
            words.append(f"memory={amounts.readable_size(self.memory_bytes)}")
        if self.gpus:
            words.append(f"gpus={self.gpus}")
        if self.gpu_memory_bytes:
            words.append(f"gpu_memory={amounts.readable_size(self.gpu_memory_bytes)}")
        words += [_quoted(str(rule)) for rule in self.labels]
        if self.time_seconds:
            words.append(f"time={amounts.readable_duration(self.time_seconds)}")
        if self.exclusive:
            words.append("exclusive")
        if self.priority:
            words.append(f"priority={readable_priority(self.priority)}")
        return " ".join(words)

    def beside(self, description: str) -> str:
        """A job's description with what it asks for, for RQ's tools; `apart` parts them again."""
        readable = self.readable()
        return f"{description} [{readable}]" if readable else description

    # --- against a worker ------------------------------------------------------------------------

    def takes_room(self) -> bool:
        """Whether a worker must count more for such a job than for one that asks for nothing."""
        return bool(self.cpus is not None or self.memory_bytes or self.gpus or self.exclusive)

    def matches(self, offer: Offer, now: float) -> bool:
        """Whether that worker could ever run such a job, were it idle at `now`, seconds of the epoch."""
        return not self.mismatches(offer, now)

    def mismatches(self, offer: Offer, now: float) -> list[Mismatch]:
        """Everything that the worker lacks; see `Mismatch`."""
        lacking = [
            Mismatch("label", rule, offer.labels.get(rule.key))
            for rule in self.labels
            if not self.met(rule, offer)
        ]
        if self.cpus is not None and self.cpus > offer.cpus:
            lacking.append(Mismatch("cpus", self.cpus, offer.cpus))
        if self.memory_bytes and self.memory_bytes > offer.memory_bytes:
            lacking.append(Mismatch("memory", self.memory_bytes, offer.memory_bytes))
        if self.gpus > len(offer.gpus):
            lacking.append(Mismatch("gpus", self.gpus, len(offer.gpus)))
        elif self.gpus and self.gpus > (enough := sum(self.gpus_enough(offer))):
            asked = Mismatch("gpus", self.gpus, enough)
            if self.gpu_memory_bytes:
                asked = Mismatch("gpu_memory", self.gpu_memory_bytes, enough)
            lacking.append(asked)
        if not self.in_time(offer.ends_at, now):
            lacking.append(Mismatch("time", self.time_seconds or 0, max(0.0, (offer.ends_at or 0) - now)))
        return lacking

    def met(self, rule: LabelRule, offer: Offer) -> bool:
        """Whether that worker meets one of its rules; of GPUs that are asked for one must."""
        if rule.key != GPU_NAME or not self.gpus or not offer.gpus:
            return rule.holds(offer.labels)
        return any(_meets(model, rule) for model in offer.models)

    def gpus_enough(self, offer: Offer) -> list[bool]:
        """Of each GPU whether it will do, whatever is to be said of rules that none of them meets."""
        met = tuple(rule for rule in self.labels if self.met(rule, offer))
        need = self if met == self.labels else replace(self, labels=met)
        each = zip(offer.gpus, offer.models, strict=True)
        return [need.gpu_is_enough(memory_bytes, model) for memory_bytes, model in each]

    def gpu_is_enough(self, memory_bytes: int, model: str | None) -> bool:
        """Whether a GPU of so much memory, with that label `gpu_name`, will do."""
        rules = (rule for rule in self.labels if rule.key == GPU_NAME)
        return memory_bytes >= (self.gpu_memory_bytes or 0) and all(_meets(model, rule) for rule in rules)

    def in_time(self, ends_at: float | None, now: float) -> bool:
        """Whether enough is left of a worker that has to go at `ends_at`."""
        return self.time_seconds is None or ends_at is None or ends_at - now >= self.time_seconds


def _meets(model: str | None, rule: LabelRule) -> bool:
    return rule.holds({} if model is None else {GPU_NAME: model})


def base_of(queue: str) -> str:
    """The queue to which a list belongs: `default` of `default@DIGEST`."""
    return queue.partition(SEPARATOR)[0]


def is_sublist(queue: str) -> bool:
    """Whether the name looks like `queue_of`; RQ's producers may have a queue `a@b`."""
    return _SUBLIST.fullmatch(queue) is not None


def apart(description: str, queue: str) -> tuple[str, str]:
    """What a job of that list is called, and what it asks for, as far as its description says so."""
    name, bracket, asks = description.rpartition(" [")
    if SEPARATOR in queue and bracket and asks.endswith("]"):
        return name, asks[:-1]
    return description, ""


# --- what people write ---------------------------------------------------------------------------


class FieldError(UsageError):
    """A field of requirements cannot be: `name` says which and `why`, for whoever knows where it stands."""

    def __init__(self, name: str, why: str, hint: str = "") -> None:
        super().__init__(f"{name}: {why}", hint)
        self.name = name
        self.why = why


def parse(said: Mapping[str, Any]) -> Requirements:
    """Requirements of what people write: words of a command line, or values of a file of jobs.

    Keys are those of `FIELDS`; None counts as not said. `labels` is a list of `k=glob` and `k!=glob`, or a
    mapping of keys to globs. Raises FieldError for one that is off, with the nearest name for an unknown one.
    """
    settled: dict[str, Any] = {}
    for name, value in said.items():
        if name not in FIELDS:
            raise FieldError(name, "there is no such requirement", _nearest(name))
        attribute, reader = FIELDS[name]
        if value is not None:
            settled[attribute] = _read(name, reader, value)
    return Requirements(**settled)


def label_rule(word: str) -> LabelRule:
    """`k=glob` or `k!=glob`. Raises UsageError."""
    found = _RULE.fullmatch(word)
    if not found or not _LABEL.fullmatch(found[1]):
        raise UsageError(
            f"{word!r} is no condition on a label", "Write k=glob or k!=glob, as gpu_type=a100*."
        )
    if not found[3] or len(found[3]) > _LONGEST_GLOB or not found[3].isprintable():
        raise UsageError(
            f"{word!r}: a glob has 1 to {_LONGEST_GLOB} printable characters",
            f"For any value write {found[1]}=*, for a label that is not there {found[1]}!=*.",
        )
    if found[3].startswith("="):
        raise UsageError(f"{word!r}: no label begins with =", f"Write {found[1]}{found[2]}{found[3]}.")
    return LabelRule(found[1], found[3], bool(found[2]))


def priority(value: str | int) -> int:
    """A whole number, or a name of `PRIORITIES`. Raises UsageError."""
    if str(value).lower() in PRIORITIES:
        return PRIORITIES[str(value).lower()]
    try:
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise ValueError
        return _checked_priority(int(value))
    except ValueError:
        names = ", ".join(PRIORITIES)
        raise UsageError(f"{value!r} is no priority", f"Use a whole number, or one of {names}.") from None


def readable_priority(number: int) -> str:
    """Its name where it has one."""
    names = {level: name for name, level in PRIORITIES.items()}
    return names.get(number, str(number))


def _labels(value: Any) -> tuple[LabelRule, ...]:
    if isinstance(value, Mapping):
        value = [f"{key}={glob}" for key, glob in value.items()]
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{value!r} is no list of conditions", "Write a list of k=glob and k!=glob.")
    return tuple(label_rule(str(word)) for word in value)


def _gpu_count(value: Any) -> float:
    return _checked_gpus(amounts.number(value))


def _memory(value: Any) -> int | None:
    return _whole_mebibytes(amounts.size(value))


def _cpu_count(value: Any) -> float:
    return _checked_cpus(amounts.number(value))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{value!r} is neither true nor false")
    return value


#: what people write -> the attribute it becomes, and how it is read
FIELDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "cpus": ("cpus", _cpu_count),
    "memory": ("memory_bytes", _memory),
    "gpus": ("gpus", _gpu_count),
    "gpu_memory": ("gpu_memory_bytes", _memory),
    "labels": ("labels", _labels),
    "time_request": ("time_seconds", amounts.duration),
    "exclusive": ("exclusive", _flag),
    "priority": ("priority", priority),
}


def _read(name: str, reader: Callable[[Any], Any], value: Any) -> Any:
    try:
        return reader(value)
    except UsageError as exc:
        raise FieldError(name, exc.message, exc.hint) from exc


def _nearest(name: str) -> str:
    import difflib  # a worker has no use for it

    near = difflib.get_close_matches(name, FIELDS, 1)
    return f"Did you mean {near[0]}?" if near else f"There are {', '.join(FIELDS)}."


# --- canonical numbers ---------------------------------------------------------------------------


def _short(value: float) -> float:
    """`value` to three digits, as an int where it is whole: the same number has one form."""
    rounded = round(value, _DIGITS)
    return int(rounded) if rounded == int(rounded) else rounded


def _checked_cpus(value: float) -> float:
    if not 10**-_DIGITS <= value <= _MOST:
        raise UsageError(f"{value:g} CPUs cannot be asked for", "Ask for 0.001 or more; 0.5 is half of one.")
    return _short(value)


def _checked_gpus(value: float) -> float:
    whole = value == int(value)
    if not (value == 0 or 10**-_DIGITS <= value <= _MOST) or (value > 1 and not whole):
        raise UsageError(
            f"{value:g} GPUs cannot be asked for",
            "Ask for a whole number of them, or for a share of one below 1.",
        )
    return _short(value)


def _checked_priority(value: int) -> int:
    if abs(value) > _LARGEST_PRIORITY:
        raise UsageError(f"{value} is no priority", f"At most {_LARGEST_PRIORITY}, as a number.")
    return value


def _whole_mebibytes(size_bytes: int | None) -> int | None:
    if size_bytes is not None and size_bytes < MEBIBYTE:
        raise UsageError(
            f"{size_bytes} bytes is too little to ask for", "Ask for 1M or more; sizes need a unit."
        )
    return None if size_bytes is None else -(-size_bytes // MEBIBYTE) * MEBIBYTE


def _quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word


#: what a job asks for that asks for nothing
NOTHING = Requirements()
