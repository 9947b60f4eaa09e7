"""One worker in the foreground: `python -I -m fleet.worker --config FILE`.

Light: SIGTERM is to be heard before the imports of `fleet.assembly`, which take most of a start.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fleet.signals import StopSignals


def main() -> int:
    """Start from a file that a launcher wrote; returns the exit code."""
    signals = StopSignals().install()
    from fleet.late import import_redis_of_worker

    import_redis_of_worker(tls=_may_speak_tls(sys.argv))
    from fleet.assembly import main as run

    return run(signals)


def _may_speak_tls(argv: list[str]) -> bool:
    """Whether its configuration names such a Redis; what is wrong with it, who reads it in earnest tells."""
    file = Path(argv[-1])
    return not file.is_file() or b"rediss" in file.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
