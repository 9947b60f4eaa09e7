"""A fleet in virtual time: real sessions, placements and waiters, the real scripts and a real Redis.

Only machines and jobs are made up: a job is an entry in a calendar. The scripts' clock is the calendar's,
which is the one thing that is replaced in them. Whatever is given out is entered into books of the
simulation's own, so that no fault of a worker's room hides itself.
"""

from __future__ import annotations

import heapq
import itertools
import math
import selectors
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import redis

from broker import scripts, sets
from broker.command import Command
from broker.line import Line
from broker.requirements import Offer, Requirements
from broker.session import Identity, Session
from broker.sets import News
from broker.submit import Options, submit_commands
from broker.waiting import Channels, Waiter
from broker.work import Claim, End
from broker.worker_settings import WorkerSettings
from fleet.placement import NoRoom, Placement
from fleet.resources import Gpu, Resources
from fleet.room import Grant, Room

QUEUE = "default"
_TIME = "redis.call('TIME')"
_NOW = "simulation:now"
_VIRTUAL_TIME = f"redis.call('HMGET', '{_NOW}', 'seconds', 'micros')"
#: real seconds of a BLPOP: longer than any simulation
_BLOCK_SECONDS = 3600
#: virtual milliseconds at the start: a time that reads well
_BEGAN_MS = 1_800_000_000_000


@dataclass(frozen=True)
class Machine:
    """What one worker is."""

    kind: str
    offer: Offer

    @property
    def total(self) -> Resources:
        gpus = tuple(Gpu(self.kind, size) for size in self.offer.gpus)
        return Resources(int(self.offer.cpus), self.offer.memory_bytes, gpus)


@dataclass
class Job:
    """One job: when it comes, how long it takes, and when it was begun; virtual seconds."""

    need: Requirements
    seconds: float
    comes_at: float = 0.0
    began_at: float | None = None


@dataclass
class Findings:
    """What was seen. `faults` are what must never be."""

    faults: list[str] = field(default_factory=list)
    begun: int = 0
    ended: int = 0
    refused: int = 0
    rounds: int = 0
    last_given_at: float = 0.0
    makespan: float = 0.0
    real_seconds: float = 0.0
    #: level -> longest time for which it had a job waiting and was given no turn
    neglect: dict[int, float] = field(default_factory=dict)
    #: requirements -> longest time for which its first job stood first
    longest_first: dict[Requirements, float] = field(default_factory=dict)


@contextmanager
def virtual_time() -> Iterator[None]:
    """Scripts ask the simulation for the time, until the end of the block."""
    used = [script for script in vars(scripts).values() if isinstance(script, scripts.Script)]
    real = scripts.Script.text
    for script in used:
        if _TIME not in script.text:
            raise RuntimeError(f"{script.name} asks for the time in other words than {_TIME}")
    scripts.Script.text = property(lambda script: real.fget(script).replace(_TIME, _VIRTUAL_TIME))  # type: ignore
    _forget_names(used)
    try:
        yield
    finally:
        scripts.Script.text = real  # type: ignore[method-assign]
        _forget_names(used)


def _forget_names(used: Iterable[scripts.Script]) -> None:
    for script in used:
        vars(script).pop("sha", None)


class _Books:
    """What one worker has given away, added up here."""

    def __init__(self, machine: Machine) -> None:
        self._offer = machine.offer
        self._slots = machine.offer.slots
        self._plain = min(1.0, machine.offer.cpus / machine.offer.slots)
        self.held: dict[str, tuple[Requirements, Grant | None]] = {}

    def left(self) -> tuple[int, float, int, list[float]]:
        """Slots, CPUs, memory, the share of each GPU."""
        cpus, memory, gpus = float(self._offer.cpus), self._offer.memory_bytes, [1.0] * len(self._offer.gpus)
        for need, grant in self.held.values():
            cpus -= self._plain if need.cpus is None else need.cpus
            memory -= need.memory_bytes or 0
            for index in grant.gpu_ids if grant and need.gpus else ():
                gpus[index] -= min(need.gpus, 1)
        return self._slots - len(self.held), cpus, memory, gpus

    def fault(self) -> str:
        """What is promised twice, or ''."""
        slots, cpus, memory, gpus = self.left()
        lone = any(need.exclusive for need, _ in self.held.values()) and len(self.held) > 1
        if slots < 0 or cpus < -1e-6 or memory < 0 or min(gpus, default=0) < -1e-6 or lone:
            return (
                f"oversubscribed: {slots} slots, {cpus} CPUs, {memory} bytes, GPUs {gpus}, exclusive {lone}"
            )
        return ""

    def that_fit(self, needs: Iterable[Requirements]) -> Iterator[Requirements]:
        """Those for which there is room."""
        left = self.left()
        if left[0] > 0 and not any(other.exclusive for other, _ in self.held.values()):
            yield from (need for need in needs if self._fits(need, *left))

    def _fits(self, need: Requirements, slots: int, cpus: float, memory: int, gpus: list[float]) -> bool:
        if need.exclusive and self.held:
            return False
        will_do = need.gpus_enough(self._offer)
        enough = [left for left, this_will in zip(gpus, will_do, strict=True) if this_will]
        return (
            cpus + 1e-6 >= (self._plain if need.cpus is None else need.cpus)
            and memory >= (need.memory_bytes or 0)
            and sum(left + 1e-6 >= min(need.gpus, 1) for left in enough) >= math.ceil(need.gpus)
        )


class _Worker:
    """One worker: the steps of fleet/loop.py, without processes."""

    def __init__(self, simulation: Simulation, name: str, machine: Machine) -> None:
        self._simulation = simulation
        self.machine = machine
        self.books = _Books(machine)
        identity = Identity(name, name, (QUEUE,), 1, "3")
        self._session = Session(identity, simulation.settings)
        room = Room(machine.total, machine.offer.slots)
        self.placement = Placement((QUEUE,), machine.offer, room, simulation.settings)
        self.waiter = Waiter(simulation.client, identity, _BLOCK_SECONDS)
        self._popped: set[str] = set()

    def start(self) -> None:
        """Enter the registry, learn what jobs ask for, claim."""
        self._session.register(self._simulation.client, "{}")
        self.placement.learn(sets.known(self._simulation.client, (QUEUE,)))
        self.waiter.connect()
        self.go()

    def go(self, ends: Sequence[End] = ()) -> None:
        """Report ends, claim for as long as something comes, then wait."""
        due = True
        while due or ends:
            wanted, ends = self._wanted(), self._claim(tuple(ends))
            due = self._due and wanted > 0
        self._listen()

    def _listen(self) -> None:
        lists = self.placement.lists() if self._wanted() else ()
        self.waiter.nudge(self._simulation.client, lists)
        self.waiter.listen(lists)

    def _wanted(self) -> int:
        self.placement.count(len(self.books.held))
        return 0 if self.placement.room.is_closed else self.machine.offer.slots - len(self.books.held)

    def _claim(self, ends: tuple[End, ...]) -> tuple[End, ...]:
        """One round trip. Returns claims for which there was no room after all."""
        wanted = self._wanted()
        is_deaf = self.waiter.is_deaf(self.placement.lists())
        places = self.placement.places(self._popped)
        if wanted:
            self._popped.clear()
        exchange = self._session.begin(ends, wanted, is_deaf=is_deaf, places=places)
        self._session.send(self._simulation.line, exchange)
        done = self._session.complete(exchange, self._simulation.line.receive())
        self._session.settle(exchange)
        self._due = len(done.claims) >= wanted or done.more
        self._due |= self.placement.hold(done.held)
        self._simulation.found.rounds += 1
        return tuple(end for claim in done.claims for end in self._begin(claim))

    def _begin(self, claim: Claim) -> Iterator[End]:
        try:
            grant = self.placement.take(claim.lease, claim.queue)
        except NoRoom:
            self._simulation.found.refused += 1
            yield End(claim, "handed-back", "no room")
            return
        self.books.held[claim.lease] = self._simulation.jobs[claim.job_id].need, grant
        self._simulation.began(self, claim)

    def end(self, claim: Claim) -> None:
        self.placement.give_back(claim.lease)
        del self.books.held[claim.lease]
        self.go([End(claim, "finished", duration_seconds=1.0)])

    def wake(self) -> None:
        """Its BLPOP has returned."""
        news = self.waiter.receive()
        if isinstance(news, str) and news:
            self._popped.add(news)
            if self._wanted():
                self.go()
                return
            self.waiter.pass_on(self._simulation.client, self._popped)
            self._popped.clear()
        self._listen()

    def hear(self, news: News) -> None:
        """There is a new set."""
        if not self.placement.hear(news):
            self.placement.learn(sets.known(self._simulation.client, (QUEUE,)))
        self._listen()


class Simulation:
    """`run` works off all jobs, and tells what it saw. Within `virtual_time` alone."""

    def __init__(
        self, client: redis.Redis, machines: Sequence[Machine], jobs: Sequence[Job], settings: WorkerSettings
    ) -> None:
        self.client = client
        client.connection_pool.max_connections = len(machines) + 100  # each worker waits on one
        self.line = Line(client)
        self.settings = settings
        self.found = Findings()
        self.jobs: dict[str, Job] = {}
        self.now = 0.0
        self._coming = sorted(jobs, key=lambda job: job.comes_at)
        self._workers = [_Worker(self, f"w{number}", machine) for number, machine in enumerate(machines)]
        self._channels = Channels(client, Identity("listener", "h", (QUEUE,), 1, "3"))
        self._calendar: list[tuple[float, int, _Worker | None, Claim | None]] = []
        self._sequence = itertools.count()
        self._waiting: dict[str, dict[str, Job]] = defaultdict(dict)
        self._lists = {job.need.queue_of(QUEUE): job.need for job in jobs}
        self._served: dict[int, float] = {}
        self._first_since: dict[str, float] = {}

    # --- the calendar ----------------------------------------------------------------------------

    def run(self, check_every: int = 1) -> Findings:
        """Until all jobs have ended; every `check_every` steps it is looked whether room is idle."""
        began = time.monotonic()
        self._set_clock(0.0)
        self._channels.connect()
        self.line.connect()
        with selectors.DefaultSelector() as self._selector:
            try:
                self._submit()
                self._start()
                self._work_off(check_every)
            finally:
                self._close()
        self.found.real_seconds = time.monotonic() - began
        for job in self.jobs.values():
            if job.began_at is None:
                self.found.faults.append(f"never begun: {job.need.readable()}")
        return self.found

    def _close(self) -> None:
        """Nobody is left who waits for tokens."""
        for worker in self._workers:
            worker.waiter.close()
        self._channels.close()
        self.line.close()

    def _start(self) -> None:
        beats = self.settings.heartbeat_seconds
        for number, worker in enumerate(self._workers):
            worker.start()
            self._selector.register(worker.waiter, selectors.EVENT_READ, worker)
            self._enter(beats * (1 + number / len(self._workers)), worker, None)
        self._settle()

    def _work_off(self, check_every: int) -> None:
        for step in itertools.count():
            if self.found.ended == len(self.jobs) and not self._coming:
                return
            at, _, worker, claim = heapq.heappop(self._calendar)
            self._set_clock(at)
            if worker is None:
                self._submit()
            elif claim is None:
                worker.go()
                self._enter(at + self.settings.heartbeat_seconds, worker, None)
            else:
                self.found.ended += 1
                self.found.makespan = at
                worker.end(claim)
            self._settle()
            if step % check_every == 0:
                self._look_for_idle_room()

    def _enter(self, at: float, worker: _Worker | None, claim: Claim | None) -> None:
        heapq.heappush(self._calendar, (at, next(self._sequence), worker, claim))

    def _set_clock(self, at: float) -> None:
        self.now = at
        micros = round((_BEGAN_MS / 1000 + at) * 1e6)
        self.client.hset(_NOW, mapping={"seconds": micros // 10**6, "micros": micros % 10**6})

    def _settle(self) -> None:
        """Let everybody do what follows at this moment."""
        self._let_write()
        while events := self._selector.select(0):
            for selected, _ in events:
                selected.data.wake()
            self._let_write()

    def _let_write(self) -> None:
        """What BLPOPs return has been written when this returns.

        Redis may write the answer to the first question before those, but only then reads the second.
        """
        self.client.ping()
        self.client.ping()

    def _submit(self) -> None:
        """What comes now, as one submission for each set."""
        due: dict[Requirements, list[Job]] = defaultdict(list)
        while self._coming and self._coming[0].comes_at <= self.now:
            job = self._coming.pop(0)
            due[job.need].append(job)
        if self._coming:
            self._enter(self._coming[0].comes_at, None, None)
        command = Command(("true",))
        for need, some in due.items():
            rows = [(None, command) for _ in some]
            ids = submit_commands(self.client, QUEUE, rows, Options(requirements=need))
            self._note_submitted(need.queue_of(QUEUE), dict(zip(ids, some, strict=True)))
        for message in self._channels.receive():
            if isinstance(message, News):
                for worker in self._workers:
                    worker.hear(message)

    # --- what is seen ----------------------------------------------------------------------------

    def _note_submitted(self, name: str, some: dict[str, Job]) -> None:
        self.jobs.update(some)
        if not self._waiting[name]:
            self._first_since[name] = self.now
        if not self._waits(self._lists[name].priority):
            self._served[self._lists[name].priority] = self.now
        self._waiting[name].update(some)

    def _waits(self, priority: int) -> bool:
        return any(jobs for name, jobs in self._waiting.items() if self._lists[name].priority == priority)

    def began(self, worker: _Worker, claim: Claim) -> None:
        """A job was given to a worker."""
        job, found = self.jobs[claim.job_id], self.found
        job.began_at = self.now
        found.begun += 1
        found.last_given_at = self.now
        lacking = job.need.mismatches(worker.machine.offer, 0)
        fault = worker.books.fault() or (f"{job.need.readable()} on {worker.machine.kind}" if lacking else "")
        if fault:
            found.faults.append(fault)
        self._note_turn(claim.queue, claim.job_id, job.need)
        self._enter(self.now + job.seconds, worker, claim)

    def _note_turn(self, name: str, job_id: str, need: Requirements) -> None:
        level, waited = need.priority, self.now - self._first_since[name]
        found = self.found
        found.longest_first[need] = max(found.longest_first.get(need, 0), waited)
        found.neglect[level] = max(found.neglect.get(level, 0), self.now - self._served[level])
        self._served[level] = self._first_since[name] = self.now
        if next(iter(self._waiting[name])) != job_id:
            found.faults.append(f"{name}: not first in, first out")
        del self._waiting[name][job_id]

    def _look_for_idle_room(self) -> None:
        """Nobody may have room for a job that waits, but who holds room for another."""
        waiting = [self._lists[name] for name, jobs in self._waiting.items() if jobs]
        for worker in self._workers:
            if worker.placement.held:
                continue
            for need in worker.books.that_fit(waiting):
                if need.matches(worker.machine.offer, 0):
                    words = f"{worker.machine.kind} is idle at {self.now:.0f} s for {need.readable()}"
                    self.found.faults.append(words)


def best_bound(machines: Sequence[Machine], jobs: Sequence[Job]) -> float:
    """Seconds below which no packing can be: for each group of machines what only they can do, by what they
    have. The groups are those that the sets of requirements make.
    """
    kinds = {machine.kind: machine.offer for machine in machines}
    count = {kind: sum(machine.kind == kind for machine in machines) for kind in kinds}
    able = {
        need: frozenset(kind for kind, offer in kinds.items() if need.matches(offer, 0))
        for need in {job.need for job in jobs}
    }
    bound = 0.0
    for group in {*able.values(), frozenset(kinds)}:
        ours = [job for job in jobs if able[job.need] <= group]
        offers = [(kinds[kind], count[kind]) for kind in group]
        plain = min(min(1.0, offer.cpus / offer.slots) for offer, _ in offers)
        for has, asks in (
            (sum(o.cpus * n for o, n in offers), sum((j.need.cpus or plain) * j.seconds for j in ours)),
            (
                sum(o.memory_bytes * n for o, n in offers),
                sum((j.need.memory_bytes or 0) * j.seconds for j in ours),
            ),
            (sum(len(o.gpus) * n for o, n in offers), sum(j.need.gpus * j.seconds for j in ours)),
            (sum(o.slots * n for o, n in offers), sum(j.seconds for j in ours)),
        ):
            bound = max(bound, asks / has if has else 0.0)
    return bound
