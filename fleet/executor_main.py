"""The executor: a process of the user's interpreter that runs Python jobs, one at a time.

The worker starts `PYTHON -I executor_main.py FD`; FD is one end of a socket pair. This file stands
alone: it needs Python 3.9 or newer, rq and redis, and nothing of ours. The worker imports `pack`,
`unpack` and `hand_over` from it, so rq is imported where it is used.

    worker to executor    {"op": "hello", ...} once, then {"op": "job" | "stopped" | "webhooks", ...},
                          each with the fields of the job's hash as its blobs
    executor to worker    {"op": "ready"} once, then {"op": "end", ...} for each of those

What a job does is what `rq.worker.BaseWorker.perform_job` does, less its writes to Redis: the
worker makes these, under the job's lease. Standard output and error go to a file of the executor
that becomes the job's when it ends, so a job that prints nothing costs nothing.
"""

from __future__ import annotations

import faulthandler
import json
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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from redis import Redis
    from rq.job import Job
    from rq.serializers import Serializer

    Blobs = Mapping[bytes, bytes]
    Frame = tuple[dict[str, Any], Blobs]

#: length of the JSON header, length of the blobs behind it, both in bytes
_HEAD = struct.Struct("!IQ")
#: bytes of JSON no header of ours has; more is noise from a job that wrote to our socket
_MAX_HEADER = 1 << 28
_READ = 1 << 18
_PAGE = resource.getpagesize()
#: rq.Queue.DEFAULT_TIMEOUT, in seconds
_DEFAULT_TIMEOUT_SECONDS = 180

#: descriptors that no process forked by a job may keep: the worker would wait for an end of file in vain
_private: set[int] = set()


# --- frames ----------------------------------------------------------------------------------------


def pack(header: Mapping[str, Any], blobs: Blobs | None = None) -> bytes:
    """A frame: both lengths, `header` as JSON, then the blobs as they are."""
    blobs = blobs or {}
    sizes = [(name.decode("latin-1"), len(value)) for name, value in blobs.items()]
    text = json.dumps({**header, "blobs": sizes}).encode()
    return b"".join([_HEAD.pack(len(text), sum(size for _, size in sizes)), text, *blobs.values()])


def unpack(buffer: bytearray) -> Frame | None:
    """Take the first frame off `buffer`; None until it is complete. Raises ValueError for noise."""
    if len(buffer) < _HEAD.size:
        return None
    header_size, blobs_size = _HEAD.unpack_from(buffer)
    if header_size > _MAX_HEADER:
        raise ValueError("not a frame")
    at = _HEAD.size + header_size
    end = at + blobs_size
    if len(buffer) < end:
        return None
    header = json.loads(buffer[_HEAD.size : at])
    blobs = {}
    with memoryview(buffer) as view:
        for name, size in header.pop("blobs"):
            blobs[name.encode("latin-1")] = bytes(view[at : at + size])
            at += size
    del buffer[:end]
    return header, blobs


class Wire:
    """Frames over a descriptor, blocking.

    A number and not a socket object: the interpreter would close that while it shuts down, before
    the exit status is there to be read.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.buffer = bytearray()

    def send(self, header: Mapping[str, Any], blobs: Blobs | None = None) -> None:
        """Write a whole frame."""
        rest = memoryview(pack(header, blobs))
        while rest:
            rest = rest[os.write(self.fd, rest) :]

    def receive(self) -> Frame:
        """The next frame. Raises EOFError when the other side is gone."""
        frame = unpack(self.buffer)
        while frame is None:
            if not self.fill():
                raise EOFError
            frame = unpack(self.buffer)
        return frame

    def fill(self) -> bool:
        """Read what is there; False at the end of the file."""
        chunk = os.read(self.fd, _READ)
        self.buffer += chunk
        return bool(chunk)


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
        return os.fstat(self.kept).st_size

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


def build_job(job_id: str, fields: Blobs, connection: Redis) -> Job:
    """The job of this hash. Raises what rq raises for a damaged one."""
    from rq.job import Job

    job = Job(connection=connection)
    job._id = job_id  # past the check of new ids: what is queued already is to run
    job.serializer = serializer_of(fields.get(b"data", b""))
    job.restore(dict(fields))
    return job


def serializer_of(data: bytes) -> Serializer:
    """RQ's JSON or pickle, told by the first byte of a job's data, deflated or not."""
    from rq.serializers import DefaultSerializer, JSONSerializer

    try:
        first = zlib.decompressobj().decompress(data, 1)
    except zlib.error:
        first = data[:1]
    return JSONSerializer if first in (b"[", b"{") else DefaultSerializer


def perform(job: Job) -> Frame:
    """Run the job and its success or failure callback, as `BaseWorker.perform_job` does."""
    from rq.job import JobStatus, Retry
    from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty
    from rq.utils import now

    started = time.monotonic()
    try:
        job.started_at = now()
        timeout = job.timeout or _DEFAULT_TIMEOUT_SECONDS
        with UnixSignalDeathPenalty(timeout, JobTimeoutException, job_id=job.id):  # type: ignore[no-untyped-call]
            value = call(job)
        seconds = time.monotonic() - started
        job.ended_at = now()
        if isinstance(value, Retry):
            return _ended("retry", seconds, _result(job, value), retry=[value.max, list(value.intervals)])
        job._status = JobStatus.FINISHED
        job.execute_success_callback(UnixSignalDeathPenalty, value)
        return _ended("finished", seconds, _result(job, value))
    except:  # noqa: E722 - as RQ: SystemExit too is a failure of the job
        return _fail(job, time.monotonic() - started)


def call(job: Job) -> Any:
    """`job.perform()` without its PERSIST: the claim has done that, and it is a round trip."""
    from rq.job import _job_stack

    _job_stack.push(job)  # type: ignore[no-untyped-call]
    try:
        job._result = _execute(job)
    finally:
        _job_stack.pop()  # type: ignore[no-untyped-call]
    return job._result


def _execute(job: Job) -> Any:
    """`job._execute()`, which leaves its event loop open: here there are jobs to come."""
    import asyncio

    if not job.func:
        raise ValueError("Cannot execute job: function is None")
    result = job.func(*job.args, **job.kwargs)
    if not asyncio.iscoroutine(result):
        return result
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(result)
    finally:
        loop.close()


def _fail(job: Job, seconds: float) -> Frame:
    """The failure that is being handled, after the failure callback; its own failure takes over."""
    from rq.job import JobStatus
    from rq.timeouts import UnixSignalDeathPenalty
    from rq.utils import now

    job._status = JobStatus.FAILED
    job.ended_at = now()
    exc_info = sys.exc_info()
    exc_string = "".join(traceback.format_exception(*exc_info))
    try:
        job.execute_failure_callback(UnixSignalDeathPenalty, *exc_info)
    except:  # noqa: E722 - as RQ
        exc_string = traceback.format_exc()
    return _failed(exc_string, seconds)


def _failed(exc_string: str, seconds: float = 0.0) -> Frame:
    return _ended("failed", seconds, {b"exc_string": exc_string.encode("utf-8", "backslashreplace")})


def _ended(kind: str, seconds: float, blobs: Blobs, **more: Any) -> Frame:
    return {"op": "end", "kind": kind, "seconds": seconds, **more}, blobs


def _result(job: Job, value: Any) -> Blobs:
    """What `rq.results.Result.serialize` stores as return_value; nothing for None."""
    from rq.defaults import UNSERIALIZABLE_RETURN_VALUE_PAYLOAD

    if value is None:
        return {}
    try:
        data = job.serializer.dumps(value)
    except:  # noqa: E722 - as RQ
        data = job.serializer.dumps(UNSERIALIZABLE_RETURN_VALUE_PAYLOAD)
    return {b"return_value": b64encode(data)}


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


def warm_up(connection: Redis) -> None:
    """Run a job that does nothing: what RQ imports for the first one, a forked process would each time."""
    from rq.serializers import DefaultSerializer

    data = DefaultSerializer.dumps(("builtins.int", None, (), {}))
    perform(build_job("warm-up", {b"data": data, b"created_at": b"2000-01-01T00:00:00.000000Z"}, connection))


class Executor:
    """Serves one worker until it closes its end."""

    def __init__(self, wire: Wire, hello: Mapping[str, Any]) -> None:
        import redis

        self.wire = wire
        self.work_dir: str = hello["work_dir"]
        # lazy: no job, no connection; kept from job to job
        self.connection = redis.Redis.from_url(hello["redis_url"])
        self.streams = (Stream("stdout", 1, hello["stdout"]), Stream("stderr", 2, hello["stderr"]))
        self.memory = Memory()
        self.run = ForkServer(self.run_task) if hello["mode"] == "fork" else self.run_task
        warm_up(self.connection)
        os.environ["RQ_WORKER_ID"] = hello["worker_name"]
        os.chdir(self.work_dir)

    def serve(self) -> None:
        """Run what the worker sends, until it is gone."""
        self.wire.send({"op": "ready"})
        with suppress(EOFError):
            while True:
                self._serve_one()

    def _serve_one(self) -> None:
        pid = os.getpid()
        task, fields = self.wire.receive()
        end, blobs = self.run(task, fields)
        if os.getpid() != pid:  # a job forked, and both returned
            os._exit(0)
        self.wire.send({**end, **self._collect(task), "rss": self.memory.resident_bytes()}, blobs)

    def run_task(self, task: Mapping[str, Any], fields: Blobs) -> Frame:
        """Run one job, callback or webhook. Never raises."""
        try:
            self._prepare(task)
            job = build_job(task["id"], fields, self.connection)
            if task["op"] == "stopped":
                return run_stopped_callback(job)
            if task["op"] == "webhooks":
                return send_webhooks(job, task["status"], task["exc_string"])
            return perform(job)
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
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        random.seed(os.urandom(32))  # as good as seed(), which reads 2,500 bytes, and twice as fast

    def _collect(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Give the job its output; trouble with that is told, and does not change the job's end."""
        sizes = [stream.size() for stream in self.streams]
        found: dict[str, Any] = {"stdout": sizes[0], "stderr": sizes[1]}
        for stream, size in zip(self.streams, sizes):  # noqa: B905 - Python 3.9
            if size:
                try:
                    stream.give(task[stream.name])
                except OSError as exc:
                    found["output_error"] = str(exc)
        return found


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
            frame, status = self._wait(Wire(reader), pid)
        finally:
            os.close(reader)
        return frame or _ended("died", time.monotonic() - started, {}, status=status)

    def _be_the_horse(self, writer: int, task: Mapping[str, Any], fields: Blobs) -> None:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _private.add(writer)
            pid = os.getpid()
            end, blobs = self.run_task(task, fields)
            if os.getpid() == pid:  # not where a job forked, and both returned
                Wire(writer).send(end, blobs)
            os._exit(0)
        finally:
            os._exit(1)

    def _wait(self, wire: Wire, pid: int) -> tuple[Frame | None, int]:
        """The horse's answer, if it gave one, and its wait status."""
        os.set_blocking(wire.fd, False)
        while True:
            ready, _, _ = select.select([wire.fd, self.bell], [], [])
            dead, status = 0, 0
            if self.bell in ready:
                os.read(self.bell, 4096)
                dead, status = os.waitpid(pid, os.WNOHANG)
            at_end = self._drain(wire)
            frame = unpack(wire.buffer)
            if frame or dead or at_end:
                return frame, status if dead else os.waitpid(pid, 0)[1]

    def _drain(self, wire: Wire) -> bool:
        """Read all there is; True at the end of the file."""
        try:
            while wire.fill():
                pass
        except BlockingIOError:
            return False
        return True


class Memory:
    """Tells the resident bytes of this process; where /proc is missing, the most it ever had."""

    def __init__(self) -> None:
        try:
            self.fd = os.open("/proc/self/statm", os.O_RDONLY)
        except OSError:
            self.fd = -1

    def resident_bytes(self) -> int:
        """As of now. A job that closed our descriptor costs only the precision."""
        try:
            return int(os.pread(self.fd, 128, 0).split()[1]) * _PAGE
        except (OSError, LookupError, ValueError):
            scale = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _close_private() -> None:
    for fd in _private:
        with suppress(OSError):
            os.close(fd)
    _private.clear()


def main(fd: int) -> None:
    """Be an executor at the other end of `fd`."""
    import rq.job  # noqa: F401 - before the user's paths, which may have a folder of that name

    os.set_inheritable(fd, False)
    _private.add(fd)
    os.register_at_fork(after_in_child=_close_private)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wire = Wire(fd)
    try:
        hello, _ = wire.receive()
    except EOFError:
        return
    sys.path[:0] = hello["paths"]
    executor = Executor(wire, hello)
    faulthandler.enable()
    executor.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
