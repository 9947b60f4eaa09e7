"""No process of a worker's jobs outlives the worker, or the lease it could not renew."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import termios
import time
import uuid
from pathlib import Path

import psutil
import pytest

from broker import clock
from fleet import sidecar_main
from fleet.sidecar import INCARNATION, Sidecar, SidecarGone

HOUR = 3600.0

#: a worker in small: starts a sidecar, runs what the test gives it, and waits to be killed
WORKER = """
import fcntl, json, os, signal, subprocess, sys, termios, time
from broker import clock
from fleet.sidecar import Sidecar
token, folder = sys.argv[1:3]
lock = open(folder + "/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
sidecar = Sidecar.start(token, lock.fileno())

def job(script, name, marked=True):
    env = dict(os.environ, FLEET_INCARNATION=token) if marked else dict(os.environ)
    return subprocess.Popen(["sh", "-c", script], env=env, start_new_session=True, cwd=folder).pid

def unread():
    return any(fcntl.ioctl(sidecar._commands, termios.FIONREAD, bytes(4)))

def busy():
    # sleeps: what was read is also taken in
    return unread() or open(f"/proc/{sidecar.pid}/stat").read().rpartition(")")[2].split()[0] != "S"

def tell(**facts):
    with open(folder + "/facts.new", "w") as file:
        json.dump({"sidecar": sidecar.pid, **facts}, file)
    os.rename(folder + "/facts.new", folder + "/facts")

BODY
signal.pause()
"""


class SmallWorker:
    """A worker process that runs `body`, and the facts it told."""

    def __init__(self, spawn, eventually, folder: Path, body: str) -> None:
        self.token = uuid.uuid4().hex
        self.folder = folder
        script = WORKER.replace("BODY", body)
        self.process = spawn([sys.executable, "-c", script, self.token, str(folder)], cwd=Path.cwd())
        eventually((folder / "facts").exists, message="the worker's facts")
        self.facts = json.loads((folder / "facts").read_text())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def lock_is_free(self) -> bool:
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def pid_told_by(self, name: str) -> int:
        """The number that a job wrote to a file."""
        return int((self.folder / name).read_text())


@pytest.fixture
def small_worker(spawn, eventually, tmp_path):
    return lambda body: SmallWorker(spawn, eventually, tmp_path, body)


@pytest.fixture
def sidecar(request):
    """A sidecar of this process."""
    token = uuid.uuid4().hex
    started = Sidecar.start(token)
    started.token = token
    yield started
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.pid, signal.SIGCONT)
    started.close()


@pytest.fixture
def job(sidecar):
    """`job("sleep 100")`: a child in a group of its own, as a worker starts it."""
    started = []

    def start(script: str, **more: str) -> subprocess.Popen[bytes]:
        env = dict(os.environ, **{INCARNATION: sidecar.token}, **more)
        started.append(subprocess.Popen(["sh", "-c", script], env=env, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lives(pid: int) -> bool:
    """Whether there is such a process, not counting what only waits to be reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_unread(sidecar: Sidecar) -> bool:
    return any(fcntl.ioctl(sidecar._commands, termios.FIONREAD, bytes(4)))


def is_written(path: Path):
    return lambda: path.exists() and path.read_text().strip()


# --- the worker dies -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_jobs_die_with_their_worker(small_worker, eventually, number):
    worker = small_worker(
        "pids = [job('sleep 100', i) for i in 'ab']\nfor p in pids: sidecar.add(p)\ntell(p=pids)"
    )
    assert all(lives(pid) for pid in worker.facts["p"])
    os.kill(worker.process.pid, number)
    eventually(lambda: not any(map(lives, worker.facts["p"])))
    eventually(lambda: not lives(worker.facts["sidecar"]))


def test_what_a_job_started_dies_too(small_worker, eventually, tmp_path):
    worker = small_worker("p = job('sleep 100 & echo $! > child; wait', 1); sidecar.add(p); tell()")
    eventually(is_written(tmp_path / "child"))
    worker.kill()
    eventually(lambda: not lives(worker.pid_told_by("child")))


@pytest.mark.skipif(not sidecar_main.look_up(os.getpid()), reason="needs /proc")
def test_a_child_that_left_its_group_dies_too(small_worker, eventually, tmp_path):
    worker = small_worker("p = job('setsid sleep 100 & echo $! > child; wait', 1); sidecar.add(p); tell()")
    eventually(is_written(tmp_path / "child"))
    worker.kill()
    eventually(lambda: not lives(worker.pid_told_by("child")))


def test_a_group_dies_though_its_processes_cleared_their_environment(small_worker, eventually):
    worker = small_worker(
        """
p = job('exec env -i sleep 100', 1)
sidecar.add(p)
while b'FLEET' in open(f'/proc/{p}/environ', 'rb').read() or busy(): time.sleep(0.01)
tell(p=p)"""
    )
    worker.kill()
    eventually(lambda: not lives(worker.facts["p"]))


def test_a_group_dies_though_its_leader_ended_before(small_worker, eventually, tmp_path):
    worker = small_worker("p = job('sleep 100 & echo $! > child', 1); sidecar.add(p); tell(p=p)")
    eventually(is_written(tmp_path / "child"))
    eventually(lambda: not lives(worker.facts["p"]))
    worker.kill()
    eventually(lambda: not lives(worker.pid_told_by("child")))


def test_a_child_that_was_never_added_dies_by_its_token(small_worker, eventually):
    worker = small_worker("tell(p=job('sleep 100', 1))")
    worker.kill()
    eventually(lambda: not lives(worker.facts["p"]))


def test_a_removed_group_and_strangers_live_on(small_worker, eventually):
    worker = small_worker(
        "p = job('sleep 100', 1, marked=False); sidecar.add(p); sidecar.remove(p)\n"
        "tell(p=p, q=job('sleep 100', 1, marked=False))"
    )
    try:
        worker.kill()
        eventually(lambda: not lives(worker.facts["sidecar"]))
        assert lives(worker.facts["p"])
        assert lives(worker.facts["q"])
    finally:
        os.killpg(worker.facts["p"], signal.SIGKILL)
        os.killpg(worker.facts["q"], signal.SIGKILL)


def test_a_number_given_to_another_since_is_spared(job, monkeypatch):
    """As if the group had ended, init had reaped it, and a stranger had got its number."""
    stranger = job("exec env -i sleep 100")
    watch = sidecar_main.Sidecar(0, 0, os.getpid(), "no process carries this")
    watch.groups[stranger.pid] = b"1"  # its leader started just after boot
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not watch._kill_known()
    assert not watch._kill_found()
    assert stranger.poll() is None


def test_what_is_not_known_by_its_token_yet_is_found_a_moment_later(monkeypatch):
    looks = [set(), set(), {7}, *[set()] * 100]
    watch = sidecar_main.Sidecar(0, 0, os.getpid(), "no process carries this")
    monkeypatch.setattr(watch, "_kill_found", lambda: looks.pop(0))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    watch._finish()
    assert len(looks) == 102 - sidecar_main.LAST_LOOKS


def test_the_lock_is_held_until_the_last_process_is_dead(small_worker, eventually, tmp_path):
    worker = small_worker("p = job('sleep 100', 1); sidecar.add(p); tell(p=p)")
    assert not worker.lock_is_free()
    os.kill(worker.facts["sidecar"], signal.SIGSTOP)
    worker.kill()
    assert not worker.lock_is_free()
    assert lives(worker.facts["p"])
    os.kill(worker.facts["sidecar"], signal.SIGCONT)
    eventually(worker.lock_is_free)
    assert not lives(worker.facts["p"])


def test_signals_meant_for_the_worker_do_not_end_the_sidecar(small_worker, eventually):
    worker = small_worker("p = job('sleep 100', 1); sidecar.add(p); tell(p=p)")
    eventually(lambda: _ignores(worker.facts["sidecar"], signal.SIGTERM))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.facts["sidecar"], number)
    worker.kill()
    eventually(lambda: not lives(worker.facts["p"]))


def _ignores(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn"))
    return bool(mask & 1 << (number - 1))


def test_a_worker_killed_while_its_sidecar_starts_leaves_nothing(small_worker, eventually):
    worker = small_worker(
        "os.kill(sidecar.pid, signal.SIGSTOP); p = job('sleep 100', 1); sidecar.add(p); tell(p=p)"
    )
    worker.kill()
    os.kill(worker.facts["sidecar"], signal.SIGCONT)
    eventually(lambda: not lives(worker.facts["p"]))


def test_an_orderly_end_leaves_nothing_either(sidecar, job):
    stray = job("sleep 100")
    sidecar.close()
    assert stray.wait(60) == -signal.SIGKILL


# --- the worker stops, or is cut off ---------------------------------------------------------------


def test_a_deadline_renewed_kills_nothing(sidecar, job, eventually):
    process = job("sleep 100")
    sidecar.add(process.pid)
    sidecar.renew(clock.boottime() + 1.0)
    sidecar.renew(clock.boottime() + HOUR)
    over = time.monotonic() + 1.3
    eventually(lambda: time.monotonic() > over)
    assert process.poll() is None
    assert sidecar.killed() == set()
    assert not sidecar.is_late()


def test_a_missed_deadline_kills_and_tells(sidecar, job, eventually):
    processes = [job("sleep 100"), job("sleep 100")]
    for process in processes:
        sidecar.add(process.pid)
    sidecar.renew(clock.boottime() + 0.2)
    assert [process.wait(60) for process in processes] == [-signal.SIGKILL] * 2
    assert eventually(sidecar.killed) == {process.pid for process in processes}
    assert sidecar.killed() == set()
    assert sidecar.is_late()
    assert sidecar.alive()


def test_a_sidecar_lives_on_after_a_missed_deadline(sidecar, job, eventually):
    sidecar.renew(clock.boottime() - 1)
    first = job("sleep 100")
    sidecar.add(first.pid)
    assert first.wait(60) == -signal.SIGKILL
    eventually(lambda: first.pid in sidecar.killed())
    sidecar.remove(first.pid)
    sidecar.renew(clock.boottime() + HOUR)
    second = job("sleep 100")
    sidecar.add(second.pid)
    sidecar.renew(clock.boottime() + 0.2)
    assert second.wait(60) == -signal.SIGKILL
    eventually(lambda: second.pid in sidecar.killed())


def test_what_is_added_after_a_missed_deadline_is_killed_at_once(sidecar, job, eventually):
    early = job("sleep 100")
    sidecar.add(early.pid)
    sidecar.renew(clock.boottime() + 0.1)
    early.wait(60)
    eventually(sidecar.killed)
    late = job("sleep 100")
    sidecar.add(late.pid)
    assert late.wait(60) == -signal.SIGKILL
    eventually(lambda: late.pid in sidecar.killed())


def test_an_infinite_deadline_is_none(sidecar, job, eventually):
    process = job("sleep 100")
    sidecar.add(process.pid)
    sidecar.renew(clock.boottime() + 1.0)
    sidecar.renew(float("inf"))
    over = time.monotonic() + 1.3
    eventually(lambda: time.monotonic() > over)
    assert process.poll() is None


def test_a_stopped_worker_loses_its_jobs_and_learns_of_it(small_worker, eventually, tmp_path):
    worker = small_worker(
        """
p = job('sleep 100', 1)
sidecar.add(p)
q = job('sleep 100', 2)
sidecar.renew(clock.boottime() + 0.5)
tell(p=p, q=q)
os.kill(os.getpid(), signal.SIGSTOP)
killed = set()
while len(killed) < 2:  # told of what was added, and then of what was found
    killed |= sidecar.killed()
    time.sleep(0.01)
os.rename(folder + '/facts', folder + '/old')
tell(killed=sorted(killed))"""
    )
    # q was started and not yet added: the worker had no time to
    eventually(lambda: not lives(worker.facts["p"]) and not lives(worker.facts["q"]))
    stopped = psutil.STATUS_STOPPED
    eventually(lambda: psutil.Process(worker.process.pid).status() == stopped, message="it is stopped")
    os.kill(worker.process.pid, signal.SIGCONT)
    eventually((tmp_path / "old").exists)
    eventually((tmp_path / "facts").exists)
    told = json.loads((tmp_path / "facts").read_text())
    assert told["killed"] == sorted([worker.facts["p"], worker.facts["q"]])


def test_the_deadlines_clock_is_the_workers(sidecar):
    assert abs(sidecar_main.clock() - clock.boottime()) < 1


# --- the sidecar itself ----------------------------------------------------------------------------


def test_a_dead_sidecar_is_noticed_and_replaced(sidecar, job, eventually):
    process = job("sleep 100")
    sidecar.add(process.pid)
    sidecar.renew(clock.boottime() + HOUR)
    os.kill(sidecar.pid, signal.SIGKILL)
    eventually(lambda: sidecar.killed() == set() and not sidecar.alive())
    with pytest.raises(SidecarGone):
        sidecar.add(1)
    sidecar.groups.discard(1)
    other = sidecar.successor()
    try:
        assert (other.groups, other.deadline) == ({process.pid}, sidecar.deadline)
        other.renew(clock.boottime() + 0.2)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        other.close()


def test_a_sidecar_that_died_makes_its_descriptor_readable(sidecar, eventually):
    assert not select.select([sidecar], [], [], 0)[0]
    os.kill(sidecar.pid, signal.SIGKILL)
    assert select.select([sidecar], [], [], 30)[0]
    assert sidecar.killed() == set()
    assert not sidecar.alive()


def test_a_sidecar_that_does_not_read_never_blocks_its_worker(sidecar, job):
    process = job("sleep 100")
    sidecar.add(process.pid)
    os.kill(sidecar.pid, signal.SIGSTOP)

    def fill() -> None:
        for _ in range(1 << 16):
            sidecar.renew(clock.boottime() + HOUR)

    with pytest.raises(SidecarGone):
        fill()
    other = sidecar.successor()
    try:
        assert process.poll() is None, "the stopped sidecar took its replacement for the worker's end"
        assert other.alive()
    finally:
        other.close()


def test_it_knows_no_secret_and_carries_no_token(monkeypatch, eventually):
    monkeypatch.setenv("FLEET_REDIS_URL", "redis://:secret@host")
    monkeypatch.setenv(INCARNATION, "another worker's")
    sidecar = Sidecar.start(uuid.uuid4().hex)
    try:
        environ = psutil.Process(sidecar.pid).environ()
        assert not [name for name in environ if name.startswith("FLEET_")]
    finally:
        sidecar.close()


def test_it_is_small(sidecar, job, eventually):
    process = job("sleep 100")
    sidecar.add(process.pid)
    sidecar.renew(clock.boottime() + 0.05)
    eventually(sidecar.killed)
    assert psutil.Process(sidecar.pid).memory_info().rss < 24 * 2**20


def test_thousands_of_short_jobs_leave_no_group_behind(sidecar, job, eventually):
    for pgid in range(4_000_000, 4_005_000):
        sidecar.add(pgid)
        sidecar.remove(pgid)
        if pgid % 500 == 0:
            sidecar.killed()
            eventually(lambda: not is_unread(sidecar))  # as real jobs would, leave it time to read
    assert sidecar.groups == set()
    assert sidecar.alive()
    sidecar.close()
