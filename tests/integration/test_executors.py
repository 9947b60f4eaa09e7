"""Python jobs run as under `rq worker`, in processes that the worker starts, feeds and never waits for."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import redis
import rq
from rq.serializers import DefaultSerializer, JSONSerializer

from fleet import executor_main
from fleet.executors import Execution, ExecutorConfig, ExecutorPool, Outcome

JOBS = """
import asyncio, ctypes, fcntl, os, pickle, random, signal, subprocess, sys, time
import rq

STATE = []
KEPT = []

class Picky:
    def __reduce__(self):
        raise TypeError("not me")

class Counter:
    def __init__(self, start):
        self.start = start
    def up(self, by):
        return self.start + by

def nothing(): pass
def add(a, b=0): return a + b
async def add_later(a, b):
    await asyncio.sleep(0)
    return a + b
def size(data): return len(data)
def many(count): return "x" * count
def pid(): return os.getpid()
def state():
    STATE.append(1)
    return len(STATE)
def picky(): return Picky()
def fail(text): raise ValueError(text)
def odd_text(): raise ValueError("\\udcff \\x00 \\u20ac")
def leave(): sys.exit(7)
def interrupt(): raise KeyboardInterrupt
def exit_now(status): os._exit(status)
def kill_self(number): os.kill(os.getpid(), number)
def segfault(): ctypes.string_at(0)
def again(count, interval): return rq.Retry(max=count, interval=interval)
def nap(seconds): time.sleep(seconds)
def touch(path): open(path, "w").close()
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
def touch_and_nap(path):
    touch(path)
    time.sleep(100)
def environment(): return dict(os.environ)
def surroundings():
    return {"cwd": os.getcwd(), "path": sys.path, "argv": sys.argv, "stdin": sys.stdin.read(),
            "int": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
            "term": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            "session": os.getsid(0), "group": os.getpgid(0), "pid": os.getpid()}
def meddle():
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def dice(way="seed"):
    value = random.random()
    if way == "setstate":
        random.setstate(random.Random(42).getstate())
    else:
        (random.seed if way == "seed" else pickle.loads(pickle.dumps(random.seed)))(42)
    return value, random.random()
def mark_meta(value):
    job = rq.get_current_job()
    job.meta["mark"] = value
    job.save_meta()
    return job.id, job.get_status().value, job.worker_name
def look_at_job(): return str(rq.get_current_job().created_at)
def current(): return rq.get_current_job() is None
def speak(text):
    print(text)
    print(text, file=sys.stderr)
def speak_everywhere():
    print("python")
    os.write(1, b"descriptor\\n")
    subprocess.run(["sh", "-c", "echo child; echo child >&2; head -c 0"], check=True)
    sys.stdout.buffer.write(b"\\xff\\n")
def speak_and_die():
    print("last words")
    os.kill(os.getpid(), signal.SIGKILL)
def speak_then(path):
    print("so far")
    wait_for(path)
def close_standard():
    os.close(0), os.close(1), os.close(2)
    print("into the void")
def close_python():
    sys.stdout.close()
    sys.stderr = None
def redirect():
    sys.stdout = KEPT
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
def leave_a_child(path):
    script = f"while ! test -e {path}; do sleep 0.01; done; echo late; touch {path}.done"
    subprocess.Popen(["sh", "-c", script])
    print("early")
def fork_and_return():
    print("before", flush=True)
    os.fork()
def fork_a_sleeper(path):
    if os.fork() == 0:
        time.sleep(100)
        os._exit(0)
    open(path, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
def descriptors():
    found = []
    for fd in range(3, 256):
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            continue
        if not flags & fcntl.FD_CLOEXEC:
            found.append(fd)
    return found
def open_descriptors(): return len(os.listdir("/proc/self/fd"))
def children(path):
    process = subprocess.Popen(["sleep", "100"])
    open(path, "w").write(str(process.pid))
    time.sleep(100)
def hoard(count): KEPT.append(bytearray(count))
def spill(seconds):
    os.closerange(3, 256)
    time.sleep(seconds)
def babble():
    import socket, stat
    for fd in range(3, 256):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode) or stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.write(fd, b"\\xff" * 64)
        except OSError:
            pass

def note(job, connection, value): connection.set(f"note:{job.id}", repr((job._status.value, value)))
def note_failure(job, connection, kind, value, trace):
    connection.set(f"note:{job.id}", repr((job._status.value, kind.__name__, str(value), trace is not None)))
def note_stop(job, connection): connection.set(f"note:{job.id}", "stopped")
def bad_callback(*args): raise LookupError("bad callback")
def slow_callback(*args): time.sleep(100)
"""

#: never that of a sidecar's test: its sidecar would kill our executors
TOKEN = "executors-have-no-sidecar-here"
SERIALIZERS = {"pickle": DefaultSerializer, "json": JSONSerializer}
both_modes = pytest.mark.parametrize("mode", ["warm", "fork"])
both_serializers = pytest.mark.parametrize("serializer", list(SERIALIZERS))


class Bench:
    """A pool, the jobs it is given, and what it told of its process groups."""

    def __init__(self, config: ExecutorConfig, client: redis.Redis) -> None:
        self.config, self.client = config, client
        self.spawned: list[int] = []
        self.exited: list[int] = []
        self.pool = ExecutorPool(config, on_spawn=self.spawned.append, on_exit=self._exit)
        self.folder = config.live_dir.parent
        self._count = 0

    def _exit(self, pgid: int) -> None:
        # not reaped yet, so that the number cannot be another's
        os.waitid(os.P_PID, pgid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        self.exited.append(pgid)

    def fields(
        self, func: str, *args, serializer: str = "pickle", **options
    ) -> tuple[str, dict[bytes, bytes]]:
        """A job's id and hash, enqueued by rq, as a claim finds it."""
        queue = rq.Queue("default", connection=self.client, serializer=SERIALIZERS[serializer])
        if not isinstance(func, str):
            job = queue.enqueue(func, args=args, **options)
        else:
            job = queue.enqueue(f"jobs_of_test.{func}", args=args, **options)
        self.client.hset(job.key, mapping={"status": "started", "worker_name": "w-0"})
        return job.id, self.client.hgetall(job.key)

    def start(self, func: str, *args, **options) -> Execution:
        job_id, fields = self.fields(func, *args, **options)
        return self.start_raw(job_id, fields)

    def start_raw(self, job_id: str, fields: dict[bytes, bytes]) -> Execution:
        self._count += 1
        out, err = (self.folder / "out" / f"{self._count}.{name}" for name in ("out", "err"))
        execution = self.pool.start(job_id, fields, execution_id="e1", stdout_path=out, stderr_path=err)
        self.pool.send()
        execution.out, execution.err = out, err
        return execution

    def run(self, func: str, *args, **options) -> Outcome:
        execution = self.start(func, *args, **options)
        return self.finish(execution)

    def finish(self, execution: Execution) -> Outcome:
        outcome = wait(execution)
        self.pool.release(execution)
        return outcome

    def value(self, func: str, *args, serializer: str = "pickle", **options):
        """The value a job returned; fails the test if it did not finish."""
        outcome = self.run(func, *args, serializer=serializer, **options)
        assert outcome.kind == "finished", outcome.exc_string
        return returned(outcome, serializer)

    def note(self, execution: Execution) -> str:
        """What a callback noted."""
        found = self.client.get(f"note:{execution.job_id}")
        return found.decode() if found else ""


def returned(outcome: Outcome, serializer: str = "pickle"):
    if outcome.return_value_b64 is None:
        return None
    return SERIALIZERS[serializer].loads(b64decode(outcome.return_value_b64))


def wait(execution: Execution, timeout_seconds: float = 60.0) -> Outcome:
    """Watch it as the worker does."""
    deadline = time.monotonic() + timeout_seconds
    while (left := deadline - time.monotonic()) > 0:
        writing = [execution] if execution.wants_write() else []
        readable, writable, _ = select.select([execution], writing, [], left)
        if writable:
            execution.flush()
        outcome = execution.receive() if readable else None
        if outcome:
            return outcome
    pytest.fail(f"no outcome within {timeout_seconds} s")


@pytest.fixture
def make_bench(redis_url, redis_client, tmp_path):
    """`make_bench(mode="fork", max_jobs=3)`: a pool that the test's end closes, with nothing left."""
    made: list[Bench] = []
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "jobs_of_test.py").write_text(JOBS)
    (tmp_path / "work").mkdir()

    def make(**options) -> Bench:
        plain = {
            "python": sys.executable,
            "redis_url": redis_url,
            "worker_name": f"w-{len(made)}",
            "environ": {**os.environ, "FLEET_INCARNATION": TOKEN, "GREETING": "hello"},
            "work_dir": str(tmp_path / "work"),
            "live_dir": tmp_path / "live",
            "paths": (str(tmp_path / "path"),),
        }
        made.append(Bench(ExecutorConfig(**(plain | options)), redis_client))
        return made[-1]

    yield make
    for bench in made:
        bench.pool.close()
        assert sorted(bench.exited) == sorted(bench.spawned)
        assert not any(psutil.pid_exists(pid) for pid in bench.spawned)
    assert not list((tmp_path / "live").glob("*")) or not made


@pytest.fixture
def bench(make_bench, mode):
    return make_bench(mode=mode)


# --- what a job returns ----------------------------------------------------------------------------


@both_modes
@both_serializers
def test_a_value_comes_back_as_rq_stores_it(bench, serializer):
    outcome = bench.run("add", 40, 2, serializer=serializer)
    assert (outcome.kind, returned(outcome, serializer)) == ("finished", 42)
    assert 0 <= outcome.duration_seconds < 60
    job = rq.job.Job(id="x", connection=bench.client, serializer=SERIALIZERS[serializer])
    result = rq.results.Result("x", rq.results.Result.Type.SUCCESSFUL, bench.client, return_value=42)
    result.serializer = job.serializer
    assert outcome.return_value_b64 == result.serialize()["return_value"]


@both_modes
@both_serializers
def test_none_is_stored_as_nothing(bench, serializer):
    outcome = bench.run("nothing", serializer=serializer)
    assert (outcome.kind, outcome.return_value_b64, outcome.exc_string) == ("finished", None, None)


@both_modes
@both_serializers
def test_a_coroutine_is_awaited(bench, serializer):
    assert bench.value("add_later", 1, 2, serializer=serializer) == 3


@both_modes
@both_serializers
def test_a_value_that_cannot_be_serialised_is_replaced_as_rq_does(bench, serializer):
    outcome = bench.run("picky", serializer=serializer)
    assert outcome.kind == "finished"
    assert returned(outcome, serializer) == "Unserializable return value"


@both_modes
def test_a_method_of_an_instance_is_called(bench, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("jobs_of_test", tmp_path / "path" / "jobs_of_test.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "jobs_of_test", module)
    spec.loader.exec_module(module)
    assert bench.value(module.Counter(40).up, 2) == 42


@both_modes
@both_serializers
def test_a_returned_retry_is_told(bench, serializer):
    outcome = bench.run("again", 3, [1, 5], serializer=serializer)
    assert (outcome.kind, outcome.retry) == ("retry", (3, [1, 5]))
    value = returned(outcome, serializer)
    if serializer == "pickle":
        assert (value.max, value.intervals) == (3, [1, 5])
    else:
        assert value == "Unserializable return value"


@both_modes
def test_large_arguments_and_values_neither_block_nor_deadlock(bench):
    data = os.urandom(50 * 2**20)
    job_id, fields = bench.fields("size", b"")
    fields[b"data"] = pickle.dumps(("jobs_of_test.size", None, (data,), {}))
    before = time.monotonic()
    execution = bench.start_raw(job_id, fields)
    assert time.monotonic() - before < 20
    assert execution.wants_write()
    assert returned(bench.finish(execution)) == len(data)
    assert len(bench.value("many", 50 * 2**20)) == 50 * 2**20


@both_modes
def test_a_value_nobody_reads_yet_does_not_hold_up_the_pool(bench):
    slow = bench.start("many", 5 * 2**20)
    assert bench.value("add", 1, 1) == 2
    assert len(returned(bench.finish(slow))) == 5 * 2**20


# --- how a job fails -------------------------------------------------------------------------------


@both_modes
@both_serializers
def test_an_exception_comes_as_a_traceback(bench, serializer):
    outcome = bench.run("fail", "broken", serializer=serializer)
    assert outcome.kind == "failed"
    assert outcome.exc_string.startswith("Traceback (most recent call last):")
    assert outcome.exc_string.endswith("ValueError: broken\n")
    assert outcome.return_value_b64 is None


@both_modes
def test_a_traceback_with_any_text_can_be_stored(bench):
    assert bench.run("odd_text").exc_string.encode()


@both_modes
@pytest.mark.parametrize(("func", "name"), [("leave", "SystemExit: 7"), ("interrupt", "KeyboardInterrupt")])
def test_leaving_and_interrupting_are_failures(bench, func, name):
    outcome = bench.run(func)
    assert (outcome.kind, outcome.exc_string.strip().splitlines()[-1]) == ("failed", name)
    assert bench.value("add", 1, 1) == 2
    assert len(bench.spawned) == 1


@both_modes
@pytest.mark.parametrize(
    ("func", "argument", "text", "number"),
    [
        ("kill_self", 9, "executor died: signal 9 (SIGKILL)", signal.SIGKILL),
        ("kill_self", 15, "executor died: signal 15 (SIGTERM)", signal.SIGTERM),
        ("segfault", None, "executor died: signal 11 (SIGSEGV)", signal.SIGSEGV),
        ("exit_now", 3, "executor exited with status 3", None),
        ("exit_now", 0, "executor exited with status 0", None),
    ],
)
def test_a_job_that_dies_tells_how(bench, func, argument, text, number):
    outcome = bench.run(func, *([] if argument is None else [argument]))
    assert (outcome.kind, outcome.exc_string, outcome.signal) == ("died", text, number)
    assert outcome.exit_status == (argument if number is None else None)
    assert not outcome.could_not_start
    assert bench.value("add", 1, 1) == 2


def test_a_fork_server_outlives_its_jobs(make_bench):
    bench = make_bench(mode="fork")
    assert bench.run("kill_self", 9).kind == "died"
    assert bench.run("segfault").kind == "died"
    assert bench.value("add", 1, 1) == 2
    assert len(bench.spawned) == 1


@both_modes
def test_a_crash_leaves_a_trace_in_standard_error(bench):
    execution = bench.start("segfault")
    outcome = bench.finish(execution)
    assert outcome.stderr_bytes > 0
    assert "in segfault" in execution.err.read_text()


@both_modes
def test_an_executor_killed_from_outside_is_a_death_and_is_replaced(bench, tmp_path, eventually):
    execution = bench.start("touch_and_nap", str(tmp_path / "on"))
    eventually((tmp_path / "on").exists)
    os.kill(execution.pid, signal.SIGKILL)
    outcome = bench.finish(execution)
    assert (outcome.kind, outcome.signal, outcome.could_not_start) == ("died", signal.SIGKILL, False)
    assert outcome.duration_seconds > 0
    assert bench.value("add", 1, 1) == 2
    assert len(bench.spawned) == 2


@both_modes
def test_killing_an_execution_kills_all_it_started(bench, tmp_path, eventually):
    execution = bench.start("children", str(tmp_path / "child"))
    child = int(eventually(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text()))
    execution.kill()
    assert bench.finish(execution).signal == signal.SIGKILL
    eventually(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


@both_modes
def test_a_death_is_noticed_though_a_child_of_the_job_lives_on(bench, tmp_path):
    outcome = bench.run("fork_a_sleeper", str(tmp_path / "on"))
    assert outcome.signal == signal.SIGKILL


@pytest.mark.parametrize(("mode", "seconds", "how"), [("warm", 100, "signal 9"), ("fork", 0, "status 1")])
def test_a_job_that_closes_the_connection_is_ended(bench, seconds, how):
    outcome = bench.run("spill", seconds)
    assert outcome.kind == "died"
    assert how in outcome.exc_string
    assert bench.value("add", 1, 1) == 2


def test_noise_on_the_connection_ends_the_executor(make_bench):
    bench = make_bench()
    assert bench.run("babble").kind == "died"
    assert bench.value("add", 1, 1) == 2


@both_modes
@pytest.mark.parametrize(
    "damage",
    [
        {b"data": b"\x80nonsense"},
        {b"timeout": b"soon"},
        {b"data": b""},
    ],
)
def test_a_damaged_hash_is_a_failure_of_its_job(bench, damage):
    job_id, fields = bench.fields("add", 1, 1)
    outcome = bench.finish(bench.start_raw(job_id, fields | damage))
    assert (outcome.kind, bool(outcome.exc_string)) == ("failed", True)
    outcome = bench.finish(bench.start_raw(job_id, {}))
    assert (outcome.kind, bool(outcome.exc_string)) == ("failed", True)


@both_modes
def test_any_id_that_is_queued_runs(bench):
    _, fields = bench.fields("add", 1, 1)
    assert returned(bench.finish(bench.start_raw("odd id: ü/..%", fields))) == 2


def test_a_function_that_is_not_there_is_a_failure(make_bench):
    bench = make_bench()
    assert "no_such_function" in bench.run("no_such_function").exc_string


# --- time ------------------------------------------------------------------------------------------


@both_modes
@both_serializers
def test_a_job_is_timed_out_as_rq_does(bench, serializer):
    outcome = bench.run("nap", 100, serializer=serializer, job_timeout=1)
    assert outcome.kind == "failed"
    assert "JobTimeoutException: Task exceeded maximum timeout value (1 seconds)" in outcome.exc_string
    assert bench.value("nap", 0, serializer=serializer) is None


@pytest.mark.parametrize(
    ("timeout", "limit"), [(b"7", 67), (b"-1", None), (b"0", 240), (None, 240), (b"x", 240)]
)
def test_the_worker_is_told_when_to_step_in(make_bench, timeout, limit):
    bench = make_bench()
    job_id, fields = bench.fields("nothing")
    fields.pop(b"timeout")
    execution = bench.start_raw(job_id, fields | ({b"timeout": timeout} if timeout else {}))
    assert execution.kill_after_seconds == limit
    assert bench.finish(execution).kind == ("failed" if timeout == b"x" else "finished")


@both_modes
@pytest.mark.parametrize("damage", [{b"created_at": b"never"}, {b"\xff": b""}])
def test_damage_matters_to_a_function_that_looks_at_its_job(bench, damage):
    job_id, fields = bench.fields("add", 1, 1)
    assert bench.finish(bench.start_raw(job_id, fields | damage)).kind == "finished"
    job_id, fields = bench.fields("look_at_job")
    outcome = bench.finish(bench.start_raw(job_id, fields | damage))
    assert (outcome.kind, bool(outcome.exc_string)) == ("failed", True)


@both_modes
def test_no_timeout_is_none(bench):
    assert bench.value("nap", 0.01, job_timeout=-1) is None


# --- callbacks -------------------------------------------------------------------------------------


@both_modes
@both_serializers
def test_a_success_callback_runs_before_the_end_is_told(bench, serializer):
    execution = bench.start("add", 1, 2, serializer=serializer, on_success=rq.Callback("jobs_of_test.note"))
    assert bench.finish(execution).kind == "finished"
    assert bench.note(execution) == "('finished', 3)"


@both_modes
@both_serializers
def test_a_failure_callback_runs_before_the_end_is_told(bench, serializer):
    execution = bench.start(
        "fail", "broken", serializer=serializer, on_failure=rq.Callback("jobs_of_test.note_failure")
    )
    assert bench.finish(execution).exc_string.endswith("ValueError: broken\n")
    assert bench.note(execution) == "('failed', 'ValueError', 'broken', True)"


@both_modes
def test_a_success_callback_that_fails_makes_the_job_fail(bench):
    callbacks = {
        "on_success": rq.Callback("jobs_of_test.bad_callback"),
        "on_failure": rq.Callback("jobs_of_test.note_failure"),
    }
    execution = bench.start("add", 1, 2, **callbacks)
    outcome = bench.finish(execution)
    assert outcome.kind == "failed"
    assert outcome.exc_string.endswith("LookupError: bad callback\n")
    assert bench.note(execution) == "('failed', 'LookupError', 'bad callback', True)"


@both_modes
def test_a_failure_callback_that_fails_takes_over(bench):
    outcome = bench.run("fail", "broken", on_failure=rq.Callback("jobs_of_test.bad_callback"))
    assert outcome.kind == "failed"
    assert "ValueError: broken" in outcome.exc_string
    assert outcome.exc_string.endswith("LookupError: bad callback\n")


@both_modes
def test_callbacks_have_timeouts_of_their_own(bench):
    outcome = bench.run("add", 1, 2, on_success=rq.Callback("jobs_of_test.slow_callback", timeout=1))
    assert "JobTimeoutException" in outcome.exc_string
    outcome = bench.run("fail", "", on_failure=rq.Callback("jobs_of_test.slow_callback", timeout=1))
    assert "JobTimeoutException" in outcome.exc_string


@both_modes
def test_a_returned_retry_is_no_success(bench):
    execution = bench.start("again", 1, 0, on_success=rq.Callback("jobs_of_test.note"))
    assert bench.finish(execution).kind == "retry"
    assert bench.note(execution) == ""


@both_modes
@both_serializers
def test_a_stopped_callback_runs_in_an_executor(bench, serializer):
    job_id, fields = bench.fields(
        "nothing", serializer=serializer, on_stopped=rq.Callback("jobs_of_test.note_stop", timeout=5)
    )
    execution = bench.pool.stopped_callback(job_id, fields)
    assert execution.kill_after_seconds == 65
    assert bench.finish(execution).kind == "finished"
    assert bench.note(execution) == "stopped"


@both_modes
def test_a_stopped_callback_that_fails_says_so(bench):
    execution = bench.pool.stopped_callback(
        *bench.fields("nothing", on_stopped=rq.Callback("jobs_of_test.bad_callback"))
    )
    assert bench.finish(execution).exc_string.endswith("LookupError: bad callback\n")


def test_without_stopped_callback_or_webhooks_there_is_nothing_to_do(make_bench):
    bench = make_bench()
    job_id, fields = bench.fields("nothing")
    assert bench.pool.stopped_callback(job_id, fields) is None
    assert bench.pool.webhooks(job_id, fields, "finished") is None
    assert bench.spawned == []


@pytest.fixture
def listener():
    """An HTTP server that keeps what it is sent: (address, list of bodies)."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", bodies
        server.shutdown()
        thread.join()


@both_modes
@both_serializers
def test_webhooks_are_told_of_the_end(bench, serializer, listener):
    address, bodies = listener
    hooks = [rq.Webhook(address, status, method="POST") for status in ("finished", "failed")]
    hooks.append(rq.Webhook("http://127.0.0.1:9/", "failed"))
    job_id, fields = bench.fields("nothing", serializer=serializer, webhooks=hooks)
    fields[b"ended_at"] = b"2026-01-02T03:04:05.000000Z"
    execution = bench.pool.webhooks(job_id, fields, "failed", "Traceback ...")
    assert bench.finish(execution).kind == "finished"
    (body,) = map(json.loads, bodies)
    assert (body["job_id"], body["status"], body["exc_info"]) == (job_id, "failed", "Traceback ...")
    assert body["ended_at"].startswith("2026-01-02T03:04:05")


# --- what a job finds ------------------------------------------------------------------------------


@both_modes
def test_a_job_knows_itself_and_keeps_meta(bench):
    job_id, fields = bench.fields("mark_meta", "x")
    outcome = bench.finish(bench.start_raw(job_id, fields))
    assert returned(outcome) == (job_id, "started", "w-0")
    job = rq.job.Job.fetch(job_id, connection=bench.client)
    assert job.meta == {"mark": "x"}
    assert bench.value("current") is False


@both_modes
def test_a_job_finds_rqs_variables_and_the_workers_environment(bench):
    job_id, fields = bench.fields("environment")
    environ = returned(bench.finish(bench.start_raw(job_id, fields)))
    assert environ["RQ_WORKER_ID"] == bench.config.worker_name
    assert (environ["RQ_JOB_ID"], environ["RQ_EXECUTION_ID"]) == (job_id, "e1")
    assert (environ["GREETING"], environ["FLEET_INCARNATION"]) == ("hello", TOKEN)


@both_modes
def test_the_password_is_in_no_command_line_and_no_environment(
    make_bench, mode, own_redis, tmp_path, eventually
):
    server = own_redis("--requirepass", "sesame")
    with server.client(password="sesame") as client:
        bench = make_bench(mode=mode, redis_url=f"redis://:sesame@127.0.0.1:{server.port}/0")
        bench.client = client
        execution = bench.start("touch_and_nap", str(tmp_path / "on"))
        eventually((tmp_path / "on").exists)
        for process in [psutil.Process(execution.pid), *psutil.Process(execution.pid).children()]:
            assert "sesame" not in " ".join(process.cmdline())
            assert "sesame" not in json.dumps(process.environ())
        assert "sesame" not in repr(bench.config)
        execution.kill()
        bench.finish(execution)
        assert bench.value("mark_meta", 1)[1] == "started"


@both_modes
def test_paths_come_first_and_the_working_directory_is_not_among_them(make_bench, mode, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "redis.py").write_text("raise RuntimeError('shadowed')")
    bench = make_bench(mode=mode, paths=(str(tmp_path / "path"), str(tmp_path / "more")))
    found = bench.value("surroundings")
    assert found["path"][:2] == [str(tmp_path / "path"), str(tmp_path / "more")]
    assert not {"", ".", found["cwd"]} & set(found["path"])
    assert found["cwd"] == bench.config.work_dir
    assert found["stdin"] == ""


@both_modes
def test_a_job_runs_in_the_executors_own_session_and_group(bench):
    execution = bench.start("surroundings")
    found = returned(bench.finish(execution))
    assert found["session"] == found["group"] == execution.pgid == execution.pid
    assert (found["pid"] == execution.pid) == (bench.config.mode == "warm")
    assert found["int"]
    assert found["term"]


def test_what_a_job_changes_is_set_right_for_the_next(make_bench):
    bench = make_bench()
    bench.value("meddle")
    found = bench.value("surroundings")
    assert found["cwd"] == bench.config.work_dir
    assert found["int"]
    assert found["term"]


@both_modes
@pytest.mark.parametrize("way", ["seed", "setstate", "pickle"])
def test_dice_are_shaken_for_each_job(bench, way):
    rolled = [bench.value("dice", way) for _ in range(5)]
    assert len({shaken for shaken, _ in rolled}) == 5
    assert {loaded for _, loaded in rolled} == {random.Random(42).random()}  # and jobs may load them


@both_modes
def test_no_descriptor_of_ours_is_inherited(bench):
    assert bench.value("descriptors") == []


def test_coroutines_leak_no_descriptors(make_bench):
    bench = make_bench()
    bench.value("add_later", 1, 2)
    before = bench.value("open_descriptors")
    for _ in range(100):
        bench.value("add_later", 1, 2)
    assert bench.value("open_descriptors") < before + 10


# --- output ----------------------------------------------------------------------------------------


@both_modes
def test_output_ends_in_the_jobs_own_files(bench):
    first, second = (bench.start("speak", text) for text in ("one", "two"))
    for execution, text in ((first, "one\n"), (second, "two\n")):
        outcome = bench.finish(execution)
        assert (outcome.stdout_bytes, outcome.stderr_bytes) == (4, 4)
        assert execution.out.read_text() == execution.err.read_text() == text


@both_modes
def test_a_silent_job_makes_no_files(bench):
    execution = bench.start("nothing")
    outcome = bench.finish(execution)
    assert (outcome.stdout_bytes, outcome.stderr_bytes, outcome.output_error) == (0, 0, None)
    assert not execution.out.exists()
    assert not execution.err.exists()


@both_modes
def test_output_of_descriptors_and_subprocesses_is_caught(bench):
    for _ in range(2):
        execution = bench.start("speak_everywhere")
        assert bench.finish(execution).kind == "finished"
        assert execution.out.read_bytes() == b"python\ndescriptor\nchild\n\xff\n"
        assert execution.err.read_bytes() == b"child\n"


@both_modes
def test_output_goes_behind_what_is_there(bench):
    execution = bench.start("speak", "more")
    execution.out.parent.mkdir(exist_ok=True)
    execution.out.write_text("some\n")
    bench.finish(execution)
    assert execution.out.read_text() == "some\nmore\n"


@both_modes
def test_last_words_of_a_dead_job_are_kept(bench):
    execution = bench.start("speak_and_die")
    outcome = bench.finish(execution)
    assert (outcome.kind, outcome.stdout_bytes) == ("died", 11)
    assert execution.out.read_text() == "last words\n"
    following = bench.start("speak", "next")
    bench.finish(following)
    assert following.out.read_text() == "next\n"


@both_modes
def test_output_can_be_followed_while_the_job_runs(bench, tmp_path, eventually):
    execution = bench.start("speak_then", str(tmp_path / "go"))
    eventually(lambda: execution.stdout_live_path.exists() and execution.stdout_live_path.read_text())
    assert execution.stdout_live_path.read_text() == "so far\n"
    assert execution.stderr_live_path.read_text() == ""
    (tmp_path / "go").touch()
    bench.finish(execution)
    assert execution.out.read_text() == "so far\n"


@both_modes
@pytest.mark.parametrize("mischief", ["close_standard", "close_python", "redirect"])
def test_whatever_a_job_does_to_its_output_the_next_one_has_its_own(bench, mischief):
    assert bench.run(mischief).kind in ("finished", "failed")
    for text in ("one", "two"):
        execution = bench.start("speak", text)
        assert bench.finish(execution).kind == "finished"
        assert execution.out.read_text() == execution.err.read_text() == f"{text}\n"


@both_modes
def test_what_a_job_leaves_running_writes_to_its_own_file(bench, tmp_path, eventually):
    execution = bench.start("leave_a_child", str(tmp_path / "go"))
    bench.finish(execution)
    following = bench.start("speak", "next")
    (tmp_path / "go").touch()
    bench.finish(following)
    eventually((tmp_path / "go.done").exists)
    assert execution.out.read_text() == "early\nlate\n"
    assert following.out.read_text() == "next\n"


@both_modes
def test_a_job_that_forks_and_returns_twice_ends_once(bench):
    execution = bench.start("fork_and_return")
    assert bench.finish(execution).kind == "finished"
    assert execution.out.read_text() == "before\n"
    assert bench.value("add", 1, 1) == 2


@both_modes
def test_output_that_cannot_be_kept_does_not_change_the_jobs_end(bench, tmp_path):
    execution = bench.start("speak", "hello")
    outcome = bench.finish(execution)
    assert outcome.output_error is None
    (tmp_path / "file").touch()
    job_id, fields = bench.fields("speak", "hello")
    execution = bench.pool.start(
        job_id, fields, execution_id="e", stdout_path=tmp_path / "file" / "out", stderr_path=tmp_path / "err"
    )
    bench.pool.send()
    outcome = bench.finish(execution)
    assert outcome.kind == "finished"
    assert "file" in outcome.output_error
    assert (tmp_path / "err").read_text() == "hello\n"
    following = bench.start("speak", "next")
    bench.finish(following)
    assert following.out.read_text() == "next\n"


@both_modes
def test_output_without_a_place_is_dropped(bench):
    job_id, fields = bench.fields("speak", "hello")
    execution = bench.pool.start(job_id, fields, execution_id="e")
    bench.pool.send()
    outcome = bench.finish(execution)
    assert (outcome.kind, outcome.stdout_bytes) == ("finished", 6)


# --- the pool --------------------------------------------------------------------------------------


def test_a_warm_executor_keeps_what_was_imported(make_bench):
    bench = make_bench()
    assert [bench.value("state") for _ in range(3)] == [1, 2, 3]
    assert len(bench.spawned) == 1


def test_a_forked_job_starts_afresh(make_bench):
    bench = make_bench(mode="fork")
    assert [bench.value("state") for _ in range(3)] == [1, 1, 1]
    assert len({bench.value("pid") for _ in range(3)}) == 3
    assert len(bench.spawned) == 1


@both_modes
def test_executors_are_replaced_after_so_many_jobs(make_bench, mode):
    bench = make_bench(mode=mode, max_jobs=2)
    for _ in range(4):
        bench.value("nothing")
    assert len(bench.spawned) == 2


def test_an_executor_that_grew_too_large_is_replaced(make_bench):
    bench = make_bench(max_rss_bytes=150 * 2**20)
    bench.value("nothing")
    bench.value("hoard", 200 * 2**20)
    assert len(bench.spawned) == 1
    bench.value("nothing")
    assert len(bench.spawned) == 2


@both_modes
def test_jobs_run_side_by_side(bench, tmp_path):
    waiting = bench.start("wait_for", str(tmp_path / "go"))
    assert bench.value("touch", str(tmp_path / "go")) is None
    assert bench.finish(waiting).kind == "finished"
    assert len(bench.spawned) == 2


@both_modes
def test_no_more_executors_wait_than_wanted(make_bench, mode, eventually):
    bench = make_bench(mode=mode, max_idle=1)
    for execution in [bench.start("nothing") for _ in range(3)]:
        bench.finish(execution)

    def only_one_is_left() -> bool:
        bench.pool.reap()
        return len(bench.exited) == 2

    eventually(only_one_is_left)


@both_modes
def test_an_executor_without_work_gives_its_memory_back(make_bench, mode, eventually):
    patient, bench = make_bench(mode=mode), make_bench(mode=mode, max_idle_seconds=0.0)
    for each in (patient, bench):
        each.value("add", 1, 1)

    def it_is_gone() -> bool:
        patient.pool.reap()
        bench.pool.reap()
        return bench.exited == bench.spawned

    eventually(it_is_gone)
    assert bench.value("add", 1, 1) == 2
    assert (len(bench.spawned), len(patient.spawned), len(patient.exited)) == (2, 1, 0)


@both_modes
def test_a_waiting_executor_that_died_is_replaced(bench, eventually):
    bench.value("add", 1, 1)
    (pid,) = bench.spawned
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: psutil.Process(pid).status() == "zombie")
    assert bench.value("add", 1, 1) == 2
    assert len(bench.spawned) == 2


@both_modes
def test_releasing_a_running_execution_ends_it(bench, tmp_path, eventually):
    execution = bench.start("touch_and_nap", str(tmp_path / "on"))
    eventually((tmp_path / "on").exists)
    bench.pool.release(execution)
    assert bench.exited == bench.spawned


@both_modes
def test_closing_ends_all_at_once(bench, tmp_path, eventually):
    execution = bench.start("touch_and_nap", str(tmp_path / "on"))
    eventually((tmp_path / "on").exists)
    bench.value("add", 1, 1)
    before = time.monotonic()
    bench.pool.close()
    assert time.monotonic() - before < 50
    assert sorted(bench.exited) == sorted(bench.spawned)
    assert not psutil.pid_exists(execution.pid)


# --- what cannot start -----------------------------------------------------------------------------


def test_an_interpreter_that_is_not_there(make_bench):
    bench = make_bench(python="/no/such/python")
    execution = bench.start("nothing")
    assert (execution.pid, execution.pgid) == (None, None)
    execution.kill()
    outcome = bench.finish(execution)
    assert (outcome.kind, outcome.could_not_start) == ("died", True)
    assert outcome.exc_string.startswith("executor could not start: ")
    assert "/no/such/python" in outcome.exc_string
    assert bench.spawned == []


def test_an_interpreter_that_cannot_be_executed(make_bench, tmp_path):
    (tmp_path / "python").write_text("")
    outcome = make_bench(python=str(tmp_path / "python")).run("nothing")
    assert outcome.could_not_start
    assert "Permission denied" in outcome.exc_string


def test_an_interpreter_without_rq(make_bench):
    bench = make_bench(python=getattr(sys, "_base_executable", sys.executable))
    if "site-packages" in (importlib.util.find_spec("rq").origin or "") and _base_has_rq():
        pytest.fail("this test needs an interpreter without rq")
    outcome = bench.run("nothing")
    assert (outcome.kind, outcome.could_not_start, outcome.exit_status) == ("died", True, 1)
    assert (
        outcome.exc_string.splitlines()[0]
        == "executor could not start: ModuleNotFoundError: No module named 'rq'"
    )


def _base_has_rq() -> bool:
    command = [sys._base_executable, "-I", "-c", "import rq"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@both_modes
def test_a_working_directory_that_is_not_there(make_bench, mode):
    outcome = make_bench(mode=mode, work_dir="/no/such/folder").run("nothing")
    assert outcome.could_not_start
    assert "/no/such/folder" in outcome.exc_string.splitlines()[0]


def test_an_interpreter_that_says_nothing(make_bench):
    outcome = make_bench(python="/bin/false").run("nothing")
    assert (outcome.could_not_start, outcome.exit_status) == (True, 1)
    assert outcome.exc_string == "executor could not start: it said nothing"


# --- the file that stands alone --------------------------------------------------------------------


def test_frames_come_back_as_they_were_whatever_the_pieces():
    blobs = {b"data": bytes(range(256)), b"\xff": b"", "ü".encode(): b"x"}
    frames = executor_main.pack({"op": "a", "text": "ü\udcff"}, blobs) + executor_main.pack({"op": "b"})
    for step in (1, 7, len(frames)):
        stream, found = executor_main.Frames(), []
        for at in range(0, len(frames), step):
            stream.feed(frames[at : at + step])
            while frame := stream.pop():
                found.append(frame)
        assert found == [({"op": "a", "text": "ü\udcff"}, blobs), ({"op": "b"}, {})]


def test_noise_is_no_frame():
    stream = executor_main.Frames()
    stream.feed(b"Traceback (most recent call last):\n")
    with pytest.raises(ValueError, match="not a frame"):
        stream.pop()


def test_the_worker_reads_frames_without_importing_rq():
    script = "import sys, fleet.executors; sys.exit('rq' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(executor_main.__file__).parent.parent)
