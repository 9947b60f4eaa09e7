"""How what a job was given is told to it, and to its process."""

from __future__ import annotations

import resource

import pytest

from broker.usage import Usage
from fleet import limits
from fleet.limits import Limit
from fleet.room import Grant

_MIB, _GIB = 2**20, 2**30


def _limit(**given: object) -> Limit:
    return Limit(Grant(**given), None, None)  # type: ignore[arg-type]


def test_nothing_is_said_of_what_was_not_asked_for():
    assert _limit(cpus=2.0, cpu_ids=(0, 1)).variables() == {"FLEET_CPUS": "2"}
    assert _limit(memory_bytes=_MIB).variables() == {"FLEET_MEMORY_BYTES": str(_MIB)}
    gpus = _limit(gpu_ids=(3, 5)).variables()
    assert (gpus["CUDA_VISIBLE_DEVICES"], gpus["ROCR_VISIBLE_DEVICES"], gpus["FLEET_GPUS"]) == (
        "3,5",
        "3,5",
        "2",
    )
    assert _limit(gpu_ids=(1,), gpu_share=0.25).variables()["FLEET_GPUS"] == "0.25"


@pytest.mark.parametrize(
    ("cpus", "ids", "nice"),
    [(None, (), 0), (1, (0,), 0), (1.5, (), 0), (0.8, (), 1), (0.5, (), 3), (0.1, (), 10), (0.001, (), 19)],
)
def test_less_than_a_cpu_is_a_weight(cpus, ids, nice):
    assert _limit(cpus=cpus, cpu_ids=ids).nice == nice


def test_a_command_without_limits_is_as_it_was():
    assert _limit(cpus=2, cpu_ids=(0, 1)).command(("true", "x")) == ("true", "x")


def test_weight_and_memory_are_there_before_it_begins(monkeypatch):
    monkeypatch.setattr(limits, "_NICE", "/usr/bin/nice")
    argv = _limit(cpus=0.5, memory_bytes=_GIB).command(("true", "x"))
    assert argv[:2] == ("/bin/sh", "-c")
    assert argv[3:] == (str((_GIB + _GIB // 2 + _GIB) >> 10), "/usr/bin/nice", "-n", "3", "true", "x")


@pytest.mark.parametrize(
    ("most", "kib"), [(resource.RLIM_INFINITY, 2621440), (3 * _GIB, 2621440), (_GIB, 1048576)]
)
def test_a_limit_that_is_there_already_is_not_raised(monkeypatch, most, kib):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, most))
    assert _limit(memory_bytes=_GIB).command(("true",))[3] == str(kib)
    assert _limit(memory_bytes=_GIB).for_executor()["data_bytes"] == kib << 10


def test_a_reason_has_what_there_was_and_what_was_allowed():
    limit = _limit(memory_bytes=200 * _MIB)
    usage = Usage(1.0, 250 * _MIB)
    assert limit.verdict(usage) == "OutOfMemory: its processes had 250 MiB, its limit is 200 MiB"
    explained = limit.explained("OutOfMemory: exit code 1, its last words: MemoryError", usage)
    assert explained == f"{limit.verdict(usage)}; exit code 1, its last words: MemoryError"
    assert _limit(cpus=1).explained("OutOfMemory: x", usage) == "OutOfMemory: x"


def test_the_most_that_was_seen_counts():
    limit = _limit(memory_bytes=200 * _MIB)
    assert limit.usage(1.0, 50 * _MIB) == Usage(1.0, 50 * _MIB)
    limit.seen_bytes, limit.seen_gpu_bytes = 150 * _MIB, 7
    assert limit.usage(None, 50 * _MIB) == Usage(None, 150 * _MIB, 7)
    assert not limit.ran_out
    limit.seen_bytes = 201 * _MIB
    assert limit.ran_out
