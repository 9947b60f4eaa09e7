"""Prometheus's configuration, rules and alerts, judged by promtool; and what alerts point at."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.monitoring.conftest import REPOSITORY

OPS = REPOSITORY / "ops" / "prometheus"
ALERTS = [
    rule
    for group in yaml.safe_load((OPS / "alerts.rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
RUNBOOK = (REPOSITORY / "docs" / "runbook.md").read_text()


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=OPS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.needs("promtool")
def test_promtool_finds_nothing_wrong_with_configuration_and_rules() -> None:
    assert "2 rule files found" in promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "recording.rules.yml", "alerts.rules.yml")


@pytest.mark.needs("promtool")
def test_alerts_fire_when_they_should_and_not_when_they_should_not() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts.test.yml")


@pytest.mark.parametrize("name", [alert["alert"] for alert in ALERTS])
def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_must_not(name: str) -> None:
    tests = yaml.safe_load((OPS / "alerts.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == name]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_says_what_it_is_what_to_do_and_where_to_look(alert: dict[str, Any]) -> None:
    notes = alert["annotations"]
    assert notes["summary"]
    assert alert["labels"]["severity"] in ("page", "ticket")
    path, _, anchor = notes["runbook"].partition("#")
    assert (REPOSITORY / path).read_text() == RUNBOOK
    assert anchor == alert["alert"].lower()
    (section,) = re.findall(rf"^## {alert['alert']}\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
    assert section.count("\n- ") >= 3, "ways to find out, and to mend it"
    uid = re.fullmatch(r"/d/([a-z-]+)(\?\S.*)?", notes["dashboard"])
    assert uid
    assert (REPOSITORY / "ops" / "grafana" / "dashboards" / f"{uid[1]}.json").is_file()


def test_the_runbook_speaks_of_no_alert_that_there_is_not() -> None:
    assert set(re.findall(r"^## (Fleet\w+)", RUNBOOK, re.MULTILINE)) == {alert["alert"] for alert in ALERTS}


def test_commands_of_the_runbook_exist() -> None:
    from cli.main import VERBS

    verbs = set(re.findall(r"(?:`|^    )fleet ([a-z][a-z-]*)", RUNBOOK, re.MULTILINE))
    assert verbs <= set(VERBS)
    assert len(verbs) > 8
