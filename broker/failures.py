"""Why attempts failed, in the words and the encodings that are stored with a job.

The kinds are named as users search for them: WorkerLost, Timeout, OutOfMemory, Killed.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode


def encoded(text: str) -> str:
    """A text as RQ keeps `exc_string`: deflated, in base64 (rq.results.Result.serialize)."""
    return b64encode(zlib.compress(text.encode("utf-8", "surrogateescape"), 1)).decode()


def decoded(text: str | bytes) -> str:
    """What `encoded` was given; '' where it cannot be read."""
    try:
        return zlib.decompress(b64decode(text)).decode("utf-8", "replace")
    except (ValueError, zlib.error):
        return ""


def lost_row(job_id: str, lease: str, reason: str, *, uncounted: bool) -> str:
    """One argument of lose.lua: an attempt that was lost with its worker."""
    row = {"job": job_id, "lease": lease, "reason": reason, "exc_string": encoded(reason)}
    return json.dumps(row | ({"uncounted": True} if uncounted else {}))
