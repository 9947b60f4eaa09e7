"""One worker in the foreground: `python -I -m fleet.worker --config FILE`.

Light: SIGTERM is to be heard before the imports of `fleet.assembly`, which take most of a start.
"""

from __future__ import annotations

import sys

from fleet.signals import StopSignals


def main() -> int:
    """Start from a file that a launcher wrote; returns the exit code."""
    signals = StopSignals().install()
    from fleet.late import import_redis

    import_redis()
    from fleet.assembly import main as run

    return run(signals)


if __name__ == "__main__":
    sys.exit(main())
