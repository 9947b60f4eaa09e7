"""What scripts are told of Redis: where it is as workers see it, and never its password."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from broker.connection import with_password
from broker.errors import RedisUnreachable, UsageError
from fleet import endpoint
from fleet.embedded import EmbeddedBroker, state_dir
from fleet.endpoint import Endpoint


def told(url: str, password_file: Path | None = None, redis_host: str | None = None) -> Endpoint:
    return endpoint.configured(url, password_file, redis_host, lambda _: None)


@pytest.mark.parametrize(
    ("url", "redis_host", "found"),
    [
        ("redis://db.lab:6379/0", None, "redis://db.lab:6379/0"),
        ("rediss://me@db.lab/3?ssl_ca_certs=/ca", None, "rediss://me@db.lab/3?ssl_ca_certs=/ca"),
        ("redis://db.lab:6379/0", "db-ib", "redis://db-ib:6379/0"),
        ("redis://127.0.0.1:6379/0", "login1-ib.lab", "redis://login1-ib.lab:6379/0"),
        ("redis://[::1]:6379/0", "2001:db8::5", "redis://[2001:db8::5]:6379/0"),
        ("redis+sentinel://a:1,b:2/main/0", None, "redis+sentinel://a:1,b:2/main/0"),
    ],
)
def test_a_script_is_told_the_url_with_the_name_that_workers_know(url, redis_host, found):
    assert told(url, redis_host=redis_host) == Endpoint(found)


def test_a_password_in_the_url_goes_into_a_file_for_this_user_alone(home):
    said: list[str] = []
    found = endpoint.configured("redis://me:p%40ss@db.lab:6379/0", None, "db-ib", said.append)
    file = Path(found.password_file)
    assert found.url == "redis://me@db-ib:6379/0"
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("p@ss\n", 0o600)
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert len(said) == 1
    assert str(file) in said[0]
    assert "p@ss" not in said[0] + repr(found)
    assert with_password(found.url, file.read_text().strip()) == "redis://me:p%40ss@db-ib:6379/0"
    assert found.environ == {"FLEET_REDIS_URL": found.url, "FLEET_REDIS_PASSWORD_FILE": str(file)}


def test_a_new_password_takes_the_place_of_the_old_one(home):
    old, new = (told(f"redis://:{word}@db.lab/0") for word in ("old", "new"))
    assert old == new
    assert Path(new.password_file).read_text() == "new\n"


def test_the_password_file_of_the_settings_is_told_as_it_is(home):
    assert told("redis://db.lab/0", Path("~/secret")) == Endpoint("redis://db.lab/0", str(home / "secret"))
    assert "FLEET_REDIS_PASSWORD_FILE" not in told("redis://db.lab/0").environ


@pytest.mark.parametrize(
    ("url", "redis_host", "message"),
    [
        (
            "redis://localhost:6379/0",
            None,
            "Redis listens at redis://localhost:6379/0, out of other machines'",
        ),
        ("unix:///run/redis", None, "out of other machines' reach"),
        ("unix:///run/redis", "db", "--redis-host does not go with"),
        ("redis+sentinel://a:1/main", "db", "--redis-host does not go with"),
        ("redis://db/0?password=x", None, "holds a password"),
        ("redis+sentinel://a:1/main?sentinel_password=x", None, "holds a password"),
        ("redis://db/0", "-db", "no name and no address"),
        ("redis://db/0", "db;rm", "no name and no address"),
        ("redis://db/0", "", "no name and no address"),
        ("redis://db/0", "a:b", "no name and no address"),
        ("redis://db/0", "10.0.0.5:6379", "no name and no address"),
        ("redis://db/0", "fe80::1%eth0", "no name and no address"),
    ],
)
def test_what_cannot_be_told_is_refused(url, redis_host, message):
    with pytest.raises(UsageError) as caught:
        told(url, redis_host=redis_host)
    assert message in caught.value.message
    assert caught.value.hint


# --- the embedded broker ---------------------------------------------------------------------------


@pytest.fixture
def broker(home, monkeypatch):
    """Says that the embedded broker of this user runs on port 7, bound to the addresses given."""

    def bound_to(*hosts: str) -> None:
        running = dataclasses.make_dataclass("Running", ["hosts", "port"])(hosts, 7)
        monkeypatch.setattr(EmbeddedBroker, "running", lambda _: running)

    return bound_to


@pytest.mark.parametrize(
    ("hosts", "redis_host", "host"),
    [
        (("127.0.0.1", "10.0.0.5"), None, "10.0.0.5"),
        (("127.0.0.1", "2001:db8::5"), None, "[2001:db8::5]"),
        (("127.0.0.1",), "localhost", "localhost"),
        (("0.0.0.0",), "127.0.0.2", "127.0.0.2"),
    ],
)
def test_the_embedded_broker_is_told_by_the_address_it_listens_on_or_a_name_of_that(
    broker, hosts, redis_host, host
):
    broker(*hosts)
    found = endpoint.of_embedded(redis_host)
    assert found == Endpoint(f"redis://{host}:7/0", str(state_dir() / "password"))


def test_one_that_listens_everywhere_is_told_by_this_machines_name(broker, monkeypatch):
    monkeypatch.setattr(endpoint.socket, "gethostname", lambda: "login1")
    broker("0.0.0.0")
    assert endpoint.of_embedded(None).url == "redis://login1:7/0"


@pytest.mark.parametrize(
    ("hosts", "redis_host", "hint"),
    [
        (("127.0.0.1",), None, "fleet broker stop && fleet broker start --host ADDRESS"),
        (("127.0.0.1",), "127.0.0.2", "fleet broker stop && fleet broker start --host 127.0.0.2"),
        (("127.0.0.1",), "no-such-host.invalid", "--redis-host NAME"),
    ],
)
def test_one_out_of_reach_is_refused_with_the_way_out(broker, hosts, redis_host, hint):
    broker(*hosts)
    with pytest.raises(UsageError) as caught:
        endpoint.of_embedded(redis_host)
    assert hint in caught.value.hint


def test_one_that_does_not_run_is_to_be_started_where_workers_reach_it(home):
    with pytest.raises(RedisUnreachable) as caught:
        endpoint.of_embedded(None)
    assert "fleet broker start --host" in caught.value.hint


def test_one_that_does_not_run_is_not_called_for_want_of_another(home, monkeypatch):
    monkeypatch.setenv("FLEET_REDIS_URL", "redis://db.lab/0")
    with pytest.raises(RedisUnreachable) as caught:
        endpoint.embedded_url("10.0.0.5")
    assert caught.value.message == "the embedded broker of this user is not running"
