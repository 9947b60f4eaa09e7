"""What a worker is spared of redis-py is there all the same for whoever asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

START = "from fleet.late import import_redis; import_redis()\nimport sys, redis\n"


def said(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_worker_has_neither_the_asyncio_half_nor_what_reads_metadata() -> None:
    heavy = ("redis.asyncio.client", "redis.asyncio.cluster", "email", "zipfile", "pickle", "csv")
    code = f"{START}import fleet.assembly; print(*[name for name in {heavy} if name in sys.modules])"
    assert said(code) == []


def test_connecting_needs_none_of_it_either(redis_url: str) -> None:
    code = f"""{START}from broker.connection import connect
client = connect({redis_url!r})
client.ping()
print("email" in sys.modules)"""
    assert said(code) == ["False"]


def test_a_verb_is_spared_it_likewise(redis_url: str) -> None:
    code = f"""from cli.context import Context
Context({redis_url!r}).redis()
import sys
print("redis.asyncio.client" in sys.modules)"""
    assert said(code) == ["False"]


def test_who_asks_gets_the_real_ones() -> None:
    code = f"""{START}from importlib import metadata
print(metadata.version("redis") == redis.__version__)
client = redis.asyncio.Redis()
import redis.asyncio.client
print(type(client) is redis.asyncio.client.Redis, type(redis.asyncio).__name__)
from redis.asyncio import Redis
print(Redis is type(client))"""
    assert said(code) == ["True", "True", "module", "True"]


def test_a_version_that_must_have_it_first_is_imported_as_usual(tmp_path: Path) -> None:
    for name, text in {
        "redis/__init__.py": "from redis import asyncio\nfrom redis.client import CLIENT",
        "redis/client.py": "from redis.asyncio import OTHER\nCLIENT = OTHER",
        "redis/asyncio/__init__.py": "OTHER = 1\nfrom redis.client import CLIENT",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert said(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{START}print(redis.asyncio.CLIENT)") == [
        "1"
    ]
