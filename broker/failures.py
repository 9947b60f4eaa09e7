"""Why attempts failed, in the words and the encodings that are stored with a job.

The kinds are named as users search for them: WorkerLost, Timeout, OutOfMemory, Killed.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from typing import Any


def encoded(text: str) -> str:
    """A text as RQ keeps `exc_string`: deflated, in base64 (rq.results.Result.serialize)."""
    return b64encode(zlib.compress(text.encode("utf-8", "surrogateescape"), 1)).decode()


def decoded(text: str | bytes) -> str:
    """What `encoded` was given; '' where it cannot be read."""
    try:
        return zlib.decompress(b64decode(text)).decode("utf-8", "replace")
    except (ValueError, zlib.error):
        return ""


def last_seen(record: bytes | str | None) -> str:
    """Of a worker's record in Redis: "(host h, last beat 2026-...) "; '' where there is none, or garbage."""
    fields = _fields(record)
    return "" if fields is None else f"(host {fields.get('host')}, last beat {fields.get('at')}) "


def is_of(record: bytes | str | None, incarnation: str) -> bool:
    """Whether a worker's record in Redis is that of this life."""
    return (_fields(record) or {}).get("incarnation") == incarnation


def _fields(record: bytes | str | None) -> dict[str, Any] | None:
    try:
        fields = json.loads(record or b"")
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def lost_row(job_id: str, lease: str, reason: str, *, uncounted: bool = False) -> str:
    """One argument of lose.lua: an attempt that was lost with its worker."""
    row = {"job": job_id, "lease": lease, "reason": reason, "exc_string": encoded(reason)}
    return json.dumps(row | ({"uncounted": True} if uncounted else {}))
