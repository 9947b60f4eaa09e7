"""Real sshd processes on loopback, each one host with a home, a host key and an alias of its own.

    farm = SshdFarm(folder, spawn)
    host = farm.add("host1")          # sshd listens
    farm.config                       # for `fleet up --ssh-config`

Sessions get HOME and the mark of the test session from `SetEnv`, so what they leave is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncssh
import psutil

from fleet.launchers.ssh import Address, SshLauncher, SshOptions, open_launcher
from tests.conftest import SESSION_MARK, find_free_port, find_program, wait_until

Spawn = Callable[..., subprocess.Popen[Any]]
#: the interpreter of the tests, in which rq-fleet is importable
PYTHON = sys.executable


class SshdHost:
    """One sshd. `environ` is what its sessions find beside HOME, `lines` are more of its configuration."""

    def __init__(
        self, farm: SshdFarm, name: str, environ: Mapping[str, str], lines: Sequence[str] = ()
    ) -> None:
        self.farm = farm
        self.name = name
        self.port = find_free_port()
        self.folder = farm.folder / name
        self.home = self.folder / "home"
        self.environ = dict(environ)
        self.lines = tuple(lines)
        self.home.mkdir(parents=True, mode=0o700)
        self.new_host_key()
        self.process: subprocess.Popen[Any] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "sshd.log").read_text()

    @property
    def output_dir(self) -> Path:
        return self.home / ".local/state/rq-fleet/work"

    def new_host_key(self) -> None:
        """Another key, as if the machine had been set up anew; takes effect at the next start."""
        write_key(self.folder / "host_key")

    def start(self) -> SshdHost:
        """Listen, and wait until it does."""
        config = self.folder / "sshd_config"
        config.write_text(self._config())
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(parents=True, exist_ok=True)
        sshd = find_program("sshd")
        assert sshd, "sshd is missing; the test must carry needs('sshd')"
        argv = [sshd, "-D", "-f", str(config), "-E", str(self.folder / "sshd.log")]
        self.process = self.farm.spawn(argv)
        wait_until(lambda: listens(self.port), message=f"sshd of {self.name} listens")
        return self

    def stop(self) -> None:
        """End it with all its sessions: the connections break, what was started detached lives on."""
        assert self.process is not None
        for process in self.servers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Stop it with all its sessions: they say nothing more, and new ones are not served."""
        for process in self.servers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        """Let it go on."""
        for process in self.servers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def servers(self) -> list[psutil.Process]:
        """The one that listens, and those of its sessions."""
        assert self.process is not None
        first = psutil.Process(self.process.pid)
        return [process for process in (first, *first.children(recursive=True)) if _is_sshd(process)]

    def _config(self) -> str:
        environ = {"HOME": str(self.home), SESSION_MARK: os.environ[SESSION_MARK], **self.environ}
        newline = "\n"  # in the braces below only from Python 3.12 on
        return f"""\
Port {self.port}
ListenAddress 127.0.0.1
HostKey {self.folder}/host_key
PidFile {self.folder}/pid
AuthorizedKeysFile {self.farm.folder}/id.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
MaxStartups 100:30:200
MaxSessions 50
Subsystem sftp internal-sftp
SetEnv {" ".join(f'"{name}={value}"' for name, value in environ.items())}
{newline.join(self.lines)}
"""


class SshdFarm:
    """Several hosts, one client key, one ssh_config, one known_hosts."""

    def __init__(self, folder: Path, spawn: Spawn) -> None:
        self.folder = folder
        self.spawn = spawn
        self.hosts: dict[str, SshdHost] = {}
        self.known_hosts = folder / "known_hosts"
        self.config = folder / "ssh_config"
        folder.mkdir(parents=True, exist_ok=True)
        write_key(folder / "id")
        self.config.write_text("")

    def add(self, name: str, *, start: bool = True, sshd: Sequence[str] = (), **environ: str) -> SshdHost:
        """One more host; its alias goes into ssh_config."""
        host = self.hosts[name] = SshdHost(self, name, environ, sshd)
        self.alias(name, host.port)
        return host.start() if start else host

    def alias(self, name: str, port: int, **options: str) -> None:
        """A host of ssh_config at that port of loopback."""
        lines = {
            "HostName": "127.0.0.1",
            "Port": port,
            "User": getpass.getuser(),
            "IdentityFile": self.folder / "id",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": self.known_hosts,
        } | options
        stanza = f"Host {name}\n" + "".join(f"  {key} {value}\n" for key, value in lines.items())
        self.config.write_text(self.config.read_text() + stanza)


def _is_sshd(process: psutil.Process) -> bool:
    try:
        return process.name() in ("sshd", "sshd-session")
    except psutil.NoSuchProcess:
        return False


def listens(port: int) -> bool:
    """Whether somebody listens on that port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def write_key(path: Path) -> None:
    """A fresh ed25519 key in `path`, and its public half beside it."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_bytes(key.export_private_key())
    path.with_name(f"{path.name}.pub").write_bytes(key.export_public_key())


def fleet_processes(folder: Path) -> list[psutil.Process]:
    """Live processes whose command line or working directory lies in `folder`, sshd aside."""
    return [process for process in psutil.process_iter() if _is_in(process, str(folder))]


def tunnel_processes(folder: Path) -> list[psutil.Process]:
    """Those of `fleet up --tunnel` whose files lie below `folder`: the supervisor, then its forwarder."""
    found: dict[bool, list[psutil.Process]] = {False: [], True: []}
    for process in fleet_processes(folder):
        with contextlib.suppress(psutil.Error):  # it may just be ending
            words = process.cmdline()
            if "fleet.tunnel_main" in words:
                found["--forward" in words].append(process)
    return found[False] + found[True]


def agents(host: SshdHost) -> list[psutil.Process]:
    """The halves of launchers that are at work at a host."""
    return [process for process in psutil.process_iter() if _is_agent(process, str(host.home))]


def _is_agent(process: psutil.Process, home: str) -> bool:
    try:
        return process.cmdline()[1:4] == ["-I", "-S", "-"] and process.environ().get("HOME") == home
    except psutil.Error:
        return False


def _is_in(process: psutil.Process, folder: str) -> bool:
    try:
        if process.name().startswith("sshd") or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return folder in " ".join(process.cmdline()) or process.cwd().startswith(folder)
    except (psutil.Error, OSError):
        return False


def at(farm: SshdFarm, name: str, work: Callable[[SshLauncher], Awaitable[Any]], **how: Any) -> Any:
    """Do `work` with a launcher for the host `name`."""
    python = how.pop("python", None)

    async def run() -> Any:
        launcher = await open_launcher(Address(name), SshOptions(config=farm.config, **how), python=python)
        try:
            return await work(launcher)
        finally:
            await launcher.close()

    return asyncio.run(run())
