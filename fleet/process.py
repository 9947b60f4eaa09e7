"""Start a command as a process group of its own, watch it end, and end it."""

from __future__ import annotations

import errno
import functools
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import psutil

#: errors that are the host's fault, not the job's: another host may well run it
_HOST_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
}
_DEFAULT_PATH = os.defpath
_DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
#: of ru_maxrss, bytes
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
#: what a child must have had, as a multiple of what we had: the kernel counts each CPU's pages in batches
_FLOOR = 1.02
#: the most memory we had when we looked last, in units of ru_maxrss
_had_ourselves = [0]
#: where programs were found last, and how many of them are remembered; looked at again before use
_resolved: dict[tuple[str, str], str] = {}
_MOST_RESOLVED = 1000


class CannotStart(Exception):
    """A command did not start. `host_fault`: nothing is wrong with the job, this host cannot run any."""

    def __init__(self, reason: str, *, host_fault: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.host_fault = host_fault


class Exit(NamedTuple):
    """How a process ended: exit code or signal number, and what it used (seconds; bytes, 0: not known)."""

    code: int | None
    signal: int | None
    cpu_seconds: float = 0.0
    max_rss_bytes: int = 0


def host_error(exc: OSError, doing: str) -> CannotStart:
    """`exc` as a reason not to start, told apart by whose fault it is."""
    return CannotStart(f"{doing}: {exc.strerror or exc}", host_fault=exc.errno in _HOST_ERRORS)


def bound_to(cpu_ids: tuple[int, ...]) -> AbstractContextManager[None]:
    """What this thread starts inside may run on these CPUs alone; none: on all that the thread may.

    It is the thread that is bound, for that moment, so that no instruction of the child runs elsewhere.
    """
    return _bound_to(cpu_ids) if cpu_ids and hasattr(os, "sched_setaffinity") else nullcontext()


@contextmanager
def _bound_to(cpu_ids: tuple[int, ...]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpu_ids)
        yield
    finally:
        os.sched_setaffinity(0, before)


def spawn(
    argv: tuple[str, ...], env: Mapping[bytes, bytes], cwd: str, files: tuple[int, int, int], home: int
) -> int:
    """Start `argv` as a process group of its own and return its process id, which is the group's.

    `files` become stdin, stdout and stderr; `home` is the directory (a file number) that this
    process returns to: posix_spawn, unlike fork, has no way to set the child's directory, and
    fork would cost milliseconds in a process of our size. Only the main thread may call this.
    Raises CannotStart.
    """
    try:
        os.chdir(cwd)
    except (OSError, ValueError) as exc:
        raise CannotStart(f"working directory {cwd}: {getattr(exc, 'strerror', exc)}") from exc
    try:
        return os.posix_spawn(
            resolve(argv[0], os.fsdecode(env.get(b"PATH", _DEFAULT_PATH))),
            argv,
            env,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(files)],
            **_apart(),
            setsigmask=(),
            setsigdef=_reset_signals(),
        )
    except OSError as exc:
        raise _explained(argv[0], exc) from exc
    finally:
        os.fchdir(home)


@functools.cache
def _apart() -> dict[str, Any]:
    """What sets a job apart from this process, and from its terminal if it has one.

    A session does both, but where jobs need none it is not free: to Linux each is a group of tasks
    (autogroup, sched(7)) that is made, scheduled and taken down.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return {"setpgroup": 0}
    return {"setsid": True}


@functools.cache
def _reset_signals() -> tuple[int, ...]:
    """What a job finds as it is by default: all but what whoever started this process ignores, nohup for one.

    Of exec what is handled here gets its default anyway. But of each signal that is not named the C library
    asks in the new process how it is handled, while this one waits.
    """
    ours = {signal.SIGPIPE, signal.SIGXFSZ}  # which Python ignores
    return tuple(n for n in signal.valid_signals() if n in ours or signal.getsignal(n) != signal.SIG_IGN)


def resolve(program: str, path: str) -> str:
    """The file that `program` names on `path`, as execvp finds it. Raises CannotStart."""
    if "/" in program:
        return program
    found = _resolved.get((program, path))
    if found and os.access(found, os.X_OK):
        return found
    candidates = [f"{folder or '.'}/{program}" for folder in path.split(":")]
    for candidate in candidates:
        if os.access(candidate, os.X_OK) and not Path(candidate).is_dir():
            if len(_resolved) >= _MOST_RESOLVED:
                _resolved.clear()
            _resolved[program, path] = candidate
            return candidate
    if any(Path(candidate).is_file() for candidate in candidates):
        raise CannotStart(f"not executable: {program}")
    raise CannotStart(f"command not found: {program}")


def _explained(program: str, exc: OSError) -> CannotStart:
    if exc.errno == errno.ENOENT:
        # a script whose #! names no program gives ENOENT too
        if Path(program).exists():
            return CannotStart(f"the interpreter named by {program} was not found")
        if not program.startswith("/"):
            hint = "jobs run in folders of their own: give its whole path, or --cwd"
            return CannotStart(f"command not found: {program} ({hint})")
        return CannotStart(f"command not found: {program}")
    if exc.errno == errno.EACCES:
        return CannotStart(f"not executable: {program}")
    if exc.errno == errno.ENOEXEC:
        return CannotStart(f"not executable: {program} is no program and has no #! line")
    return host_error(exc, program)


def is_running(pid: int, start_time: float) -> bool:
    """Whether the process of that number is the one that started then, as psutil counts."""
    try:
        return bool(psutil.Process(pid).create_time() == start_time)
    except psutil.Error:
        return False


def began(pid: int) -> int | None:
    """Tells a process from any other that has, or had, its number since the machine was booted.

    None: there is none, or it has ended and its parent has not looked yet. Unlike a time of day it stays
    the same when the clock is set.
    """
    try:
        # the name, in parentheses, may hold anything
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except OSError:
        return None if Path("/proc/self/stat").exists() else _began_elsewhere(pid)


def _began_elsewhere(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).create_time() * 1000)
    except psutil.Error:
        return None


def boot_id() -> str:
    """What two hosts, and two runs of one, do not have in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))


def has_exited(pid: int) -> bool:
    """Whether the child `pid` ended; it stays a zombie, so its number cannot be another's yet."""
    if hasattr(os, "waitid"):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # macOS before Python 3.13


def reap(pid: int) -> Exit:
    """Collect the child `pid`, which has ended."""
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    cpu, rss = usage.ru_utime + usage.ru_stime, peak_bytes(usage)
    return Exit(code, None, cpu, rss) if code >= 0 else Exit(None, -code, cpu, rss)


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The most memory that a child, or one that it waited for, had; 0 where it was no more than we had.

    For then nobody can tell: until a child becomes another program it runs in our memory, and the most that
    this ever held counts as its own (exec_mmap in Linux's fs/exec.c).
    """
    had = usage.ru_maxrss
    if had <= _had_ourselves[0] * _FLOOR:  # what we ever had only grows
        return 0
    _had_ourselves[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return had * _RSS_UNIT if had > _had_ourselves[0] * _FLOOR else 0


def signal_group(pgid: int, signum: int) -> None:
    """Send a signal to a process group; no matter if it is gone, or (0) never was."""
    if pgid <= 1:
        return
    try:
        os.killpg(pgid, signum)
    except (ProcessLookupError, PermissionError):
        return


def member_of(pgid: int, seen: int = 0) -> int:
    """A process of that group that lives, 0: none does. `seen`, one found before, is looked at first.

    A group may have zombies for long, which no signal tells from others: its leader until we reap it, and
    where nobody reaps what has lost its parent, as in many containers, all the rest.
    """
    if _lives_in(pgid, seen):
        return seen
    return next((pid for pid in psutil.pids() if _lives_in(pgid, pid)), 0)


def _lives_in(pgid: int, pid: int) -> bool:
    try:
        return os.getpgid(pid) == pgid and psutil.Process(pid).status() not in _DEAD
    except (OSError, psutil.Error):
        return False


def signal_name(signum: int) -> str:
    """`SIGKILL` for 9."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"
