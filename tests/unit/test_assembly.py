"""How a worker leaves."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from fleet import assembly


class Registry:
    """Redis, which answers at the second time."""

    def __init__(self, trouble: redis.RedisError) -> None:
        self._answers: list[Any] = [trouble, True]

    def retire(self, client: object, *, known_seconds: int) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, redis.RedisError):
            raise answer
        return answer


@pytest.mark.parametrize("trouble", [redis.ConnectionError("cut"), redis.TimeoutError("slow")])
def test_it_signs_off_again_where_redis_did_not_answer(trouble, caplog):
    session: Any = Registry(trouble)
    client: Any = None
    assembly._leave(session, client, known_seconds=0)
    assert caplog.records == []
