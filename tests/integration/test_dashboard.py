"""rq-dashboard, as it is, watches a fleet at work and acts on it: in a browser."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import rq

from broker import jobs
from tests.integration import browser
from tests.integration.conftest import Workers

pytestmark = pytest.mark.needs("chromium")


@pytest.fixture
def dashboard(spawn: Any, workers: Workers, free_port: Any, tmp_path: Path) -> str:
    """Its address."""
    port, log = free_port(), tmp_path / "dashboard.log"
    program = str(Path(sys.executable).parent / "rq-dashboard")
    with open(log, "wb") as out:
        argv = [program, "--redis-url", workers.url, "--port", str(port), "--bind", "127.0.0.1"]
        process = spawn(argv, stdout=out, stderr=out, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    workers.until(lambda: "Running on" in log.read_text() or process.poll() is not None, "it listens")
    assert process.poll() is None, log.read_text()
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def at_work(workers: Workers, tmp_path: Path) -> dict[str, str]:
    """A fleet with a command and a function that run, and others that have ended; their ids."""
    workers.start("w0", slots=2)
    workers.start("w1", queues=("python",))
    queue = rq.Queue("python", connection=workers.client)
    found = {
        "fine": workers.submit("true"),
        "bad": workers.submit("sh", "-c", f"test -e {tmp_path}/mended && exit 0; echo sorry; exit 3"),
        "function": queue.enqueue("math.sqrt", -1).id,
    }
    workers.wait(list(found.values()))
    found["running"] = workers.submit("sh", "-c", f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done")
    found["call"] = queue.enqueue("rq_jobs.note_and_wait", f"{tmp_path}/notes", "here", f"{tmp_path}/go").id
    workers.until(lambda: workers.state(found["running"]) == workers.state(found["call"]) == "started")
    found["waiting"] = workers.submit("true", queue="nobody")
    return found


def cells(tab: browser.Tab, table: str, name: str) -> list[str]:
    """The row of a table whose first cell is `name`, once it is there."""
    row = tab.page.locator(f"#{table} tbody tr", has=tab.page.locator(f"td:first-child:text-is('{name}')"))
    row.first.wait_for()
    return [text.strip() for text in row.first.locator("td").all_inner_texts()]


def test_queues_workers_and_jobs_are_shown(dashboard, workers, at_work, tmp_path):
    with browser.opened(dashboard) as tab:
        # queued, deferred, scheduled, started, finished, failed, canceled
        assert cells(tab, "queues", "default") == ["default", "0", "0", "0", "1", "1", "1", "0"]
        assert cells(tab, "queues", "python") == ["python", "0", "0", "0", "1", "0", "1", "0"]
        assert cells(tab, "queues", "nobody") == ["nobody", "1", "0", "0", "0", "0", "0", "0"]
        tab.page.goto(f"{dashboard}/0/view/workers")
        # RQ cannot say what a command is, and would show no worker at all if it had to
        assert cells(tab, "workers", "w0") == ["w0", "idle", "default"]
        name, call, queue = cells(tab, "workers", "w1")
        assert (name, queue) == ("w1", "python")
        assert "rq_jobs.note_and_wait(" in call
        tab.page.goto(f"{dashboard}/0/view/job/{at_work['bad']}")
        tab.page.wait_for_selector("#job-data p")
        about = tab.page.inner_text("#job-data")
        assert "failed" in about
        assert "echo sorry; exit 3" in about
        assert "exit code 3" in about
        assert "sorry" in tab.page.inner_text("pre.exc_info")
        tab.page.goto(f"{dashboard}/0/view/jobs/nobody/queued/8/asc/1")
        assert at_work["waiting"] in tab.page.inner_text("#jobs tr[data-role=job]")
        assert tab.faults == []
    (tmp_path / "go").touch()
    workers.wait([at_work["running"], at_work["call"]])


def test_its_buttons_requeue_delete_and_empty(dashboard, workers, at_work, tmp_path):
    (tmp_path / "mended").touch()
    with browser.opened(f"{dashboard}/0/view/job/{at_work['bad']}") as tab:
        tab.page.click("#requeue-job-btn")
        workers.until(lambda: workers.state(at_work["bad"]) == "finished", "it ran again")
        outcomes = [one.outcome for one in jobs.show(workers.client, at_work["bad"]).attempts]
        assert outcomes == ["failed", "finished"]

        tab.page.goto(f"{dashboard}/0/view/jobs/python/failed/8/asc/1")
        tab.page.click(f"tr[data-job-id='{at_work['function']}'] [data-role=delete-job-btn]")
        tab.page.click("#confirmation-modal-yes")
        workers.until(lambda: workers.state(at_work["function"]) is None, "it is deleted")

        tab.page.goto(f"{dashboard}/0/view/jobs/nobody/queued/8/asc/1")
        tab.page.click("#empty-btn")
        tab.page.click("#confirmation-modal-yes")
        workers.until(lambda: workers.state(at_work["waiting"]) is None, "the queue is empty")
        assert tab.faults == []
    (tmp_path / "go").touch()
    workers.wait([at_work["running"], at_work["call"]])
    workers.assert_clean()
