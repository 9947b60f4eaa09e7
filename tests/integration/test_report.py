"""`fleet report` of a fleet that worked: printed, as JSON, and as a page in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rq

from broker import keys, past
from broker.command import Command
from broker.requirements import parse
from broker.submit import Options, submit_commands
from fleet import series
from tests.integration import browser
from tests.integration.conftest import Workers

_EVIL = "<script>alert(1)</script>"


@pytest.fixture
def report(run_fleet: Any, fleet_redis_url: str, tmp_path: Path) -> Any:
    """`report("--json", code=0)`: what it printed."""

    def run(*options: str, code: int = 0) -> Any:
        done = run_fleet("report", *options, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def worked(workers: Workers, tmp_path: Path) -> Workers:
    """A fleet that has run this and that, was sampled, and runs one job still."""
    workers.start("here-0", slots=2, settings={"sample_seconds": 0.2})
    workers.start("here-1", slots=2, settings={"sample_seconds": 0.2})
    asked = Options(requirements=parse({"memory": "512M"}))
    hungry = Command(("python3", "-c", "import time; x = bytearray(60 << 20); time.sleep(1)"))
    found = submit_commands(workers.client, "default", [(None, hungry)], asked)
    found += workers.submit_many([("sh", "-c", f"exit {n % 2 * 3}") for n in range(6)])
    found += workers.submit_many([("false", _EVIL)])
    found.append(rq.Queue("default", connection=workers.client).enqueue("math.sqrt", -1).id)
    workers.wait(found)
    running = workers.submit("sh", "-c", f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done")
    workers.until(lambda: workers.state(running) == "started")
    workers.until(lambda: list(series.files(workers.folder)), "samples are written")
    return workers


@pytest.mark.needs("chromium")
def test_a_page_of_a_fleet_at_work(worked, report, tmp_path):
    report("--html", "page.html", "-l", str(worked.folder))
    found = json.loads(report("--json", "-l", str(worked.folder)).stdout)
    assert found["jobs"] == {"finished": 4, "failed": 5, "started": 1}
    attempts = found["attempts"]
    attempts.pop("handed-back", 0)  # claimed ahead, and not begun
    assert attempts == {"finished": 4, "failed": 5, "running": 1}
    assert found["hosts"][0]["name"] == "here"
    assert {row["worker"] for row in found["busiest"]} <= {"here-0", "here-1"}
    assert found["failures"][0]["reason"] == "exit code 3"
    assert found["failures"][0]["count"] == 3
    (memory,) = [one for one in found["memory"] if one["asked_bytes"]]
    assert (memory["asked_bytes"] >> 20, memory["suggested_bytes"] >> 20) in ((512, 96), (512, 128))
    assert found["slowest"][0]["id"]
    assert sum(one["count"] for one in found["running"]["below"]) == found["running"]["count"] >= 9
    backgrounds = set()
    for width, dark in ((1280, False), (400, True)):
        with browser.opened((tmp_path / "page.html").as_uri(), width=width, dark=dark) as tab:
            _look(tab, width)
            backgrounds.add(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2, "dark where the browser is"
    (tmp_path / "go").touch()


#: whether labels of one axis that are shown lie over each other
_OVERLAP = """
[...document.querySelectorAll(".x")].some(axis => {
  const boxes = [...axis.querySelectorAll("span")].map(one => one.getBoundingClientRect());
  const shown = boxes.filter(box => box.width);
  return shown.some((box, i) => i > 0 && box.left < shown[i - 1].right);
})
"""


def _look(tab: browser.Tab, width: int) -> None:
    page = tab.page
    assert page.locator("#gantt .lane rect.finished").count() == 4, "a bar for each attempt"
    assert page.locator("#gantt .lane rect.failed").count() == 5
    assert page.locator("#gantt .lane rect.running").count() == 1
    assert page.locator("#time figure").count() == 8
    for box in (one.bounding_box() for one in page.locator("svg[role=img]").all()):
        assert box
        assert box["width"] > 40
        assert box["height"] >= 9
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert not page.evaluate(_OVERLAP)
    failures = page.inner_text("#failures")
    assert "exit code 3" in failures
    assert f"false {_EVIL}" in failures
    assert "math domain error" in failures
    assert "ask for" in page.inner_text("#memory")
    title = page.locator("#gantt .lane rect.failed title").first.text_content() or ""
    assert "failed on here-" in title
    assert "here" in page.inner_text("#hosts")
    assert tab.faults == []
    assert [url.partition(":")[0] for url in tab.requests] == ["file"]


@pytest.mark.needs("chromium")
def test_a_page_of_nothing(report, tmp_path):
    assert "Nothing has run" in report().stdout
    report("--html", "page.html")
    with browser.opened((tmp_path / "page.html").as_uri()) as tab:
        assert tab.page.locator("#nothing").is_visible()
        assert tab.page.locator("#gantt").count() == 0
        assert tab.faults == []


def test_it_is_told_in_the_terminal(worked, report, tmp_path):
    lines = report("-l", str(worked.folder)).stdout.splitlines()
    assert "Jobs:     5 failed, 4 finished, 1 started" in lines
    text = "\n".join(lines)
    for words in ("Why jobs failed", "exit code 3", "Memory asked for and used", "The longest runs", "Hosts"):
        assert words in text
    assert "Jobs:     1 started" in report("--since", "1ms").stdout
    (tmp_path / "go").touch()


def test_where_it_cannot_be_written_nothing_is(report, tmp_path):
    assert "there is no folder" in report("--html", "no/page.html", code=2).stderr
    assert "does not exist" in report("-l", "nowhere", code=2).stderr
    (tmp_path / "folder").mkdir()
    assert "is a directory" in report("--html", "folder", code=2).stderr
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_what_is_read_is_bounded_and_damage_is_passed_over(workers, run_fleet):
    ids = workers.submit_many([("true",)] * 30)
    waiting = workers.submit_many([("true",)] * 3, queue="nobody")
    workers.start("here-0", slots=2)
    workers.wait(ids)
    assert (past.read(workers.client, 30).left_out, past.read(workers.client, 20).left_out) == (0, 10)
    assert len(list(past.read(workers.client, 20).jobs)) == 20
    workers.client.hset(keys.job(ids[0]), "fleet_attempts", '{"fence": "x"}\n[]\nno JSON')
    workers.client.delete(keys.job(ids[1]))
    workers.client.set(keys.job(ids[2]), "damaged")
    found = past.read(workers.client, 1000)
    assert (found.kept["finished"], found.kept["queued"]) == (30, 3)
    jobs = {job.id: job for job in found.jobs}
    assert set(jobs) == {*ids} - {ids[1], ids[2]}
    assert not jobs.keys() & set(waiting), "those that wait have not run"
    assert jobs[ids[0]].attempts == ()
    attempt = jobs[ids[3]].attempts[0]
    assert (attempt.worker, attempt.outcome) == ("here-0", "finished")
    assert jobs[ids[3]].queued <= attempt.started <= attempt.ended
