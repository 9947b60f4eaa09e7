"""Which URL of Redis a host is told, and what is said where there is none."""

from __future__ import annotations

import dataclasses

import pytest

from fleet import embedded
from fleet.launchers import base
from fleet.listening import covers
from fleet.reach import is_loopback, url_for
from tests.unit.test_bootstrap import PROBE

EMBEDDED = "redis://:pw@127.0.0.1:{port}/0"


def elsewhere(our_address: str | None) -> base.Probe:
    return dataclasses.replace(PROBE, is_here=False, our_address=our_address)


@pytest.mark.parametrize(
    ("bound_to", "our_address", "told"),
    [
        pytest.param(("127.0.0.1", "10.0.0.5"), "10.0.0.5", "10.0.0.5", id="bound to it"),
        pytest.param(("0.0.0.0",), "10.0.0.5", "10.0.0.5", id="bound to all"),
        pytest.param(("127.0.0.1", "::"), "2001:db8::5", "[2001:db8::5]", id="bound to all of IPv6"),
        pytest.param(("127.0.0.1", "10.0.0.5"), "192.168.1.5", "10.0.0.5", id="bound to another"),
        pytest.param(("127.0.0.1", "10.0.0.5"), None, "10.0.0.5", id="through a jump host"),
        pytest.param(("127.0.0.1", "127.0.1.1", "2001:db8::5"), None, "[2001:db8::5]", id="IPv6"),
    ],
)
def test_a_host_elsewhere_is_told_an_address_that_the_broker_listens_on(bound_to, our_address, told):
    url = url_for(EMBEDDED.format(port=7), bound_to, elsewhere(our_address))
    assert url == f"redis://:pw@{told}:7/0"


@pytest.mark.parametrize(
    ("bound_to", "our_address", "host"),
    [
        pytest.param(("127.0.0.1",), "10.0.0.5", "10.0.0.5", id="loopback"),
        pytest.param(("127.0.0.1", "127.0.1.1"), "10.0.0.5", "10.0.0.5", id="loopback twice"),
        pytest.param(("127.0.0.1",), None, "ADDRESS", id="through a jump host"),
        pytest.param(("0.0.0.0",), None, "ADDRESS", id="bound to all, which is our address unknown"),
        pytest.param(("0.0.0.0",), "2001:db8::5", "2001:db8::5", id="bound to all of IPv4, reached by IPv6"),
    ],
)
def test_where_the_broker_is_out_of_reach_the_commands_that_mend_it_are_told(bound_to, our_address, host):
    url = EMBEDDED.format(port=embedded.default_port())
    with pytest.raises(base.RedisOutOfReach) as caught:
        url_for(url, bound_to, elsewhere(our_address))
    assert f": fleet broker stop && fleet broker start --host {host}" in caught.value.hint
    assert "--port" not in caught.value.hint
    assert "--tunnel" in caught.value.hint
    assert ("ADDRESS: this machine's" in caught.value.hint) is (our_address is None)
    assert "pw" not in caught.value.message + caught.value.hint


def test_a_broker_that_moves_to_a_network_keeps_its_port_untold():
    with pytest.raises(base.RedisOutOfReach) as caught:
        url_for(EMBEDDED.format(port=7), ("127.0.0.1",), elsewhere("10.0.0.5"))
    assert caught.value.hint.endswith("fleet broker start --host 10.0.0.5")


@pytest.mark.parametrize(
    ("url", "our_address", "named"),
    [
        ("redis://:pw@localhost:6380/2", "10.0.0.5", "--redis redis://10.0.0.5:6380/2"),
        ("rediss://127.0.0.1", "2001:db8::5", "--redis rediss://[2001:db8::5]:6379"),
        ("redis://127.0.0.1:6379/0", None, "--redis redis://ADDRESS:6379/0 (ADDRESS: this machine's"),
        ("unix:///tmp/redis.sock", "10.0.0.5", "--redis redis://10.0.0.5:PORT"),
    ],
)
def test_another_redis_on_loopback_is_to_be_named_by_an_address(url, our_address, named):
    with pytest.raises(base.RedisOutOfReach) as caught:
        url_for(url, (), elsewhere(our_address))
    assert named in caught.value.hint
    assert "broker" not in caught.value.hint
    assert "--tunnel" in caught.value.hint
    assert "pw" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("url", ["redis://10.0.0.1:6379/0", "redis://redis.example.com"])
def test_a_redis_that_has_an_address_is_told_as_it_is(url):
    assert url_for(url, (), elsewhere("10.0.0.5")) == url


def test_a_host_that_is_here_uses_loopback():
    here = dataclasses.replace(PROBE, our_address="127.0.0.1")
    for bound_to in ((), ("127.0.0.1",), ("0.0.0.0",), ("127.0.0.1", "10.0.0.5")):
        assert url_for("redis://127.0.0.1:7/0", bound_to, here) == "redis://127.0.0.1:7/0"


@pytest.mark.parametrize(
    ("bound_to", "address", "is_covered"),
    [
        (("127.0.0.1",), "127.0.0.1", True),
        (("127.0.0.1",), "10.0.0.5", False),
        (("0.0.0.0",), "10.0.0.5", True),
        (("0.0.0.0",), "2001:db8::5", False),
        (("127.0.0.1", "::"), "2001:db8::5", True),
        (("127.0.0.1", "::"), "10.0.0.5", False),
    ],
)
def test_every_address_means_those_of_one_kind(bound_to, address, is_covered):
    assert covers(bound_to, address) is is_covered


@pytest.mark.parametrize(
    ("url", "only_here"),
    [
        ("redis://localhost", True),
        ("redis://:pw@127.0.0.5:1/0", True),
        ("redis://[::1]:6379", True),
        ("unix:///tmp/redis.sock", True),
        ("redis://10.0.0.1", False),
        ("redis://redis.example.com", False),
        ("rediss://[2001:db8::1]:6379", False),
    ],
)
def test_loopback_is_recognised(url, only_here):
    assert is_loopback(url) is only_here
