"""What users can cause ends with a message, a hint and an exit code; never with a traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading

import pytest

from broker.command import Command
from broker.submit import Options, submit_commands
from tests.conftest import fleet_script

#: every verb that speaks to Redis
VERBS = {
    "submit": ["submit", "--", "true"],
    "status": ["status"],
    "jobs": ["jobs"],
    "show": ["show", "x"],
    "logs": ["logs", "x"],
    "wait": ["wait", "x"],
    "wait --all": ["wait", "--all"],
    "cancel": ["cancel", "x"],
    "queues": ["queues"],
    "report": ["report"],
    "doctor": ["doctor"],
    "hosts": ["hosts", "list"],
    "worker": ["worker", "--burst"],
}
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())


@pytest.fixture
def judged(run_fleet):
    """`judged(words, url, code=6)`: what it said on stderr, which must be a message; nothing on stdout."""

    def run(words: list[str], url: str, code: int) -> str:
        done = run_fleet(*words, env={"FLEET_REDIS_URL": url})
        assert (done.returncode, done.stdout) == (code, ""), done
        assert "fleet: " in done.stderr
        return done.stderr

    return run


@every_verb
def test_redis_down(judged, free_port, verb):
    assert "not reachable" in judged(verb, f"redis://127.0.0.1:{free_port()}", 6)


@every_verb
def test_wrong_password(judged, own_redis, verb):
    server = own_redis("--requirepass", "right")
    for user in ("", ":wrong@"):
        said = judged(verb, f"redis://{user}127.0.0.1:{server.port}", 6)
        assert "refused us" in said
        assert "wrong@" not in said


@every_verb
@pytest.mark.parametrize(
    "url",
    ["nonsense", "http://x", "redis://", "redis://h:port", "redis://h:99999", "redis://[::1", "redis:///0"],
)
def test_wrong_url(judged, verb, url):
    judged(verb, url, 2)


@pytest.mark.parametrize("verb", [VERBS["submit"], VERBS["jobs"]])
def test_a_database_that_redis_has_not(judged, redis_server, verb):
    judged(verb, f"redis://127.0.0.1:{redis_server.port}/9999", 2)


def test_an_empty_url_is_no_wish_for_the_embedded_broker(run_fleet):
    assert run_fleet("status", "--redis", "").returncode == 2


def test_no_redis_configured_and_none_running(run_fleet):
    done = run_fleet("status")
    assert done.returncode == 6
    assert "fleet broker start" in done.stderr


def test_a_url_names_no_secret_in_messages(run_fleet):
    done = run_fleet("status", "--redis", "redis://user:secret@[bad/0")
    assert "secret" not in done.stderr


def test_something_else_answers(judged):
    """An HTTP server, say."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_answer, args=(server,))
        thread.start()
        said = judged(["jobs"], f"redis://127.0.0.1:{server.getsockname()[1]}", 6)
        thread.join()
    assert "Redis" in said


def _answer(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--maxmemory", "1kb"], "is full"),
        (["--replicaof", "127.0.0.1 1"], "replica"),
        (["--min-replicas-to-write", "1"], "too few replicas"),
    ],
)
def test_a_redis_that_takes_no_change(own_redis, run_fleet, options, word):
    server = own_redis(*options)
    done = run_fleet("submit", "--json", "--redis", server.url, "--", "true")
    assert (done.returncode, done.stdout) == (1, "")
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "redis_refused"
    assert word in error["message"]
    assert error["hint"]
    assert run_fleet("jobs", "--redis", server.url).returncode == 0


@pytest.mark.parametrize(
    "reply", ["LOADING Redis is loading the dataset in memory", "MISCONF Errors writing"]
)
def test_replies_that_are_hard_to_provoke(run_fleet, reply):
    with _Says(reply) as url:
        done = run_fleet("jobs", "--json", "--redis", url)
    error = json.loads(done.stderr)["error"]
    expected = {"LOADING": ("redis_loading", 6), "MISCONF": ("redis_refused", 1)}[reply.split()[0]]
    assert (error["code"], done.returncode) == expected


class _Says:
    """A Redis that answers everything with one error."""

    def __init__(self, reply: str) -> None:
        self._reply = f"-{reply}\r\n".encode()
        self._server = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> str:
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return f"redis://127.0.0.1:{self._server.getsockname()[1]}"

    def _serve(self) -> None:
        connection, _ = self._server.accept()
        with connection:
            while asked := connection.recv(65536):
                connection.sendall(self._reply * max(asked.count(b"*"), 1))

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._server.close()


@pytest.mark.parametrize("words", [["wait", "a"], ["logs", "-f", "a"], ["submit", "--wait", "--", "true"]])
def test_redis_dies_in_the_middle(own_redis, spawn, eventually, tmp_path, words):
    server = own_redis()
    said = tmp_path / "said"
    with server.client() as client:
        submit_commands(client, "default", [("a", Command(("true",)))], Options())
        with open(said, "wb") as errors:
            command = [fleet_script(), *words, "--redis", server.url]
            if "--" in words:
                command = [fleet_script(), "--redis", server.url, *words]
            process = spawn(command, stderr=errors, stdout=subprocess.DEVNULL)
        eventually(lambda: len(client.client_list()) > 1, message="it is connected")
        eventually(lambda: client.info("commandstats").get("cmdstat_hget", {}).get("calls", 0) > 2)
    server.kill()
    assert process.wait(60) == 6
    assert b"Traceback" not in said.read_bytes()
    assert b"not reachable" in said.read_bytes()


# --- the command line itself -----------------------------------------------------------------------


def test_errors_of_usage(run_fleet):
    for words in (["nonsense"], ["--nonsense"], ["jobs", "--nonsense"], ["show"], ["config", "nonsense"]):
        done = run_fleet(*words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert "Try 'fleet" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["slurm", "script", "--output-dir", ""], "'--output-dir': is empty"),
        (
            ["slurm", "script", "--nodes", "99999999999"],
            "--nodes 99999999999 is more than the 65533",
        ),
        (["script", "--output-dir", ""], "'--output-dir': is empty"),
        (["worker", "--output-dir", ""], "'--output-dir': is empty"),
        (["worker", "--check", "--name", "w 1"], "'w 1' is no worker name"),
        (["up", "--dry-run", "--output-dir", ""], "--output-dir '': must begin with / or ~/"),
        (["collect-logs", "--remote-output-dir", ""], "--remote-output-dir '': must begin with / or ~/"),
    ],
)
def test_a_number_a_folder_or_a_name_that_cannot_be_is_an_error_of_usage(fleet, words, told):
    assert told in fleet(*words, code=2).stderr


def test_under_json_errors_are_json(run_fleet):
    for words in (["jobs", "--json", "--limit", "x"], ["show", "--json"], ["jobs", "--nonsense", "--json"]):
        done = run_fleet(*words)
        assert done.returncode == 2
        assert json.loads(done.stderr)["error"]["code"] == "usage"


def test_help_without_a_verb(run_fleet):
    done = run_fleet()
    assert done.returncode == 2
    assert "submit" in done.stderr
    asked = run_fleet("--help")
    assert asked.returncode == 0
    assert "submit" in asked.stdout


def test_options_before_and_after_the_verb(run_fleet, redis_url, free_port):
    nowhere = f"redis://127.0.0.1:{free_port()}"
    assert run_fleet("--redis", redis_url, "jobs").returncode == 0
    assert run_fleet("jobs", "--redis", redis_url).returncode == 0
    assert run_fleet("--redis", nowhere, "jobs", "--redis", redis_url).returncode == 0
    assert run_fleet("submit", "--redis", redis_url, "-q", "--", "true").returncode == 0
    assert run_fleet("hosts", "list", "--redis", redis_url).returncode == 0
    assert run_fleet("hosts", "--redis", redis_url, "list").returncode == 0
    assert "No jobs" not in run_fleet("jobs", "-q", "--state", "failed", "--redis", redis_url).stderr


def test_a_job_may_use_fleet_itself(fleet, burst, submit, fleet_redis_url):
    """What a job finds in its environment (FLEET_WORKER, ...) is no setting."""
    job = submit(fleet_script(), "submit", "--redis", fleet_redis_url, "--queue", "inner", "--", "true")
    burst()
    inner = fleet("logs", job).stdout.strip()
    assert "inner" in fleet("show", inner).stdout


def test_debug_shows_the_traceback(free_port):
    words = [fleet_script(), "jobs", "--debug", "--redis", f"redis://127.0.0.1:{free_port()}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert "Traceback" in done.stderr
    assert "not reachable" in done.stderr


def test_a_reader_that_has_seen_enough(fleet, fleet_redis_url, redis_client):
    commands = [(None, Command(("true", "x" * 100))) for _ in range(2000)]
    submit_commands(redis_client, "default", commands, Options())
    script = f"{fleet_script()} jobs --limit 2000 | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0].startswith("JOB")
    assert done.stdout.splitlines()[1] == "0"


def test_a_full_disk_under_stdout(fleet_redis_url):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([fleet_script(), "status"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b"fleet: No space left on device\n"


@pytest.mark.parametrize(
    ("word", "meant"), [("staus", "'status'"), ("drian", "'drain' or 'undrain'"), ("cancle", "'cancel'")]
)
def test_a_verb_that_is_misspelled_is_suggested(fault, word, meant):
    assert f"Did you mean {meant}" in fault(word, code=2)["message"]


def test_a_word_that_is_no_verb_suggests_none(fault):
    assert "Did you mean" not in fault("frobnicate", code=2)["message"]


def test_help_is_quick(run_fleet):
    """0.3 s is promised; its own work counts, not waiting for other tests on a busy machine."""

    def once() -> float:
        before = os.times()
        run_fleet("--help")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(once() < 0.3 for _ in range(10))


def test_an_embedded_broker_is_started_and_said_so_only_by_submit(run_fleet):
    try:
        done = run_fleet("submit", "--", "true")
        assert done.returncode == 0
        assert "embedded Redis" in done.stderr
        assert len(done.stdout.split()) == 1
        assert run_fleet("jobs").stdout.count("queued") == 1
    finally:
        run_fleet("broker", "stop", "--force")


def test_ctrl_c_during_submit_wait_says_that_the_job_goes_on(spawn, fleet_redis_url, tmp_path, eventually):
    told, said = tmp_path / "told", tmp_path / "said"
    with open(told, "wb") as output, open(said, "wb") as errors:
        process = spawn([fleet_script(), "submit", "--wait", "--", "true"], stdout=output, stderr=errors)
    eventually(lambda: b"No worker listens" in said.read_bytes(), message="it waits")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert b"goes on" in said.read_bytes()
    assert b"Traceback" not in said.read_bytes()
