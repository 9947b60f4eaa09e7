"""Start a worker that outlives us: `python -I -m fleet.detach --config FILE`.

The worker gets a session of its own, no stdin, and its log for stdout and stderr, so it
lives on when the SSH connection and the operator's laptop go; where its user lingers it is a
systemd user unit (fleet.user_unit). Prints one line of JSON, `{"pid": ..., "start_time": ...,
"token": ..., "version": ...}`, with `"unit_file"` where there is one, and ends. The process carries
the token in its environment: with PID and start time it tells that very process from any other.

It imports little: `fleet up` waits for it at every host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from broker import __version__
from fleet import user_unit
from fleet.launchers.agent import TOKEN_VARIABLE, started_at

#: what belongs to the connection that started the worker, and is void when that ends
_OF_THE_CONNECTION = ("SSH_",)
#: settings of the operator; what the worker is to know, and any secret, is in its file
_OF_THE_OPERATOR = ("FLEET_",)
#: the default of worker.stop_grace_seconds; its module would cost every start its import
_GRACE_SECONDS = 30.0


def main(argv: Sequence[str]) -> int:
    """Start the worker of `--config FILE` and print what it is. Raises OSError, ValueError."""
    _, file = argv
    config = Path(file).resolve()
    fields = json.loads(config.read_text())
    grace = float(fields.get("settings", {}).get("stop_grace_seconds", _GRACE_SECONDS))
    process = start(config, Path(fields["output_dir"]), fields["name"], grace)
    sys.stdout.write(json.dumps(process) + "\n")
    return 0


def start(config: Path, output_dir: Path, name: str, stop_grace_seconds: float) -> dict[str, object]:
    """Start `python -I -m fleet.worker --config CONFIG`, its log OUTPUT_DIR/log/NAME.log."""
    log = log_file(output_dir, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    token = os.urandom(16).hex()
    wanted = user_unit.Start(
        name=name,
        argv=[sys.executable, "-I", "-m", "fleet.worker", "--config", str(config)],
        environ={**_environment(os.environ), TOKEN_VARIABLE: token},
        token=token,
        folder=output_dir,
        log=log,
        environ_file=config.with_name(f"{name}.environ"),
        stop_grace_seconds=stop_grace_seconds,
    )
    started = user_unit.start(wanted)
    pid = started.pid if started else _in_a_session(wanted)
    found = {"pid": pid, "start_time": started_at(pid), "token": token}
    unit = {"unit_file": str(started.file)} if started else {}
    return {**found, **unit, "version": __version__}


def _in_a_session(wanted: user_unit.Start) -> int:
    """Start it in a session of its own; returns its PID."""
    descriptor = os.open(wanted.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            wanted.argv,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            cwd=wanted.folder,
            env=wanted.environ,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    # never waited for: it is init's when we end
    return process.pid


def log_file(output_dir: Path, name: str) -> Path:
    """Where worker `name` of that output folder logs."""
    return output_dir / "log" / f"{name}.log"


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    void = _OF_THE_CONNECTION + _OF_THE_OPERATOR
    return {name: value for name, value in environ.items() if not name.startswith(void)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
