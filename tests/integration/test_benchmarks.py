"""That the benchmarks still run: ours beside xargs, tiny. Their figures are judged by nobody here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import growth, report

_REPOSITORY = Path(__file__).parents[2]


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments, "--quick", "--seconds", "0.03"]
    return subprocess.run(
        [*command, "--out", str(folder)], cwd=_REPOSITORY, capture_output=True, text=True, check=True
    )


def test_ours_and_xargs_are_measured_and_reported(tmp_path):
    done = _run(tmp_path, "commands", "--peers", "xargs")
    found = json.loads((tmp_path / "figures.json").read_text())
    rates = found["sections"]["commands"]["two"]
    assert list(rates) == ["fleet", "xargs", "fleet, one worker"]
    assert all(1 < rate < 100_000 for (rate,) in rates.values())
    (ours,), (theirs,) = rates["fleet"], rates["xargs"]
    bars = {bar["what"]: bar for bar in found["sections"]["commands"]["bars"]}
    bar = bars["commands, 2 slots, beside xargs -P2"]
    assert bar["reached"] == (ours / theirs >= 0.75)
    assert bar["found"] in (tmp_path / "figures.md").read_text()
    assert "FAILED" not in done.stdout


def test_the_other_quick_rows_run_and_a_peer_that_is_not_installed_is_skipped_loudly(tmp_path):
    rows = ["noops", "latency", "submission", "memory", "start", "arrivals"]
    done = _run(tmp_path, *rows, "--peers", "huey")
    assert ("!!! SKIPPED huey" in done.stdout) == (importlib.util.find_spec("huey") is None)
    assert "FAILED" not in done.stdout
    sections = json.loads((tmp_path / "figures.json").read_text())["sections"]
    assert list(sections) == rows
    assert all(len(section) > 1 for section in sections.values()), "each has figures beside its bars"


def test_figures_go_into_the_document_between_their_marks(tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report._BEGIN}\nold\n{report._END}\nafter\n")
    section = report.Section("Things", [report.Table(("what", "n"), [("a", "1")])])
    found = report.Report({"things": section}, {"fleet": "rq-fleet 0"}, {"date": "today"})
    found.write_document(document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| a | 1 |" in text
    assert "old" not in text


def test_costs_that_grow_are_seen_to():
    assert growth._grown({10: [100.0, 110.0, 90.0], 1000: [200.0]}) == 2.0
