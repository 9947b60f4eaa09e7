"""The file from which a worker starts."""

from __future__ import annotations

import pytest

from broker.errors import UsageError
from fleet.worker_config import WorkerConfig


@pytest.mark.parametrize("text", ["", "[]", "[1]", "7", "null", '"text"', "{}", '{"colour": "red"}'])
def test_what_is_no_configuration_is_said_to_be_none(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the worker's configuration"):
        WorkerConfig.from_json(text)
