"""The thread that does the fleet's chores when this worker is elected to.

It also watches the plain queues: a producer that knows only RQ pushes a job and rings no
bell, so the elected worker peeks at each queue with a blocking BLMOVE of the list onto itself,
left to left, which changes nothing, and rings when one has a job.
"""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import redis

from broker import chores, clock, jobs, keys, names, scripts, tunnels
from broker.requirements import base_of
from broker.session import Session
from fleet import jitter
from fleet.logs import about
from fleet.outputs import Folders

log = logging.getLogger("fleet.chores")

#: seconds between looks at a queue that is full: where its jobs are taken and few are left, for its
#: producer may wait for each before it enqueues the next; where they are taken and many are left;
#: and, at last, where the first of them stays, for nobody can take it, or may
_PEEK_PAUSE_SECONDS, _MOVING_PAUSE_SECONDS, _LONGEST_PEEK_PAUSE_SECONDS = 0.002, 0.1, 0.25
_FEW_JOBS = 16
#: a reply that took this many seconds was waited for: the queue had been empty; so many, if the same job
#: is first as before, for a busy machine takes its time, too
_PEEK_WAITED_SECONDS, _SAME_WAITED_SECONDS = 0.005, 0.05
#: queues that are watched so: each costs a connection, and the others are rung for once a second
_MOST_PEEKS = 64
_PEEK_BLOCK_SECONDS = 30
#: seconds in which a job that came with a token is claimed, also by this very worker: where jobs come
#: without, as far as the last ones told, and where they come with one
_YIELD_SECONDS, _RUNG_YIELD_SECONDS = 0.0005, 0.005
_PRUNE_SECONDS = 3600


#: a reply, or a turn of chores, that took so many seconds
_LATE_SECONDS = 1.0
#: questions a second that Redis gets of all workers; and the longest pause of one, for most may die at once
_QUESTIONS_PER_SECOND = 50
_LONGEST_PAUSE_SECONDS = 20.0


@dataclass(frozen=True)
class AllDone:
    """No job of this worker's queues is left that has not ended."""


class ChoreThread:
    """Asks once a second to be elected; while it is, runs what is due and listens to the queues.

    Elected or not, it removes what jobs left on this host when their results have run out; and tells
    `all_done`, if that is given, whenever no job of `queues` is left that has not ended.
    """

    def __init__(
        self,
        session: Session,
        client: redis.Redis,
        folders: Folders,
        *,
        all_done: Callable[[], None] | None = None,
        queues: Sequence[str] = (),
    ) -> None:
        self._session = session
        self._folders = folders
        self._all_done = all_done
        self._queues = queues
        self._prune_at = 0.0
        self._client = client
        self._table = chores.table(session.settings)
        self._due = dict.fromkeys(range(len(self._table)), 0.0)
        self._peeks = _Peeks(client)
        self._told: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chores", daemon=True)
        #: whether Redis was away, or late, since this worker last asked
        self._troubled = False
        self._pauses = jitter.returns_seconds(1, session.settings, session.identity)

    def start(self) -> None:
        """Take part in elections from now on."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and let another be elected at once."""
        self._stop.set()
        self._thread.join(timeout=20)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except Exception as exc:  # somebody's damage must not end the recovery of all others' jobs
                self._troubled |= _is_away(exc)
                self._tell(exc)
                self._peeks.close()
                self._stop.wait(next(self._pauses) if _is_away(exc) else 1.0)
        self._peeks.close()
        with suppress(redis.RedisError):
            self._resign()

    def _tell(self, exc: Exception) -> None:
        """Say each trouble once; that Redis is away is for the loop to say."""
        if _is_away(exc) or str(exc) in self._told:
            return
        self._told.add(str(exc))
        trace = None if isinstance(exc, redis.RedisError) else exc
        log.warning("chores: %s", exc, exc_info=trace, extra=about("chores"))

    def _turn(self) -> None:
        self._prune()
        self._look_for_work()
        with self._timed():
            election = self._ask()
        self._pauses = jitter.returns_seconds(election.alive, self._session.settings, self._session.identity)
        if not election.elected:
            self._peeks.close()
            self._stop.wait(_pause(election.alive))
            return
        until = clock.monotonic() + 1.0
        while clock.monotonic() < until and not self._stop.is_set():
            with self._timed():
                self._run_due()
            self._peeks.listen_and_ring(self._next_due(until) - clock.monotonic())

    def _ask(self) -> chores.Election:
        incarnation, settings = self._session.identity.incarnation, self._session.settings
        election = chores.elect(self._client, incarnation, settings, troubled=self._troubled)
        self._troubled = False
        return election

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Replies that take long are a sign that Redis, or the way to it, stood still."""
        began = clock.monotonic()
        yield
        self._troubled |= clock.monotonic() - began > _LATE_SECONDS

    def _prune(self) -> None:
        if clock.monotonic() >= self._prune_at:
            self._prune_at = clock.monotonic() + _PRUNE_SECONDS
            ttl = self._session.settings.result_ttl_seconds
            fleet = tunnels.fleet_id(self._client, make=True)
            self._folders.prune(str(fleet), ttl, lambda ids: jobs.gone(self._client, ids))

    def _look_for_work(self) -> None:
        if self._all_done and not jobs.unfinished(self._client, self._queues):
            self._all_done()

    def _run_due(self) -> None:
        for index, chore in enumerate(self._table):
            if clock.monotonic() >= self._due[index]:
                self._due[index] = clock.monotonic() + chore.interval_seconds
                done = chore.run(self._client)
                if done and isinstance(chore, chores.Recovery):
                    log.warning("recovered %d jobs of workers that died", done, extra=about("recovered"))

    def _next_due(self, until: float) -> float:
        return min(until, *self._due.values())

    def _resign(self) -> None:
        if self._client.get(keys.CHORES) == self._session.identity.incarnation.encode():
            self._client.delete(keys.CHORES)


def _pause(alive: int) -> float:
    """Seconds until a worker of so many asks again."""
    return min(_LONGEST_PAUSE_SECONDS, max(1.0, alive / _QUESTIONS_PER_SECOND))


def _is_away(exc: Exception) -> bool:
    return isinstance(exc, redis.ConnectionError | redis.TimeoutError | OSError)


class _Peeks:
    """One blocked connection for each queue: BLMOVE takes one list, and must not take a job."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._selector = selectors.DefaultSelector()
        self._connections: dict[str, Any] = {}
        #: closed, to be opened again: a pool of redis-py makes only so many in its life
        self._spare: list[Any] = []
        #: file numbers that the selector knows; a connection that was cut has forgotten its own
        self._watched: list[int] = []
        #: queues that had jobs a moment ago, and when to peek again
        self._paused: dict[str, float] = {}
        #: when each queue was asked, how many seconds it took to answer, and how long its last pause was
        self._asked: dict[str, float] = {}
        self._waited: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        #: the job that was first in each queue
        self._heads: dict[str, bytes] = {}
        self._listed_at = 0.0
        #: whether the last jobs seen came with tokens
        self._are_rung_for = False

    def listen_and_ring(self, seconds: float) -> None:
        """Wait up to `seconds` for a plain producer, and ring for the queues that have jobs."""
        self._follow_queues()
        pause = min((at - clock.monotonic() for at in self._paused.values()), default=seconds)
        ready = self._selector.select(max(0.0, min(seconds, pause)))
        now = clock.monotonic()
        self._waited |= {key.data: now - self._asked[key.data] for key, _ in ready}
        if ready:
            time.sleep(_RUNG_YIELD_SECONDS if self._are_rung_for else _YIELD_SECONDS)
        heads = {key.data: job for key, _ in ready if (job := self._first_job(key.data))}
        if heads:
            self._are_rung_for = all(map(names.is_rung_for, heads.values()))
            lengths = scripts.RING(self._client, [keys.queue(queue) for queue in heads], list(heads))
            for (queue, head), length in zip(heads.items(), lengths, strict=True):
                self._pause(queue, head, length)
        self._resume()

    def close(self) -> None:
        """Drop all connections; they come back when it listens again."""
        for fd in self._watched:
            self._selector.unregister(fd)
        self._watched.clear()
        for connection in self._connections.values():
            connection.disconnect()
        self._spare += self._connections.values()
        self._connections.clear()
        self._paused.clear()
        self._listed_at = 0.0

    def _follow_queues(self) -> None:
        if clock.monotonic() - self._listed_at < 1.0:
            return
        self._listed_at = clock.monotonic()
        for queue in chores.known_queues(self._client):
            if len(self._connections) >= _MOST_PEEKS:
                break
            # who pushes to a sublist mostly rings; for the others it is rung once a second
            if queue not in self._connections and queue == base_of(queue):
                self._open(queue)

    def _open(self, queue: str) -> None:
        if not self._spare:
            self._spare.append(self._client.connection_pool.make_connection())
        self._spare[-1].connect()
        connection = self._connections[queue] = self._spare.pop()
        self._selector.register(connection._sock, selectors.EVENT_READ, queue)
        self._watched.append(connection._sock.fileno())
        self._peek(queue)

    def _peek(self, queue: str) -> None:
        name = keys.queue(queue)
        self._asked[queue] = clock.monotonic()
        self._connections[queue].send_command("BLMOVE", name, name, "LEFT", "LEFT", _PEEK_BLOCK_SECONDS)

    def _first_job(self, queue: str) -> bytes | None:
        try:
            job: bytes | None = self._connections[queue].read_response()
        except redis.ResponseError:  # somebody keeps something else under that name
            self._paused[queue] = clock.monotonic() + 5.0
            return None
        if job is None:
            self._peek(queue)
        return job

    def _pause(self, queue: str, head: bytes, length: int) -> None:
        now, pause, waited = clock.monotonic(), _PEEK_PAUSE_SECONDS, self._waited[queue]
        moves = self._heads.get(queue) != head or waited >= _SAME_WAITED_SECONDS
        if not moves or not (waited >= _PEEK_WAITED_SECONDS or length <= _FEW_JOBS):
            longest = _MOVING_PAUSE_SECONDS if moves else _LONGEST_PEEK_PAUSE_SECONDS
            pause = min(2 * self._pauses.get(queue, pause), longest)
        self._pauses[queue], self._paused[queue], self._heads[queue] = pause, now + pause, head

    def _resume(self) -> None:
        now = clock.monotonic()
        for queue in [queue for queue, at in self._paused.items() if at <= now]:
            del self._paused[queue]
            self._peek(queue)
