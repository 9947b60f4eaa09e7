"""The batch script of a submission."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from broker.errors import UsageError
from fleet import rendering
from fleet.endpoint import Endpoint
from fleet.rendering import Template
from fleet.slurm.request import Request

TEMPLATE = "sbatch.sh.j2"
#: seconds that Slurm gives jobs between SIGTERM and SIGKILL where it does not tell
_KILL_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Orders:
    """What runs in each task: arguments of `fleet worker`, and the settings it is to have, as variables."""

    python: str
    words: Sequence[str]
    environ: Mapping[str, str]
    endpoint: Endpoint
    #: lines of shell that come first
    setup: str = ""
    #: None: ours
    template: Template | None = None


def render(request: Request, orders: Orders) -> str:
    """The script's text. Raises UsageError for what cannot be, or cannot be rendered."""
    request.checked()
    template = orders.template or rendering.ours(TEMPLATE)
    text = template.render(
        {
            "request": request,
            "directives": list(request.directives()),
            "workers_per_node": request.workers_per_node,
            "cpus_per_task": request.cpus_per_task,
            "time_seconds": request.time_seconds,
            "warning_seconds": request.warning_seconds,
            "setup": orders.setup.strip("\n"),
            "environ": {**orders.endpoint.environ, **orders.environ},
            "password_file": orders.endpoint.password_file,
            "python": orders.python,
            "words": orders.words,
        }
    )
    if not text.startswith("#!"):
        raise UsageError(f"{template.name}:1: a batch script begins with #!", "Begin it with #!/bin/bash.")
    if "\0" in text:
        raise UsageError(f"{template.name}: what it makes holds a NUL byte", "sbatch would refuse it.")
    return text


def grace_seconds(wanted: float, kill_wait: float | None) -> float:
    """The grace of workers, which have signed off before Slurm kills, `kill_wait` seconds after SIGTERM."""
    wait = _KILL_WAIT_SECONDS if kill_wait is None else kill_wait
    return min(wanted, max(1.0, wait - max(2.0, wait / 6)))


def make_log_dir(output_dir: Path) -> None:
    """Slurm starts no job that cannot write its log, and says so nowhere. Raises UsageError."""
    try:
        (output_dir / "log").mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(
            f"cannot write to {output_dir}: {exc.strerror}", "Name another folder with --output-dir."
        ) from exc
