"""Fixtures: a harness of the test's own, and the verdict on what it left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.checker import check
from tests.chaos.evidence import Evidence
from tests.chaos.harness import Harness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    """Started, and ended with all it started."""
    made = Harness(tmp_path / "chaos").start()
    yield made
    made.close()


@pytest.fixture(scope="session")
def acquit() -> Callable[[Evidence], None]:
    """`acquit(evidence)`: fails the test with everything that contradicts any of the ten properties."""

    def judge(evidence: Evidence) -> None:
        found = check(evidence)
        assert not found, "\n".join(str(one) for one in found[:20])

    return judge
