"""A stand-in for a user's systemd, which needs to be PID 1 of its machine, and here is not.

    manager = Manager(folder)             # .path goes in front of PATH, .runtime is XDG_RUNTIME_DIR
    manager.lingers("no")
    manager.fails("start")
    manager.hangs("loginctl")              # or a verb of systemctl
    manager.calls                          # what systemctl was told, in order, and loginctl among it

It reads the unit files that it is given, and starts what they say in the manager's own, nearly empty
environment; a service that ends is started again only if Restart= says so. That the files are such as
systemd takes is for systemd-analyze to say.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.conftest import SESSION_MARK
from tests.integration.sshd import PYTHON

_LOGINCTL = """\
#!/bin/sh
echo loginctl >> {folder}/calls
[ ! -e {folder}/hangs.loginctl ] || exec sleep 1000
cat {folder}/lingers
"""
_SYSTEMCTL = """\
#!{python} -I
import os, pathlib, shlex, subprocess, sys, time
folder = pathlib.Path({folder!r})
assert sys.argv[1] == "--user" and os.environ["XDG_RUNTIME_DIR"] == str(folder)
verb, *words = [word for word in sys.argv[2:] if not word.startswith("--")]
with (folder / "calls").open("a") as calls:
    calls.write(" ".join([verb, *words]) + "\\n")
if (folder / f"fails.{{verb}}").exists():
    sys.exit("Failed to connect to bus")
if (folder / f"hangs.{{verb}}").exists():
    time.sleep(1000)
if verb == "show":
    pid = folder / f"{{words[0]}}.pid" if words else folder / "lingers"
    print(pid.read_text() if pid.exists() else 0)
elif verb == "start":
    text = (folder / "systemd/user" / words[0]).read_text()
    says = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] != "#")
    command = shlex.split(says["ExecStart"].replace("%%", "%").replace("$$", "$"))
    service = {service!r}
    running = subprocess.Popen(
        [sys.executable, "-I", "-c", service, says["Restart"], str(folder / f"{{words[0]}}.pid"), *command],
        cwd="/", env={environ!r}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    while not (folder / f"{{words[0]}}.pid").exists() and running.poll() is None:
        time.sleep(0.01)
"""
#: what systemd does with one service
_SERVICE = """
import pathlib, subprocess, sys
restart, note, *command = sys.argv[1:]
while True:
    process = subprocess.Popen(command, start_new_session=True)
    part = pathlib.Path(note + ".part")
    part.write_text(str(process.pid))
    part.rename(note)
    process.wait()
    if restart == "no":
        break
pathlib.Path(note).unlink()
"""


class Manager:
    """The manager of one user; its folder is the user's XDG_RUNTIME_DIR."""

    def __init__(self, folder: Path) -> None:
        self.runtime = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "systemd").mkdir()
        self.path = f"{folder / 'bin'}:{os.environ['PATH']}"
        environ = {"PATH": "/usr/bin:/bin", SESSION_MARK: os.environ[SESSION_MARK]}
        texts = {
            "loginctl": _LOGINCTL.format(folder=folder),
            "systemctl": _SYSTEMCTL.format(
                python=PYTHON, folder=str(folder), service=_SERVICE, environ=environ
            ),
        }
        for name, text in texts.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.lingers("yes")

    def lingers(self, said: str) -> None:
        """What loginctl says of it."""
        (self.runtime / "lingers").write_text(f"{said}\n")

    def fails(self, verb: str) -> None:
        """systemctl does that no more."""
        (self.runtime / f"fails.{verb}").touch()

    def hangs(self, verb: str) -> None:
        """systemctl, or loginctl, never comes back from that."""
        (self.runtime / f"hangs.{verb}").touch()

    @property
    def calls(self) -> list[str]:
        """The verbs that systemctl was given, "loginctl" for what that was asked."""
        calls = self.runtime / "calls"
        return [line.split()[0] for line in calls.read_text().splitlines()] if calls.exists() else []

    @property
    def units(self) -> list[Path]:
        return sorted((self.runtime / "systemd").rglob("*.service"))
