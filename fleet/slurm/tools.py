"""Slurm's own commands, each with a limit of time: sbatch, squeue, scancel, scontrol, sinfo.

What they are told is in arguments and on stdin, never a secret; what they answer is checked.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from broker.errors import FleetError
from fleet.slurm import times
from fleet.worker_config import this_host

#: seconds each command gets
LIMIT_SECONDS = 60.0
#: what ends an allocation; any other state holds its nodes, or waits for some
_ENDS = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)
_WAITS = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
#: ends that are a fault of an allocation's nodes, or of what ran on them
FAILED = frozenset({"BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"})
#: of an answer after which the submission may have been made all the same
_IS_UNSURE = re.compile(
    r"timed out|timeout|unable to contact|zero bytes|unexpected message|communication|connection|transport",
    re.IGNORECASE,
)
#: of a caller in a job, say: they would become options of the one that is submitted
_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
_SECRET_VARIABLES = ("FLEET_REDIS_URL", "FLEET_REDIS_PASSWORD_FILE", "REDIS_URL", "RQ_REDIS_URL")
_FORMAT = "%i|%A|%F|%T|%r|%L|%D|%u|%j"


class SlurmError(FleetError):
    """Slurm refused, or is not there."""

    code = "slurm"


class Unanswered(SlurmError):
    """Slurm did not say what became of a submission: it may have been made."""

    code = "slurm_unanswered"


@dataclass(frozen=True)
class Row:
    """One allocation as squeue has it: `id` is 12 or 12_3, `job_id` its number, `master` its array's."""

    id: str
    job_id: str
    master: str
    state: str
    reason: str
    seconds_left: int | None
    nodes: int
    user: str
    name: str

    @property
    def has_ended(self) -> bool:
        """Whether it holds and wants nothing any more."""
        return self.state in _ENDS

    @property
    def waits(self) -> bool:
        """Whether it has no nodes yet."""
        return self.state in _WAITS

    @property
    def hangs(self) -> bool:
        """Whether it could not be started, and Slurm holds it until somebody sees to it."""
        return self.waits and "launch failed" in self.reason


def submit(script: str, name: str) -> str:
    """Submit it as a job of that name; returns its id.

    Raises Unanswered where it may have been submitted or not, SlurmError where it was not.
    """
    try:
        done = _run(["sbatch", "--parsable", f"--job-name={name}"], script)
    except subprocess.TimeoutExpired as exc:
        raise Unanswered(f"sbatch has not answered within {exc.timeout:g} s") from exc
    found = re.search(r"^(\d+)(;\S+)?$", done.stdout.strip(), re.MULTILINE)
    if done.returncode == 0 and found:
        return found[1]
    said = _last_words(done)
    if done.returncode == 0 or done.returncode < 0 or _IS_UNSURE.search(done.stderr):
        raise Unanswered(f"sbatch did not tell whether it submitted: {said}")
    raise SlurmError(f"sbatch refused: {said}", "See 'sinfo', and what your cluster asks of each job.")


def try_out(script: str) -> str:
    """Ask Slurm whether it would take the script, and submit nothing; returns what it says.

    Raises SlurmError.
    """
    done = _limited(["sbatch", "--test-only"], script)
    if done.returncode:
        raise SlurmError(f"sbatch would refuse: {_last_words(done)}", "Change the options that it names.")
    return _last_words(done)


def allocations(users: Iterable[str]) -> list[Row]:
    """All allocations of these users that Slurm remembers, arrays one by one. Raises SlurmError."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--users={','.join(sorted(users))}"]
    done = _limited([*command, f"--format={_FORMAT}"])
    if done.returncode:
        raise SlurmError(
            f"squeue failed: {_last_words(done)}", "Is Slurm's controller up? 'scontrol ping' tells."
        )
    return [row for line in done.stdout.splitlines() if (row := _row(line))]


def _row(line: str) -> Row | None:
    parts = line.strip().split("|", 8)
    if len(parts) != 9 or not parts[1].isdigit():
        return None
    shown, job_id, master, state, reason, left, nodes, user, name = parts
    count = int(nodes) if nodes.isdigit() else 0
    return Row(shown, job_id, master, state, reason, times.seconds_left(left), count, user, name)


def cancel(ids: Sequence[str], *, pending_only: bool = False) -> None:
    """Cancel these allocations, or those of them that have not begun. Raises SlurmError.

    One that has ended is no error.
    """
    if not ids:
        return
    done = _limited(["scancel", *(["--state=PENDING"] if pending_only else []), *ids])
    if done.returncode and "Invalid job id" not in done.stderr and "already" not in done.stderr:
        raise SlurmError(f"scancel failed: {_last_words(done)}", "They go on; try again.")


def end_steps(ids: Sequence[str]) -> None:
    """Tell what runs in these allocations to end, and not their batch shells. Raises SlurmError.

    scancel alone tells srun too, which may then kill its tasks outright, before they have done anything.
    """
    if ids:
        _limited(["scancel", "--quiet", "--signal=TERM", *ids])


def kill_wait_seconds() -> float | None:
    """Seconds between SIGTERM and SIGKILL when Slurm ends a job; None where it does not tell."""
    try:
        done = _limited(["scontrol", "show", "config"])
    except SlurmError:
        return None
    found = re.search(r"^KillWait\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    return float(found[1]) if found else None


def is_all_here() -> bool:
    """Whether all nodes of the cluster are this very machine, as in a test."""
    try:
        done = _limited(["sinfo", "--noheader", "--format=%o"])
    except SlurmError:
        return False
    found = set(done.stdout.split())
    return bool(found) and found <= {"127.0.0.1", "::1", "localhost", this_host()}


def _limited(command: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return _run(command, text)
    except subprocess.TimeoutExpired as exc:
        raise SlurmError(f"{command[0]} has not answered within {exc.timeout:g} s") from exc


def _run(command: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run it to its end. Raises SlurmError where it cannot be run, TimeoutExpired."""
    try:
        return subprocess.run(
            command,
            input=text,
            env=_environ(os.environ),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except OSError as exc:
        raise SlurmError(
            f"{command[0]} cannot be run: {exc.strerror}",
            "This is for a machine from which one may submit to Slurm.",
        ) from exc


def _environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What sbatch hands on to the job: no secret, and nothing of a job in which we are."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _SECRET_VARIABLES and (not name.startswith("SLURM_") or name in _KEPT_VARIABLES)
    }


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else f"nothing (exit code {done.returncode})"
