"""Jobs that run out of memory are told apart by name, with real workers and the real kernel."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rq

from broker import jobs
from fleet.resources import cgroups
from tests.integration.conftest import Workers

_MIB = 1 << 20
_LIMIT = 256 * _MIB
#: touches a gibibyte, page by page
_GLUTTON = "b = bytearray(1 << 30)\nfor i in range(0, 1 << 30, 4096): b[i] = 1"
#: is refused a gibibyte by a limit of its own
_REFUSED = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29,) * 2); b = bytearray(1 << 30)"


def limited_cgroup() -> Path | None:
    """A new cgroup below our own whose processes may have _LIMIT of memory; None: we may not make one."""
    limits = {1: "memory.limit_in_bytes", 2: "memory.max"}
    for own, mount, version in cgroups("memory"):
        for parent in (own, mount):
            folder = parent / f"fleet-test-{secrets.token_hex(4)}"
            try:
                folder.mkdir()
                (folder / limits[version]).write_text(str(_LIMIT))
                return folder
            except OSError:
                if folder.is_dir():
                    folder.rmdir()
    return None


@pytest.fixture
def confined(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Workers started from here on have little memory; False where this machine cannot limit them."""
    folder = limited_cgroup()
    if folder is None:
        yield False
        return
    start = workers._spawn

    def spawn(argv, **options):
        enter = 'echo $$ > "$0" && exec "$@"'
        return start(["/bin/sh", "-c", enter, str(folder / "cgroup.procs"), *argv], **options)

    monkeypatch.setattr(workers, "_spawn", spawn)
    yield True
    workers.until(lambda: not killed_in(folder), "it is empty")
    folder.rmdir()


def killed_in(folder: Path) -> list[str]:
    """Kill what is in a cgroup; returns what was."""
    pids = (folder / "cgroup.procs").read_text().split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), 9)
    return pids


def ended(workers: Workers, job_id: str) -> jobs.JobView:
    (job,) = workers.wait([job_id])
    assert job.state == "failed"
    return job


def test_a_command_that_the_kernel_kills_is_out_of_memory(workers, confined):
    if not confined:
        if os.geteuid() != 0:
            pytest.skip("may not make a cgroup with a limit of memory")
        # a container that shows no cgroups it may change: the limit of an address space is left
        workers.start("w0")
        job = ended(workers, workers.submit(sys.executable, "-c", _REFUSED))
        assert job.reason.startswith("OutOfMemory")
        return
    workers.start("w0")
    job = ended(workers, workers.submit(sys.executable, "-c", f"print('hello', flush=True)\n{_GLUTTON}"))
    assert job.reason.startswith("OutOfMemory: killed by SIGKILL"), job.reason
    assert job.exit_code == 137
    assert "hello" in job.result, "with its last output"
    shell = f"{sys.executable} -c '{_GLUTTON}'; code=$?; exit $code"
    job = ended(workers, workers.submit("bash", "-c", shell))
    assert job.reason.startswith("OutOfMemory: killed by SIGKILL"), "also where a shell stands in between"
    for executor in ("warm", "fork"):
        workers.start(executor, queues=(executor,), executor=executor)
        queue = rq.Queue(executor, connection=workers.client)
        job = ended(workers, queue.enqueue("rq_jobs.fill_memory", 1 << 30).id)
        assert job.reason.startswith("OutOfMemory: killed by SIGKILL"), (executor, job.reason)
        assert workers.wait([queue.enqueue("operator.add", 1, 2).id])[0].state == "finished", (
            "the worker lives"
        )


def test_a_job_killed_by_somebody_is_not(workers):
    workers.start("w0")
    job = ended(workers, workers.submit("sh", "-c", "kill -9 $$"))
    assert (job.reason, job.exit_code) == ("killed by SIGKILL", 137)


def test_a_job_that_was_refused_memory_is_named_by_its_last_words(workers):
    workers.start("w0")
    job = ended(workers, workers.submit(sys.executable, "-c", _REFUSED))
    assert job.reason == "OutOfMemory: exit code 1, its last words: MemoryError"
    assert job.exit_code == 1
    assert "Traceback" in job.result


def test_a_function_that_was_refused_memory_is_named_by_its_traceback(workers):
    workers.start("w0", executor="fork")
    queue = rq.Queue(connection=workers.client)
    job = ended(workers, queue.enqueue("rq_jobs.be_refused_memory").id)
    assert job.reason == "MemoryError"


@pytest.mark.parametrize(
    ("limit", "work", "reason"),
    [
        (
            "ulimit -S -t 1",
            "while :; do :; done",
            "killed by SIGXCPU (over its limit of CPU time",
        ),
        ("ulimit -f 1", "exec head -c 1000000 /dev/zero > f", "killed by SIGXFSZ"),
    ],
)
def test_limits_that_a_job_sets_itself_are_named(workers, limit, work, reason):
    workers.start("w0")
    assert ended(workers, workers.submit("sh", "-c", f"{limit}; {work}")).reason.startswith(reason)
