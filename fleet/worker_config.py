"""What a worker is told when it starts: one frozen record, carried as a 0600 JSON file.

Every launcher writes this file and starts `python -I -m fleet.worker --config FILE`, so a
worker is the same however it came to be started, and no secret is in a command line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from broker import names
from broker.errors import UsageError
from broker.requirements import SEPARATOR
from fleet import logs


@dataclass(frozen=True)
class WorkerConfig:
    """One worker: who it is, what it listens to, where it writes.

    `host` is the host's name in the hosts file, not gethostname; `output_dir` is absolute
    and shared by the workers of a host; `settings` are those of `broker.worker_settings.WorkerSettings`.
    """

    name: str
    host: str
    redis_url: str
    output_dir: str
    #: names, or all with a weight: NAME:3
    queues: tuple[str, ...] = ("default",)
    slots: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    #: "warm": a Python process kept for many jobs; "fork": a fresh process for each
    executor: str = "warm"
    executor_python: str = sys.executable
    #: put first on sys.path of executors
    paths: tuple[str, ...] = ()
    #: leave when the queues are empty
    burst: bool = False
    #: leave when no job of the queues is left that has not ended, wherever it waits or runs
    until_done: bool = False
    max_jobs: int | None = None
    idle_timeout_seconds: float | None = None
    #: begin at a moment within so many seconds that follows from host and name: fleet/jitter.py
    startup_delay_seconds: float = 0.0
    #: take the jobs of one set of requirements alone, of this digest; '': whatever it may take
    only_set: str = ""
    #: leave after one job, in the only slot
    ephemeral: bool = False
    #: the tunnel that `redis_url` leads into, for the worker's record
    tunnel: str | None = None
    #: what it is said to have of its host, by the arguments of `fleet.resources.detect`
    resources: Mapping[str, int] = field(default_factory=dict)
    #: that is the most it takes of what is left; else it has it, whatever others were promised
    is_modest: bool = False
    #: it is the one of this number, from 0, of so many that divide their host; one alone takes what is left
    sibling: int = 0
    siblings: int = 1
    #: after so long it has ended; jobs that cannot end before that are handed back
    time_limit_seconds: float | None = None
    #: it runs in a job of Slurm, which tells when that ends, and then ends all processes
    in_slurm: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: of fleet.logs
    log_format: str = "human"
    log_level: str = "info"

    def checked(self) -> WorkerConfig:
        """Return itself, or raise UsageError for the first thing that cannot be."""
        names.worker_name(self.name)
        if not self.queues:
            raise UsageError("a worker needs at least one queue", "Use --queues default.")
        names.weighted_queues(self.queues)
        if self.slots < 1:
            raise UsageError(f"--slots must be at least 1, got {self.slots}")
        if self.ephemeral and (self.slots, self.max_jobs) != (1, 1):
            raise UsageError(
                "an --ephemeral worker has one slot and leaves after one job",
                "Leave out --slots and --max-jobs, or --ephemeral.",
            )
        for name, value in self.labels.items():
            names.label_name(name)
            names.label_value(value)
        if self.executor not in ("warm", "fork"):
            raise UsageError(f"--executor must be warm or fork, got {self.executor!r}")
        if self.log_format not in logs.FORMATS or self.log_level not in logs.LEVELS:
            raise UsageError(
                f"no log of the form {self.log_format!r} and the level {self.log_level!r}",
                f"--log-format is {' or '.join(logs.FORMATS)}, --log-level {', '.join(logs.LEVELS)}.",
            )
        return self

    @property
    def served(self) -> tuple[str, ...]:
        """The queues whose jobs it takes, or the one sublist of each."""
        queues, _ = names.weighted_queues(self.queues)
        return tuple(f"{queue}{SEPARATOR}{self.only_set}" if self.only_set else queue for queue in queues)

    def as_ephemeral(self) -> WorkerConfig:
        """The same worker with one slot, and for one job."""
        return replace(self, ephemeral=True, slots=1, max_jobs=1)

    def to_json(self) -> str:
        """The file's text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerConfig:
        """Read what `to_json` wrote. Raises UsageError for anything else."""
        try:
            fields = dict(json.loads(text))
            fields |= {name: tuple(fields.get(name, ())) for name in ("queues", "paths")}
            return cls(**fields).checked()
        except (ValueError, TypeError) as exc:
            raise UsageError(f"cannot read the worker's configuration: {exc}") from exc


def state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """What workers of this user keep at a host: $XDG_STATE_HOME or ~/.local/state, rq-fleet."""
    home = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "rq-fleet"


def default_output_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where workers of this user write."""
    return state_dir(environ) / "work"


def this_host() -> str:
    """This machine's name as a worker's host: the first label of gethostname, made safe."""
    name = socket.gethostname().partition(".")[0]
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in name).strip("-_") or "localhost"
