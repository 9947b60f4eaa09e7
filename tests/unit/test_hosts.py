"""The hosts file: what it may hold, and that every fault is told with file and line."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from broker.errors import UsageError
from fleet import hosts
from fleet.hosts import Host, HostOptions, HostsFileError, parse

EXAMPLE = """\
# comment                       blank lines and comments are skipped

worker1.example.com   # also after an entry
alice@worker2.example.com
admin@192.168.1.10:2222
[2001:db8::1]
\t[::1]:2222\r
gpu7  slots=2 label.gpu_type=a100 python=/opt/py/bin/python3
"""


def faults(text: str) -> tuple[str, ...]:
    with pytest.raises(HostsFileError) as caught:
        parse(text, "hosts.txt")
    assert caught.value.exit_code == 2
    return caught.value.faults


def test_the_example_of_the_documentation_is_read():
    assert parse(EXAMPLE, "hosts.txt") == (
        Host("worker1.example.com"),
        Host("worker2.example.com", "alice"),
        Host("192.168.1.10", "admin", 2222),
        Host("2001:db8::1"),
        Host("::1", None, 2222),
        Host("gpu7", options=HostOptions(slots=2, labels={"gpu_type": "a100"}, python="/opt/py/bin/python3")),
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("h", Host("h")),
        ("h#comment", Host("h")),
        ("h # slots=2", Host("h")),
        ("h label.a=b#c", Host("h", options=HostOptions(labels={"a": "b#c"}))),
        ("h label.a=", Host("h", options=HostOptions(labels={"a": ""}))),
        ("h# slots=2", Host("h")),
        ("\t h\t\tslots=2\t", Host("h", options=HostOptions(slots=2))),
        ("a@b@h", Host("h", "a@b")),
        ("h:1", Host("h", port=1)),
        ("h:65535", Host("h", port=65535)),
        ("2001:db8::1", Host("2001:db8::1")),
        ("::1", Host("::1")),
        ("fe80::1234:abcd", Host("fe80::1234:abcd")),
        ("me@[fe80::1%eth0]:22", Host("fe80::1%eth0", "me", 22)),
        ("h queues=a,b workers=3", Host("h", options=HostOptions(queues=("a", "b"), workers=3))),
        ("h output_dir=~/out", Host("h", options=HostOptions(output_dir="~/out"))),
    ],
)
def test_an_entry_is_read(line, expected):
    assert parse(line, "f") == (expected,)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("@h", "the user is empty"),
        ("alice@", "the host is empty"),
        (":22", "the host is empty"),
        ("[]:22", "the host is empty"),
        ("h:", "port '' is no number from 1 to 65535"),
        ("h:0", "port '0' is no number"),
        ("h:65536", "port '65536' is no number"),
        ("h:-1", "port '-1' is no number"),
        ("h:ssh", "port 'ssh' is no number"),
        ("h:٢٢", "is no number"),
        ("[::1", "unclosed bracket"),
        ("[::1:22", "unclosed bracket"),
        ("[worker]:22", "is no IPv6 address"),
        ("[::1]22", "is no port: write [::1]:PORT"),
        ("[::1]:0", "port '0'"),
        ("2001:db8::1:2222", "needs brackets: [2001:db8::1]:2222"),
        ("::1:22", "needs brackets"),
        ("1:2:3:4:5:6:7:8:22", "needs brackets"),
        ("a:b:c", "neither a host with a port nor an IPv6 address"),
        ("-oProxyCommand=x", "begins with '-'"),
        ("-x@h", "begins with '-'"),
        ("h\x07x", "blanks or control characters"),
        ("h\xa0x", "blanks or control characters"),
        ("a\x0bb@h", "blanks or control characters"),
        ("a/b", "bracket or a slash"),
        ("my host", "unexpected 'host'"),
        ("h slot=2", "unknown slot=; did you mean slots=?"),
        ("h lable.x=2", "did you mean label.K=?"),
        ("h zzz=1", "unknown zzz=; known are slots="),
        ("h slots=0", "slots=0: must be a whole number of at least 1"),
        ("h workers=-1", "workers=-1: must be"),
        ("h slots=x", "slots=x: must be"),
        ("h slots=1 slots=2", "slots is set twice"),
        ("h queues=a,,b", "is no queue name"),
        ("h label.=x", "is no name of a label"),
        ("h python=", "python= is empty"),
        ("h output_dir=relative", "must begin with / or ~/"),
    ],
)
def test_a_fault_is_told_with_file_and_line(line, fault):
    (told,) = faults(f"good\n\n{line}\n")
    assert told.startswith("hosts.txt:3: ")
    assert fault in told


@pytest.mark.parametrize("again", ["alice@host", "host:2222", "HOST", "host."])
def test_a_host_appears_once_whatever_its_user_port_or_case(again):
    assert faults(f"host\nother\n{again}") == (
        f"hosts.txt:3: {hosts._address(again)[1]} is there already, in line 1: a host may appear once",
    )


def test_a_duplicate_is_told_even_where_the_options_are_wrong():
    assert len(faults("h slot=1\nh")) == 2


def test_an_ipv6_address_appears_once_however_it_is_spelled():
    assert "in line 1" in faults("[::1]\n[0:0:0::1]:22")[0]


def test_two_hosts_must_not_share_the_names_of_their_workers():
    assert faults("[fd00::1]\nfd00--1") == (
        "hosts.txt:2: workers of fd00--1 would be named like those of fd00::1 in line 1",
    )


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_a_file_with_no_entry_is_a_fault(text):
    assert faults(text) == ("hosts.txt:1: holds no host",)


def test_all_faults_are_told_at_once():
    told = faults("ok\n@h\nh:0 slot=1\n[::1\nok\n")
    assert [line.split(" ")[0] for line in told] == [f"hosts.txt:{n}:" for n in (2, 3, 3, 4, 5)]


@pytest.mark.parametrize(
    ("name", "worker"),
    [
        ("gpu7", "gpu7-0"),
        ("worker1.example.com", "worker1.example.com-0"),
        ("2001:db8::1", "2001-db8--1-0"),
        ("::1", "0--1-0"),
        ("fe80::1%eth0", "fe80--1-eth0-0"),
        ("bücher", "b-cher-0"),
    ],
)
def test_workers_are_named_after_the_host(name, worker):
    assert Host(name).worker_name(0) == worker


def test_a_host_survives_being_kept():
    host = parse("me@h:2222 slots=2 queues=a,b label.k=v", "f")[0]
    assert Host.from_json(host.to_json()) == host


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": 1, "options": {"queues": [], "x": 1}}'])
def test_a_row_that_is_damaged_is_an_error_for_people(text):
    with pytest.raises(UsageError, match="cannot be read"):
        Host.from_json(text)


def test_a_dash_reads_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"h\n@x\n")))
    with pytest.raises(HostsFileError, match=r"^<stdin>:2: "):
        hosts.read("-")


def test_a_file_that_is_missing_or_no_text_is_an_error_for_people(tmp_path):
    with pytest.raises(UsageError, match="cannot read the hosts file"):
        hosts.read(str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"ok\n\xff\xfe")
    with pytest.raises(HostsFileError, match=r"binary:2: is not UTF-8"):
        hosts.read(str(tmp_path / "binary"))
