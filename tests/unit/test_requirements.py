"""Sets of requirements: what people write, one form for equal sets, and which workers do."""

from __future__ import annotations

import random
from fnmatch import fnmatchcase

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broker import names, requirements
from broker.errors import UsageError
from broker.requirements import FieldError, Mismatch, Offer, Requirements, gpu_names, parse
from tests.sets import NOW, G, needs, offers

# --- the canonical form --------------------------------------------------------------------------


@given(needs)
def test_a_set_survives_its_canonical_form(need):
    assert Requirements.from_canonical(need.canonical()) == need


@given(needs, st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_of_labels_makes_another_set(need, chance: random.Random):
    shuffled = list(need.labels) * 2
    chance.shuffle(shuffled)
    fields = {name: getattr(need, name) for name in ("cpus", "memory_bytes", "gpus", "gpu_memory_bytes")}
    same = Requirements(
        labels=tuple(shuffled),
        time_seconds=need.time_seconds,
        exclusive=need.exclusive,
        priority=need.priority,
        **fields,
    )
    assert (same.canonical(), same.digest()) == (need.canonical(), need.digest())


@given(needs, needs)
def test_different_sets_have_different_digests(one, other):
    assert (one == other) == (one.digest() == other.digest())


@given(needs)
def test_a_set_reads_as_people_write_it(need):
    """What is shown can be typed again, word by word."""
    words = need.readable().replace('"A100 80GB"', "A100 80GB")
    assume(" " not in "".join(str(rule) for rule in need.labels))
    said: dict[str, object] = {"labels": []}
    for word in words.split():
        name, _, value = word.partition("=")
        name = {"time": "time_request"}.get(name, name)
        if name == "exclusive":
            said[name] = True
        elif name in requirements.FIELDS:
            said[name] = value
        else:
            said["labels"].append(word)  # type: ignore[attr-defined]
    assert parse(said) == need


def test_the_same_set_has_the_same_digest_for_ever():
    """Jobs wait under it in Redis: an update must not change it."""
    need = parse({"cpus": 2.0, "memory": "4G", "labels": ["gpu_type=a100*", "os!=win*"], "priority": "high"})
    assert need.canonical() == (
        '{"cpus":2,"labels":["gpu_type=a100*","os!=win*"],"memory_bytes":4294967296,"priority":10}'
    )
    assert need.queue_of("default") == "default@3py6icas5i"


def test_nothing_asked_for_is_the_plain_queue():
    nothing = parse({"cpus": None, "labels": [], "exclusive": False, "priority": "normal"})
    assert (nothing.digest(), nothing.readable(), nothing.canonical()) == ("", "", "{}")
    assert nothing.queue_of("default") == "default"


@given(needs)
def test_the_name_of_its_list_leads_back_to_the_queue(need):
    assert requirements.base_of(need.queue_of("big.jobs:1")) == "big.jobs:1"
    with pytest.raises(UsageError):
        names.queue_name("a" + requirements.SEPARATOR + "b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"colour":1}',
        '{"cpus":"x"}',
        '{"cpus":NaN}',
        '{"labels":[1]}',
        '{"labels":["x"]}',
        "{",
    ],
)
def test_what_is_no_set_is_known_as_such(text):
    with pytest.raises(ValueError):
        Requirements.from_canonical(text)


def test_how_a_set_reads():
    need = parse(
        {
            "cpus": "2",
            "memory": "1536M",
            "gpu_memory": "40G",
            "labels": {"gpu_name": "NVIDIA A100*"},
            "time_request": "2h",
            "exclusive": True,
            "priority": 7,
        }
    )
    assert need.readable() == (
        'cpus=2 memory=1.5G gpus=1 gpu_memory=40G "gpu_name=NVIDIA A100*" time=2h exclusive priority=7'
    )


# --- what people write ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cpus": 0}, "cpus: 0 CPUs cannot"),
        ({"cpus": "many"}, "cpus: 'many' is no number"),
        ({"memory": "4"}, "memory: '4' is no size"),
        ({"memory": 4}, "memory: 4 bytes is too little"),
        ({"gpus": 1.5}, "gpus: 1.5 GPUs cannot"),
        ({"gpus": -1}, "gpus: -1: must be 0 or more"),
        ({"gpu_memory": "x"}, "gpu_memory: 'x' is no size"),
        ({"labels": ["gpu_type"]}, "labels: 'gpu_type' is no condition"),
        ({"labels": ["=x"]}, "labels: '=x' is no condition"),
        ({"labels": ["k="]}, "labels: 'k=': a glob has 1 to"),
        ({"labels": "k=v"}, "labels: 'k=v' is no list"),
        ({"time_request": "soon"}, "time_request: 'soon' is no duration"),
        ({"exclusive": "yes"}, "exclusive: 'yes' is neither"),
        ({"priority": "highest"}, "priority: 'highest' is no priority"),
        ({"priority": 1.5}, "priority: 1.5 is no priority"),
        ({"labels": ["zone==eu"]}, "labels: 'zone==eu': no label begins with ="),
        ({"priority": True}, "priority: True is no priority"),
        ({"gpu": 1}, "gpu: there is no such requirement"),
    ],
)
def test_what_cannot_be_asked_for(said, message):
    with pytest.raises(FieldError) as caught:
        parse(said)
    assert message in caught.value.message
    assert caught.value.name == next(iter(said))
    assert caught.value.exit_code == 2


def test_the_nearest_name_is_offered():
    with pytest.raises(FieldError) as caught:
        parse({"memmory": "4G"})
    assert caught.value.hint == "Did you mean memory?"


@pytest.mark.parametrize(
    ("said", "number"), [("high", 10), ("low", -10), ("-3", -3), (40, 40), ("critical", 30)]
)
def test_priorities(said, number):
    assert requirements.priority(said) == number


# --- matching ------------------------------------------------------------------------------------


@given(needs, offers)
def test_matching_is_what_its_parts_say(need, offer):
    """Judged once more, the long way round."""
    enough = [memory for memory in offer.gpus if memory >= (need.gpu_memory_bytes or 0)]
    labels = all(
        (rule.key in offer.labels and fnmatchcase(offer.labels[rule.key], rule.glob)) is not rule.negated
        for rule in need.labels
    )
    expected = (
        labels
        and (need.cpus or 0) <= offer.cpus
        and (need.memory_bytes or 0) <= offer.memory_bytes
        and need.gpus <= len(enough)
        and (offer.ends_at is None or need.time_seconds is None or NOW + need.time_seconds <= offer.ends_at)
    )
    assert need.matches(offer, NOW) is expected


@given(needs, offers)
def test_a_larger_worker_lacks_nothing_more(need, offer):
    larger = Offer(
        offer.labels, offer.cpus + 1, offer.memory_bytes + G, (*offer.gpus, 80 * G), offer.slots + 1, None
    )
    had = {lack.what for lack in need.mismatches(offer, NOW)}
    still = {lack.what for lack in need.mismatches(larger, NOW)}
    assert still - {"gpu_memory"} <= had
    assert "gpu_memory" not in still or had & {"gpus", "gpu_memory"}


def test_what_is_lacking_is_named_with_numbers():
    need = parse(
        {"cpus": 8, "memory": "64G", "gpus": 2, "labels": ["os=linux", "t=a100*"], "time_request": "1h"}
    )
    offer = Offer({"os": "linux", "t": "v100"}, 4, 40 * G, (16 * G,), 4, NOW + 60)
    assert [(lack.what, str(lack.asked), lack.has) for lack in need.mismatches(offer, NOW)] == [
        ("label", "t=a100*", "v100"),
        ("cpus", "8", 4),
        ("memory", str(64 * G), 40 * G),
        ("gpus", "2", 1),
        ("time", "3600.0" if isinstance(need.time_seconds, float) else "3600", 60),
    ]


def test_gpus_that_are_too_small_do_not_count():
    need = parse({"gpus": 2, "gpu_memory": "40G"})
    assert need.matches(Offer(gpus=(80 * G, 16 * G, 40 * G)), NOW)
    (lack,) = need.mismatches(Offer(gpus=(80 * G, 16 * G, 0)), NOW)
    assert (lack.what, lack.asked, lack.has) == ("gpu_memory", 40 * G, 1)


UNLIKE = ("NVIDIA A100", "NVIDIA A100", "Tesla T4")


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        ("gpu_name=*A100", 2),
        ("gpu_name=*T4", 1),
        ("gpu_name!=*T4*", 2),
        ("gpu_name=*", 3),
        ("gpu_name=L4", 0),
    ],
)
def test_a_rule_on_gpu_name_is_of_each_gpu(rule, most):
    offer = Offer({"gpu_name": "NVIDIA A100,Tesla T4"}, gpus=(G, G, 0), gpu_names=UNLIKE)
    matching = [count for count in (1, 2, 3) if parse({"gpus": count, "labels": [rule]}).matches(offer, NOW)]
    assert matching == list(range(1, most + 1))


def test_what_lacks_of_unlike_gpus_is_told():
    offer = Offer({"gpu_name": "NVIDIA A100,Tesla T4"}, gpus=(G, G, 0), gpu_names=UNLIKE)
    three = parse({"gpus": 3, "labels": ["gpu_name=*A100"]})
    assert three.mismatches(offer, NOW) == [Mismatch("gpus", 3, 2)]
    none = parse({"gpus": 1, "labels": ["gpu_name=L4"]})
    assert [lack.what for lack in none.mismatches(offer, NOW)] == ["label"]


def test_a_gpu_name_that_somebody_gave_is_that_of_each_gpu():
    labels = {"gpu_name": "big"}
    assert gpu_names(labels, UNLIKE) == ()
    assert gpu_names({"gpu_name": "NVIDIA A100,Tesla T4"}, UNLIKE) == UNLIKE
    offer = Offer(labels, gpus=(G, G, G))
    assert parse({"gpus": 3, "labels": ["gpu_name=big"]}).matches(offer, NOW)
    assert not parse({"gpus": 1, "labels": ["gpu_name=*A100"]}).matches(offer, NOW)


def test_without_gpus_a_rule_on_gpu_name_is_of_the_worker():
    offer = Offer({"gpu_name": "NVIDIA A100,Tesla T4"}, gpus=(G, G, 0), gpu_names=UNLIKE)
    assert parse({"labels": ["gpu_name=*T4"]}).matches(offer, NOW)
    assert not parse({"labels": ["gpu_name!=*T4"]}).matches(offer, NOW)


def test_names_of_priorities_are_read_in_any_case():
    assert parse({"priority": "HIGH"}) == parse({"priority": "high"}) == parse({"priority": 10})


def test_a_label_that_is_missing():
    assert parse({"labels": ["os!=win*"]}).matches(Offer(), NOW)
    assert not parse({"labels": ["os=*"]}).matches(Offer(), NOW)
    assert not parse({"labels": ["os!=*"]}).matches(Offer({"os": "linux"}), NOW)
    assert not parse({"labels": ["os=Linux"]}).matches(Offer({"os": "linux"}), NOW)


@pytest.mark.parametrize(
    ("said", "takes"),
    [
        ({}, False),
        ({"labels": ["a=b"], "priority": 3, "time_request": 5}, False),
        ({"cpus": 1}, True),
        ({"memory": "1G"}, True),
        ({"gpus": 0.5}, True),
        ({"exclusive": True}, True),
    ],
)
def test_which_sets_take_room(said, takes):
    assert parse(said).takes_room() is takes
