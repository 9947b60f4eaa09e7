"""What a worker, or a tunnel, says on stderr: one set-up for each process, a line an event.

All of a process goes through it: our own lines, those of libraries, warnings, and the traceback of what
nobody caught. Who logs names the event, and the claim it is about, by `about`.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from broker.work import Claim

#: "human": `TIME LEVEL MESSAGE`; "json": an object a line, see JsonFormatter
FORMATS = ("human", "json")
LEVELS = ("debug", "info", "warning", "error")
#: the event of a line whose logger named none, as libraries do not
_NO_EVENT = "log"

log = logging.getLogger("fleet.worker")


def about(event: str, claim: Claim | None = None) -> dict[str, Any]:
    """The `extra` of a line: the event, a word that stays the same, and the claim that it is about."""
    if claim is None:
        return {"event": event}
    return {"event": event, "job": claim.job_id, "fence": int(claim.fence)}


class JsonFormatter(logging.Formatter):
    """Objects of `time` (ISO-8601, UTC), `level`, `worker`, `host`, `job`, `fence`, `event`, `message`;
    `traceback` where there is one."""

    def __init__(self, worker: str | None, host: str | None) -> None:
        super().__init__()
        self._who = {"worker": worker, "host": host}

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            **self._who,
            "job": getattr(record, "job", None),
            "fence": getattr(record, "fence", None),
            "event": getattr(record, "event", _NO_EVENT),
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)  # ASCII: it is the same whatever the locale


class HumanFormatter(logging.Formatter):
    """`TIME LEVEL MESSAGE`, and the traceback where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """ISO-8601, UTC."""
        return _time(record)


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def set_up(
    form: str = "human", level: str = "info", *, worker: str | None = None, host: str | None = None
) -> None:
    """Log to stderr from now on; of FORMATS and LEVELS. What was set up before is replaced."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(worker, host) if form == "json" else HumanFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _tell
    threading.excepthook = lambda fault: _tell(
        fault.exc_type, fault.exc_value, fault.exc_traceback, in_thread=fault.thread
    )
    sys.unraisablehook = _tell_dropped


def _tell(
    kind: type[BaseException],
    value: BaseException | None,
    trace: Any,
    *,
    in_thread: threading.Thread | None = None,
) -> None:
    """The last word of the process, or of a thread."""
    if value is None or issubclass(kind, SystemExit | KeyboardInterrupt):
        return
    where = f" in {in_thread.name}" if in_thread else ""
    log.critical("%s%s: %s", kind.__name__, where, value, exc_info=(kind, value, trace), extra=about("crash"))


def _tell_dropped(dropped: sys.UnraisableHookArgs) -> None:
    """What Python drops, for a callback of its own raised it, is no fault where it is our wish to leave."""
    if dropped.exc_value is not None and dropped.exc_type is not SystemExit:
        caught = (dropped.exc_type, dropped.exc_value, dropped.exc_traceback)
        said = dropped.err_msg or "Exception ignored in"
        log.error("%s %r: %s", said, dropped.object, dropped.exc_value, exc_info=caught, extra=about("crash"))
