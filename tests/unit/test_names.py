"""Ids of jobs, and what they tell."""

from __future__ import annotations

import uuid

import pytest

from broker import names
from broker.errors import UsageError


def test_ids_that_nobody_chose_tell_that_their_jobs_come_with_a_token():
    for _ in range(100):
        own = names.new_uuid()
        assert (uuid.UUID(own).version, uuid.UUID(own).variant) == (8, uuid.RFC_4122)
        assert names.is_rung_for(own.encode())
        assert names.is_rung_for(names.new_job_id().encode())
        assert not names.is_rung_for(str(uuid.uuid4()).encode())
    assert not names.is_rung_for(b"nightly-report")
    assert not names.is_rung_for(b"\xff\x00")


def test_queues_have_weights_or_an_order():
    assert names.weighted_queues(["a", "b:c"]) == (("a", "b:c"), ())
    assert names.weighted_queues(["a:3", "b:c:1"]) == (("a", "b:c"), (3, 1))
    assert names.weighted_queues(["a:2:1", "a:3:1"]) == (("a:2", "a:3"), (1, 1))


@pytest.mark.parametrize("name", ["proj:3", "a:0", "a:1000001", "a:1.5", "a:-1"])
def test_one_queue_alone_has_a_name_and_no_weight(name):
    assert names.weighted_queues([name]) == ((name,), ())


def test_what_may_be_names_or_weights_is_refused_with_the_way_out():
    for words in (["proj:3", "default"], ["proj:1", "proj:2"], ["proj:1.5", "default:2"], ["proj:0", "b:1"]):
        with pytest.raises(UsageError) as told:
            names.weighted_queues(words)
        way_out = told.value.hint.rpartition(": ")[2].rstrip(".")
        assert names.weighted_queues(way_out.split(",")) == (tuple(words), (1, 1))


@pytest.mark.parametrize(
    "words", [["a:3", "b"], ["a:0", "b:1"], ["a:1000001", "b:1"], ["a:1.5", "b:2.5"], ["a b:1"], [""]]
)
def test_queues_with_half_a_weight_or_none_at_all_are_refused(words):
    with pytest.raises(UsageError):
        names.weighted_queues(words)
