"""What URLs of Sentinel name, and which are none."""

from __future__ import annotations

import pytest
from redis.connection import SSLConnection

from broker import sentinel
from broker.connection import address, check_url, connect, redacted, with_password
from broker.errors import UsageError
from fleet import reach


def test_a_url_names_sentinels_and_a_service():
    found = sentinel.parse("redis+sentinel://a,b:5,[::1]:26380/main")
    assert (found.name, found.sentinels) == ("main", (("a", 26379), ("b", 5), ("::1", 26380)))
    assert found.options == {}


def test_passwords_are_of_redis_and_of_the_sentinels_apart():
    found = sentinel.parse("redis+sentinel://u:p%40@h/s/3?sentinel_password=q%26&sentinel_username=v")
    assert found.options == {"username": "u", "password": "p@", "db": 3}
    assert (found.sentinel_options["username"], found.sentinel_options["password"]) == ("v", "q&")
    assert "p@" not in repr(found)
    assert "q&" not in repr(found)


def test_tls_is_spoken_to_both():
    found = sentinel.parse("rediss+sentinel://h/s?ssl_ca_certs=/ca&socket_timeout=3")
    assert found.options == {"ssl": True, "ssl_ca_certs": "/ca", "socket_timeout": 3.0}
    assert (found.sentinel_options["ssl"], found.sentinel_options["ssl_ca_certs"]) == (True, "/ca")
    made = connect("rediss+sentinel://h/s?ssl_ca_certs=/ca").connection_pool.make_connection()
    assert isinstance(made, SSLConnection)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h",
        "redis+sentinel://h/",
        "redis+sentinel:///s",
        "redis+sentinel://u:p@/s",
        "redis+sentinel://h:x/s",
        "redis+sentinel://h:99999/s",
        "redis+sentinel://h,:5/s",
        "redis+sentinel://h/s/x",
        "redis+sentinel://h/s/1/2",
        "redis+sentinel://h/s?db=x",
        "sentinel://h/s",
    ],
)
def test_what_names_no_service_is_refused(url):
    with pytest.raises(UsageError):
        check_url(url)
    with pytest.raises(UsageError):
        connect(url)


def test_nothing_secret_is_printed():
    url = "redis+sentinel://u:secret@a:1,b:2/main/0?sentinel_password=secret"
    assert redacted(url) == "redis+sentinel://a:1,b:2/main/0"
    assert address(connect(url)) == "main (of the sentinels at a port 1, b port 2)"
    with pytest.raises(UsageError) as caught:
        connect("redis+sentinel://u:secret@a:x,b:2/main/0?sentinel_password=secret")
    assert "secret" not in caught.value.message


def test_a_password_from_a_file_is_that_of_redis():
    url = with_password("redis+sentinel://a:1,b:2/main/0?sentinel_password=q", "p/w")
    assert sentinel.parse(url).options["password"] == "p/w"
    assert with_password(url, "other") == url


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("127.0.0.1,localhost:5", True), ("[::1]", True), ("127.0.0.1,10.0.0.5", False), ("a,b", False)],
)
def test_sentinels_on_loopback_are_out_of_reach_of_other_machines(hosts, expected):
    assert reach.is_loopback(f"redis+sentinel://{hosts}/main") == expected
