"""Rounds: ends out and claims in, sent and not waited for; what lost replies, cuts and odd ends leave."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import redis
import rq

from broker import history, jobs, keys, scripts
from broker.connection import connect
from broker.line import Line
from broker.session import Session
from broker.work import Claim, End, Tails
from fleet.rounds import Rounds
from tests.integration.proxy import Passage
from tests.integration.test_claims import claim, send, session, submit

#: more than what Lua can hand to one call
_VERY_MANY = 4500
#: waits longer for a reply than the tests hold one
CALM = {"heartbeat_seconds": 10.0, "lease_seconds": 30.0}


def test_a_round_of_very_many_jobs_is_whole(redis_url: str) -> None:
    with connect(redis_url, timeout_seconds=100) as client:
        run_very_many(client)


def run_very_many(redis_client: redis.Redis) -> None:
    submit(redis_client, _VERY_MANY)
    who = session(redis_client, "w0")
    claims = claim(redis_client, who, _VERY_MANY)
    assert len(claims) == _VERY_MANY
    assert redis_client.zcard(keys.LEASES) == redis_client.hlen(keys.worker_leases("w0")) == _VERY_MANY
    ends = [End(one, "finished", exit_code=0) for one in claims]
    told = 0
    while ends:
        done = send(redis_client, who, ends, 0)
        assert all(done.accepted)
        told, ends = told + len(done.accepted), ends[len(done.accepted) :]
    assert redis_client.zcard(keys.of("finished", "default")) == told == _VERY_MANY
    assert not redis_client.exists(keys.LEASES, keys.worker_leases("w0"), keys.of("wip", "default"))
    assert not list(redis_client.scan_iter("rq:execution*"))


# --- what Redis does not take ----------------------------------------------------------------------


class Ends:
    """What a worker's slots know of ends."""

    oldest_end = 0.0

    def __init__(self, ends: list[End]) -> None:
        self.found = {end.claim.lease: end for end in ends}

    @property
    def ends(self) -> list[End]:
        return list(self.found.values())

    def is_stocked(self) -> bool:
        return False

    def replace(self, end: End) -> None:
        self.found[end.claim.lease] = end

    def settled(self, end: End) -> None:
        del self.found[end.claim.lease]


def poisonous(one: Claim) -> End:
    """An end that stops the script."""
    maximum: Any = "no number"
    return End(one, "retry", "the function returned Retry", 0.1, retry=(maximum, []))


def exchange_all(client: redis.Redis, who: Session, ends: Ends) -> int:
    """Send rounds until all is told; how many it took."""
    slots: Any = ends
    line = Line(client)
    line.connect()
    rounds = Rounds(who, line, slots)
    count = 0
    while ends.found:
        count += 1
        assert count < 20, "it goes on for ever"
        rounds.send(0, 0, is_deaf=False)
        answer = rounds.receive()
        for end in answer[0].ends if answer else ():
            ends.settled(end)
    line.close()
    return count


def test_an_end_that_redis_refuses_fails_its_job_and_holds_up_no_other(redis_client: redis.Redis) -> None:
    ids = submit(redis_client, 5)
    who = session(redis_client, "w0")
    claims = claim(redis_client, who, 5)
    redis_client.hset(keys.job(ids[0]), "number_of_retries", 1)
    ends = [poisonous(claims[0]), *(End(one, "finished", exit_code=0) for one in claims[1:])]
    exchange_all(redis_client, who, Ends(ends))
    assert [jobs.show(redis_client, job_id).state for job_id in ids] == ["failed"] + ["finished"] * 4
    assert jobs.show(redis_client, ids[0]).reason.startswith("ResultRefused: ")
    assert not redis_client.exists(keys.LEASES, keys.worker_leases("w0"))


def test_what_redis_takes_for_nobody_is_no_refusal(own_redis: Callable[..., Any]) -> None:
    server = own_redis()
    with server.client() as client:
        submit(client)
        who = session(client, "w0")
        end = End(claim(client, who)[0], "finished", exit_code=0, tails=Tails(b"x", b"", 1))
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.ResponseError, match="OOM"):
            exchange_all(client, who, Ends([end]))
        client.config_set("maxmemory", 0)
        assert exchange_all(client, who, Ends([end])) == 1
        assert jobs.show(client, end.claim.job_id).state == "finished"


def test_a_value_at_which_redis_hangs_up_fails_its_job_and_no_other(own_redis, workers_of) -> None:
    workers = workers_of(own_redis("--proto-max-bulk-len", "1mb").url)
    queue = rq.Queue("default", connection=workers.client)
    large = queue.enqueue("rq_jobs.return_bytes", 3 << 20).id
    small = [queue.enqueue("rq_jobs.add", 1, number).id for number in range(20)]
    workers.start("w0", slots=2)
    views = workers.wait([large, *small])
    assert [view.state for view in views] == ["failed"] + ["finished"] * 20
    assert views[0].reason.startswith("ResultRefused: ")
    workers.assert_clean()


def test_what_is_handed_back_keeps_its_order_whatever_was_given_up_first(redis_client: redis.Redis) -> None:
    ids = submit(redis_client, 6)
    who = session(redis_client, "w0")
    early, late = claim(redis_client, who, 3), claim(redis_client, who, 3)
    exchange_all(redis_client, who, Ends([End(one, "handed-back") for one in (*early, *late)]))
    assert [one.decode() for one in redis_client.lrange(keys.queue("default"), 0, -1)] == ids


# --- a worker whose connection is cut at the worst moment ------------------------------------------


class Fault(Passage):
    """A way to Redis that knows a round when it passes: it may cut it off, or swallow or hold its reply."""

    def __init__(self, url: str) -> None:
        #: cut the next round "before" or "after" Redis has run it
        self.plan = ""
        #: hold the next reply that has this in it
        self.hold = b""
        self.held = threading.Event()
        self.released = threading.Event()
        super().__init__(urlsplit(url).port or 6379)
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        self.released.set()
        super().close()

    def _ways(self, near: socket.socket, far: socket.socket) -> Iterable[Callable[[], None]]:
        swallow = threading.Event()
        return (partial(self._there, near, far, swallow), partial(self._back, near, far, swallow))

    def _there(self, near: socket.socket, far: socket.socket, swallow: threading.Event) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 20):
                if self.plan and scripts.ROUND.sha.encode() in data:
                    plan, self.plan = self.plan, ""
                    if plan == "before":
                        break
                    swallow.set()
                far.sendall(data)
        self._hang_up(near, far)

    def _back(self, near: socket.socket, far: socket.socket, swallow: threading.Event) -> None:
        with suppress(OSError):
            while data := far.recv(1 << 20):
                if swallow.is_set():
                    break
                if self.hold and self.hold in data:
                    self.hold = b""
                    self.held.set()
                    self.released.wait(60)
                near.sendall(data)
        self._hang_up(near, far)

    @staticmethod
    def _hang_up(*sockets: socket.socket) -> None:
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def fault(redis_url: str, redis_client: redis.Redis) -> Iterator[Fault]:
    """The session's Redis, reached through a fault."""
    redis_client.script_load(scripts.ROUND.text)  # the first of all rounds is asked twice, and waited for
    made = Fault(redis_url)
    yield made
    made.close()


def notes(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_rounds_cut_before_and_after_redis_ran_them_lose_and_repeat_nothing(
    fault: Fault, workers_of, redis_client: redis.Redis, tmp_path: Path
) -> None:
    path = tmp_path / "notes"
    queue = rq.Queue("default", connection=redis_client)
    prepare = rq.Queue.prepare_data
    rows = [prepare("rq_jobs.note", args=(str(path), str(number))) for number in range(1500)]
    ids = [job.id for job in queue.enqueue_many(rows)]
    workers = workers_of(fault.url)
    workers.start("w0", slots=2)
    for count in range(4):
        goal = len(notes(path)) + 50
        workers.until(lambda goal=goal: len(notes(path)) >= goal)
        fault.plan = ("before", "after")[count % 2]
        workers.until(lambda: not fault.plan, "a round was cut")
    views = workers.wait(ids)
    assert {view.state for view in views} == {"finished"}
    assert sorted(notes(path), key=int) == [str(number) for number in range(1500)], "each once"
    counts = history.read(redis_client)["default"]
    assert counts.stale == 0, "an end that arrived is recognised"
    assert counts.lost == 0
    assert counts.finished == 1500
    workers.until(lambda: not any(workers.leftovers().values()), "nothing is left")
    finished = int(redis_client.hget(keys.rq_worker("w0"), "successful_job_count"))
    assert finished == 1500


def test_a_worker_told_to_stop_gives_back_what_a_round_under_way_brings(
    fault: Fault, workers_of, redis_client: redis.Redis, tmp_path: Path
) -> None:
    path = tmp_path / "notes"
    workers = workers_of(fault.url)
    worker = workers.start("w0", slots=2, settings=CALM)
    fault.hold = b"description"
    job = rq.Queue("default", connection=redis_client).enqueue("rq_jobs.note", str(path), "x").id
    assert fault.held.wait(60)
    workers.until(lambda: jobs.show(redis_client, job).state == "started", "it was claimed")
    worker.terminate()
    workers.until(lambda: "stopping" in workers.log("w0"))
    fault.released.set()
    assert worker.wait(60) == 0
    assert jobs.show(redis_client, job).state == "queued"
    assert not notes(path)
    workers.assert_clean()


def test_a_worker_whose_time_is_up_waits_for_the_answer_to_its_claim(
    fault: Fault, workers_of, redis_client: redis.Redis, tmp_path: Path
) -> None:
    workers = workers_of(fault.url)
    fault.hold = b"description"
    job = workers.submit("touch", str(tmp_path / "done"))
    worker = workers.start("w0", idle_timeout_seconds=2.0, settings=CALM)
    assert fault.held.wait(60)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(3)
    fault.released.set()
    workers.wait([job])
    assert (tmp_path / "done").exists()
    assert worker.wait(60) == 0


# --- idle ------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_worker_with_nothing_to_do_uses_no_processor(
    workers, redis_client: redis.Redis, is_busy: bool
) -> None:
    worker = workers.start("w0", slots=2, settings=CALM)
    if is_busy:
        job = rq.Queue("default", connection=redis_client).enqueue("rq_jobs.nap", 600).id
        workers.until(lambda: workers.state(job) == "started")
    time.sleep(1)  # what a start leaves to do
    before, since = cpu_seconds(worker.pid), time.monotonic()
    time.sleep(3)
    share = (cpu_seconds(worker.pid) - before) / (time.monotonic() - since)
    assert share <= 0.05, f"{share:.1%} of a processor"
