"""The verb: Textual is imported only once there is a terminal to show something on."""

from __future__ import annotations

import os
import sys

import click

from broker.errors import UsageError
from cli.context import PATIENCE_SECONDS, Context, pass_context
from cli.params import Duration


@click.command()
@click.option(
    "--interval",
    type=Duration(),
    default=1.0,
    metavar="SECONDS",
    help="Look so often (1 s); a great fleet less often, so that looking takes a tenth of one CPU.",
)
@pass_context
def top(context: Context, /, interval: float) -> int:
    """Workers, queues and running jobs, live on the whole terminal, until q; ? tells the keys.

    Sort, filter, drain and undrain workers, cancel jobs, follow what one prints. Exit code 0 after q, 130
    after Ctrl-C.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError("fleet top needs a terminal", "Elsewhere: fleet status --watch")
    if context.no_color:
        os.environ["NO_COLOR"] = "1"  # which Textual heeds
    with context.client(PATIENCE_SECONDS) as client:
        client.ping()
        from cli.top.app import TopApp

        sys.setswitchinterval(0.001)  # the thread that reads is not to keep keys waiting
        app = TopApp(context, client, interval)
        app.run()
    return app.return_code or 0
