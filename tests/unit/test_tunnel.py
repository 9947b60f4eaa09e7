"""What a tunnel is told and tells: URLs, who is to have one, how long it waits, what its files hold."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path

import fakeredis
import pytest
import redis

from broker import keys, streams, tunnels
from broker.errors import UsageError
from fleet import kept_hosts, tunnel
from fleet.hosts import Host, HostOptions, HostsFileError, parse
from fleet.launchers.base import HostError
from fleet.launchers.ssh_connect import SshOptions
from fleet.tunnel_folder import Settings, State, TunnelFolder, Wish, key_of
from fleet.tunnel_keeper import Rhythm


@pytest.mark.parametrize(
    ("url", "there"),
    [
        ("redis://127.0.0.1:7/2", "unix:///s/r.sock?db=2"),
        ("redis://:p%40w@h:7", "unix://:p%40w@/s/r.sock?db=0"),
        ("rediss://me:pw@h:7/1?ssl_ca_certs=/ca.pem", "unix://me:pw@/s/r.sock?db=1"),
        ("unix://:pw@/run/redis.sock?db=3", "unix://:pw@/s/r.sock?db=3"),
    ],
)
def test_a_host_is_told_the_socket_with_user_password_and_database(url, there):
    assert streams.url_at_socket(url, "/s/r.sock") == there
    here, told = (redis.Redis.from_url(one).connection_pool.connection_kwargs for one in (url, there))
    for name in ("username", "password"):
        assert here.get(name) == told.get(name)
    assert here.get("db", 0) == told["db"]


def test_sentinels_cannot_be_at_the_end_of_a_tunnel():
    with pytest.raises(UsageError, match="one Redis") as caught:
        streams.check_can_be_handed_on("redis+sentinel://:pw@a,b/main")
    assert "--redis redis://HOST:PORT/DB" in caught.value.hint
    assert "pw" not in caught.value.message


def test_files_that_a_url_names_are_spelled_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = streams.with_whole_paths("rediss://:p%2Fw@h:7/1?ssl_ca_certs=ca.pem&ssl_check_hostname=false")
    known = redis.Redis.from_url(url).connection_pool.connection_kwargs
    assert known["ssl_ca_certs"] == str(tmp_path / "ca.pem")
    assert (known["ssl_check_hostname"], known["password"]) == (False, "p/w")
    assert streams.with_whole_paths("redis://:p%40w@h:7/1") == "redis://:p%40w@h:7/1"


def test_a_line_of_the_hosts_file_may_ask_for_a_tunnel_or_none():
    found = parse("a tunnel=yes\nb tunnel=no\nc\n", "hosts.txt")
    assert [host.options.tunnel for host in found] == [True, False, None]
    with pytest.raises(HostsFileError, match=r"hosts\.txt:1: tunnel=maybe: must be yes or no"):
        parse("a tunnel=maybe", "hosts.txt")


def host(name: str, tunnel: bool | None) -> Host:
    return Host(name, options=HostOptions(tunnel=tunnel))


@pytest.mark.parametrize(
    ("line", "option", "kept", "settled"),
    [
        (None, None, None, None),
        (None, True, None, True),
        (None, None, True, True),
        (False, True, True, False),
        (None, False, True, False),
        (True, False, None, True),
    ],
)
def test_the_line_of_a_file_comes_first_then_the_option_then_what_is_kept(line, option, kept, settled):
    client = fakeredis.FakeRedis()
    kept_hosts.keep(client, [host("a", kept)])
    (found,) = kept_hosts.settled(client, [host("a", line)], {"tunnel": option}, named=True)
    assert found.options.tunnel is settled


def test_an_option_outranks_what_is_kept_where_no_file_is_named():
    client = fakeredis.FakeRedis()
    kept_hosts.keep(client, [host("a", True)])
    for option, settled in ((None, True), (False, False)):
        (found,) = kept_hosts.settled(client, kept_hosts.load(client), {"tunnel": option}, named=False)
        assert found.options.tunnel is settled


def test_this_machine_needs_no_tunnel():
    assert not Host("here", options=HostOptions(tunnel=True), launcher="local").is_tunnelled
    assert host("there", True).is_tunnelled


def test_a_silent_connection_is_noticed_and_mended_within_a_lease():
    for lease_seconds in (4.0, 30.0, 120.0):
        rhythm = Rhythm(lease_seconds)
        noticed = 3 * rhythm.keepalive_seconds
        assert noticed + rhythm.pause(0) + rhythm.connect_limit(0) < lease_seconds


def test_attempts_are_spread_and_never_further_apart_than_a_quarter_of_the_lease():
    pauses = [Rhythm(30.0).pause(failures) for failures in range(2000)]
    assert 0 < min(pauses) < max(pauses) <= 7.5
    assert len(set(pauses)) > 1900


def test_the_files_are_their_owners_alone_and_a_damaged_one_is_none(tmp_path):
    folder = TunnelFolder(tmp_path / "fleet")
    key = key_of("2001:db8::1")
    folder.ask(key, Wish("2001:db8::1", "id"), Settings("redis://:pw@h", 30.0))
    folder.write_state(key, State("token", "up", "/s"))
    assert folder.settings() == Settings("redis://:pw@h", 30.0)
    assert folder.wishes() == {key: Wish("2001:db8::1", "id")}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()} == {0o600}
    (folder.path / "other.wish").write_text("{")
    (folder.path / f"{key}.state").write_text('{"of": "another version"}')
    assert list(folder.wishes()) == [key]
    assert folder.state(key) is None
    folder.remove_wish(key)
    folder.sweep()
    assert b"pw" not in b"".join(path.read_bytes() for path in folder.path.iterdir())


@pytest.fixture
def held(tmp_path: Path) -> Iterator[TunnelFolder]:
    """Two hosts that a process which never lets go of any holds: this one."""
    folder = TunnelFolder(tmp_path / "fleet")
    for name in ("a", "b"):
        folder.ask(name, Wish(name, name), Settings("redis://:pw@h", 30.0))
        folder.write_state(name, State("token", "up", "/s"))
    with folder.lock() as is_ours:
        assert is_ours
        yield folder


def test_a_tunnel_that_is_not_let_go_of_is_told_each_time_and_keeps_no_other_waiting(held, monkeypatch):
    monkeypatch.setattr(tunnel, "_END_SECONDS", 0.1)
    hosts = [host(name, True) for name in ("a", "b")]
    for _ in range(2):
        with pytest.raises(HostError, match="the tunnel to a is still open") as caught:
            asyncio.run(tunnel.end_all(held, hosts))
        assert "tunnel.log. Run it again" in caught.value.hint
        assert held.wishes() == {}
    held.forget("a")
    held.forget("b")
    assert not asyncio.run(tunnel.end(held, hosts[0]))


def test_an_up_that_is_cut_before_a_process_is_there_leaves_no_password(tmp_path, monkeypatch):
    monkeypatch.setattr(TunnelFolder, "launch", lambda *_: None)
    settings = Settings("redis://:pw@h", 30.0)
    folder = TunnelFolder(tmp_path / "fleet")
    tunnels_here = tunnel.Tunnels(folder, SshOptions(), settings)

    async def bring() -> None:
        async with tunnels_here.brought(host("a", True)):
            pass

    async def cut() -> None:
        bringing = asyncio.create_task(bring())
        await asyncio.sleep(0)
        assert folder.settings() == settings
        bringing.cancel()
        await asyncio.gather(bringing, return_exceptions=True)

    asyncio.run(cut())
    assert list(folder.path.iterdir()) == []


def test_what_an_up_that_was_killed_left_goes_with_the_next_down(tmp_path):
    folder = TunnelFolder(tmp_path / "fleet")
    folder.ask("a", Wish("a", "id"), Settings("redis://:pw@h", 30.0))
    folder.remove_wish("a")
    assert not asyncio.run(tunnel.end(folder, host("b", None)))
    assert folder.settings() is None


def test_a_fleet_keeps_its_name_even_where_redis_was_emptied():
    client = fakeredis.FakeRedis()
    assert tunnels.fleet_id(client, make=False) is None
    name = tunnels.fleet_id(client, make=True)
    assert name == tunnels.fleet_id(client, make=True) == tunnels.fleet_id(client, make=False)
    client.flushall()
    tunnels.report(client, name, {"t": tunnels.Note("up", "me@here")})
    assert tunnels.fleet_id(client, make=False) == name
    assert 0 < client.ttl(keys.tunnel("t")) <= tunnels.NOTE_SECONDS


def test_a_tunnel_of_which_nobody_tells_is_down():
    client = fakeredis.FakeRedis()
    tunnels.report(client, "fleet", {"t": tunnels.Note("up", "me@here")})
    client.set(keys.tunnel("damaged"), "?")
    found = tunnels.read(client, ["t", "gone", "damaged"])
    assert found["t"] == tunnels.Note("up", "me@here")
    assert found["gone"].state == found["damaged"].state == "down"
    assert "fleet up" in found["gone"].error
    tunnels.forget(client, ["t"])
    assert tunnels.read(client, ["t"])["t"].state == "down"
