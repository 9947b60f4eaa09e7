"""Whether the user that we log in to Redis as may do what the fleet does."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

import redis
from redis import exceptions

from broker import keys, scripts
from broker.connection import one_line
from broker.findings import Finding, Patient, ask, some

#: a command of each kind that we send; _K stands for a key, _C for a channel
_COMMANDS = """
DEL _K|EXISTS _K|EXPIRE _K 1|PEXPIRE _K 1|PERSIST _K|GET _K|SET _K v|INCR _K|MGET _K
HSET _K f v|HSETNX _K f v|HGET _K f|HMGET _K f|HGETALL _K|HDEL _K f|HKEYS _K|HLEN _K|HVALS _K|HEXISTS _K f
HINCRBY _K f 1|HINCRBYFLOAT _K f 1|LPUSH _K v|RPUSH _K v|LPOP _K|BLPOP _K 1|BLMOVE _K _K LEFT LEFT 1
LLEN _K|LINDEX _K 0|LRANGE _K 0 1|LREM _K 0 v|LTRIM _K 0 0|SADD _K v|SREM _K v|SMEMBERS _K|SCARD _K
SISMEMBER _K v|ZADD _K 1 v|ZREM _K v|ZSCORE _K v|ZCARD _K|ZRANGE _K 0 1|ZREVRANGE _K 0 1
ZRANGEBYSCORE _K 0 1|ZREMRANGEBYSCORE _K 0 1|XADD _K * f v|XREVRANGE _K + -|PUBLISH _C v
SUBSCRIBE _C|TIME|INFO|PING|SCRIPT LOAD v|EVALSHA v 0|MULTI|EXEC
"""
#: a key of each family; what may be done to one of a family may be done to all
_KEYS = (keys.job("doctor"), keys.queue("doctor"), keys.QUEUES, keys.LEASES, keys.worker_beat("doctor"))
#: redis.acl_check_cmd came with Redis 7.0. Asks about each command, runs none
_MAY_I = """
if not redis.acl_check_cmd then return false end
local denied = {}
for i, words in ipairs(ARGV) do
  local list = {}
  for word in string.gmatch(words, '%S+') do table.insert(list, word) end
  if not redis.acl_check_cmd(unpack(list)) then table.insert(denied, words) end
end
return denied
"""


def check_rights(patient: Patient) -> Finding:
    """Whether the user we log in as may do what the fleet does."""
    client = patient.client
    who = ask(lambda: client.acl_whoami())
    name = who.decode() if isinstance(who, bytes) else str(who or "USER")
    try:
        denied: Any = client.eval(_MAY_I, 0, *_questions())
        client.script_load(scripts.ROUND.text)
    except exceptions.NoPermissionError as exc:
        return Finding("rights", "error", f"{name} may not run scripts: {one_line(exc)}", _grant(name))
    except exceptions.ResponseError as exc:
        return Finding("rights", "unknown", f"Redis does not tell: {one_line(exc)}")
    if denied is None:
        return _rights_by_trying(client, name)
    if denied:
        return Finding("rights", "error", f"{name} may not: {some(_words(denied))}", _grant(name))
    return Finding("rights", "ok", f"{name} may do all that is needed")


def _questions() -> Iterator[str]:
    rows = [row for line in _COMMANDS.split("\n") for row in line.split("|") if row]
    for row in rows:
        yield row.replace("_K", _KEYS[0]).replace("_C", keys.pubsub("doctor"))
    yield f"PUBLISH {keys.NEWS} v"
    for key in _KEYS[1:]:
        yield from (f"GET {key}", f"DEL {key}")


def _words(denied: Iterable[bytes]) -> list[str]:
    return [text.decode().replace(_KEYS[0], "rq:job:*") for text in denied]


def _grant(name: str) -> str:
    return f"redis-cli ACL SETUSER {name} '~rq:*' '~fleet:*' '&rq:*' '&fleet:*' +@all -@dangerous +info"


def _rights_by_trying(client: redis.Redis, name: str) -> Finding:
    """Before Redis 7.0: write a key of each family and remove it, in one step."""
    text = "for _, key in ipairs(KEYS) do redis.call('SET', key, '1', 'EX', 10) redis.call('DEL', key) end"
    mark = secrets.token_hex(8)
    families = (keys.job(f"doctor-{mark}"), keys.worker_beat(f"doctor-{mark}"))
    try:
        client.eval(text, len(families), *families)
    except exceptions.ResponseError as exc:  # in a script, NOPERM comes without a class of its own
        return Finding("rights", "error", f"{name} may not write: {one_line(exc)}", _grant(name))
    return Finding("rights", "ok", f"{name} may write keys of rq and of the fleet")
