"""The real exporter and a real Prometheus that scrapes it: `exporter()`, `prometheus(...)`."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import fleet_script

REPOSITORY = Path(__file__).parents[3]
RULES = sorted((REPOSITORY / "ops" / "prometheus").glob("*.rules.yml"))


@dataclass(frozen=True)
class Exporter:
    """One that runs; `said` is what it wrote on stderr so far."""

    port: int
    process: subprocess.Popen[Any]
    log: Path

    def text(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as reply:
            assert reply.status == 200
            return str(reply.read().decode())

    def scrape(self) -> dict[str, float]:
        """`name{label="value",...}`, labels sorted, -> value."""
        return {
            _series(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    def said(self) -> str:
        return self.log.read_text()


def _series(name: str, labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name


@pytest.fixture
def exporter(
    spawn: Callable[..., Any], tmp_path: Path, eventually: Callable[..., Any]
) -> Callable[..., Exporter]:
    """`exporter(url, "--per-worker")`: `fleet metrics` at a port of its own, once it listens."""

    def start(url: str, *options: str) -> Exporter:
        log = tmp_path / f"exporter-{len(list(tmp_path.glob('exporter-*')))}.log"
        with open(log, "wb") as file:
            command = [fleet_script(), "metrics", "--redis", url, "--port", "0", *options]
            process = spawn(command, stdout=file, stderr=file)
        found = eventually(lambda: re.search(r"metrics at http://\S+:(\d+)/", log.read_text()))
        return Exporter(int(found[1]), process, log)

    return start


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    port: int

    def ask(self, what: str, **arguments: str) -> Any:
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/api/v1/{what}?{query}", timeout=60
        ) as reply:
            document = json.load(reply)
        assert document["status"] == "success", document
        return document["data"]

    def query(self, expression: str) -> dict[str, float]:
        """Series, without the labels of the scrape, -> value."""
        data = self.ask("query", query=expression)
        if data["resultType"] == "scalar":
            return {"": float(data["result"][1])}
        return {_labels(row["metric"]): float(row["value"][1]) for row in data["result"]}

    def value(self, expression: str) -> float | None:
        """Of the one series there is."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return next(iter(found.values()), None)

    def firing(self) -> set[str]:
        """The alerts that fire."""
        alerts = self.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def _labels(metric: Mapping[str, str]) -> str:
    inside = {key: value for key, value in metric.items() if key not in ("instance", "job")}
    return _series(inside.pop("__name__", ""), inside)


@pytest.fixture
def prometheus(
    spawn: Callable[..., Any],
    tmp_path: Path,
    free_port: Callable[[], int],
    eventually: Callable[..., Any],
) -> Callable[..., Prometheus]:
    """`prometheus(port, rules=[...], seconds=1)`: scrapes and evaluates so often; once it has scraped."""

    def start(exporter_port: int, rules: Sequence[Path] = (), seconds: float = 0.5) -> Prometheus:
        folder = tmp_path / "prometheus"
        folder.mkdir()
        every = f"{seconds * 1000:.0f}ms"
        config = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": [str(file) for file in rules],
            "scrape_configs": [
                {"job_name": "fleet", "static_configs": [{"targets": [f"127.0.0.1:{exporter_port}"]}]}
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        port = free_port()
        options = f"--storage.tsdb.path={folder}/data --web.listen-address=127.0.0.1:{port}".split()
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", *options]
        with open(folder / "log", "wb") as log:
            spawn(command, stdout=log, stderr=log)
        made = Prometheus(port)

        def has_scraped() -> bool:
            try:
                return made.value("up") == 1
            except OSError:
                return False

        eventually(has_scraped, message=(folder / "log").read_text())
        return made

    return start
