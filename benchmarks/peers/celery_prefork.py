"""Celery: one worker, prefork pool of two processes, Redis for messages and results.

Promised: acks_late and reject_on_worker_lost, so a task whose child process is killed runs again
at once; one whose whole worker is killed runs again after the visibility timeout (an hour by
default), perhaps twice. Results are stored, the last one wins. Not promised: one accepted result.
Prefetch 64, as its guide recommends for short tasks; gossip, mingle and heartbeat events are off,
for they only cost here.
"""

from __future__ import annotations

import os

from celery import Celery

from benchmarks import harness, work
from benchmarks.harness import URL_VARIABLE, Site
from benchmarks.peers.base import COMMAND, NOOP, PROBE, Peer

_URL = os.environ.get(URL_VARIABLE, "redis://")
app = Celery("bench", broker=_URL, backend=_URL)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=64,
    broker_connection_retry_on_startup=True,
    result_expires=3600,
)
_TASKS = {
    kind: app.task(name=kind)(function)
    for kind, function in ((COMMAND, work.command), (NOOP, work.noop), (PROBE, work.probe))
}


class CeleryPrefork(Peer):
    name = "celery"
    packages = ("celery", "kombu")
    paces = {COMMAND: 500, NOOP: 1000, PROBE: 50}

    def submit(self, site: Site, work: str, *arguments: str) -> None:
        _TASKS[work].apply_async(arguments)

    def workers(self, site: Site, work: str, slots: int) -> list[list[str]]:
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
        options = ["--concurrency", str(slots), "--pool", "prefork", *quiet]
        return [harness.python("-m", "celery", "--app", __name__, "worker", *options)]

    def done(self, site: Site) -> int:
        return max(0, int(site.client.dbsize()) - _other_keys(site))


def _other_keys(site: Site) -> int:
    """Keys that are no results: the queue, what is not acknowledged, bindings."""
    names = ("celery", "unacked", "unacked_index", "unacked_mutex", "_kombu.binding.celery")
    others = ("_kombu.binding.celery.pidbox", "_kombu.binding.reply.celery.pidbox", "_kombu.binding.celeryev")
    return int(site.client.exists(*names, *others))


PEERS = {"celery": CeleryPrefork()}
