"""A bash script that starts one worker on a machine that nobody but its user manages."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fleet import rendering
from fleet.endpoint import Endpoint

#: seconds beyond the worker's own grace, or its time limit, before it is killed
MARGIN_SECONDS = 15


def script(
    endpoint: Endpoint,
    words: Sequence[str],
    *,
    environ: Mapping[str, str],
    slots: int | None,
    time_limit_seconds: float | None,
    stop_grace_seconds: float,
) -> str:
    """The script's text. `words` are arguments of `fleet worker`, `environ` the settings it is to have.

    Without `slots` it has as many as the machine has CPUs.
    """
    values = {
        "environ": {**endpoint.environ, **environ},
        "password_file": endpoint.password_file,
        "program": str(Path(sys.executable).with_name("fleet")),
        "words": words,
        "slots": slots,
        "time_limit_seconds": math.ceil(time_limit_seconds or 0),
        "grace_seconds": math.ceil(stop_grace_seconds),
        "margin_seconds": MARGIN_SECONDS,
    }
    return rendering.ours("script.sh.j2").render(values)
