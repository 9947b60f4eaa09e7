"""`fleet status` on a real terminal."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import redis

from broker import keys
from tests.conftest import fleet_script
from tests.integration import terminal
from tests.integration.cli.fake_fleet import add_worker

pytestmark = pytest.mark.needs("tmux")


@pytest.fixture
def some(redis_client: redis.Redis, fleet_redis_url: str) -> redis.Redis:
    """Three workers, of which one is offline, and two queues."""
    add_worker(redis_client, "gpu1.cluster.example.com-0", running=3)
    add_worker(redis_client, "gpu1.cluster.example.com-1")
    add_worker(redis_client, "gpu2.cluster.example.com-0", alive=False)
    redis_client.sadd(keys.QUEUES, keys.queue("default"), keys.queue("reports"))
    redis_client.sadd(keys.PAUSED, "reports")
    return redis_client


def test_at_80_columns_the_more_important_ones_stay_and_names_are_told_apart(some, tmp_path):
    for number in range(2):
        add_worker(some, f"gpu3.a-rather-long-name.example.com-{number}")
    with terminal.opened(tmp_path, [fleet_script(), "status"], 80, 40) as screen:
        text = screen.shows("ended with 0", "paused")
    head = next(line for line in text.splitlines() if line.startswith("WORKER"))
    assert head.split() == ["WORKER", "STATE", "SLOTS", "CPUS", "MEMORY", "BEAT"]
    names = [line.split()[0] for line in text.splitlines() if line.startswith("gpu")]
    assert len(set(names)) == 5
    assert any("…" in name for name in names)
    assert re.search(r"● busy +3/4 +████░░ +1\.5/8 +16\.0/64\.0 GiB", text)
    assert "✗ offline" in text
    assert "slots 3/16" in text


def test_at_200_columns_nothing_is_cut(some, tmp_path):
    with terminal.opened(tmp_path, [fleet_script(), "status"], 200, 40) as screen:
        text = screen.shows("ended with 0", "paused")
    [head] = [line for line in text.splitlines() if line.startswith("WORKER")]
    assert {"HOST", "QUEUES", "RUNNING", "DONE", "FAILED", "VERSION"} <= set(head.split())
    assert "gpu2.cluster.example.com-0 " in text
    assert "0.5/2x A100" in text
    assert "‖ paused" in text


def test_without_colour_states_are_words_and_marks_all_the_same(some, tmp_path):
    def run(*environ: str) -> str:
        with terminal.opened(tmp_path, [fleet_script(), "status"], 100, 40, environ=environ) as screen:
            screen.shows("ended with 0", "✗ offline", "● busy", "‖ paused")
            return screen.text(colours=True)

    coloured = re.compile(r"\x1b\[[0-9;]*3[1-6]m")
    assert coloured.search(run())
    assert not coloured.search(run("NO_COLOR=1"))


def test_where_there_is_no_utf_8_bars_are_of_ascii(some, tmp_path):
    plain = ("LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0", "PYTHONIOENCODING=ascii:replace")
    with terminal.opened(tmp_path, [fleet_script(), "status"], 160, 40, environ=plain) as screen:
        text = screen.shows("ended with 0", "offline")
    assert "####--" in text


def test_a_great_fleet_does_not_scroll_by_but_for_who_wants_that(redis_client, fleet_redis_url, tmp_path):
    for number in range(60):
        add_worker(redis_client, f"w{number:02}", alive=number != 42)
    with terminal.opened(tmp_path, [fleet_script(), "status"], 80, 24) as screen:
        text = screen.shows("ended with 0", "60 workers: 59 idle, 1 offline")
        shown = [line for line in text.splitlines() if re.match(r"w\d\d ", line)]
        assert shown[0].startswith("w42")
        assert f"{60 - len(shown)} more ('fleet status --all')" in text
    with terminal.opened(tmp_path, [fleet_script(), "status", "--all"], 80, 80) as screen:
        text = screen.shows("ended with 0", "w59")
        assert sum(bool(re.match(r"w\d\d ", line)) for line in text.splitlines()) == 60


def test_watch_is_drawn_anew_when_the_size_changes_and_ends_with_q(some, tmp_path):
    with terminal.opened(tmp_path, [fleet_script(), "status", "--watch", "3600"], 80, 30) as screen:
        screen.shows("3 workers", "q quits")
        screen.resize(200, 20)
        screen.shows("VERSION", "q quits; shown anew each 3600 s")
        assert screen.lines()[19].startswith("q quits")
        screen.keys("q")
        screen.ended(0)


def test_watch_goes_on_where_redis_is_away_hangs_and_comes_back_and_ends_with_ctrl_c(own_redis, tmp_path):
    server = own_redis()
    with server.client() as client:
        add_worker(client, "w0")
        server.kill()
    command = [fleet_script(), "--redis", server.url, "status", "--watch", "0.2"]
    with terminal.opened(tmp_path, command, 120) as screen:
        screen.shows("No news yet, trying again: Redis at 127.0.0.1:", "is not reachable")
        server.start()
        screen.shows("1 worker: 1 idle", "w0")
        server.process.send_signal(signal.SIGSTOP)
        assert "w0" in screen.shows("No news since ", "Timeout")
        server.process.send_signal(signal.SIGCONT)
        screen.shows("1 worker: 1 idle")
        server.kill()
        assert "w0" in screen.shows("No news since ", "Connection refused")
        server.start()
        screen.shows("1 worker: 1 idle")
        screen.keys("C-c")
        screen.ended(130)


def test_watch_leaves_the_terminal_in_order_when_it_is_told_to_end(some, tmp_path: Path):
    pid = tmp_path / "pid"
    script = f"echo $$ > {pid}; exec {fleet_script()} status --watch"
    with terminal.opened(tmp_path, ["sh", "-c", script]) as screen:
        screen.shows("3 workers", "q quits")
        terminal.end(int(pid.read_text()))
        screen.ended(143)
