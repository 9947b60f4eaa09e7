"""What the rows found: tables and bars, as Markdown for people and JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, Site, number

DOCUMENT = REPOSITORY / "docs" / "performance.md"
_BEGIN, _END = "<!-- figures: written by make bench -->", "<!-- end of the figures -->"


@dataclass(frozen=True)
class Bar:
    """Something that is to be reached: `wanted` and `found` in words that stand beside each other."""

    what: str
    wanted: str
    found: str
    reached: bool

    @classmethod
    def at_least(cls, what: str, least: float, found: float, unit: str = "", digits: int = 2) -> Bar:
        """A bar that is reached from `least` on."""
        return cls(what, f"≥ {_short(least)}{unit}", f"{number(found, digits)}{unit}", found >= least)

    @classmethod
    def at_most(cls, what: str, most: float, found: float, unit: str = "", digits: int = 2) -> Bar:
        """A bar that is reached up to `most`."""
        return cls(what, f"≤ {_short(most)}{unit}", f"{number(found, digits)}{unit}", found <= most)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


@dataclass(frozen=True)
class Table:
    """A table of texts; all columns but the first are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As GitHub reads it."""
        rules = ["---", *["---:"] * (len(self.header) - 1)]
        return "".join(f"| {' | '.join(row)} |\n" for row in (self.header, rules, *self.rows))


@dataclass(frozen=True)
class Section:
    """What one row of the benchmarks found. `notes` are paragraphs of Markdown, `data` is for JSON."""

    title: str
    tables: Sequence[Table]
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Heading, tables, notes."""
        parts = [f"### {self.title}\n", *(table.markdown() for table in self.tables)]
        return "\n".join(parts + [f"{note}\n" for note in self.notes])


@dataclass(frozen=True)
class Report:
    """A whole run."""

    sections: dict[str, Section]
    versions: dict[str, str]
    setting: dict[str, str]

    def markdown(self) -> str:
        """The machine, the bars, the sections."""
        setting = "; ".join(f"{name} {value}" for name, value in self.setting.items())
        versions = "; ".join(sorted(set(self.versions.values())))
        bars = [bar for section in self.sections.values() for bar in section.bars]
        rows = [(bar.what, bar.wanted, bar.found, "yes" if bar.reached else "**no**") for bar in bars]
        table = Table(("what", "bar", "found", "reached"), rows).markdown() if bars else ""
        head = f"{setting}.\n\nMeasured: {versions}.\n"
        return "\n".join([head, table, *(section.markdown() for section in self.sections.values())])

    def json(self) -> str:
        """Everything, samples included; what could not be measured is null."""
        sections = {
            key: {"bars": [dataclasses.asdict(bar) for bar in section.bars], **section.data}
            for key, section in self.sections.items()
        }
        document = {
            "schema": 1,
            "setting": self.setting,
            "versions": self.versions,
            "sections": sections,
        }
        return json.dumps(_finite(document), indent=1, ensure_ascii=False)

    def save(self, folder: Path) -> None:
        """Write figures.md and figures.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "figures.md").write_text(self.markdown())
        (folder / "figures.json").write_text(self.json())

    def write_document(self, document: Path = DOCUMENT) -> None:
        """Put the figures into docs/performance.md, between their two marks."""
        text = document.read_text()
        pattern = re.escape(_BEGIN) + ".*" + re.escape(_END)
        figures = f"{_BEGIN}\n\n{self.markdown()}\n{_END}"
        document.write_text(re.sub(pattern, lambda _: figures, text, count=1, flags=re.DOTALL))


def _finite(value: Any) -> Any:
    """`value` without NaN, which JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def setting(site: Site) -> dict[str, str]:
    """The machine and the moment, as the figures carry them."""
    info = site.client.info("server")
    version = info.get("valkey_version")
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPUs ({_processor()})",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "Redis": f"Valkey {version}" if version else str(info["redis_version"]),
        "append-only file": "everysec",
        "rounds": str(site.rounds),
        "load before": load,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
