"""Webhooks: told once, of the end that is final."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rq import Retry
from rq.command import send_stop_job_command
from rq.webhook import Webhook

from tests.integration.rq.conftest import Desk


class Listener(BaseHTTPRequestHandler):
    """Notes the documents it is sent."""

    heard: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hooks() -> Iterator[tuple[list[Webhook], Callable[[Any], list[str]]]]:
    """Webhooks for both ends, and `heard(job)`: which of them were told of it."""
    server = HTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/"
    both = [Webhook(url, status, method="POST") for status in ("finished", "failed")]
    yield both, lambda job: [row["status"] for row in Listener.heard if row["job_id"] == job.id]
    server.shutdown()
    thread.join()
    server.server_close()


def test_each_end_is_told_once(desk: Desk, hooks: Any) -> None:
    webhooks, heard = hooks
    good, bad = desk.enqueue("add", 1, 1, webhooks=webhooks), desk.enqueue("fail", webhooks=webhooks)
    desk.wait(good, bad)
    desk.until(lambda: heard(good) and heard(bad), "both were told")
    desk.settled()
    assert (heard(good), heard(bad)) == (["finished"], ["failed"])


def test_failures_that_are_tried_again_are_not_told(desk: Desk, hooks: Any) -> None:
    webhooks, heard = hooks
    runs = desk.file()
    saved = desk.enqueue("fail_until", str(runs), 3, webhooks=webhooks, retry=Retry(max=3))
    lost = desk.enqueue("fail", webhooks=webhooks, retry=Retry(max=2))
    assert desk.wait(saved, lost) == ["finished", "failed"]
    desk.until(lambda: heard(saved) and heard(lost), "both were told")
    desk.settled()
    assert (heard(saved), heard(lost)) == (["finished"], ["failed"])


def test_asking_too_often_to_be_run_again_is_told_as_a_failure(desk: Desk, hooks: Any) -> None:
    webhooks, heard = hooks
    job = desk.run("again", 2, webhooks=webhooks)
    assert job.is_failed
    desk.until(lambda: heard(job), "it was told")
    desk.settled()
    assert heard(job) == ["failed"]


def test_a_dead_process_is_told_and_a_stopped_job_is_not(desk: Desk, hooks: Any) -> None:
    webhooks, heard = hooks
    dead = desk.run("die", webhooks=webhooks)
    desk.until(lambda: heard(dead), "it was told")
    with desk.busy(webhooks=webhooks) as stopped:
        send_stop_job_command(desk.client, stopped.id)
        assert desk.wait(stopped) == ["stopped"]
    desk.settled()
    assert (heard(dead), heard(stopped)) == (["failed"], [])


def test_an_address_that_does_not_answer_is_nobodys_failure(desk: Desk, free_port: Callable[[], int]) -> None:
    nowhere = Webhook(f"http://127.0.0.1:{free_port()}/", "finished", timeout=1)
    job = desk.run("add", 1, 1, webhooks=[nowhere])
    assert (job.is_finished, job.return_value()) == (True, 2)
    desk.settled()
