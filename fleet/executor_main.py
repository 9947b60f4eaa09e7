"""The executor: a process of the user's interpreter that runs Python jobs, one at a time.

The worker starts `PYTHON -I executor_main.py FD TURNS`; FD is one end of a socket pair, TURNS the end of
a pipe. This file stands alone: it needs Python 3.9 or newer, rq and redis, and nothing of ours. The
worker imports the frames and `hand_over` from it, so rq is imported where it is used.

    worker to executor    {"op": "hello", ...} once, then tasks: {"op": "job" | "stopped" | "webhooks",
                          "number": N, ...}, each with the fields of the job's hash as its blobs, and
                          to one that forks perhaps with "limits" (see `confine`);
                          and on TURNS the number of each, without which it is not begun
    executor to worker    {"op": "ready"} once, then {"op": "end", ...} for each task that was begun

What a job does is what `rq.worker.BaseWorker.perform_job` does, less its writes to Redis: the
worker makes these, under the job's lease. Standard output and error go to a file of the executor
that becomes the job's when it ends, so a job that prints nothing costs nothing.
"""

from __future__ import annotations

import faulthandler
import gc
import marshal
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import time
import traceback
import zlib
from base64 import b64encode
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from functools import lru_cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO

try:  # what signal.signal wraps: that looks up the names of handlers, which takes ten times as long
    from _signal import signal as set_handler  # type: ignore[import-not-found]
except ImportError:
    from signal import signal as set_handler

if TYPE_CHECKING:
    from redis import Redis
    from rq.job import Job
    from rq.serializers import Serializer

    Blobs = Mapping[bytes, bytes]
    Frame = tuple[dict[str, Any], Blobs]

#: what every frame begins with, lest a job that wrote to our socket be taken for one; bytes that follow
_HEAD = struct.Struct("!4sQ")
_MARK = b"\xf1RQ\n"
#: the number of a task
TURN = struct.Struct("!I")
_READ = 1 << 18
_PAGE = resource.getpagesize()
#: of ru_maxrss, bytes
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
#: rq.Queue.DEFAULT_TIMEOUT, in seconds
_DEFAULT_TIMEOUT_SECONDS = 180

#: seconds between the end of a function and the report of it that are worth telling
_NOTABLE_SECONDS = 0.001
#: for `set_handler`
_IGNORE, _DEFAULT = int(signal.SIG_IGN), int(signal.SIG_DFL)
#: seconds for which what was read of the process's memory holds
_MEMORY_SECONDS = 0.001

#: attributes of a job on which its end depends, or what people see of it: a job, or its callback,
#: may change them without saving, for RQ's worker saves the job
_OWN = (
    "description",
    "result_ttl",
    "failure_ttl",
    "ttl",
    "retries_left",
    "retry_intervals",
    "number_of_retries",
    "enqueue_at_front_on_retry",
    "repeats_left",
    "repeat_intervals",
)
#: KEYS 1 rq:job:ID; ARGV 1 lease, 2 number of pairs, then these, then fields to drop
_KEEP_CHANGES = """
if redis.call('HGET', KEYS[1], 'fleet_lease') == ARGV[1] then
  for i = 3, #ARGV do
    if i > 2 + 2 * ARGV[2] then
      redis.call('HDEL', KEYS[1], ARGV[i])
    elseif i % 2 == 1 then
      redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    end
  end
end
"""

#: descriptors that no process forked by a job may keep: the worker would wait for an end of file in vain
_private: set[int] = set()


# --- frames ----------------------------------------------------------------------------------------


def pack(header: Mapping[str, Any], blobs: Blobs | None = None) -> bytes:
    """A frame: a mark, its length, then `header` and blobs in the second format of marshal.

    That one is the same in every Python there is, and ten times as fast as JSON. It is not safe
    against an enemy; this is one user's process speaking with another of theirs.
    """
    body = marshal.dumps((dict(header), dict(blobs or {})), 2)
    return _HEAD.pack(_MARK, len(body)) + body


class Frames:
    """Takes frames off a stream of bytes."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._at = 0

    def feed(self, chunk: bytes) -> None:
        """Add what was read."""
        if self._at:
            del self._bytes[: self._at]
            self._at = 0
        self._bytes += chunk

    def pop(self) -> Frame | None:
        """The next frame; None until it is complete. Raises ValueError for noise."""
        start = self._at + _HEAD.size
        if len(self._bytes) < start:
            return None
        mark, size = _HEAD.unpack_from(self._bytes, self._at)
        if mark != _MARK:
            raise ValueError("not a frame")
        if len(self._bytes) < start + size:
            return None
        self._at = start + size
        frame: Frame = marshal.loads(self._bytes[start : self._at])
        return frame


class Wire:
    """Frames over a descriptor, blocking.

    A number and not a socket object: the interpreter would close that while it shuts down, before
    the exit status is there to be read.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.frames = Frames()

    def send(self, header: Mapping[str, Any], blobs: Blobs | None = None) -> None:
        """Write a whole frame."""
        frame = pack(header, blobs)
        sent = os.write(self.fd, frame)
        while sent < len(frame):
            sent += os.write(self.fd, memoryview(frame)[sent:])

    def receive(self) -> Frame:
        """The next frame. Raises EOFError when the other side is gone."""
        frame = self.frames.pop()
        while frame is None:
            if not self.fill():
                raise EOFError
            frame = self.frames.pop()
        return frame

    def fill(self) -> bool:
        """Read what is there; False at the end of the file."""
        chunk = os.read(self.fd, _READ)
        self.frames.feed(chunk)
        return bool(chunk)


class Turns:
    """Leave to begin a task: its number, read off a pipe that the worker reads too, to take it back.

    Whoever reads a number has it alone: so a task that was sent ahead is either begun here or
    withdrawn there, and never both.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def take(self) -> int:
        """The number of the task that may begin; waits for it. Raises EOFError when there is no worker."""
        while True:
            try:
                number = os.read(self.fd, TURN.size)
            except BlockingIOError:  # taken back under our eyes
                select.select([self.fd], [], [])
                continue
            if not number:
                raise EOFError
            return int(TURN.unpack(number)[0])


# --- output ----------------------------------------------------------------------------------------


def hand_over(path: str, target: str | None) -> int:
    """Make the file `path` the job's file `target`, behind what that holds already.

    None drops it; an empty one is dropped too. Returns its size in bytes. Raises OSError.
    """
    source, size = Path(path), Path(path).stat().st_size
    if target is None or size == 0:
        source.unlink()
    elif Path(target).exists():
        _append(source, Path(target))
    else:
        _move(source, Path(target))
    return size


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError:  # another file system
        _append(source, target)


def _append(source: Path, target: Path) -> None:
    with source.open("rb") as taken, target.open("ab") as given:
        shutil.copyfileobj(taken, given, 1 << 20)
    source.unlink()


class Stream:
    """Standard output or error: descriptor `fd`, which writes to the live file at `path`.

    A second descriptor to that file stays out of jobs' reach, so that whatever they do to the
    first, and to `sys.stdout`, is mended after them.
    """

    def __init__(self, name: str, fd: int, path: str) -> None:
        self.name, self.fd, self.path = name, fd, path
        self.kept = os.dup(fd)
        self.file = os.fstat(fd)
        self.text = self._opened()
        setattr(sys, name, self.text)

    def _opened(self) -> TextIO:
        # line buffered: what a job printed is there for who follows it, and survives its crash
        return open(self.fd, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)

    def settle(self) -> None:
        """Write out what Python holds back, and undo what the job did to the descriptor and to `sys`."""
        bent = getattr(sys, self.name)
        if bent is not self.text:
            _flushed(bent)
            setattr(sys, self.name, self.text)
        if not self._is_in_place():
            os.dup2(self.kept, self.fd)
        if not _flushed(self.text):
            self._drop()
        if self.text.closed:
            self.text = self._opened()
            setattr(sys, self.name, self.text)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fd), self.file)
        except OSError:
            return False

    def _drop(self) -> None:
        """Let go of text that cannot be written, or the next job would find it in its output."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fd)
        os.close(null)
        _flushed(self.text)
        os.dup2(self.kept, self.fd)

    def size(self) -> int:
        """Bytes that the job wrote."""
        return os.lseek(self.kept, 0, os.SEEK_END)  # all write to its end, and fstat takes four times as long

    def give(self, target: str | None) -> None:
        """Hand the file to `target` and begin another. Raises OSError."""
        try:
            hand_over(self.path, target)
        finally:
            self._start_anew()

    def _start_anew(self) -> None:
        # a new file, not a truncated one: what the job left running goes on writing to the job's
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(fd, self.kept, inheritable=False)
        os.dup2(fd, self.fd)
        os.close(fd)
        self.file = os.fstat(self.fd)


def _flushed(text: TextIO) -> bool:
    try:
        text.flush()
    except Exception:  # closed, the disk is full, or it is the job's own invention
        return False
    return True


# --- one job, as RQ does it ------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _rq() -> Any:
    """What every job needs of rq: to import it each time takes as long as a short function."""
    from rq.defaults import UNSERIALIZABLE_RETURN_VALUE_PAYLOAD
    from rq.job import Retry, _job_stack
    from rq.serializers import DefaultSerializer, JSONSerializer
    from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

    class Limit(UnixSignalDeathPenalty):
        """RQ's timeout."""

        def setup_death_penalty(self) -> None:
            set_handler(signal.SIGALRM, self.handle_death_penalty)
            signal.alarm(self._timeout)

        def cancel_death_penalty(self) -> None:
            signal.alarm(0)
            set_handler(signal.SIGALRM, _DEFAULT)

    jobs: Any = _job_stack
    jobs.push(None)  # rq reads that as empty; to make one anew for each job takes three times as long
    return SimpleNamespace(
        Limit=Limit,
        JobTimeoutException=JobTimeoutException,
        Retry=Retry,
        job_stack=jobs,
        pickle=DefaultSerializer,
        json=JSONSerializer,
        unserializable=UNSERIALIZABLE_RETURN_VALUE_PAYLOAD,
    )


def build_job(job_id: str, fields: Blobs, connection: Redis) -> Job:
    """The job of this hash. Raises what rq raises for a damaged one."""
    from rq.job import Job

    job = Job(connection=connection)
    job._id = job_id  # past the check of new ids: what is queued already is to run
    job.serializer = serializer_of(fields.get(b"data", b""))
    job.restore({name: value for name, value in fields.items() if name not in _DATES})
    for name, attribute in _DATES.items():
        if fields.get(name):
            setattr(job, attribute, datetime.fromisoformat(fields[name].decode().replace("Z", "+00:00")))
    return job


#: read here, and not by `restore`: it takes strptime for them, a quarter of all a short job costs
_DATES = {
    name.encode(): name for name in ("created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat")
}


def serializer_of(data: bytes) -> Serializer:
    """RQ's JSON or pickle, told by the first byte of a job's data, deflated or not."""
    try:
        first = zlib.decompressobj().decompress(data, 1)
    except zlib.error:
        first = data[:1]
    return _serializer_by(first)


def _serializer_by(first: bytes) -> Serializer:
    found: Serializer = _rq().json if first in (b"[", b"{") else _rq().pickle
    return found


@lru_cache(maxsize=1)
def _unread_class() -> type[Job]:
    from rq.job import Job

    class Unread(Job):
        """A job that becomes one when somebody looks at it: most functions do not, and it takes longer
        than all else about a short one."""

        def __init__(self, reader: Any) -> None:
            self.__dict__["_reader"] = reader

        def __getattr__(self, name: str) -> Any:
            return getattr(_read(self), name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(_read(self), name, value)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _read(self).__reduce_ex__(protocol)

    return Unread


def _read(unread: Job) -> Job:
    """Make it the job that it stands for."""
    from rq.job import Job

    job: Job = unread.__dict__.pop("_reader")()
    object.__setattr__(unread, "__class__", Job)
    unread.__dict__.update(job.__dict__)
    return unread


class Task:
    """A job as it came, and what rq makes of it."""

    def __init__(self, job_id: str, fields: Blobs, connection: Redis) -> None:
        self.id, self.fields, self.connection = job_id, fields, connection
        self.begun = datetime.now(timezone.utc)  # noqa: UP017 - Python 3.9
        #: what `own` said of the job when it was read; None: nobody has looked at it
        self.before: list[Any] | None = None
        #: what its data is written with, once that was read
        self.serializer: Serializer | None = None

    def job(self) -> Job:
        """The job, as its hash has it. Raises what rq raises for a damaged one."""
        job = build_job(self.id, self.fields, self.connection)
        job.started_at, self.before = self.begun, own(job)
        return job

    def unread(self) -> Job:
        """The job, not read before somebody looks at it."""
        unread: Callable[[Callable[[], Job]], Job] = _unread_class()
        return unread(self.job)

    def has_callbacks(self) -> bool:
        """Whether somebody will look at the job when it has ended."""
        fields = self.fields
        return bool(fields.get(b"success_callback_name") or fields.get(b"failure_callback_name"))

    def call(self) -> tuple[Callable[..., Any], Any, Any]:
        """`job.func`, `job.args` and `job.kwargs`. Raises what those raise."""
        data = _inflated(self.fields[b"data"])
        self.serializer = _serializer_by(data[:1])
        try:
            name, instance, args, kwargs = self.serializer.loads(data)
        except Exception:
            job = self.job()
            return job.func, job.args, job.kwargs
        if not name:
            raise ValueError("Cannot execute job: function is None")
        return getattr(instance, name) if instance else _imported(name), args, kwargs

    def timeout(self) -> int:
        """In seconds; negative for none."""
        return int(self.fields.get(b"timeout") or 0) or _DEFAULT_TIMEOUT_SECONDS

    def result(self, value: Any) -> Blobs:
        """What `rq.results.Result.serialize` stores as return_value; nothing for None."""
        if value is None:
            return {}
        serializer = self.serializer or serializer_of(self.fields[b"data"])
        try:
            data = serializer.dumps(value)
        except:  # noqa: E722 - as RQ
            data = serializer.dumps(_rq().unserializable)
        return {b"return_value": b64encode(data)}


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompress(data)
    except zlib.error:  # as old clients of rq stored it
        return data


def _imported(name: str) -> Callable[..., Any]:
    """What `rq.utils.import_attribute` finds; at once where its module is loaded."""
    from rq.utils import import_attribute

    module, _, attribute = name.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(sys.modules[module], attribute)
    except (KeyError, AttributeError):
        found = import_attribute(name)
    return found


def perform(task: Task) -> Frame:
    """Run the job and its callback, and keep what they changed about it, unless the lease is gone."""
    job, began = task.unread(), time.monotonic()
    end, blobs = _perform(task, job)
    if task.before is not None and (after := own(job)) != task.before:
        changed = {name for name, old, new in zip(_OWN, task.before, after) if old != new}  # noqa: B905
        keep_changes(job, changed, task.fields.get(b"fleet_lease", b""))
    since = time.monotonic() - began - end["seconds"]
    if since > _NOTABLE_SECONDS:
        end["callback_seconds"] = since
    return end, blobs


def own(job: Job) -> list[Any]:
    """The values of the attributes in _OWN; an rq too old to know one has None."""
    return [getattr(job, name, None) for name in _OWN]


def keep_changes(job: Job, changed: set[str], lease: bytes) -> None:
    """Store the attributes of these names, as `job.save()` would."""
    stored = job.to_dict(include_meta=False, include_result=False)
    pairs = [part for name in changed if name in stored for part in (name, stored[name])]
    dropped = [name for name in changed if name not in stored]
    job.connection.eval(_KEEP_CHANGES, 1, job.key, lease, len(pairs) // 2, *pairs, *dropped)


def _perform(task: Task, job: Job) -> Frame:
    """Run the job and its success or failure callback, as `BaseWorker.perform_job` does."""
    rq, started = _rq(), time.monotonic()
    try:
        with rq.Limit(task.timeout(), rq.JobTimeoutException):
            value = call(job, *task.call())
        seconds = time.monotonic() - started
        if isinstance(value, rq.Retry):
            return _ended("retry", seconds, task.result(value), retry=[value.max, list(value.intervals)])
        if task.has_callbacks():
            _succeed(job, value)
        return _ended("finished", seconds, task.result(value))
    except:  # noqa: E722 - as RQ: SystemExit too is a failure of the job
        seconds = time.monotonic() - started
        return _failed(_fail(job) if task.has_callbacks() else traceback.format_exc(), seconds)


def call(job: Job, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`job.perform()` without its PERSIST: the claim has done that, and it is a round trip."""
    jobs = _rq().job_stack
    jobs.push(job)
    try:
        result = function(*args, **kwargs)
        return _awaited(result) if isinstance(result, Coroutine) else result
    finally:
        jobs.pop()


def _awaited(result: Coroutine[Any, Any, Any]) -> Any:
    """As `job._execute()`, which leaves its event loop open: here there are jobs to come."""
    import asyncio

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(result)
    finally:
        loop.close()


def _succeed(job: Job, value: Any) -> None:
    from rq.job import JobStatus
    from rq.timeouts import UnixSignalDeathPenalty
    from rq.utils import now

    job._result, job.ended_at, job._status = value, now(), JobStatus.FINISHED
    job.execute_success_callback(UnixSignalDeathPenalty, value)


def _fail(job: Job) -> str:
    """The failure that is being handled, after the failure callback; its own failure takes over."""
    from rq.job import JobStatus
    from rq.timeouts import UnixSignalDeathPenalty
    from rq.utils import now

    job._status, job.ended_at = JobStatus.FAILED, now()
    exc_info = sys.exc_info()
    exc_string = "".join(traceback.format_exception(*exc_info))
    try:
        job.execute_failure_callback(UnixSignalDeathPenalty, *exc_info)
    except:  # noqa: E722 - as RQ
        exc_string = traceback.format_exc()
    return exc_string


def _failed(exc_string: str, seconds: float = 0.0) -> Frame:
    return _ended("failed", seconds, {b"exc_string": exc_string.encode("utf-8", "backslashreplace")})


def _ended(kind: str, seconds: float, blobs: Blobs, **more: Any) -> Frame:
    return {"op": "end", "kind": kind, "seconds": seconds, **more}, blobs


def run_stopped_callback(job: Job) -> Frame:
    """What RQ runs after it has killed a job that was stopped."""
    from rq.timeouts import UnixSignalDeathPenalty

    started = time.monotonic()
    job.execute_stopped_callback(UnixSignalDeathPenalty)
    return _ended("finished", time.monotonic() - started, {})


def send_webhooks(job: Job, status: str, exc_string: str | None) -> Frame:
    """Tell the addresses registered for `status`; an rq too old to know webhooks has none."""
    started = time.monotonic()
    if hasattr(job, "send_webhooks"):
        job.send_webhooks(status, exc_string=exc_string)
    return _ended("finished", time.monotonic() - started, {})


# --- the process -----------------------------------------------------------------------------------


def connect(hello: Mapping[str, Any]) -> Redis:
    """The jobs' own connection: to a server, or to the primary that sentinels name when it is opened."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    service = hello.get("sentinel")
    if service is None:
        return redis.Redis.from_url(hello["redis_url"])
    sentinels = [(host, port) for host, port in service["sentinels"]]
    sentinel: Any = redis.Sentinel
    asking = {"retry": Retry(NoBackoff(), 0), **service["sentinel_options"]}  # there are others to ask
    manager = sentinel(sentinels, sentinel_kwargs=asking)
    primary: Redis = manager.master_for(service["name"], **service["options"])
    return primary


def warm_up(connection: Redis) -> None:
    """Run a job that does nothing: what RQ imports for the first one, a forked process would each time."""
    from rq.serializers import DefaultSerializer

    data = DefaultSerializer.dumps(("builtins.int", None, (), {}))
    task = Task("warm-up", {b"data": data, b"created_at": b"2000-01-01T00:00:00.000000Z"}, connection)
    perform(task)
    task.job()


class Executor:
    """Serves one worker until it closes its end."""

    def __init__(self, wire: Wire, turns: Turns, hello: Mapping[str, Any]) -> None:
        self.wire, self.turns = wire, turns
        self.work_dir: str = hello["work_dir"]
        # lazy: no job, no connection; kept from job to job
        self.connection = connect(hello)
        self.streams = (Stream("stdout", 1, hello["stdout"]), Stream("stderr", 2, hello["stderr"]))
        self.memory = Memory()
        self.chance = Chance()
        warm_up(self.connection)
        self.meter = Meter()
        self.run = ForkServer(self._run_task) if hello["mode"] == "fork" else self.run_task
        gc.freeze()  # what is there by now stays: no collection has to look at it again
        os.environ["RQ_WORKER_ID"] = hello["worker_name"]
        os.chdir(self.work_dir)

    def serve(self) -> None:
        """Run what the worker sends, until it is gone."""
        self.wire.send({"op": "ready"})
        with suppress(EOFError):
            while True:
                self._serve_one()

    def _serve_one(self) -> None:
        number = self.turns.take()
        task, fields = self.wire.receive()
        while task["number"] != number:  # withdrawn
            task, fields = self.wire.receive()
        pid = os.getpid()
        end, blobs = self.run(task, fields)
        if os.getpid() != pid:  # a job forked, and both returned
            os._exit(0)
        self._collect(task, end)
        end["rss"] = self.memory.resident_bytes()
        self.wire.send(end, blobs)

    def run_task(self, task: Mapping[str, Any], fields: Blobs) -> Frame:
        """Run one job, callback or webhook, and tell what it used. Never raises."""
        end, blobs = self._run_task(task, fields)
        end["used"] = self.meter.read()
        return end, blobs

    def _run_task(self, task: Mapping[str, Any], fields: Blobs) -> Frame:
        try:
            self._prepare(task)
            given = Task(task["id"], fields, self.connection)
            if task["op"] == "stopped":
                return run_stopped_callback(given.job())
            if task["op"] == "webhooks":
                return send_webhooks(given.job(), task["status"], task["exc_string"])
            return perform(given)
        except BaseException:
            return _failed(traceback.format_exc())
        finally:
            signal.alarm(0)
            for stream in self.streams:
                stream.settle()

    def _prepare(self, task: Mapping[str, Any]) -> None:
        """What RQ sets up in a fresh process; here the last job may have changed it."""
        os.environ["RQ_JOB_ID"] = task["id"]
        os.environ["RQ_EXECUTION_ID"] = task.get("execution_id", "")
        os.chdir(self.work_dir)
        set_handler(signal.SIGINT, _IGNORE)
        set_handler(signal.SIGTERM, _DEFAULT)
        self.chance.renew()

    def _collect(self, task: Mapping[str, Any], end: dict[str, Any]) -> None:
        """Give the job its output; trouble with that is told, and does not change the job's end."""
        for stream in self.streams:
            size = end[stream.name] = stream.size()
            if size:
                try:
                    stream.give(task[stream.name])
                except OSError as exc:
                    end["output_error"] = str(exc)


class ForkServer:
    """Runs each task in a forked process of its own, as RQ's work horse.

    The process stays in our group. If it dies, we tell how, and live on.
    """

    def __init__(self, run_task: Any) -> None:
        self.run_task = run_task
        self.bell, ringer = os.pipe()
        for fd in (self.bell, ringer):
            os.set_blocking(fd, False)
        # a job's children may hold its pipe open, so its end of file alone is not enough
        signal.set_wakeup_fd(ringer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def __call__(self, task: Mapping[str, Any], fields: Blobs) -> Frame:
        started = time.monotonic()
        reader, writer = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(writer)
            os.close(reader)
            return _failed(traceback.format_exc())
        if pid == 0:
            self._be_the_horse(writer, task, fields)
        os.close(writer)
        try:
            frame, status, usage = self._wait(Wire(reader), pid)
        finally:
            os.close(reader)
        end, blobs = frame or _ended("died", time.monotonic() - started, {}, status=status)
        return {**end, "used": used(usage)}, blobs

    def _be_the_horse(self, writer: int, task: Mapping[str, Any], fields: Blobs) -> None:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _private.add(writer)
            pid = os.getpid()
            confine(task.get("limits"))
            end, blobs = self.run_task(task, fields)
            if os.getpid() == pid:  # not where a job forked, and both returned
                Wire(writer).send(end, blobs)
            os._exit(0)
        finally:
            os._exit(1)

    def _wait(self, wire: Wire, pid: int) -> tuple[Frame | None, int, resource.struct_rusage]:
        """The horse's answer, if it gave one, its wait status, and what it used."""
        os.set_blocking(wire.fd, False)
        while True:
            ready, _, _ = select.select([wire.fd, self.bell], [], [])
            dead, status, usage = 0, 0, None
            if self.bell in ready:
                os.read(self.bell, 4096)
                dead, status, usage = os.wait4(pid, os.WNOHANG)
            at_end = self._drain(wire)
            frame = wire.frames.pop()
            if frame or dead or at_end:
                if usage is None or not dead:
                    _, status, usage = os.wait4(pid, 0)
                return frame, status, usage

    def _drain(self, wire: Wire) -> bool:
        """Read all there is; True at the end of the file."""
        try:
            while wire.fill():
                pass
        except BlockingIOError:
            return False
        return True


def confine(limits: Mapping[str, Any] | None) -> None:
    """Hold this process, and all that it will start, to what its job was given; see fleet/limits.py."""
    if not limits:
        return
    if limits["entrance"]:
        Path(limits["entrance"]).write_text("0", encoding="ascii")
    if limits["data_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (limits["data_bytes"],) * 2)
    if limits["cpu_ids"]:
        os.sched_setaffinity(0, limits["cpu_ids"])
    os.nice(limits["nice"])
    os.environ.update(limits["variables"])


class Chance:
    """Python's common random numbers: to each job they are as unforeseeable as in a process of its own.

    To seed them takes a sixth of all that a short job costs: it is done only after somebody else did.
    """

    def __init__(self) -> None:
        self.is_ours = True
        for name in ("seed", "setstate"):
            setattr(random, name, self._noticed(name, getattr(random, name)))

    def _noticed(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(change)
        def changed(*args: Any, **kwargs: Any) -> Any:
            self.is_ours = False
            return change(*args, **kwargs)

        changed.__qualname__ = name  # by which pickle finds it, and another process the original
        return changed

    def renew(self) -> None:
        """Make them unforeseeable again."""
        if not self.is_ours:
            random.seed()
            self.is_ours = True


class Meter:
    """What a job uses of this process, and of those that it started and waited for."""

    def __init__(self) -> None:
        self.cpu_seconds, self.peak_bytes = self._look()

    def read(self) -> tuple[float, int]:
        """CPU seconds since the last time; and the most memory that one of them ever had, bytes, or 0 where
        that was before: then nobody knows what this job had."""
        before = self.cpu_seconds, self.peak_bytes
        self.cpu_seconds, self.peak_bytes = self._look()
        peak = self.peak_bytes if self.peak_bytes > before[1] else 0
        return self.cpu_seconds - before[0], peak

    def _look(self) -> tuple[float, int]:
        own = resource.getrusage(resource.RUSAGE_SELF)
        others = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime
        return seconds, max(own.ru_maxrss, others.ru_maxrss) * _RSS_UNIT


def used(usage: resource.struct_rusage) -> tuple[float, int]:
    """CPU seconds, and the most memory in bytes."""
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _RSS_UNIT


class Memory:
    """Tells the resident bytes of this process; where /proc is missing, the most it ever had."""

    def __init__(self) -> None:
        try:
            self.fd = os.open("/proc/self/statm", os.O_RDONLY)
        except OSError:
            self.fd = -1
        self._latest, self._again_at = 0, 0.0

    def resident_bytes(self) -> int:
        """As of a moment ago. A job that closed our descriptor costs only the precision."""
        now = time.monotonic()
        if now >= self._again_at:
            self._latest, self._again_at = self._read(), now + _MEMORY_SECONDS
        return self._latest

    def _read(self) -> int:
        try:
            return int(os.pread(self.fd, 128, 0).split()[1]) * _PAGE
        except (OSError, LookupError, ValueError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def _close_private() -> None:
    for fd in _private:
        with suppress(OSError):
            os.close(fd)
    _private.clear()


def main(fd: int, turns: int) -> None:
    """Be an executor at the other end of `fd`."""
    import rq.job  # noqa: F401 - before the user's paths, which may have a folder of that name

    for number in (fd, turns):
        os.set_inheritable(number, False)
        _private.add(number)
    os.register_at_fork(after_in_child=_close_private)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wire = Wire(fd)
    try:
        hello, _ = wire.receive()
    except EOFError:
        return
    sys.path[:0] = hello["paths"]
    executor = Executor(wire, Turns(turns), hello)
    faulthandler.enable()
    executor.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
