"""known_hosts: which line speaks of a host, and what is recorded."""

from __future__ import annotations

import base64
import hashlib
import hmac
import subprocess
import threading
from pathlib import Path

import asyncssh
import pytest

from fleet.launchers import ssh_known_hosts
from fleet.launchers.ssh_known_hosts import KnownHosts

KEYS = [asyncssh.generate_private_key("ssh-ed25519").convert_to_public() for _ in range(2)]
TEXT = [" ".join(key.export_public_key().decode().split()[:2]) for key in KEYS]


@pytest.fixture(autouse=True)
def _no_file_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(ssh_known_hosts, "SYSTEM_FILE", tmp_path / "system")


def found(tmp_path: Path, text: str, host: str, port: int | None = None) -> list[tuple[int, str]]:
    file = tmp_path / "known_hosts"
    file.write_text(text)
    return [(entry.line, entry.kind) for entry in KnownHosts([file]).find(host, port)]


def hashed(name: str) -> str:
    salt = b"0123456789abcdef0123"
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return "|1|" + "|".join(base64.b64encode(part).decode() for part in (salt, digest))


@pytest.mark.parametrize(
    ("pattern", "host", "port", "matches"),
    [
        ("h", "h", None, True),
        ("h", "h", 22, True),
        ("h", "hh", None, False),
        ("a,h,b", "h", None, True),
        ("[h]:2222", "h", 2222, True),
        ("[h]:2222", "h", 2223, False),
        ("[h]:2222", "h", None, False),
        ("h", "h", 2222, True),
        ("*.example.com", "x.example.com", None, True),
        ("*,!h", "h", None, False),
        ("[::1]:22", "::1", 22, False),
        ("::1", "::1", 22, True),
        (hashed("h"), "h", None, True),
        (hashed("[h]:2222"), "h", 2222, True),
        (hashed("x"), "h", None, False),
    ],
)
def test_a_line_speaks_of_a_host(tmp_path, pattern, host, port, matches):
    assert found(tmp_path, f"# first\n{pattern} {TEXT[0]}\n", host, port) == ([(2, "key")] if matches else [])


def test_a_line_with_the_port_comes_before_one_without(tmp_path):
    text = f"h {TEXT[0]}\n[h]:2222 {TEXT[1]}\n"
    assert found(tmp_path, text, "h", 2222) == [(2, "key")]


def test_revoked_keys_and_authorities_are_told_apart(tmp_path):
    text = f"@revoked h {TEXT[0]}\n@cert-authority h {TEXT[1]}\n"
    assert found(tmp_path, text, "h") == [(1, "revoked"), (2, "authority")]


def test_lines_that_cannot_be_read_are_passed_over(tmp_path):
    text = f"h\nh ssh-ed25519 damaged\n@strange h {TEXT[0]}\n\x00\xff h\nh {TEXT[0]} comment\n"
    assert found(tmp_path, text, "h") == [(5, "key")]


def test_a_file_that_is_not_there_holds_nothing(tmp_path):
    assert KnownHosts([tmp_path / "none"]).find("h", None) == []


def test_what_is_recorded_is_read_by_ssh_keygen_and_by_us(tmp_path):
    file = tmp_path / "new" / "known_hosts"
    known = KnownHosts([file])
    known.record("h", 2222, KEYS[0])
    known.record("h", 2222, KEYS[0])
    known.record("other", 22, KEYS[1])
    assert [str(entry) for entry in known.find("h", 2222)] == [f"{file}:1"]
    assert known.find("other", None)[0].key == KEYS[1]
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_text().splitlines()) == 2
    listed = subprocess.run(
        ["ssh-keygen", "-F", "[h]:2222", "-f", str(file)], capture_output=True, text=True, check=True
    )
    assert TEXT[0] in listed.stdout


def test_many_record_at_once_and_no_line_is_torn(tmp_path):
    file = tmp_path / "known_hosts"
    threads = [
        threading.Thread(target=KnownHosts([file]).record, args=(f"h{number}", 22, KEYS[0]))
        for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file.read_text().splitlines()) == sorted(f"h{number} {TEXT[0]}" for number in range(20))


def test_with_no_file_nothing_is_recorded(tmp_path):
    known = KnownHosts([])
    known.record("h", None, KEYS[0])
    assert known.find("h", None) == []
