"""A fleet under chaos, watched: dashboards say what the journal says; the right alerts fire, and no others.

The rules are those of ops/prometheus on a clock that is SPEED times as fast: every duration in them, and the
age at which a job has waited too long, is divided by it.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.command import Command
from broker.requirements import Requirements, base_of
from broker.submit import Options, submit_commands
from tests.chaos.evidence import Evidence
from tests.chaos.harness import Harness
from tests.chaos.storm import Plan, Storm
from tests.integration.monitoring.conftest import RULES, Exporter, Prometheus
from tests.integration.monitoring.test_dashboards import asked, queries

#: how much faster time goes in the copy of the rules
SPEED = 60
_MS = {"s": 1000, "m": 60_000, "h": 3_600_000}


def hurried(folder: Path) -> list[Path]:
    """A copy of the rules for the faster clock."""

    def shorter(found: re.Match[str]) -> str:
        return f"{int(found[1]) * _MS[found[2]] // SPEED}ms"

    made = []
    for file in RULES:
        text = re.sub(r"(?<=for: )(\d+)([smh])", shorter, file.read_text())
        text = re.sub(r"(?<=\[)(\d+)([smh])(?=\])", shorter, text)
        text = text.replace("age_seconds > 900", f"age_seconds > {900 / SPEED:g}")
        made.append(folder / file.name)
        made[-1].write_text(text)
    return made


@dataclass(frozen=True)
class Truth:
    """What the journal of Redis says became of all jobs, replayed step by step."""

    claims: int
    finished: Counter[str]
    failed: int
    by_dependency: int
    retried: int
    lost: int
    recovered: int
    handed_back: int
    recovery_seconds: float


def truth(evidence: Evidence) -> Truth:
    """By queue only what finished."""
    arrays = {event["array"] for event in evidence.named("intent") if "array" in event}
    outcomes: Counter[str] = Counter()
    finished: Counter[str] = Counter()
    seconds = 0.0
    for change in evidence.changes:
        ends = change.after.status in ("failed", "stopped")
        if ends and change.before.status == "deferred" and change.job not in arrays:
            outcomes["dependency"] += 1
        for record in change.records:
            outcomes[record.outcome] += 1
            outcomes["ended"] += ends
            outcomes["retried"] += record.outcome == "failed" and not ends
            if record.outcome == "finished":
                finished[base_of(change.before.origin)] += 1
            if record.outcome == "lost" and not ends:
                outcomes["recovered"] += 1
                seconds += max(0.0, record.at - record.expiry)
    claims = sum(len(change.given) for change in evidence.changes)
    names = ("ended", "dependency", "retried", "lost", "recovered", "handed-back")
    return Truth(claims, finished, *(outcomes[name] for name in names), seconds)


def shown(server: Prometheus, uid: str, title: str) -> float | None:
    """The number that a panel shows."""
    (query,) = (query for board, panel, query, _ in queries() if (board, panel) == (uid, title))
    return server.value(asked(query))


def differences(server: Prometheus, true: Truth) -> Iterator[str]:
    """Where dashboards say otherwise than the journal."""
    panels = {
        ("fleet-overview", "Finished"): true.finished.total(),
        ("fleet-overview", "Failed"): true.failed + true.by_dependency,
        ("fleet-overview", "Attempts lost"): true.lost,
        ("fleet-overview", "Recovered"): true.recovered,
        ("fleet-overview", "Running"): 0,
        ("fleet-overview", "Waiting"): 0,
        ("fleet-queues", "Claims"): true.claims,
        ("fleet-queues", "Finished"): true.finished.total(),
        ("fleet-queues", "Retried"): true.retried,
        ("fleet-recovery", "Attempts lost"): true.lost,
        ("fleet-recovery", "Recovered"): true.recovered,
        ("fleet-recovery", "Handed back"): true.handed_back,
    }
    for (uid, title), wanted in panels.items():
        if (found := shown(server, uid, title)) != wanted:
            yield f"{uid}, {title}: {found}, and by the journal {wanted}"
    for queue, wanted in true.finished.items():
        found = server.value(f'sum(fleet_job_running_seconds_count{{queue="{queue}", outcome="finished"}})')
        if found != wanted:
            yield f"finished of {queue}: {found}, and by the journal {wanted}"
    seconds = server.value("sum(fleet_recovery_seconds_sum)") or 0.0
    if abs(seconds - true.recovery_seconds) > 0.01 + 0.002 * true.recovered:
        yield f"time to recover: {seconds}, and by the journal {true.recovery_seconds}"


def fired(server: Prometheus, since: float) -> set[str]:
    """The alerts that fired at any moment since then, Unix seconds."""
    past = f"{(time.time() - since) * 1000:.0f}ms"
    series = server.query(f'group by (alertname) (count_over_time(ALERTS{{alertstate="firing"}}[{past}]))')
    return {name for one in series for name in re.findall(r'alertname="(\w+)"', one)}


#: alert -> whether there was what it is about, which on a busy machine may come about by itself
_SYMPTOMS = {
    "FleetJobsWaitTooLong": f"max(max_over_time(fleet_oldest_job_age_seconds[{{past}}])) > {900 / SPEED:g}",
    "FleetNobodyTakesJobs": "max(max_over_time(fleet_unplaceable_jobs[{past}])) > 0",
    "FleetJobsFail": 'sum(fleet_jobs_failed_total{{reason!="stopped"}}) >= 5',
    "FleetRedisDown": "min(min_over_time(fleet_redis_up[{past}])) < 1",
    "FleetNotScraped": 'min(min_over_time(up{{job="fleet"}}[{past}])) < 1',
}


def explained(server: Prometheus, since: float) -> set[str]:
    """The alerts for which there was reason at any moment since then."""
    past = f"{(time.time() - since) * 1000:.0f}ms"
    return {alert for alert, query in _SYMPTOMS.items() if server.query(query.format(past=past))}


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    made = Harness(tmp_path / "chaos").start()
    yield made
    made.close()


@pytest.mark.needs("promtool")
@pytest.mark.timeout(480)
def test_dashboards_tell_what_the_journal_tells_and_the_right_alerts_fire(
    harness: Harness,
    exporter: Callable[..., Exporter],
    prometheus: Callable[..., Prometheus],
    eventually: Callable[..., Any],
    tmp_path: Path,
) -> None:
    server = prometheus(exporter(harness.redis.url).port, hurried(tmp_path), seconds=1.0)
    eventually(lambda: not server.firing())  # it takes some seconds until its first scrape: minutes, here
    began = time.time()
    # commands, functions, some that fail at first, chains, sets, arrays; none that fails for good
    plan = Plan(
        secrets.randbelow(10**6),
        jobs=300,
        seconds=5.0,
        worker_kills=6,
        redis_restarts=0,
        other_faults=0,
        slow=0.3,
        shares=(3, 5, 1, 1, 0, 3, 2),
    )
    watched(harness, server, plan, eventually)
    eventually(lambda: "FleetLeasesLost" in fired(server, began))
    assert fired(server, began) <= {"FleetLeasesLost"} | explained(server, began)

    harness.redis.kill()
    eventually(lambda: "FleetRedisDown" in fired(server, began))
    harness.redis.start()
    with harness.client() as client:
        harness.until(client.ping, "Redis has read its journal")
        nobody = Options(requirements=Requirements(gpus=64))
        submit_commands(client, "default", [(None, Command(("true",)))], nobody)
    eventually(lambda: {"FleetNobodyTakesJobs", "FleetJobsWaitTooLong"} <= fired(server, began))
    right = {"FleetLeasesLost", "FleetRedisDown", "FleetNobodyTakesJobs", "FleetJobsWaitTooLong"}
    assert right <= fired(server, began) <= right | explained(server, began)
    eventually(lambda: server.firing() == {"FleetNobodyTakesJobs", "FleetJobsWaitTooLong"})


def watched(harness: Harness, server: Prometheus, plan: Plan, eventually: Callable[..., Any]) -> None:
    """A storm; then the dashboards must say what the journal says."""
    print(f"seed {plan.seed}")
    Storm(harness, plan, print).run()
    evidence = harness.evidence()
    true = truth(evidence)
    print(true)
    assert true.finished.total() > 0.7 * plan.jobs
    assert true.lost > 0
    with contextlib.suppress(pytest.fail.Exception):  # what differs says more
        eventually(lambda: not [*differences(server, true)], timeout_seconds=30)
    assert [*differences(server, true)] == []
