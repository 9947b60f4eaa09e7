"""What `fleet doctor` looks at: one small check each, all of the same shape, in one table.

A check asks Redis and changes nothing. What Redis will not tell (managed services hide
CONFIG, an ACL user may not ask) is `unknown`, never a failure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import redis
from redis import exceptions

from broker import __version__, chores, clock, keys
from broker.connection import is_wrong_type, one_line, replies
from broker.durability import check_eviction, check_failover, check_persistence
from broker.findings import Finding, Patient, setting, some
from broker.requirements import SEPARATOR, is_sublist
from broker.rights import check_rights

#: oldest versions that will do, by name of the server
OLDEST_VERSIONS = {"redis": (6, 2), "valkey": (8, 0)}
#: seconds that the clocks may be apart before times that people see look wrong
_SKEW_SECONDS = 2.0
#: share of maxmemory above which there is little room left
_NEARLY_FULL = 0.9
_ASKS_OF_CLOCK = 3


def examine(client: redis.Redis) -> list[Finding]:
    """All checks, in the order of the table. Raises what redis-py raises when Redis goes away."""
    patient = Patient(client)
    return [_checked(check, patient) for check in CHECKS]


def _checked(check: Callable[[Patient], Finding], patient: Patient) -> Finding:
    """What a check found; `unknown` where we may not ask, or somebody wrote over what it looks at."""
    name = check.__name__.removeprefix("check_").replace("_", " ")
    try:
        return check(patient)
    except exceptions.NoPermissionError as exc:
        return Finding(name, "unknown", f"we may not ask: {one_line(exc)}", "See 'rights'.")
    except exceptions.ResponseError as exc:
        if not is_wrong_type(exc):
            raise
        return Finding(name, "unknown", "what it looks at is something else", "See 'keys'.")


# --- Redis -----------------------------------------------------------------------------------------


def check_version(patient: Patient) -> Finding:
    """Old ones lack commands that the scripts use."""
    if not patient.info:
        return Finding(
            "version", "unknown", "Redis does not tell", "It must be redis 6.2 or valkey 8, or newer."
        )
    kind = "valkey" if "valkey_version" in patient.info else "redis"
    found = str(patient.info.get("valkey_version") or patient.info.get("redis_version", ""))
    oldest = OLDEST_VERSIONS[kind]
    needed = f"{kind} {'.'.join(map(str, oldest))}"
    try:
        numbers = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        return Finding("version", "unknown", f"it calls itself {found!r}", f"fleet needs {needed} or newer.")
    if numbers < oldest:
        return Finding("version", "error", f"{kind} {found}", f"Install {needed} or newer.")
    return Finding("version", "ok", f"{kind} {found}")


def check_memory(patient: Patient) -> Finding:
    """A full Redis takes no jobs."""
    if not patient.info:
        return Finding("memory", "unknown", "Redis does not tell")
    used, limit = int(patient.info.get("used_memory", 0)), int(patient.info.get("maxmemory", 0))
    room = f" of {limit / 2**20:.0f} MiB used" if limit else " MiB used, no limit"
    found = f"{used / 2**20:.0f}{room}{_waste(patient)}"
    if not limit or used < _NEARLY_FULL * limit:
        return Finding("memory", "ok", found)
    return Finding("memory", "warning", found, "Raise maxmemory: a full Redis refuses jobs and results.")


def _waste(patient: Patient) -> str:
    """Redis sets aside a whole node of a stream for the one entry that a job's result is."""
    node = setting(patient.client, "stream-node-max-bytes")
    if node is None or 0 < int(node) <= 4 * keys.RESULT_BYTES:
        return ""
    mend = f"redis-cli CONFIG SET stream-node-max-bytes {keys.RESULT_BYTES}"
    return f"; each result takes 4 KiB, after {mend} half of one"


def check_role(patient: Patient) -> Finding:
    """A replica takes no change."""
    role = patient.info.get("role", "unknown")
    if patient.info.get("cluster_enabled"):
        return Finding("role", "error", "a cluster", "fleet needs a Redis that is no cluster.")
    if role == "slave":
        return Finding(
            "role", "error", "a replica, which takes no change", "Name the primary with --redis URL."
        )
    if role != "master":
        return Finding("role", "unknown", "Redis does not tell")
    return Finding("role", "ok", "primary")


# --- clocks, workers, others -----------------------------------------------------------------------


def check_clock(patient: Patient) -> Finding:
    """Leases go by Redis's clock; scheduled times and what people read by that of each machine."""
    skew, error = min((_skew(patient.client) for _ in range(_ASKS_OF_CLOCK)), key=lambda found: found[1])
    found = f"this machine is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} Redis"
    if abs(skew) > _SKEW_SECONDS + error:
        return Finding("clock", "warning", found, "Let NTP (chrony, systemd-timesyncd) set both clocks.")
    return Finding("clock", "ok", f"within {math.ceil(1000 * max(abs(skew), error))} ms of Redis")


def _skew(client: redis.Redis) -> tuple[float, float]:
    """(seconds this machine is ahead, seconds by which that may be wrong)."""
    begin, start = time.time(), clock.monotonic()
    seconds, micros = client.time()
    half = (clock.monotonic() - start) / 2
    return begin + half - (seconds + micros / 1e6), half


def check_workers(patient: Patient) -> Finding:
    """Workers that fell silent."""
    workers = patient.fleet.workers
    offline = [worker.name for worker in workers if worker.state == "offline"]
    if not workers:
        return Finding(
            "workers", "warning", "none", "'fleet worker' starts one here, 'fleet up HOSTS' elsewhere."
        )
    found = f"{len(workers) - len(offline)} alive"
    if offline:
        mend = "Look at their hosts; 'fleet up' starts them again. Their jobs were given to others."
        return Finding("workers", "warning", f"{found}, {len(offline)} offline: {some(offline)}", mend)
    return Finding("workers", "ok", found)


def check_versions(patient: Patient) -> Finding:
    """Workers of several versions may differ in what they do."""
    alive = [worker for worker in patient.fleet.workers if worker.state != "offline"]
    versions = sorted({worker.version for worker in alive} | {__version__})
    if len(versions) == 1:
        return Finding("versions", "ok", versions[0])
    found = "; ".join(
        f"{version}: {some([w.name for w in alive if w.version == version] or ['this command'])}"
        for version in versions
    )
    return Finding(
        "versions", "warning", found, "Install one version everywhere, and start the workers anew."
    )


def check_taking_jobs(patient: Patient) -> Finding:
    """What keeps workers from taking jobs."""
    said = [f"{worker.name}: {worker.notice}" for worker in patient.fleet.workers if worker.notice]
    if patient.client.exists(keys.SUSPENDED):
        return Finding(
            "taking jobs", "warning", "'rq suspend' is in force: no worker takes jobs", "rq resume"
        )
    if said:
        return Finding("taking jobs", "warning", some(said), "Mend it at the hosts of these workers.")
    return Finding("taking jobs", "ok", "; ".join(_wishes(patient)) or "nothing is in the way")


def _wishes(patient: Patient) -> Iterator[str]:
    """What operators hold back, which may be forgotten."""
    paused = [queue.name for queue in patient.fleet.queues if queue.paused]
    members: Any = patient.client.smembers(keys.DRAINED)
    drained = sorted(name.decode("utf-8", "replace") for name in members)
    if paused:
        yield f"paused queues: {some(paused)} ('fleet resume QUEUE')"
    if drained:
        yield f"drained workers: {some(drained)} ('fleet undrain WORKER')"


def check_rq_workers(patient: Patient) -> Finding:
    """Stock `rq worker`s know no leases, and no command jobs."""
    ours = {worker.name for worker in patient.fleet.workers}
    queues = {queue for worker in patient.fleet.workers for queue in worker.queues}
    clashing = [name for name, theirs in _rq_workers(patient.client, ours) if queues & theirs]
    if not clashing:
        return Finding("rq workers", "ok", "none on the fleet's queues")
    return Finding(
        "rq workers",
        "error",
        f"stock rq workers on queues of the fleet: {some(clashing)}; this is not supported",
        "End them, or give them queues of their own: they know no leases and cannot run commands.",
    )


def _rq_workers(client: redis.Redis, ours: set[str]) -> Iterator[tuple[str, set[str]]]:
    """(name, queues) of each worker that RQ knows and the fleet does not."""
    members: Any = client.smembers(keys.WORKERS)
    prefix = keys.rq_worker("")
    names = [
        name for key in members if (name := key.decode("utf-8", "replace").removeprefix(prefix)) not in ours
    ]
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hget(keys.rq_worker(name), "queues")
        found = replies(pipe)
    for name, queues in zip(names, found, strict=True):
        if isinstance(queues, bytes):
            yield name, set(queues.decode("utf-8", "replace").split(","))


def check_keys(patient: Patient) -> Finding:
    """Keys that all share, and that somebody wrote over: commands and scripts fail that need them."""
    with patient.client.pipeline(transaction=False) as pipe:
        for key in keys.TYPES:
            pipe.type(key)
        found = dict(zip(keys.TYPES, (kind.decode() for kind in replies(pipe)), strict=True))
    odd = [
        f"{key} is a {kind}, not a {keys.TYPES[key]}"
        for key, kind in found.items()
        if kind not in ("none", keys.TYPES[key])
    ]
    if not odd:
        return Finding("keys", "ok", "those that all share are what they should be")
    return Finding(
        "keys",
        "error",
        f"somebody wrote over keys of the fleet: {some(odd)}",
        "Find out who. 'redis-cli RENAME KEY KEY:odd' puts one aside; what was in it before is lost.",
    )


def check_queues(patient: Patient) -> Finding:
    """Queues whose names no worker of ours can be told: RQ takes any."""
    members: Any = patient.client.smembers(keys.QUEUES)
    every = {keys.queue_of(member.decode("utf-8", "replace")) for member in members}
    odd = sorted(every - set(chores.queue_names(members)))
    if not odd:
        return Finding("queues", "ok", f"{len(every)} known")
    return Finding(
        "queues",
        "warning",
        f"names that the fleet does not work on: {some(map(repr, odd))}",
        "Enqueue to names of letters, digits, '_', '.', ':' and '-'.",
    )


def check_sets(patient: Patient) -> Finding:
    """Jobs in a sublist of which nobody knows what they ask for: no worker would dare."""
    sublists = [name for name in chores.known_queues(patient.client) if SEPARATOR in name]
    with patient.client.pipeline(transaction=False) as pipe:
        for name in sublists:
            base, _, digest = name.partition(SEPARATOR)
            pipe.hexists(keys.sets(base), digest)
            pipe.exists(keys.queue(name))
        rows = replies(pipe)
    unknown = [
        name
        for name, is_known, has_jobs in zip(sublists, rows[::2], rows[1::2], strict=True)
        if has_jobs == 1 and is_known != 1
    ]
    if not unknown:
        return Finding("requirements", "ok", f"{len(sublists)} sets that jobs ask for")
    return Finding(
        "requirements",
        "error",
        f"jobs wait where nobody knows what they ask for: {some(unknown)}",
        _WAY_OUT if any(map(is_sublist, unknown)) else _NO_SUBLIST,
    )


_WAY_OUT = "Nobody takes them: 'fleet cancel' them, and submit them anew with 'fleet submit --cpus ...'."
#: a producer called its queue so, and had nothing else in mind
_NO_SUBLIST = (
    f"What follows '{SEPARATOR}' is what jobs ask for, so nobody takes them: 'fleet cancel' them, and "
    f"enqueue to a name without '{SEPARATOR}'."
)


CHECKS: tuple[Callable[[Patient], Finding], ...] = (
    check_version,
    check_role,
    check_eviction,
    check_memory,
    check_persistence,
    check_failover,
    check_rights,
    check_clock,
    check_workers,
    check_versions,
    check_taking_jobs,
    check_rq_workers,
    check_keys,
    check_queues,
    check_sets,
)
