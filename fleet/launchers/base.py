"""What every launcher can do: the same eight verbs for SSH, this machine, Slurm, Kubernetes.

    probe    what is there: system, Python, resources, what of ours is installed
    install  bring the bundle; what is installed already costs nothing
    start    start workers, detached; a worker that lives is left alone
    inspect  what of ours runs there, and the end of its log
    stop     end workers, and look whether they ended
    files    list, fetch and remove what workers and jobs left
    unlink   remove files by their paths
    close    let go of whatever reaches the place

A launcher stands for one place where workers can be started: a host, an allocation, a
namespace. How it is opened differs (a connection, a command, an API) and is its own matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from broker.errors import FleetError
from fleet.bundle import Bundle
from fleet.resources import Gpu
from fleet.worker_config import WorkerConfig

if TYPE_CHECKING:
    from fleet.launchers.remote_files import RemoteFolder


@dataclass(frozen=True)
class Venv:
    """An environment that an earlier install left complete."""

    key: str
    python: str
    version: str
    #: seconds since the epoch, by the host's clock
    completed_at: float
    #: which of the Pythons and machines that share a home it is for
    tag: str


@dataclass(frozen=True)
class Seen:
    """A worker's process, as looked for at its host. `alive`: that very process, not its PID."""

    name: str
    alive: bool
    pid: int | None = None
    version: str | None = None
    #: the last lines of its log, where they were asked for
    log: str = ""


@dataclass(frozen=True)
class Probe:
    """What a host is. Sizes in bytes; `clock_skew_seconds` positive where its clock is ahead."""

    system: str
    machine: str
    python: str
    python_version: str
    #: whether that Python can make virtual environments that have pip
    can_make_venvs: bool
    cpus: int
    memory_bytes: int
    free_disk_bytes: int
    gpus: tuple[Gpu, ...]
    clock_skew_seconds: float
    home: str
    #: where the bundle is installed, and where workers write unless told otherwise
    data_dir: str
    output_dir: str
    venvs: tuple[Venv, ...] = ()
    #: whether the host is the machine that we run on, so that our loopback is its own
    is_here: bool = False
    #: this machine's address as the host sees it; None where that is not known
    our_address: str | None = None
    #: whether somebody named `python`; else it is only the first that was found
    python_was_named: bool = False
    #: the version of rq-fleet that `python` has, if it was named; None: it has none
    fleet_version: str | None = None
    #: a uv to install with: one that was named, or where `python` cannot make environments
    uv: str | None = None
    #: the tag of the environments that `python` makes
    venv_tag: str = ""
    #: what decides which wheels fit `python`: its markers of PEP 508, "cp311", "glibc 2.36"
    markers: Mapping[str, str] = field(default_factory=dict)
    abi: str = ""
    libc: str = ""

    @property
    def in_use(self) -> tuple[str, str]:
        """The interpreter for workers where nothing is to be installed, and its rq-fleet's version.

        Raises InstallFailed.
        """
        if self.python_was_named:
            if self.fleet_version is None:
                raise InstallFailed(
                    f"rq-fleet is not installed for {self.python}",
                    "Install it for that Python, or leave out --no-install.",
                )
            return self.python, self.fleet_version
        ours = [venv for venv in self.venvs if venv.tag == self.venv_tag]
        if ours:
            return ours[-1].python, ours[-1].version
        raise InstallFailed(
            f"rq-fleet is not installed under {self.data_dir}",
            "Leave out --no-install, or name an interpreter that has it: python=PATH.",
        )

    def installed(self, key: str) -> str | None:
        """The interpreter in which the bundle of that key is installed already, for `python`; or None."""
        found = [venv.python for venv in self.venvs if (venv.key, venv.tag) == (key, self.venv_tag)]
        return found[-1] if found else None


@dataclass(frozen=True)
class Started:
    """A worker after `start`; `fresh` is false where it lived already and was left alone."""

    name: str
    pid: int
    fresh: bool
    version: str | None = None
    #: whether it runs with other options than were asked for now, or did before it was replaced
    other_options: bool = False
    #: the version of the worker that it replaced
    replaced: str | None = None


@dataclass(frozen=True)
class Stopped:
    """A worker after `stop`. `how`: "stopped", "killed", "not running" or "remains"."""

    name: str
    pid: int | None
    how: str


class Launcher(Protocol):
    """One place where workers can be started. Every verb raises HostError."""

    async def probe(self, *, fetch_python: bool = False) -> Probe:
        """Look at the place. Raises NoPython.

        `fetch_python`: where there is none that will do, but a uv, have that fetch one.
        """
        ...

    async def install(self, bundle: Bundle, wheelhouse: Path | None = None) -> str:
        """The interpreter in which `bundle` is importable, installed first where it is not.

        `wheelhouse`: a folder here with all wheels that it needs; None: they come from an index.
        Raises InstallFailed; an older install then works on.
        """
        ...

    async def start(
        self,
        python: str,
        orders: Sequence[WorkerConfig],
        *,
        replace: Mapping[str, str | None] | None = None,
        grace_seconds: float = 0.0,
    ) -> tuple[Started, ...]:
        """Start, by the interpreter `python`, each worker that does not live. Raises StartFailed.

        Those in `replace` that live with that version still are ended first, as by `stop`.
        """
        ...

    async def inspect(self, output_dir: str | None, base: str, *, log_lines: int = 0) -> tuple[Seen, ...]:
        """The workers BASE-0, BASE-1 ... that left a trace in `output_dir`; None: the default one."""
        ...

    async def stop(
        self, output_dir: str | None, base: str, *, grace_seconds: float, force: bool = False
    ) -> tuple[Stopped, ...]:
        """End these workers: SIGTERM, the grace, SIGKILL to their process groups; then look."""
        ...

    def files(self, output_dir: str | None, base: str) -> RemoteFolder:
        """What its workers and jobs left in `output_dir`; None: the default one."""
        ...

    async def unlink(self, paths: Sequence[str]) -> None:
        """Remove these files, so far as they are there."""
        ...

    async def close(self) -> None:
        """Let go of the place, or do nothing where that was done. Never raises; workers run on."""
        ...


class HostError(FleetError):
    """Something went wrong at, or on the way to, one host. The other hosts go on."""

    code = "host"


class ConnectError(HostError):
    """The host could not be reached."""

    code = "connect"


class NameNotResolved(ConnectError):
    """No address is known for that name."""

    code = "name_not_resolved"


class Refused(ConnectError):
    """The host is there, but nothing listens on the port."""

    code = "refused"


class TimedOut(ConnectError):
    """No answer, or only half of one, within the time."""

    code = "connect_timeout"


class KeyDenied(ConnectError):
    """The host knows none of our keys for that user."""

    code = "permission_denied"


class HostKeyChanged(ConnectError):
    """The host shows another key than the one recorded."""

    code = "host_key_changed"


class HostKeyUnknown(ConnectError):
    """No key of the host is recorded, and StrictHostKeyChecking is yes."""

    code = "host_key_unknown"


class Disconnected(HostError):
    """The connection broke in the middle."""

    code = "disconnected"


class CommandTimeout(HostError):
    """A command at the host did not end in its time."""

    code = "command_timeout"


class CommandFailed(HostError):
    """A command at the host ended in a way that we cannot read."""

    code = "command_failed"


class NoPython(HostError):
    """No Python that is new enough; `uv` is one there that might fetch one, or ""."""

    code = "no_python"

    def __init__(self, message: str, hint: str = "", *, uv: str = "") -> None:
        super().__init__(message, hint)
        self.uv = uv


class HostBusy(HostError):
    """Another `fleet up` or `fleet down` is at work there."""

    code = "host_busy"


class InUse(HostError):
    """A worker lives there that uses what was to be removed."""

    code = "in_use"


class DiskFull(HostError):
    """No space, or no quota, left where we have to write."""

    code = "disk_full"


class InstallFailed(HostError):
    """The bundle could not be installed, or is not there where it should be used as it is."""

    code = "install_failed"


class VersionMismatch(HostError):
    """The rq-fleet that is to be used as it is there is of another version than ours."""

    code = "version_mismatch"


class StartFailed(HostError):
    """The worker could not be started."""

    code = "start_failed"


class WorkerDied(StartFailed):
    """The worker ended before it registered."""

    code = "worker_died"


class RedisNotReached(WorkerDied):
    """The worker ended because Redis does not answer where that host looks for it."""

    code = "redis_not_reached"


class NotRegistered(StartFailed):
    """The worker runs, but has not registered in Redis."""

    code = "not_registered"


class RedisOutOfReach(HostError):
    """Redis listens on loopback, and the host is another machine."""

    code = "redis_on_loopback"
