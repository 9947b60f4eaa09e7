"""Which versions are older, and what is told of them."""

from __future__ import annotations

import pytest

from fleet import versions
from fleet.launchers import base


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    monkeypatch.setattr(versions, "__version__", "1.10.0")


@pytest.mark.parametrize(
    ("version", "older"),
    [
        ("1.10.0", False),
        ("1.10", False),
        ("1.9.9", True),
        ("1.10.0rc1", True),
        ("1.10.0.dev3", True),
        ("1.10.0.post1", False),
        ("1.10.1", False),
        ("2.0", False),
        ("0.9", True),
        ("unknown", True),
        (None, True),
    ],
)
def test_which_versions_are_older_than_ours(version, older):
    assert versions.is_older(version) is older


def test_only_living_workers_that_are_older_make_way():
    seen = [base.Seen("a", True, 1, "1.9"), base.Seen("b", False, 2, "1.9"), base.Seen("c", True, 3, "2.0")]
    assert versions.older(seen) == {"a": "1.9"}


def test_what_is_told_of_each_version():
    def worker(fresh: bool, version: str | None, replaced: str | None = None) -> base.Started:
        return base.Started("w", 1, fresh, version, replaced=replaced)

    assert versions.note([worker(True, "1.10.0"), worker(False, "1.10.0")]) == ""
    assert versions.note([worker(False, "1.9"), worker(False, None)]) == (
        "runs version 1.9, unknown, here it is 1.10.0: 'fleet up --upgrade' replaces it"
    )
    assert versions.note([worker(False, "2.0")]) == "runs version 2.0, newer than 1.10.0 here"
    assert versions.note([worker(True, "1.10.0", "1.9")]) == "replaced version 1.9"
