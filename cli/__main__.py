"""Where `fleet` begins: no more than Ctrl-C while the rest is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script, and of `python -m cli`."""
    try:
        from cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
