"""Which settings of Redis can lose what it acknowledged: checks for `broker.doctor`."""

from __future__ import annotations

from broker import sentinel
from broker.findings import Finding, Level, Patient, setting

#: sentinels that can outvote one that is lost
_ENOUGH_SENTINELS = 3


def check_eviction(patient: Patient) -> Finding:
    """A Redis that evicts keys when it is full throws away jobs."""
    policy = patient.info.get("maxmemory_policy") or setting(patient.client, "maxmemory-policy")
    if policy is None:
        return Finding("eviction", "unknown", "Redis does not tell", "See to it that it is noeviction.")
    if policy == "noeviction":
        return Finding("eviction", "ok", policy)
    level: Level = "error" if patient.info.get("maxmemory") else "warning"
    return Finding(
        "eviction",
        level,
        f"{policy}: when memory is short, Redis throws away jobs and results",
        "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf.",
    )


def check_persistence(patient: Patient) -> Finding:
    """What a crash of Redis costs."""
    info = patient.info
    if "aof_enabled" not in info:
        return Finding("persistence", "unknown", "Redis does not tell", "It should keep appendonly yes.")
    if info["aof_enabled"]:
        return _append_only(patient)
    mend = "redis-cli CONFIG SET appendonly yes, and the same in redis.conf."
    snapshots = setting(patient.client, "save")
    if snapshots == "":
        return Finding("persistence", "error", "nothing is kept: a crash of Redis loses all jobs", mend)
    found = "no append-only file: a crash loses what changed since the last snapshot"
    if snapshots is None:
        found += " (whether it makes any, it does not tell)"
    if info.get("rdb_last_bgsave_status") != "ok":
        return Finding("persistence", "error", f"{found}, and the last snapshot failed", mend)
    return Finding("persistence", "warning", found, mend)


def _append_only(patient: Patient) -> Finding:
    name, info = "persistence", patient.info
    for write in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if info.get(write, "ok") != "ok":
            return Finding(
                name, "error", f"append-only file: {write} {info[write]}", "Make room on its disk."
            )
    policy = setting(patient.client, "appendfsync")
    costs = {
        "always": "a crash loses nothing",
        "everysec": "a crash of the machine may lose what was acknowledged in the last second",
        "no": "a crash of the machine may lose what was acknowledged in the last half minute",
        None: "how often it is written out Redis does not tell",
    }
    found = f"append-only file, {costs.get(policy, policy)}" + (f" (appendfsync {policy})" if policy else "")
    if policy == "no":
        return Finding(name, "warning", found, "redis-cli CONFIG SET appendfsync everysec")
    return Finding(name, "ok", found)


def check_failover(patient: Patient) -> Finding:
    """What a failover costs: replication is asynchronous."""
    name, info = "failover", patient.info
    if info.get("role") != "master":
        return Finding(name, "unknown", "Redis does not tell", "A primary knows; see 'role'.")
    watchers = sentinel.watchers(patient.client)
    replicas = int(info.get("connected_slaves", 0))
    if watchers is None and not replicas:
        return Finding(name, "ok", "one server, no replica: where its disk is lost, all is lost")
    if not replicas:
        found = "no replica is connected: sentinels have nothing to fail over to"
        return Finding(name, "warning", found, "Start a replica, or see why it is away.")
    if watchers is not None and watchers < _ENOUGH_SENTINELS:
        found = f"{watchers} sentinels answer: where one is lost, nobody fails over"
        return Finding(name, "warning", found, "Let three or more watch, on machines of their own.")
    return _replicas(patient, replicas, is_watched=watchers is not None)


def _replicas(patient: Patient, replicas: int, *, is_watched: bool) -> Finding:
    has = f"{replicas} replica{'s' * (replicas != 1)}"
    needed = setting(patient.client, "min-replicas-to-write")
    if needed is None:
        return Finding("failover", "unknown", f"{has}; how many must be there to write Redis does not tell")
    last = "a failover may forget what was acknowledged last"
    if int(needed):
        lag = setting(patient.client, "min-replicas-max-lag")
        found = f"{has}; {last}, at most the {lag} s in which {needed} of them may be silent"
        return Finding("failover", "ok", f"{found} (min-replicas-to-write {needed})")
    found = f"{has}; {last}, and a primary that is cut off acknowledges what will be lost"
    mend = "redis-cli CONFIG SET min-replicas-to-write 1; have two replicas, or it stops when one is lost."
    return Finding("failover", "warning" if is_watched else "ok", f"{found} (min-replicas-to-write 0)", mend)
