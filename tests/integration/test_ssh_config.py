"""Reaching hosts as ssh(1) would: ssh_config, known_hosts, key files and ssh-agent, with real sshd."""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from fleet.launchers import base
from fleet.launchers.ssh import Address, SshOptions, open_launcher
from tests.integration.sshd import PYTHON, SshdFarm, SshdHost, write_key
from tests.integration.test_ssh import RELAY, probe

pytestmark = pytest.mark.needs("sshd")


@pytest.fixture
def agent(tmp_path: Path, spawn: Any, eventually: Any, monkeypatch: Any) -> Callable[[Path], None]:
    """An ssh-agent at SSH_AUTH_SOCK; what is called adds a key to it."""
    path = tmp_path / "agent"
    spawn(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    eventually(path.exists)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))

    def add(key: Path) -> None:
        subprocess.run(["ssh-add", "-q", str(key)], stdin=subprocess.DEVNULL, check=True)

    return add


def with_agent(farm: SshdFarm, host: SshdHost, **options: str) -> None:
    """The alias "asked": a host for which the agent of the environment is asked."""
    farm.config.write_text(
        f"Host asked\n HostName 127.0.0.1\n Port {host.port}\n UserKnownHostsFile {farm.known_hosts}\n"
        + "".join(f" {name} {value}\n" for name, value in options.items())
    )


def lock(key: Path, passphrase: str = "hush") -> None:
    """Give a key a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", passphrase, "-P", "", "-f", str(key)], check=True)


# --- ssh_config ------------------------------------------------------------------------------------


def test_what_ssh_config_says_is_done(farm, tmp_path):
    host, user = farm.add("host1"), getpass.getuser()
    more = tmp_path / "more"
    more.mkdir()
    (more / "keys.conf").write_text(
        f"Match host 127.0.0.1 user {user}\n  IdentityFile {farm.folder}/id\n  IdentitiesOnly yes\n"
    )
    farm.config.write_text(
        f"""\
# a comment
Host web-* !web-9
  HostName=127.0.0.1
  Port {host.port}
Host *
  User "{user}"
  IdentityAgent none
  UserKnownHostsFile {farm.known_hosts}
  ControlMaster auto
  ForwardAgent yes
Include {more}/*.conf
"""
    )
    assert probe(farm, "web-1").home == str(host.home)
    with pytest.raises(base.NameNotResolved, match=rf"^web-9 \({user}@web-9:22\)|^{user}@web-9:22"):
        probe(farm, "web-9")


def test_how_long_to_wait_is_the_flags_then_that_of_ssh_config(farm, silent_port):
    farm.alias("silent", silent_port, ConnectTimeout="1")
    with pytest.raises(base.TimedOut, match=r"within 1 s"):
        probe(farm, "silent", default_connect_timeout_seconds=0.3)
    with pytest.raises(base.TimedOut, match=r"within 0\.2 s"):
        probe(farm, "silent", connect_timeout_seconds=0.2)


@pytest.mark.parametrize("tail", ["", " 2>/dev/null", " | cat"])
def test_a_proxy_command_is_for_a_shell_and_may_speak_on_stderr(farm, tail):
    host = farm.add("host1")
    relay = farm.folder / "relay.py"
    relay.write_text(f"import sys\nprint('a warning', file=sys.stderr, flush=True)\n{RELAY}")
    farm.alias("proxied", host.port, ProxyCommand=f"{PYTHON} {relay} %h %p{tail}")
    assert not probe(farm, "proxied").is_here


def test_a_proxy_command_that_fails_is_named(farm):
    farm.alias("proxied", 1, ProxyCommand="/bin/false %h")
    with pytest.raises(base.ConnectError, match=r"no way to proxied") as caught:
        probe(farm, "proxied")
    assert caught.value.hint == "Does its ProxyCommand work? /bin/false 127.0.0.1"


def test_several_jumps_are_gone_through_and_the_one_that_fails_is_named(farm, free_port):
    host = farm.add("host1")
    for name in ("jump1", "jump2"):
        farm.add(name)
    farm.alias("off", free_port())
    farm.alias("behind", host.port, ProxyJump="jump1,jump2")
    farm.alias("lost", host.port, ProxyJump="jump1,off")
    farm.alias("beyond", 1, ProxyJump="jump1")
    assert probe(farm, "behind").home == str(host.home)
    with pytest.raises(base.ConnectError, match=r"^the jump host cannot reach off \("):
        probe(farm, "lost")
    with pytest.raises(base.ConnectError, match=r"^the jump host cannot reach beyond \("):
        probe(farm, "beyond")


# --- known_hosts -----------------------------------------------------------------------------------


def new_key(host: SshdHost) -> None:
    host.stop()
    host.new_host_key()
    host.start()


@pytest.mark.parametrize("checking", ["accept-new", "ask", "no", "off"])
def test_a_new_key_is_recorded_unless_ssh_config_forbids_it(farm, checking):
    host = farm.add("host1")
    farm.alias("checked", host.port, StrictHostKeyChecking=checking)
    assert probe(farm, "checked").is_here
    assert len(farm.known_hosts.read_text().splitlines()) == 1


def test_with_strict_checking_a_new_key_is_refused_until_it_is_added(farm):
    host = farm.add("host1")
    farm.alias("strict", host.port, StrictHostKeyChecking="yes")
    with pytest.raises(base.HostKeyUnknown, match=r"is not known, and StrictHostKeyChecking is yes: SHA256:"):
        probe(farm, "strict")
    assert not farm.known_hosts.exists()
    probe(farm, "host1")
    assert probe(farm, "strict").is_here


def test_without_checking_a_changed_key_is_accepted_with_a_warning(farm, caplog):
    host = farm.add("host1")
    farm.alias("unchecked", host.port, StrictHostKeyChecking="no")
    probe(farm, "host1")
    new_key(host)
    before = farm.known_hosts.read_text()
    with caplog.at_level(logging.WARNING, logger="fleet"):
        assert probe(farm, "unchecked").is_here
    assert f"is not the one in {farm.known_hosts}:1, which StrictHostKeyChecking allows" in caplog.text
    assert farm.known_hosts.read_text() == before
    with pytest.raises(base.HostKeyChanged):
        probe(farm, "host1")


def test_what_is_said_of_a_changed_key_mends_it(farm):
    host = farm.add("host1")
    probe(farm, "host1")
    new_key(host)
    with pytest.raises(base.HostKeyChanged) as caught:
        probe(farm, "host1")
    command = re.search(r"ssh-keygen .*", caught.value.hint)
    assert command, caught.value.hint
    subprocess.run(["sh", "-c", command[0]], check=True, capture_output=True)
    assert probe(farm, "host1").is_here


def test_hashed_names_are_understood(farm):
    host = farm.add("host1")
    probe(farm, "host1")
    subprocess.run(["ssh-keygen", "-H", "-f", str(farm.known_hosts)], check=True, capture_output=True)
    hashed = farm.known_hosts.read_text()
    assert hashed.startswith("|1|")
    assert probe(farm, "host1").is_here
    assert farm.known_hosts.read_text() == hashed
    new_key(host)
    with pytest.raises(base.HostKeyChanged, match=f"{farm.known_hosts}:1"):
        probe(farm, "host1")


def test_hosts_that_are_new_at_once_are_recorded_once_each(farm):
    names = ["host1", "host2", "host3"]
    for name in names:
        farm.add(name)

    async def reach(name: str) -> None:
        await (await open_launcher(Address(name), SshOptions(config=farm.config))).close()

    async def all_at_once() -> None:
        await asyncio.gather(*(reach(name) for name in names * 3))

    asyncio.run(all_at_once())
    lines = farm.known_hosts.read_text().splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(
        f"[127.0.0.1]:{host.port}" for host in farm.hosts.values()
    )


def test_known_hosts_that_cannot_be_written_keeps_nobody_out(farm, caplog):
    host = farm.add("host1")
    farm.alias("unrecorded", host.port, UserKnownHostsFile=f"{farm.folder}/id/known_hosts")
    with caplog.at_level(logging.WARNING, logger="fleet"):
        assert probe(farm, "unrecorded").is_here
    assert "could not be recorded: " in caplog.text


def test_known_hosts_of_the_machine_count_too(farm, tmp_path):
    host = farm.add("host1")
    key = (host.folder / "host_key.pub").read_text().split()
    of_machine = tmp_path / "of_machine"
    of_machine.write_text(f"[127.0.0.1]:{host.port} {key[0]} {key[1]}\n")
    files = {"UserKnownHostsFile": "none", "GlobalKnownHostsFile": str(of_machine)}
    farm.alias("strict", host.port, StrictHostKeyChecking="yes", **files)
    assert probe(farm, "strict").is_here


# --- keys and agents -------------------------------------------------------------------------------


def test_a_file_that_holds_no_key_is_passed_over(farm, tmp_path):
    host = farm.add("host1")
    (tmp_path / "garbage").write_text("not a key\n")
    farm.config.write_text(
        f"Host *\n  IdentityFile {tmp_path}/garbage\n  IdentityFile {farm.folder}/id.pub\n"
    )
    farm.alias("host1", host.port)
    assert probe(farm, "host1").is_here


def test_a_dead_agent_is_passed_over(farm, tmp_path, monkeypatch):
    host = farm.add("host1")
    with_agent(farm, host, IdentityFile=f"{farm.folder}/id")
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(dead))
    for path in (dead, tmp_path / "none"):
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        assert probe(farm, "asked").is_here


def test_the_agents_key_is_found_by_its_public_half_among_many(farm, agent):
    host = farm.add("host1")
    for number in range(8):
        write_key(farm.folder / f"other{number}")
        agent(farm.folder / f"other{number}")
    agent(farm.folder / "id")
    (farm.folder / "id").unlink()
    with_agent(farm, host)
    with pytest.raises(base.KeyDenied, match="before the right key was tried: Too many") as caught:
        probe(farm, "asked")
    assert "IdentitiesOnly yes" in caught.value.hint
    with_agent(farm, host, IdentityFile=f"{farm.folder}/id", IdentitiesOnly="yes")
    assert probe(farm, "asked").is_here


def test_the_agent_is_not_asked_for_keys_that_are_not_meant(farm, agent):
    host = farm.add("host1")
    agent(farm.folder / "id")
    write_key(farm.folder / "other")
    for named in ("other", "none"):
        with_agent(farm, host, IdentityFile=f"{farm.folder}/{named}", IdentitiesOnly="yes")
        with pytest.raises(base.KeyDenied):
            probe(farm, "asked")


def test_a_key_with_a_passphrase_wants_ssh_add(farm, agent, monkeypatch):
    host, key = farm.add("host1"), farm.folder / "id"
    open_key = shutil.copy(key, farm.folder / "open")
    lock(key)
    with_agent(farm, host, IdentityFile=str(key))
    with pytest.raises(base.KeyDenied, match="accepts none of our keys") as caught:
        probe(farm, "asked")
    assert caught.value.hint == f"{key} has a passphrase, and nothing here asks for it: ssh-add {key}"
    # what ssh-add does with the passphrase: the same key, in the agent
    agent(open_key)
    assert probe(farm, "asked").is_here
    write_key(farm.folder / "unknown")
    (farm.folder / "unknown").rename(farm.folder / "id")
    (farm.folder / "unknown.pub").rename(farm.folder / "id.pub")
    monkeypatch.delenv("SSH_AUTH_SOCK")
    lock(key)
    with pytest.raises(base.KeyDenied) as caught:
        probe(farm, "asked")
    assert caught.value.hint.endswith(f'eval "$(ssh-agent)"; ssh-add {key}')


def test_a_locked_key_that_the_agent_holds_is_not_to_blame(farm, agent):
    host = farm.add("host1")
    write_key(farm.folder / "unknown")
    agent(farm.folder / "unknown")
    lock(farm.folder / "unknown")
    with_agent(farm, host, IdentityFile=f"{farm.folder}/unknown", IdentitiesOnly="yes")
    with pytest.raises(base.KeyDenied) as caught:
        probe(farm, "asked")
    assert caught.value.hint == "Is our public key in ~/.ssh/authorized_keys there?"


class Asking(asyncssh.SSHServer):
    """A server that lets in by answers alone, and notes whether it got any."""

    answers: list[str]

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        self.answers.append("password")
        return True

    def kbdint_auth_supported(self) -> bool:
        return True

    def get_kbdint_challenge(self, username: str, lang: str, submethods: str) -> Any:
        self.answers.append("keyboard-interactive")
        return "", "", "", [("Password: ", False)]

    def validate_kbdint_response(self, username: str, responses: Any) -> bool:
        return True


def test_nobody_is_ever_asked_for_a_password(farm, tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    askpass = tmp_path / "askpass"
    askpass.write_text(f"#!/bin/sh\ntouch {asked}\necho secret\n")
    askpass.chmod(0o755)
    for name, value in {"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}.items():
        monkeypatch.setenv(name, value)
    answers: list[str] = []

    def asking() -> Asking:
        server = Asking()
        server.answers = answers
        return server

    async def reach() -> None:
        key = asyncssh.generate_private_key("ssh-ed25519")
        async with await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[key], server_factory=asking
        ) as server:
            farm.alias("asking", server.get_port(), PreferredAuthentications="keyboard-interactive,password")
            farm.alias("willing", server.get_port(), KbdInteractiveAuthentication="yes")
            for name in ("asking", "willing"):
                with pytest.raises(base.KeyDenied):
                    await open_launcher(Address(name), SshOptions(config=farm.config))

    asyncio.run(reach())
    assert answers == []
    assert not asked.exists()
    assert os.environ["SSH_ASKPASS"]
