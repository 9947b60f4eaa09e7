"""Where `fleet` begins: no more than Ctrl-C while the rest is imported."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Entry point of the console script, and of `python -m cli`."""
    try:
        # who started us may have held it back while the interpreter, which would print a traceback, came up
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        from cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
