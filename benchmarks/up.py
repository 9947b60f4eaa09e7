"""`fleet up` on fifty hosts that have all they need, beside as many bare connections that run one command.

All hosts are one real sshd on loopback under fifty names, so the processors of this machine do the work
of all of them: a worker's start is shown by itself.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from benchmarks import harness
from benchmarks.harness import Site, alternate, median, number, ratio
from benchmarks.peers.base import Peer
from benchmarks.peers.fleet_worker import worker_command
from benchmarks.report import Bar, Section, Table
from broker import keys

_HOSTS, _PARALLEL = 50, 10
_BAR = 1.5


@dataclass(frozen=True)
class Farm:
    """Names that lead to one sshd, and how to reach them."""

    names: tuple[str, ...]
    folder: Path
    port: int

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"


def up(site: Site, peers: Sequence[Peer]) -> Section:
    """Seconds from the command to its end."""
    del peers
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")
    if not sshd:
        print("    sshd is not installed: skipped")
        return Section("Starting fifty hosts", [], [], data={})
    with _farm(site, sshd) as farm:
        found = alternate(
            {
                "fleet up": lambda: _fleet_up(site, farm),
                "bare asyncssh, one command each": lambda: asyncio.run(_bare(farm)),
                "as many workers' starts, no SSH": lambda: _workers(site),
            },
            site.rounds,
        )
    rows = [(name, number(median(each), 2)) for name, each in found.items()]
    ours, bare = found["fleet up"], found["bare asyncssh, one command each"]
    bars = [
        Bar.at_most(f"fleet up of {_HOSTS} hosts, beside bare connections", _BAR, ratio(ours, bare), " x")
    ]
    table = Table((f"{_HOSTS} hosts, {_PARALLEL} at once", "s, median"), rows)
    return Section("Starting fifty hosts", [table], bars, data=found)


def _fleet_up(site: Site, farm: Farm) -> float:
    """Workers on all hosts, started and seen to beat; taken down again unmeasured."""
    site.fresh()
    hosts = site.folder / "hosts.txt"
    hosts.write_text("".join(f"{name} slots=1\n" for name in farm.names))
    common = ["--ssh-config", str(farm.config), "--max-parallel-ssh", str(_PARALLEL)]
    python = ["--no-install", "--python", sys.executable]
    seconds = _timed(lambda: _fleet(site, ["up", str(hosts), *python, *common]))
    _fleet(site, ["down", "--force", *common])
    return seconds


def _fleet(site: Site, words: Sequence[str]) -> None:
    fleet = str(Path(sys.executable).with_name("fleet"))
    environ = {**os.environ, "FLEET_REDIS_URL": site.url}
    subprocess.run([fleet, "--quiet", *words], check=True, stdout=subprocess.DEVNULL, env=environ)


async def _bare(farm: Farm) -> float:
    """As many connections at once as `fleet up` has, and one command on each."""
    gate = asyncio.Semaphore(_PARALLEL)

    async def visit() -> None:
        key = str(farm.folder / "id")
        async with (
            gate,
            asyncssh.connect("127.0.0.1", farm.port, client_keys=[key], known_hosts=None, config=None) as ssh,
        ):
            await ssh.run("true", check=True)

    started = time.perf_counter()
    await asyncio.gather(*(visit() for _ in farm.names))
    return time.perf_counter() - started


def _workers(site: Site) -> float:
    """Until as many workers beat, started by nobody but us: what of it no launcher can save."""
    site.fresh()
    names = [f"bare{number}" for number in range(_HOSTS)]
    commands = [worker_command(site, name) for name in names]
    started = time.perf_counter()
    with harness.processes(commands, site.log("up")):
        harness.until(lambda: all(site.client.mget([keys.worker_beat(name) for name in names])))
        return time.perf_counter() - started


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def _farm(site: Site, sshd: str) -> Iterator[Farm]:
    """A real sshd, its keys, and an ssh_config with fifty names for it."""
    folder = site.folder / "farm"
    (folder / "home").mkdir(parents=True, mode=0o700)
    for name in ("id", "host_key"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        (folder / name).touch(0o600)
        (folder / name).write_bytes(key.export_private_key())
        (folder / f"{name}.pub").write_bytes(key.export_public_key())
    farm = Farm(tuple(f"host{number}" for number in range(_HOSTS)), folder, _free_port())
    (folder / "sshd_config").write_text(_sshd_config(farm))
    farm.config.write_text("".join(_stanza(farm, name) for name in farm.names))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)
    command = [sshd, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")]
    with harness.processes([command], site.log("sshd")):
        harness.until(lambda: _listens(farm.port))
        yield farm


def _sshd_config(farm: Farm) -> str:
    return f"""\
Port {farm.port}
ListenAddress 127.0.0.1
HostKey {farm.folder}/host_key
PidFile none
AuthorizedKeysFile {farm.folder}/id.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
MaxStartups 100:30:200
Subsystem sftp internal-sftp
SetEnv HOME={farm.folder}/home
"""


def _stanza(farm: Farm, name: str) -> str:
    return f"""\
Host {name}
  HostName 127.0.0.1
  Port {farm.port}
  User {getpass.getuser()}
  IdentityFile {farm.folder}/id
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {farm.folder}/known_hosts
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
