"""What a worker is spared of redis-py is there all the same for whoever asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

START = "from fleet.late import import_redis; import_redis()\nimport sys, redis\n"
WORKER = START.replace("import_redis", "import_redis_of_worker").replace("()", "(tls=False)")


def said(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_worker_has_neither_the_asyncio_half_nor_what_reads_metadata() -> None:
    heavy = (
        "redis.asyncio.client",
        "asyncio.base_events",
        "ssl",
        "_hashlib",
        "email",
        "zipfile",
        "pickle",
        "csv",
    )
    code = f"{WORKER}import fleet.assembly; print(*[name for name in {heavy} if name in sys.modules])"
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


def test_asyncio_is_whole_for_who_asks_and_its_parts_are_the_same() -> None:
    code = f"""{WORKER}import asyncio
part = asyncio.StreamReader
print(type(asyncio).__name__)
async def five():
    await asyncio.sleep(0)
    return 5
print(asyncio.run(five()))
import asyncio
print(asyncio.streams.StreamReader is part, asyncio.StreamReader is part, asyncio.events.__name__)
print(type(sys.modules["asyncio"]).__name__)"""
    assert said(code) == ["Late", "5", "True", "True", "asyncio.events", "module"]


def test_hashes_are_the_interpreters_own_and_the_same() -> None:
    code = f"""{WORKER}import hashlib, _hashlib
print(all(hashlib.new(n, b"x").digest() == _hashlib.new(n, b"x").digest() for n in ("md5", "sha1", "sha256")))
print(len(hashlib.blake2b(b"x").digest()))"""
    assert said(code) == ["True", "64"]


def test_without_tls_in_redis_py_others_have_it() -> None:
    code = f"""{WORKER}import ssl
import redis.connection
print(redis.connection.ssl, ssl.OPENSSL_VERSION_INFO > (1,))"""
    assert said(code) == ["None", "True"]


@pytest.mark.parametrize(("scheme", "tls"), [("rediss", "True"), ("redis", "False")])
def test_a_worker_has_tls_where_its_redis_has(tmp_path: Path, scheme: str, tls: str) -> None:
    (tmp_path / "config").write_text(f'{{"redis_url": "{scheme}://h"}}')
    arguments = ["--config", str(tmp_path / "config")]
    code = f"""import sys
sys.argv[1:] = {arguments}
from fleet.worker import main
main()
import redis.connection
print(redis.connection.ssl is not None)"""
    assert said(code) == [tls]


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
