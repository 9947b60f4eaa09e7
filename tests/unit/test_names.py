"""Ids of jobs, and what they tell."""

from __future__ import annotations

import uuid

from broker import names


def test_ids_that_nobody_chose_tell_that_their_jobs_come_with_a_token():
    for _ in range(100):
        own = names.new_uuid()
        assert (uuid.UUID(own).version, uuid.UUID(own).variant) == (8, uuid.RFC_4122)
        assert names.is_rung_for(own.encode())
        assert names.is_rung_for(names.new_job_id().encode())
        assert not names.is_rung_for(str(uuid.uuid4()).encode())
    assert not names.is_rung_for(b"nightly-report")
    assert not names.is_rung_for(b"\xff\x00")
