"""Writes the Grafana dashboards of ops/grafana/dashboards: `python tools/dashboards.py`.

Four, one click from each other; `fleet-NAME` is the uid of each, so that links to them hold. What they ask is
what `fleet metrics` tells; tests run every query against a Prometheus that scrapes a fleet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "ops" / "grafana" / "dashboards"
_TITLES = {
    "fleet-overview": "Overview",
    "fleet-queues": "Queues",
    "fleet-workers": "Workers and hosts",
    "fleet-recovery": "Recovery",
}
#: of a row
_COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_GREEN, _RED, _ORANGE = "green", "red", "orange"


@dataclass(frozen=True)
class Panel:
    """`queries`: what a series is called -> PromQL. `width` of 24 columns; `unit` is Grafana's.

    `stat`: one number, orange from `warn` on, red from `alarm` on, and red below `least`; else a graph.
    """

    title: str
    queries: Mapping[str, str]
    description: str = ""
    unit: str = "short"
    width: int = 12
    stat: bool = False
    stacked: bool = False
    warn: float | None = None
    alarm: float | None = None
    least: float | None = None
    #: of a stat: words in place of numbers
    words: Mapping[str, str] = field(default_factory=dict)
    most: float | None = None


def stat(title: str, query: str, description: str, **more: Any) -> Panel:
    """One number."""
    return Panel(title, {"": query}, description, stat=True, **({"width": 4} | more))


def rate(metric: str, selector: str = "") -> str:
    return f"rate({metric}{selector}[$__rate_interval])"


def quantile(share: float, metric: str, selector: str = "", by: str = "le") -> str:
    return f"histogram_quantile({share}, sum by ({by}) ({rate(f'{metric}_bucket', selector)}))"


#: of the queues chosen
_Q = '{queue=~"$queue"}'

OVERVIEW = [
    stat("Redis", "min(fleet_redis_up)", "Whether Redis answers.", least=1, words={"0": "DOWN", "1": "up"}),
    stat(
        "Alerts",
        'count(ALERTS{alertname=~"Fleet.*", alertstate="firing"}) or vector(0)',
        "Alerts that fire now: docs/runbook.md says what to do.",
        warn=1,
        alarm=2,
    ),
    stat("Waiting", 'sum(fleet_jobs{state="queued"})', "Jobs that are queued."),
    stat(
        "Oldest waits",
        "max(fleet_oldest_job_age_seconds)",
        "For how long the first job of a queue waits.",
        unit="s",
        warn=300,
        alarm=900,
    ),
    stat(
        "Nobody takes",
        "sum(fleet_unplaceable_jobs)",
        "Queued jobs that no worker would ever take.",
        warn=1,
        alarm=1,
    ),
    stat("Running", 'sum(fleet_jobs{state="started"})', "Jobs that run."),
    stat("Workers", 'sum(fleet_workers{state!="offline"})', "Workers that live.", least=1),
    stat(
        "Slots used", "sum(fleet_slots_used) / sum(fleet_slots)", "Of workers that live.", unit="percentunit"
    ),
    stat("Finished", "sum(fleet_jobs_finished_total)", "Since the first job of each queue."),
    stat("Failed", "sum(fleet_jobs_failed_total)", "For good, those that were stopped among them."),
    stat("Attempts lost", "sum(fleet_leases_lost_total)", "Their workers died, or were cut off."),
    stat("Recovered", "sum(fleet_jobs_recovered_total)", "Lost jobs that were queued again."),
    Panel(
        "Jobs a second",
        {
            "claimed": f"sum({rate('fleet_claims_total')})",
            "finished": f"sum({rate('fleet_jobs_finished_total')})",
            "failed": f"sum({rate('fleet_jobs_failed_total')})",
            "retried": f"sum({rate('fleet_jobs_retried_total')})",
        },
        "What was given to workers, and what became of it.",
        unit="ops",
    ),
    Panel(
        "Waiting jobs",
        {"{{queue}}": 'sum by (queue) (fleet_jobs{state="queued"})'},
        "By queue.",
        stacked=True,
    ),
    Panel(
        "Slots",
        {"used": "sum(fleet_slots_used)", "all": "sum(fleet_slots)"},
        "Where all are used, more hosts would help.",
    ),
    Panel(
        "Time from queued to claimed",
        {
            "p50": quantile(0.5, "fleet_job_waiting_seconds"),
            "p95": quantile(0.95, "fleet_job_waiting_seconds"),
        },
        "Half of the jobs, and 95 of 100, waited for no longer.",
        unit="s",
    ),
]

QUEUES = [
    stat("Claims", f"sum(fleet_claims_total{_Q})", "Jobs given to workers, in all."),
    stat("Finished", f"sum(fleet_jobs_finished_total{_Q})", "In all."),
    stat("Failed", f"sum(fleet_jobs_failed_total{_Q})", "For good, in all."),
    stat("Retried", f"sum(fleet_jobs_retried_total{_Q})", "Failed attempts that were repeated, in all."),
    stat(
        "Nobody takes", f"sum(fleet_unplaceable_jobs{_Q})", "Queued jobs that no worker would take.", alarm=1
    ),
    stat("Paused", f"sum(fleet_paused_queues{_Q})", "Queues that give out nothing.", warn=1),
    Panel("Jobs by state", {"{{state}}": f"sum by (state) (fleet_jobs{_Q})"}, "What is kept in Redis."),
    Panel(
        "Oldest job waits for",
        {"{{queue}}": f"max by (queue) (fleet_oldest_job_age_seconds{_Q})"},
        "The first of each queue; a page from 15 minutes on.",
        unit="s",
    ),
    Panel(
        "Finished a second",
        {"{{queue}}": f"sum by (queue) ({rate('fleet_jobs_finished_total', _Q)})"},
        unit="ops",
    ),
    Panel(
        "Share that fails",
        {"{{queue}}": "max by (queue) (queue:fleet_jobs_failed:ratio_rate5m" + _Q + " >= 0)"},
        "Of those that ended in five minutes; a page from a quarter on.",
        unit="percentunit",
        most=1,
    ),
    Panel(
        "Failed by reason",
        {"{{reason}}": f"sum by (reason) (increase(fleet_jobs_failed_total{_Q}[$__rate_interval]))"},
        "For good. docs/cli.md, fleet metrics, says what each means.",
        stacked=True,
    ),
    Panel(
        "Retried by reason",
        {"{{reason}}": f"sum by (reason) (increase(fleet_jobs_retried_total{_Q}[$__rate_interval]))"},
        "Attempts that failed and are repeated.",
        stacked=True,
    ),
    Panel(
        "Time from queued to claimed",
        {
            f"p{share * 100:.0f}": quantile(share, "fleet_job_waiting_seconds", _Q)
            for share in (0.5, 0.95, 0.99)
        },
        unit="s",
    ),
    Panel(
        "Time jobs run",
        {
            f"p{share * 100:.0f}": quantile(
                share, "fleet_job_running_seconds", '{queue=~"$queue", outcome="finished"}'
            )
            for share in (0.5, 0.95, 0.99)
        },
        "Those that finished.",
        unit="s",
    ),
]

WORKERS = [
    Panel("Workers by state", {"{{state}}": "sum by (state) (fleet_workers)"}, "", stacked=True),
    Panel(
        "Since the last heartbeat",
        {
            "latest": "max(fleet_heartbeat_age_max_seconds)",
            "median": "max(fleet_heartbeat_age_median_seconds)",
        },
        "Of workers that live. They beat every 10 s, and are lost after 30 s, unless set otherwise.",
        unit="s",
    ),
    stat("Hosts", "sum(fleet_hosts)", "With a worker that lives.", width=6),
    stat("Slots", "sum(fleet_slots)", "Of workers that live.", width=6),
    stat("CPUs", "sum(fleet_cpus)", "Of workers that live.", width=6),
    stat("GPUs", "sum(fleet_gpus)", "Of workers that live.", width=6),
    Panel("Slots", {"used": "sum(fleet_slots_used)", "all": "sum(fleet_slots)"}),
    Panel(
        "CPUs", {"given to jobs": "sum(fleet_cpus_used)", "all": "sum(fleet_cpus)"}, "What jobs asked for."
    ),
    Panel(
        "Memory",
        {"given to jobs": "sum(fleet_memory_used_bytes)", "all": "sum(fleet_memory_bytes)"},
        "What jobs asked for.",
        unit="bytes",
    ),
    Panel(
        "GPUs", {"given to jobs": "sum(fleet_gpus_used)", "all": "sum(fleet_gpus)"}, "What jobs asked for."
    ),
    Panel(
        "Registrations",
        {"registrations": "sum(increase(fleet_worker_registrations_total[$__rate_interval]))"},
        "Workers that started, or came back after they were cut off.",
    ),
    stat(
        "Registered",
        "sum(fleet_worker_registrations_total)",
        "Times that workers registered, in all.",
        width=12,
    ),
    Panel(
        "Steps of fleet up, mean",
        {
            "{{step}}": "sum by (step) (fleet_bootstrap_step_seconds_sum)"
            " / (sum by (step) (fleet_bootstrap_step_seconds_count) > 0)"
        },
        "How long each step took at a host.",
        unit="s",
    ),
    Panel(
        "Hosts at which fleet up failed",
        {"{{step}}": "sum by (step) (fleet_bootstrap_failures_total)"},
        "In all, by step.",
    ),
]

RECOVERY = [
    stat("Attempts lost", "sum(fleet_leases_lost_total)", "Their workers died, or were cut off."),
    stat("Recovered", "sum(fleet_jobs_recovered_total)", "Lost jobs that were queued again."),
    stat(
        "Lost too often",
        'sum(fleet_jobs_failed_total{reason="worker_lost"})',
        "Jobs that failed, for they were lost four times.",
        warn=1,
    ),
    stat(
        "Refused", "sum(fleet_stale_writes_refused_total)", "Reports that came too late and changed nothing."
    ),
    stat(
        "Handed back",
        "sum(fleet_jobs_handed_back_total)",
        "Claimed jobs that came back, most of them unbegun.",
    ),
    stat(
        "Damaged keys", "sum(fleet_damaged_keys_total)", "Passed over, for somebody overwrote them.", warn=1
    ),
    Panel(
        "Lost and recovered",
        {
            "lost": "sum(increase(fleet_leases_lost_total[$__rate_interval]))",
            "recovered": "sum(increase(fleet_jobs_recovered_total[$__rate_interval]))",
            "refused": "sum(increase(fleet_stale_writes_refused_total[$__rate_interval]))",
        },
        "Each loss should be followed by a recovery within seconds.",
    ),
    Panel(
        "Time to recover",
        {
            "mean": "sum(fleet_recovery_seconds_sum) / (sum(fleet_recovery_seconds_count) > 0)",
            "p95": "histogram_quantile(0.95, sum by (le) (fleet_recovery_seconds_bucket))",
        },
        "From the end of the lease to the job being queued again, since the beginning; 0 where a worker that "
        "started again gave its jobs back before. The lease itself, 30 s, comes before.",
        unit="s",
    ),
    stat(
        "Append-only file",
        "min(fleet_redis_append_only * fleet_redis_append_only_write_ok)",
        "Whether Redis has one, and could write it.",
        least=1,
        width=6,
        words={"0": "NO", "1": "written"},
    ),
    stat(
        "Snapshot",
        "min(fleet_redis_snapshot_ok)",
        "Whether the last one could be written.",
        least=1,
        width=6,
        words={"0": "FAILED", "1": "ok"},
    ),
    stat(
        "Eviction",
        "max(fleet_redis_may_evict)",
        "Whether Redis may throw away jobs.",
        alarm=1,
        width=6,
        words={"0": "never", "1": "MAY EVICT"},
    ),
    stat("Replicas", "sum(fleet_redis_replicas)", "Connected to the Redis that is asked.", width=6),
    Panel(
        "Memory of Redis",
        {"used": "max(fleet_redis_memory_used_bytes)", "limit": "max(fleet_redis_memory_limit_bytes)"},
        "A limit of 0 is none.",
        unit="bytes",
    ),
    Panel(
        "Keys evicted, and changes since the last snapshot",
        {"evicted": "sum(fleet_redis_evicted_keys_total)", "changes": "sum(fleet_redis_unsaved_changes)"},
    ),
]

PANELS = dict(zip(_TITLES, (OVERVIEW, QUEUES, WORKERS, RECOVERY), strict=True))


def dashboard(uid: str) -> dict[str, Any]:
    """The document of one, as Grafana provisions it."""
    return {
        "uid": uid,
        "title": f"rq-fleet: {_TITLES[uid]}",
        "tags": ["rq-fleet"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "links": [_link(other) for other in _TITLES if other != uid],
        "templating": {"list": _variables(uid)},
        "annotations": {"list": []},
        "panels": _placed(PANELS[uid]),
    }


def _link(uid: str) -> dict[str, Any]:
    return {
        "type": "link",
        "title": _TITLES[uid],
        "url": f"/d/{uid}",
        "icon": "dashboard",
        "keepTime": True,
        "includeVars": True,
        "targetBlank": False,
    }


def _variables(uid: str) -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    if uid != "fleet-queues":
        return [source]
    everything = {"text": ["All"], "value": ["$__all"]}
    queue = {
        "name": "queue",
        "label": "Queue",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(fleet_jobs, queue)", "refId": "queue"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": everything,
    }
    return [source, queue]


def _placed(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Row by row, from left to right."""
    found: list[dict[str, Any]] = []
    x = y = row = 0
    for number, panel in enumerate(panels, 1):
        height = 4 if panel.stat else 8
        if x + panel.width > _COLUMNS:
            x, y, row = 0, y + row, 0
        place = {"x": x, "y": y, "w": panel.width, "h": height}
        found.append({"id": number, "gridPos": place, **_document(panel)})
        x, row = x + panel.width, max(row, height)
    return found


def _document(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "description": panel.description,
        "type": "stat" if panel.stat else "timeseries",
        "datasource": _SOURCE,
        "targets": [
            _target(letter, *query, panel)
            for letter, query in zip("ABCDEF", panel.queries.items(), strict=False)
        ],
        "fieldConfig": {"defaults": _look(panel), "overrides": []},
        "options": _stat_options() if panel.stat else _graph_options(),
    }


def _target(letter: str, legend: str, query: str, panel: Panel) -> dict[str, Any]:
    return {
        "refId": letter,
        "datasource": _SOURCE,
        "expr": query,
        "legendFormat": legend or panel.title,
        "instant": panel.stat,
        "range": not panel.stat,
    }


def _look(panel: Panel) -> dict[str, Any]:
    look: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": _thresholds(panel)}
    if panel.most is not None:
        look["max"] = panel.most
    if panel.words:
        options = {value: {"text": text, "index": at} for at, (value, text) in enumerate(panel.words.items())}
        look["mappings"] = [{"type": "value", "options": options}]
    if panel.stat:
        return look | {"color": {"mode": "thresholds"}}
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 25 if panel.stacked else 8,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none"},
    }
    return look | {"color": {"mode": "palette-classic"}, "custom": custom}


def _thresholds(panel: Panel) -> dict[str, Any]:
    levels = ((_ORANGE, panel.warn), (_RED, panel.alarm), (_GREEN, panel.least))
    base = {"color": _GREEN if panel.least is None else _RED, "value": None}
    steps = [base, *({"color": color, "value": value} for color, value in levels if value is not None)]
    return {"mode": "absolute", "steps": steps}


def _stat_options() -> dict[str, Any]:
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value",
        "justifyMode": "auto",
    }


def _graph_options() -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def text(uid: str) -> str:
    """The file of one."""
    return json.dumps(dashboard(uid), indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for uid in _TITLES:
        (FOLDER / f"{uid}.json").write_text(text(uid))
