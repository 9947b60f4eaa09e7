"""Start a worker that outlives us: `python -I -m fleet.detach --config FILE`.

The worker gets a session of its own, no stdin, and its log for stdout and stderr, so it
lives on when the SSH connection and the operator's laptop go. Prints one line of JSON,
`{"pid": ..., "start_time": ..., "token": ..., "version": ...}`, and ends. The process carries the
token in its environment: with PID and start time it tells that very process from any other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import psutil

from broker import __version__
from fleet.launchers.agent import TOKEN_VARIABLE

#: what belongs to the connection that started the worker, and is void when that ends
_OF_THE_CONNECTION = ("SSH_",)
#: settings of the operator; what the worker is to know, and any secret, is in its file
_OF_THE_OPERATOR = ("FLEET_",)


def main(argv: list[str] | None = None) -> int:
    """Start the worker of `--config FILE` and print what it is. Raises OSError, ValueError."""
    parser = argparse.ArgumentParser(prog="fleet.detach", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    config: Path = parser.parse_args(argv).config.resolve()
    fields = json.loads(config.read_text())
    process = start(config, Path(fields["output_dir"]), fields["name"])
    sys.stdout.write(json.dumps(process) + "\n")
    return 0


def start(config: Path, output_dir: Path, name: str) -> dict[str, object]:
    """Start `python -I -m fleet.worker --config CONFIG`, its log OUTPUT_DIR/log/NAME.log."""
    log = log_file(output_dir, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    token = uuid.uuid4().hex
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", "fleet.worker", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            cwd=output_dir,
            env={**_environment(os.environ), TOKEN_VARIABLE: token},
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    # never waited for: it is init's when we end
    started_at = psutil.Process(process.pid).create_time()
    return {"pid": process.pid, "start_time": started_at, "token": token, "version": __version__}


def log_file(output_dir: Path, name: str) -> Path:
    """Where worker `name` of that output folder logs."""
    return output_dir / "log" / f"{name}.log"


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    void = _OF_THE_CONNECTION + _OF_THE_OPERATOR
    return {name: value for name, value in environ.items() if not name.startswith(void)}


if __name__ == "__main__":
    sys.exit(main())
