"""`fleet top` on a real terminal: what is seen, and what keys do."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker import keys
from tests.conftest import fleet_script
from tests.integration import terminal
from tests.integration.cli.fake_fleet import add_worker

pytestmark = pytest.mark.needs("tmux")
TOP = [fleet_script(), "top", "--interval", "0.2"]


def names(text: str) -> list[str]:
    """The first words of the rows, in the order in which they are shown."""
    return re.findall(r"^(gpu\d+-0)\b", text, re.MULTILINE)


@pytest.fixture
def some(redis_client, fleet_redis_url):
    """Workers gpu1, gpu2 and gpu10, of which gpu2 is offline and gpu10 runs three jobs."""
    add_worker(redis_client, "gpu1-0")
    add_worker(redis_client, "gpu2-0", alive=False)
    add_worker(redis_client, "gpu10-0", running=3)
    return redis_client


def test_rows_are_sorted_by_keys_and_clicks_filtered_and_fit_whatever_size(some, tmp_path):
    with terminal.opened(tmp_path, TOP, 80, 24) as screen:
        text = screen.shows("3 workers: 1 busy, 1 idle, 1 offline", "STATE↑", "q Quit")
        assert names(text) == ["gpu2-0", "gpu10-0", "gpu1-0"]
        assert re.search(r"● busy +3/4 +████░░ +1\.5/8 +16\.0/64\.0 GiB", text)
        screen.keys("S")  # HOST, which a narrow terminal leaves out
        screen.keys("S")
        assert names(screen.shows("WORKER↑")) == ["gpu1-0", "gpu2-0", "gpu10-0"]
        screen.keys("r")
        assert names(screen.shows("WORKER↓")) == ["gpu10-0", "gpu2-0", "gpu1-0"]
        head = next(i for i, line in enumerate(screen.lines()) if line.startswith("WORKER"))
        screen.click(screen.lines()[head].index("SLOTS"), head)
        assert names(screen.shows("SLOTS↓"))[0] == "gpu10-0"
        screen.resize(200, 40)
        screen.shows("VERSION", "0.5/2x A100", "q Quit")
        assert len(screen.lines()) == 40
        screen.keys("/", "gpu1 idle", "Enter")
        assert names(screen.shows("1 with 'gpu1 idle'")) == ["gpu1-0"]
        screen.keys("Escape")
        screen.until(lambda text: len(names(text)) == 3)
        screen.keys("?")
        screen.shows("cancel a job; it asks first")
        screen.keys("Escape")
        screen.until(lambda text: "it asks first" not in text)
        screen.keys("q")
        screen.ended(0)


def test_a_worker_is_drained_a_job_followed_and_canceled_by_keys(
    workers, submit, fleet_redis_url, tmp_path, eventually
):
    workers.start("w0", slots=2)
    gate = tmp_path / "gate"
    script = (
        f"printf 'at 1%%\\rat 2%%\\n\\033[31mred\\033[0m \\001\\n'; until [ -e {gate} ]; do sleep .1; done; "
    )
    job = submit("sh", "-c", f"{script} echo second; sleep 600", options=("--name", "long one"))
    eventually(lambda: workers.state(job) == "started")
    with terminal.opened(tmp_path, TOP, 100, 30) as screen:
        screen.shows("1 worker: 1 busy", "w0")
        screen.keys("d")
        screen.shows("w0 draining: takes no new jobs", "◐ draining")
        assert workers.client.exists(keys.worker_drain("w0"))
        screen.keys("u")
        screen.shows("w0 takes jobs again", "● busy")

        screen.keys("c")
        screen.shows("Choose a job first")
        screen.keys("Enter")
        screen.shows("1 with 'w0'", job, "long one")
        screen.keys("l")
        text = screen.shows(f"stdout of {job}", "● started", "red \\x01")
        assert "at 2%" in text
        assert "at 1%" not in text
        screen.keys("d")  # means nothing here
        gate.touch()
        screen.shows("second")
        screen.keys("Escape")
        screen.shows("3 Jobs (1)")

        screen.keys("c")
        screen.shows(f"Cancel job {job}, which runs on w0?", "long one")
        screen.keys("n")
        screen.until(lambda text: "Cancel job" not in text)
        assert workers.state(job) == "started"
        screen.keys("c")
        screen.shows("Cancel job")
        screen.keys("y")
        screen.shows(f"{job}: stopping")
        eventually(lambda: workers.state(job) == "stopped")
        screen.keys("4")
        screen.shows("4 Failures (1)", "stopped by user")
    assert not workers.client.exists(keys.worker_drain("w0"))


def test_it_goes_on_where_redis_goes_away_and_comes_back_and_ends_with_ctrl_c(own_redis, tmp_path):
    server = own_redis()
    with server.client() as client:
        add_worker(client, "gpu1-0")
    command = [fleet_script(), "--redis", server.url, "top", "--interval", "0.2"]
    with terminal.opened(tmp_path, command, 120) as screen:
        screen.shows("1 worker: 1 idle", "gpu1-0")
        server.process.send_signal(signal.SIGSTOP)
        screen.shows("No news since ", "Timeout", "gpu1-0")
        server.process.send_signal(signal.SIGCONT)
        screen.until(lambda text: "No news" not in text)
        server.kill()
        assert "gpu1-0" in screen.shows("No news since ", "is not reachable")
        screen.keys("d")
        screen.until(lambda text: text.count("is not reachable") == 2)
        server.start()
        screen.shows("1 worker: 1 idle")
        screen.keys("C-c")
        screen.ended(130)


def test_it_leaves_the_terminal_in_order_when_it_is_told_to_end(some, tmp_path: Path):
    pid = tmp_path / "pid"
    with terminal.opened(tmp_path, ["sh", "-c", f"echo $$ > {pid}; exec {fleet_script()} top"]) as screen:
        screen.shows("3 workers", "gpu1-0")
        terminal.end(int(pid.read_text()))
        screen.ended(143)


def test_without_colour_there_are_greys_and_the_same_words(some, tmp_path):
    with terminal.opened(tmp_path, [fleet_script(), "--no-color", "top"], 100, 24) as screen:
        screen.shows("✗ offline", "● busy", "○ idle")
        colours = set(re.findall(r"[34]8;5;(\d+)", screen.text(colours=True)))
        screen.keys("q")
        screen.ended(0)
    # of the 256 colours of such a terminal
    assert colours <= {str(grey) for grey in (0, 7, 8, 15, 16, 59, 102, 145, 188, 231, *range(232, 256))}


def test_of_a_great_fleet_any_row_is_reached_at_once(redis_client, fleet_redis_url, tmp_path):
    for number in range(1500):
        add_worker(redis_client, f"gpu{number}-0")
    with terminal.opened(tmp_path, TOP, 80, 24) as screen:
        screen.shows("1,500 workers: 1,500 idle", "gpu0-0")
        screen.keys("End")
        screen.shows("gpu1499-0", "row 1,500")
        screen.keys("PPage")
        screen.until(lambda text: "gpu1499-0" not in text)
        screen.keys("Home")
        screen.shows("gpu0-0", "row 1")


@pytest.mark.parametrize("environ", [{}, {"TERM": "dumb"}])
def test_without_a_terminal_it_says_what_to_use(fleet, environ):
    done = fleet("top", code=2, env=environ)
    assert "fleet status --watch" in done.stderr


def test_nobody_else_imports_textual(fleet_redis_url):
    script = "import cli.main, cli.status, cli.top.verb, sys; sys.exit('textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
