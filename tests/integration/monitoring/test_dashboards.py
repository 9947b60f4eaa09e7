"""The dashboards as Grafana gets them; every query is asked of a Prometheus that scrapes a fleet at work."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from broker import bootstraps
from broker.requirements import Requirements
from tests.integration.conftest import Workers
from tests.integration.monitoring.conftest import REPOSITORY, RULES, Exporter, Prometheus

GRAFANA = REPOSITORY / "ops" / "grafana"
DASHBOARDS = {file.stem: json.loads(file.read_text()) for file in sorted(GRAFANA.glob("dashboards/*.json"))}
#: what Grafana puts in their place
VARIABLES = {"$__rate_interval": "5m", "$queue": ".*"}


def queries() -> Iterator[tuple[str, str, str, bool]]:
    """(uid, title of the panel, PromQL, whether the panel is one number) of each query there is."""
    for uid, board in DASHBOARDS.items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield uid, panel["title"], target["expr"], panel["type"] == "stat"


def asked(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def test_the_files_are_what_the_program_writes() -> None:
    spec = importlib.util.spec_from_file_location("dashboards", REPOSITORY / "tools" / "dashboards.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboards"] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    assert list(DASHBOARDS) == sorted(module.PANELS)
    for uid in DASHBOARDS:
        written = (GRAFANA / "dashboards" / f"{uid}.json").read_text()
        assert written == module.text(uid), "run: python tools/dashboards.py"


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_each_leads_to_all_others_and_asks_the_data_source_that_is_chosen(uid: str) -> None:
    board = DASHBOARDS[uid]
    assert board["uid"] == uid
    assert {link["url"] for link in board["links"]} == {f"/d/{other}" for other in DASHBOARDS} - {f"/d/{uid}"}
    kinds = {variable["name"]: variable["type"] for variable in board["templating"]["list"]}
    assert kinds["datasource"] == "datasource"
    sources = [panel["datasource"] for panel in board["panels"]]
    sources += [target["datasource"] for panel in board["panels"] for target in panel["targets"]]
    assert {source["uid"] for source in sources} == {"${datasource}"}
    used = {name for _, _, query, _ in queries() for name in re.findall(r"\$(\w+)", query)}
    assert used <= {"__rate_interval", "queue"}
    assert not [query for _, _, query, _ in queries() if re.search(r"\[\d+[smh]\]", query)]


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_panels_lie_beside_each_other(uid: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARDS[uid]["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_what_is_provisioned_fits_together() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/fleet.yml").read_text())["providers"]
    services = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
    assert provider["options"]["path"] in " ".join(services["grafana"]["volumes"])
    assert source["url"].partition("//")[2].partition(":")[0] in services


#: what each panel must show at the end of `at_work`; of others that they show something is enough
EXACT = {
    ("fleet-overview", "Redis"): 1,
    ("fleet-overview", "Waiting"): 5,
    ("fleet-overview", "Nobody takes"): 5,
    ("fleet-overview", "Running"): 1,
    ("fleet-overview", "Workers"): 1,
    ("fleet-overview", "Slots used"): 0.5,
    ("fleet-overview", "Finished"): 12,
    ("fleet-overview", "Failed"): 3,
    ("fleet-overview", "Attempts lost"): 1,
    ("fleet-overview", "Recovered"): 1,
    ("fleet-queues", "Finished"): 12,
    ("fleet-queues", "Failed"): 3,
    ("fleet-queues", "Retried"): 2,
    ("fleet-queues", "Nobody takes"): 5,
    ("fleet-queues", "Paused"): 0,
    ("fleet-workers", "Hosts"): 1,
    ("fleet-workers", "Slots"): 2,
    ("fleet-workers", "Registered"): 2,
    ("fleet-recovery", "Attempts lost"): 1,
    ("fleet-recovery", "Recovered"): 1,
    ("fleet-recovery", "Lost too often"): 0,
    ("fleet-recovery", "Refused"): 0,
    ("fleet-recovery", "Append-only file"): 1,
    ("fleet-recovery", "Eviction"): 0,
}


def at_work(workers: Workers) -> None:
    """12 finished, of them one that was lost once; 3 failed, of them 2 after a retry; 1 runs, 5 wait."""
    first = workers.start("lost", settings={"lease_seconds": 5.0})
    lost = workers.submit("sh", "-c", "[ $FLEET_FENCE -gt 1 ] || sleep 600")
    workers.until(lambda: workers.state(lost) == "started")
    workers.start("w0", slots=2)  # before: lest recovery pause, for nobody did the chores
    workers.kill(first)
    ids = workers.submit_many([["true"]] * 11) + workers.submit_many([["false"]])
    ids += workers.submit_many([["false"]] * 2, retries=1, retry_delay_seconds=0)
    workers.wait([*ids, lost])
    workers.submit_many([["true"]] * 3, requirements=Requirements(gpus=64))
    workers.submit_many([["true"]] * 2, "later")
    running = workers.submit("sleep", "600")
    workers.until(lambda: workers.state(running) == "started")
    bootstraps.record(workers.client, [("connect", 0.2)], ["install"])


@pytest.mark.needs("promtool")
def test_every_query_finds_what_the_fleet_did(
    workers: Workers,
    exporter: Callable[..., Exporter],
    prometheus: Callable[..., Prometheus],
    redis_url: str,
) -> None:
    server = prometheus(exporter(redis_url).port, RULES)
    at_work(workers)
    faults: dict[str, Any] = {}

    def all_answer() -> bool:
        faults.clear()
        for uid, title, query, is_number in queries():
            values = list(server.query(asked(query)).values())
            wanted = EXACT.get((uid, title)) if is_number else None
            if not values or any(map(math.isnan, values)) or (wanted is not None and values != [wanted]):
                faults[f"{uid}: {title}: {query}"] = (values, wanted)
        return not faults

    with contextlib.suppress(pytest.fail.Exception):
        workers.until(all_answer, seconds=30)
    assert not faults
    handed_back = server.value("sum(fleet_jobs_handed_back_total)")
    assert server.value("sum(fleet_claims_total)") == 19 + handed_back, "each attempt, and what was not begun"
