"""Redis and RQ: keys, jobs, queues, claims, leases, registry, recovery, control.

Knows nothing of machines, processes or the terminal. `broker.Queue` is an `rq.Queue`
that also takes command lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from broker.queue import Queue

__version__ = "0.1.0"
__all__ = ["Queue", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Queue` when it is first asked for: `fleet --help` must not pay for rq."""
    if name == "Queue":
        from broker.queue import Queue

        return Queue
    raise AttributeError(f"module 'broker' has no attribute {name!r}")
