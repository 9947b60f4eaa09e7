"""Machines with addresses of their own, made of network namespaces: this one, and hosts with sshd.

    with Network(folder) as network:       # a bridge, with us at 10.77.0.1
        host = network.add("fh1")          # 10.77.0.11, its own name, home and sshd
        network.run(["ssh", ...])          # as typed at our machine
        host.cut_off(); host.join()

Our machine is a namespace too, which holds the bridge: nothing is added to the network of the
machine that runs the tests, several of these may be at once, and all go with their namespaces.
What runs in a namespace is known to the kernel, however well it has detached itself.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

from tests.conftest import SESSION_MARK, find_program, wait_until
from tests.integration.sshd import write_key

#: this machine, as the hosts see it
OUR_ADDRESS = "10.77.0.1"
_SSH_NAMES = ("sshd", "sshd-session")


class Host:
    """A namespace with an sshd."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.network = network
        self.name = name
        self.address = f"10.77.0.{10 + number}"
        self.namespace = f"{network.tag}-{name}"
        self.link = f"v{network.tag}{number}"
        self.folder = network.folder / name
        self.home = self.folder / "home"
        self.home.mkdir(parents=True, mode=0o700)

    def start(self) -> Host:
        """Plug it in and have its sshd listen."""
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        bridge, peer = f"link add {self.link} type veth peer name eth0 netns".split(), self.namespace
        ip("-n", self.network.namespace, *bridge, peer)
        ip("-n", self.network.namespace, "link", "set", self.link, "master", "bridge", "up")
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        write_key(self.folder / "host_key")
        (self.folder / "sshd_config").write_text(self._sshd_config())
        sshd = f"{find_program('sshd')} -f {self.folder}/sshd_config -E {self.folder}/sshd.log"
        named = ["unshare", "--uts", "sh", "-c", f"hostname {self.name} && exec {sshd}"]
        subprocess.run([*inside(self.namespace), *named], check=True, timeout=60)
        return self

    def cut_off(self) -> None:
        """Pull the plug: nothing tells either side."""
        ip("-n", self.network.namespace, "link", "set", self.link, "down")

    def join(self) -> None:
        """Put the plug back in."""
        ip("-n", self.network.namespace, "link", "set", self.link, "up")

    def make_bad(self, *, lost_percent: int, kilobits: int) -> None:
        """Lose so many packets of a hundred, each way; let so few bits a second through that they queue."""
        drop = f"numgen random mod 100 < {lost_percent} drop"
        chains = "\n".join(
            f"chain {hook} {{ type filter hook {hook} priority 0; {drop}; }}" for hook in ("input", "output")
        )
        rate = f"qdisc add dev eth0 root tbf rate {kilobits}kbit burst 8kb latency 400ms".split()
        for words in (["nft", f"table inet bad {{\n{chains}\n}}"], ["tc", *rate]):
            subprocess.run([*inside(self.namespace), *words], check=True, timeout=60)

    def processes(self) -> list[psutil.Process]:
        """All that runs there but for SSH."""
        return [process for process in processes_in(self.namespace) if process.name() not in _SSH_NAMES]

    def worker_log(self) -> str:
        (log,) = (self.home / ".local/state/rq-fleet/work/log").glob("*.log")
        return log.read_text()

    def _sshd_config(self) -> str:
        environ = {"HOME": str(self.home), SESSION_MARK: os.environ[SESSION_MARK]}
        return f"""\
Port 22
ListenAddress {self.address}
HostKey {self.folder}/host_key
PidFile {self.folder}/pid
AuthorizedKeysFile {self.network.folder}/id.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
SetEnv {" ".join(f'"{name}={value}"' for name, value in environ.items())}
"""


class Network:
    """A bridge with this machine and its hosts on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = f"f{uuid.uuid4().hex[:8]}"
        self.namespace = f"{self.tag}-here"
        self.hosts: list[Host] = []
        self.ssh_config = folder / "ssh_config"

    def __enter__(self) -> Network:
        self.folder.mkdir(parents=True)
        write_key(self.folder / "id")
        self.ssh_config.write_text("")
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)
        try:
            self._make_bridge()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def add(self, name: str) -> Host:
        """One more host, known to ssh by its name."""
        host = Host(self, name, len(self.hosts) + 1)
        self.hosts.append(host)
        self.ssh_config.write_text(self.ssh_config.read_text() + self._stanza(host))
        return host.start()

    def run(
        self, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str], timeout_seconds: float = 150
    ) -> subprocess.CompletedProcess[str]:
        """Run a command at our machine to its end."""
        words = [*inside(self.namespace), *map(os.fspath, argv)]
        return subprocess.run(
            words,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def _make_bridge(self) -> None:
        done = subprocess.run(
            [_ip(), "netns", "add", self.namespace], capture_output=True, text=True, check=False
        )
        if "not permitted" in done.stderr:
            pytest.skip(f"root may not make network namespaces here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        here = ("-n", self.namespace)
        ip(*here, "link", "set", "lo", "up")
        ip(*here, "link", "add", "bridge", "type", "bridge")
        ip(*here, "addr", "add", f"{OUR_ADDRESS}/24", "dev", "bridge")
        ip(*here, "link", "set", "bridge", "up")

    def _stanza(self, host: Host) -> str:
        return f"""\
Host {host.name}
  HostName {host.address}
  User {getpass.getuser()}
  IdentityFile {self.folder}/id
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {self.folder}/known_hosts
"""

    def _remove(self) -> None:
        """End all that runs in the namespaces, then remove these; links and addresses go with them."""
        namespaces = [*(host.namespace for host in self.hosts), self.namespace]
        existing = _namespaces()
        with contextlib.ExitStack() as stack:  # one that cannot be removed does not keep the others
            for name in namespaces:
                if name in existing:
                    stack.callback(_remove, name)


def ip(*words: str) -> str:
    """Run iproute2's ip; returns what it printed."""
    done = subprocess.run([_ip(), *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"ip {shlex.join(words)}: {done.stderr}"
    return done.stdout


def inside(namespace: str) -> list[str]:
    """What stands before a command that is to run in that namespace."""
    return [_ip(), "netns", "exec", namespace]


def processes_in(namespace: str) -> list[psutil.Process]:
    """All that lives there."""
    found = []
    for pid in map(int, ip("netns", "pids", namespace).split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _remove(namespace: str) -> None:
    wait_until(lambda: _killed(namespace), message=f"{namespace} is empty")
    ip("netns", "del", namespace)


def _killed(namespace: str) -> bool:
    """Kill what lives there; whether nothing did."""
    left: list[Any] = processes_in(namespace)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return not left


def _namespaces() -> set[str]:
    return {line.split()[0] for line in ip("netns", "list").splitlines() if line}


def _ip() -> str:
    program = find_program("ip")
    assert program, "ip is missing; the test must carry needs('ip')"
    return program
