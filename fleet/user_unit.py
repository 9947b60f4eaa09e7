"""A worker as a systemd user unit, where its user lingers.

logind may end whatever a login leaves behind (KillUserProcesses); what runs under a lingering
user's own manager it leaves alone. That manager is also told of a shutdown in good time, and tells
the worker alone, which then hands its jobs back.

It is the same worker as anywhere else: with the environment of the login that started it, its own
log, and ended by signals. Nothing is taken for granted: without lingering, without a manager that
answers, or where the unit does not come up, there is no unit, and the caller starts the worker, and
those that it starts after it, as everywhere else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from fleet.launchers.agent import NO_UNIT_VARIABLE, carries, started_at

#: seconds for a question to systemd; one that takes longer is no manager to rely on
_PATIENCE_SECONDS = 3.0
#: seconds for the worker's process to be there, and to be the worker
_START_SECONDS = 10.0
#: seconds beyond the worker's own grace before systemd kills what is left
_MARGIN_SECONDS = 15
#: one unit for each start: rendered anew, read by systemd-analyze verify in the tests
_UNIT = Template("""\
# Made by 'fleet up' for this worker; 'fleet down' ends it and removes this file.
[Unit]
Description=rq-fleet worker $name
CollectMode=inactive-or-failed

[Service]
ExecStart=$command
# SIGTERM goes to the worker alone, which ends its jobs in order
KillMode=mixed
# a job for which the kernel finds no memory ends alone
OOMPolicy=continue
# the worker makes cgroups below its own, for jobs with a limit of memory
Delegate=yes
TimeoutStopSec=$stop_seconds
# who was told to end stays ended, and who died is seen to have died: 'fleet up' starts it again
Restart=no
""")


class Start(NamedTuple):
    """What is to be started; `environ` carries `token`, by which its process is known."""

    name: str
    argv: Sequence[str]
    environ: Mapping[str, str]
    token: str
    folder: Path
    log: Path
    #: where the environment lies until the unit has read it; only its owner may read that
    environ_file: Path
    stop_grace_seconds: float


class Started(NamedTuple):
    """The worker's process, and its unit's file."""

    pid: int
    file: Path


def start(wanted: Start) -> Started | None:
    """Start it as a unit of this user's manager; None where that cannot be relied on, and nothing runs."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    if NO_UNIT_VARIABLE in os.environ or not (runtime / "systemd").is_dir():
        return None
    manager = _Manager(runtime)
    if not manager.outlives_logins():
        return None
    # the same for each life of the worker; another folder's worker of that name has another
    place = zlib.crc32(bytes(wanted.environ_file))
    file = runtime / "systemd" / "user" / f"rq-fleet-{wanted.name}-{place:08x}.service"
    try:
        _write_secret(wanted.environ_file, "\0".join(f"{k}={v}" for k, v in wanted.environ.items()))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(unit(wanted))
        pid = manager.started(file.name, wanted.token)
    except OSError:
        pid = None
    wanted.environ_file.unlink(missing_ok=True)
    if pid:
        return Started(pid, file)
    manager.call("stop", file.name)
    file.unlink(missing_ok=True)
    return None


def unit(wanted: Start) -> str:
    """The text of the unit's file: no secret is in it."""
    command = [sys.executable, "-I", "-m", "fleet.user_unit"]
    words = [*command, str(wanted.environ_file), str(wanted.folder), str(wanted.log), *wanted.argv]
    return _UNIT.substitute(
        name=wanted.name,
        command=" ".join(map(_quoted, words)),
        stop_seconds=round(wanted.stop_grace_seconds + _MARGIN_SECONDS),
    )


def _quoted(word: str) -> str:
    """A word of ExecStart: systemd.service(5), "Command lines"."""
    for sign, instead in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(sign, instead)
    return f'"{word}"'


class _Manager:
    """This user's systemd, by way of systemctl."""

    def __init__(self, runtime: Path) -> None:
        self._environ = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}

    def outlives_logins(self) -> bool:
        """Whether it runs on when the last login ends, and answers."""
        lingers = self._said(["loginctl", "show-user", str(os.getuid()), "--property=Linger", "--value"])
        return lingers == "yes" and bool(self.call("show", "--property=Version", "--value"))

    def started(self, name: str, token: str) -> int | None:
        """Start the unit; the PID of its process, once that is the worker."""
        if self.call("daemon-reload") is None or self.call("start", name) is None:
            return None
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            said = self.call("show", "--property=MainPID", "--value", name) or "0"
            if not said.isdigit() or said == "0" or started_at(int(said)) is None:
                return None
            if carries(int(said), token):
                return int(said)
            time.sleep(0.02)
        return None

    def call(self, *words: str) -> str | None:
        """What systemctl says; None where it fails."""
        return self._said(["systemctl", "--user", *words])

    def _said(self, argv: Sequence[str]) -> str | None:
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_PATIENCE_SECONDS,
                env=self._environ,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", errors="surrogateescape") as file:
        file.write(text)


def main(argv: Sequence[str]) -> None:
    """Become the worker: `python -I -m fleet.user_unit ENVIRON_FILE FOLDER LOG ARGV...`, run by the unit."""
    environ_file, folder, log, *command = argv
    text = Path(environ_file).read_text(errors="surrogateescape")
    Path(environ_file).unlink()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.chdir(folder)
    os.execve(command[0], command, dict(line.split("=", 1) for line in text.split("\0")))


if __name__ == "__main__":
    main(sys.argv[1:])
