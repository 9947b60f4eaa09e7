"""What a submission asks of Slurm, checked before Slurm sees it.

Lines of `#SBATCH` are read by sbatch, and no shell's quoting holds there: so each value is of a few
characters that cannot be anything but themselves, or it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from broker.errors import UsageError
from fleet.slurm import times

#: seconds before its end at which Slurm warns an allocation; at most a sixth of its time
WARNING_SECONDS = 120
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,127}"
_UNLIMITED = ("UNLIMITED", "INFINITE")
#: what --extra may not say, for an option of ours says it, or the script relies on it
_RESERVED = {
    "array": "--allocations",
    "job-name": "--job-name",
    "nodes": "--nodes",
    "ntasks": "--workers-per-node",
    "ntasks-per-node": "--workers-per-node",
    "output": "--output-dir",
    "signal": "",
    "time": "--time",
    "wrap": "",
}


@dataclass(frozen=True)
class Rule:
    """What the value of an option looks like, as a pattern and for people."""

    pattern: str
    told: str


_RULES = {
    "account": Rule(_NAME, "a name of letters, digits and _.@+-"),
    "partition": Rule(rf"{_NAME}(,{_NAME})*", "a name of letters, digits and _.@+-, or several with commas"),
    "qos": Rule(_NAME, "a name of letters, digits and _.@+-"),
    "mem": Rule(r"[0-9]{1,9}[KMGT]?", "a number with K, M, G or T, as 16G; without a unit it is MB"),
    "gpus": Rule(rf"({_NAME}:)?[0-9]{{1,4}}", "a number, or TYPE:NUMBER, as a100:2"),
    "constraint": Rule(r"[A-Za-z0-9_.,:!&|*()\[\]+-]{1,256}", "features as in sbatch(1), without blanks"),
    "job_name": Rule(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "letters, digits and _.-"),
    "output_dir": Rule(
        r"/[A-Za-z0-9_./@+=,:~-]*",
        "a path from / on, of letters, digits and _./@+=,:~-, for it stands in a line of #SBATCH",
    ),
}
#: more than these no Slurm has: it counts them in 16 bits, and a job array ends at 4,000,000 (slurm.conf(5))
_MOST = {"nodes": 65_533, "workers_per_node": 65_533, "cpus_per_task": 65_533, "allocations": 4_000_001}
_EXTRA = re.compile(r"--([a-z][a-z0-9-]*)(=[A-Za-z0-9_.,:/@%+=^*\[\]-]+)?")


@dataclass(frozen=True)
class Request:
    """Allocations of so many nodes each. '' and None: as the cluster has it."""

    nodes: int = 1
    workers_per_node: int = 1
    #: so many of them, each by itself: a job array where it is more than one
    allocations: int = 1
    #: of each worker
    cpus_per_task: int | None = None
    time: str = ""
    account: str = ""
    partition: str = ""
    qos: str = ""
    #: of each node
    mem: str = ""
    #: of each node
    gpus: str = ""
    constraint: str = ""
    extra: tuple[str, ...] = ()
    job_name: str = "fleet"
    #: where Slurm writes what workers say, in its folder `log`; absolute
    output_dir: str = "/tmp"

    @property
    def workers(self) -> int:
        """Of one allocation."""
        return self.nodes * self.workers_per_node

    @property
    def time_seconds(self) -> int | None:
        """Of its time limit, whole minutes as Slurm counts them; None: none, or the partition's."""
        seconds = times.seconds(self.time) if self.time else None
        return None if seconds is None else math.ceil(seconds / 60) * 60

    @property
    def warning_seconds(self) -> int:
        """How long before its end Slurm warns an allocation."""
        return min(WARNING_SECONDS, (self.time_seconds or 10**9) // 6)

    def checked(self) -> Request:
        """Itself. Raises UsageError for the first value that sbatch might take for something else."""
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if (value or name == "job_name") and not re.fullmatch(rule.pattern, value, re.ASCII):
                raise UsageError(f"--{name.replace('_', '-')} {value!r} is not {rule.told}")
        for name, most in _MOST.items():
            if (value := getattr(self, name) or 0) > most:
                raise UsageError(f"--{name.replace('_', '-')} {value} is more than the {most} of Slurm")
        self._check_time()
        for word in self.extra:
            _check_extra(word)
        return self

    def _check_time(self) -> None:
        if not self.time or self.time in _UNLIMITED:
            return
        if times.seconds(self.time) is None:
            raise UsageError(
                f"--time {self.time!r} is no time limit of Slurm",
                f"It is one of {times.FORMATS}, as 90 or 01:30:00.",
            )
        if not self.time_seconds:
            raise UsageError("--time 0 would be no limit at all to Slurm", "Say --time UNLIMITED.")

    def directives(self) -> Iterator[str]:
        """What follows `#SBATCH` in each line."""
        yield f"--job-name={self.job_name}"
        yield f"--nodes={self.nodes}"
        yield f"--ntasks-per-node={self.workers_per_node}"
        if self.allocations > 1:
            yield f"--array=0-{self.allocations - 1}"
        if self.cpus_per_task:
            yield f"--cpus-per-task={self.cpus_per_task}"
        for option in ("time", "account", "partition", "qos", "mem", "constraint"):
            if value := getattr(self, option):
                yield f"--{option}={value}"
        if self.gpus:
            yield f"--gpus-per-node={self.gpus}"
        yield f"--signal=B:TERM@{self.warning_seconds}"
        yield f"--output={self.output_dir.rstrip('/')}/log/slurm-%x-%j.log"
        # preempted, or requeued by an administrator, it starts again, and its log goes on; a node that
        # fails takes no other node's workers with it
        yield from ("--open-mode=append", "--requeue", "--no-kill")
        yield from self.extra


def _check_extra(word: str) -> None:
    found = _EXTRA.fullmatch(word)
    if not found:
        raise UsageError(
            f"--extra {word!r} is no option of sbatch that can stand in a script",
            "It looks like --name or --name=VALUE, without blanks, quotes, or what a shell reads: ;&|$`<>",
        )
    name = found[1]
    if reserved := [one for one in _RESERVED if one.startswith(name)]:  # sbatch takes short forms, too
        ours = _RESERVED[reserved[0]]
        hint = f"Use {ours} of fleet." if ours else "Workers rely on it as it is."
        raise UsageError(f"--extra may not say --{name}", hint)
