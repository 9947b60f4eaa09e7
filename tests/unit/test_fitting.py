"""Why workers do not take the jobs of a set: words, and the numbers in them."""

from __future__ import annotations

import pytest
from hypothesis import given

from broker import fitting
from broker.fitting import Free
from broker.requirements import Offer, Requirements, parse
from fleet.resources import Gpu, Resources
from fleet.room import Room
from tests.sets import NOW, G, needs, offers

A100 = Offer({"gpu_type": "a100", "os": "linux"}, 16, 128 * G, (80 * G, 80 * G), 4)
V100 = Offer({"gpu_type": "v100", "os": "linux"}, 8, 40 * G, (16 * G,), 4, NOW + 1800)
L4 = Offer({"gpu_type": "l4", "os": "linux"}, 4, 20 * G, (), 4)


def why(offers, **said):
    return [reason.message for reason in fitting.unmatched(parse(said), offers, NOW)]


@pytest.mark.parametrize(
    ("workers", "said", "messages"),
    [
        ((V100, L4), {"labels": ["gpu_type=a100*"]}, ["no worker has gpu_type=a100*: seen are l4, v100"]),
        ((V100,), {"labels": ["zone=eu"]}, ["no worker has zone=eu: none has a label zone"]),
        ((V100,), {"labels": ["os!=linux"]}, ["no worker has os!=linux: seen is linux"]),
        (
            (A100, V100, L4),
            {"labels": ["os=linux"], "memory": "256G"},
            ["3 workers match the labels; the largest has 128G of the 256G asked for"],
        ),
        (
            (V100, L4),
            {"cpus": 16},
            ["2 workers on the queue; the largest has 8 of the 16 CPUs asked for"],
        ),
        (
            (V100, L4),
            {"gpus": 2},
            ["2 workers on the queue; the one with the most has 1 of the 2 GPUs asked for"],
        ),
        (
            (A100, V100),
            {"gpus": 4, "gpu_memory": "40G"},
            ["2 workers on the queue; the one with the most has 2 of the 4 GPUs of 40G asked for"],
        ),
        (
            (V100,),
            {"time_request": "2h"},
            ["1 worker on the queue; the one that stays longest has 30m left of the 2h asked for"],
        ),
        (
            (A100, V100),
            {"labels": ["gpu_type=v*"], "memory": "64G", "gpus": 2},
            [
                "1 worker matches the labels; the largest has 40G of the 64G asked for",
                "1 worker matches the labels; the one with the most has 1 of the 2 GPUs asked for",
            ],
        ),
        (
            (A100, V100),
            {"labels": ["gpu_type=h100"], "cpus": 64},
            [
                "no worker has gpu_type=h100: seen are a100, v100",
                "2 workers on the queue; the largest has 16 of the 64 CPUs asked for",
            ],
        ),
        (
            (Offer({"a": "1"}), Offer({"b": "1"})),
            {"labels": ["a=1", "b=1"]},
            ["no worker has all of these labels at once: of 2, 1 has a=1, 1 has b=1"],
        ),
        (
            (Offer(cpus=8, memory_bytes=G), Offer(cpus=1, memory_bytes=8 * G)),
            {"cpus": 8, "memory": "8G"},
            ["2 workers on the queue; none has all that is asked for: 1 has 8 CPUs, 1 has 8G"],
        ),
    ],
)
def test_what_nobody_has(workers, said, messages):
    assert why(workers, **said) == messages


def test_many_values_of_a_label_are_not_all_named():
    (message,) = why([Offer({"rack": f"r{number}"}) for number in range(9)], labels=["rack=x"])
    assert message == "no worker has rack=x: seen are r0, r1, r2, r3, r4, r5 and 3 more"


@pytest.mark.parametrize(
    ("said", "free", "message"),
    [
        ({}, Free(0, 0, 0, (1, 1)), "1 worker matches, all busy: none of their 4 slots is free"),
        (
            {},
            Free(2, 0, 0, (1, 1)),
            "1 worker matches, all busy: their CPUs are taken by jobs that asked for them",
        ),
        (
            {"memory": "64G"},
            Free(2, 8, 40 * G, (1, 1)),
            "1 worker matches, all busy; the largest has 40G free of the 64G asked for",
        ),
        (
            {"gpus": 2},
            Free(2, 8, 40 * G, (1, 0.5)),
            "1 worker matches, all busy; the one with the most has 1 free of the 2 GPUs asked for",
        ),
        (
            {"gpus": 0.5},
            Free(2, 8, 40 * G, (0.3, 0)),
            "1 worker matches, all busy; the one with the most has 0.3 free of the 0.5 GPUs asked for",
        ),
        (
            {"exclusive": True},
            Free(2, 8, 40 * G, (1, 1)),
            "1 worker matches, all busy; exclusive: it waits until one of them runs nothing",
        ),
    ],
)
def test_what_nobody_has_free(said, free, message):
    need = parse(said)
    assert not fitting.fits(need, A100, free)
    assert fitting.without_room(need, [(A100, free)]).message == message


def test_each_has_something_free_but_none_has_all():
    need = parse({"cpus": 4, "memory": "64G"})
    workers = [(A100, Free(4, 1, 128 * G, ())), (A100, Free(4, 8, G, ()))]
    assert fitting.without_room(need, workers).message == (
        "2 workers match, all busy; none of them has all that is asked for free at once"
    )


@given(needs, offers)
def test_there_is_always_a_reason(need, offer):
    """A set matches any worker, or it is said why not; and it fits where the worker's own room says so."""
    if not need.matches(offer, NOW):
        assert all(reason.message for reason in fitting.unmatched(need, [offer], NOW))
        assert fitting.unmatched(need, [offer], NOW)
        return
    room = Room(
        Resources(int(offer.cpus), offer.memory_bytes, tuple(Gpu("x", size) for size in offer.gpus)),
        offer.slots,
    )
    room.take("other", Requirements())
    left = room.free()
    free = Free(left.slots, left.cpus, left.memory_bytes, left.gpus)
    assert fitting.fits(need, offer, free) is room.fits(need)
    if not room.fits(need):
        assert fitting.without_room(need, [(offer, free)]).message
