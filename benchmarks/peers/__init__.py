"""The systems that are measured side by side: one module each, imported only where it is installed.

`names()` lists them, `load` makes one. A peer's module says in its docstring what that system
promises in the configuration measured here, and what it does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from benchmarks.peers.base import Missing, Peer

#: name -> module, in the order of the tables; ours first
MODULES = {
    "fleet": "fleet_worker",
    "xargs": "shell",
    "parallel": "shell",
    "hyperqueue": "hq",
    "rq": "rq_worker",
    "rq-simple": "rq_worker",
    "celery": "celery_prefork",
    "dramatiq": "dramatiq_worker",
    "huey": "huey_consumer",
    "taskiq": "taskiq_streams",
    "saq": "saq_worker",
}


def load(name: str) -> Peer:
    """The peer of that name. Raises Missing where its package or program is not here."""
    try:
        module = importlib.import_module(f"benchmarks.peers.{MODULES[name]}")
    except ModuleNotFoundError as exc:
        raise Missing(f"{name}: the package {exc.name} is not installed ('make bench' does)") from exc
    peer: Peer = module.PEERS[name]
    peer.check()
    return peer


def available(names: Iterable[str]) -> list[Peer]:
    """Those of `names` that can be run here; of the others it is said loudly that they are skipped."""
    found = []
    for name in names:
        try:
            found.append(load(name))
        except Missing as exc:
            print(f"!!! SKIPPED {exc}", flush=True)
    return found
