"""A storm: many workers, many jobs, and faults of every kind at random, all decided by one seed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import redis

from broker import jobs
from tests.chaos.harness import SETTINGS, Child, Harness, rq_counts
from tests.chaos.harness import counts as our_counts
from tests.chaos.proxy import Proxy

#: how likely each fault is, beside those whose number is given
_SHARES = {
    "executor": 4,
    "job": 4,
    "sidecar": 2,
    "stop": 2,
    "freeze": 1,
    "cut": 3,
    "deaf": 2,
    "delay": 2,
    "drop": 2,
    "term": 2,
}


@dataclass(frozen=True)
class Plan:
    """How much of everything. `seconds` is how long jobs come and faults go on."""

    seed: int
    jobs: int
    seconds: float
    workers: int = 6
    worker_kills: int = 10
    redis_restarts: int = 1
    other_faults: int = 20
    submitters: int = 2
    batch: int = 20
    #: share of jobs that take some tenths of a second
    slow: float = 0.1
    #: commands, plain RQ functions, commands that fail at first, chains, trees, those that ask for something,
    #: arrays
    shares: tuple[int, ...] = (3, 5, 1, 1, 2, 3, 2)
    queues: tuple[str, ...] = ("high", "default")
    #: beyond its lease, until a worker that stays away comes back
    absent_seconds: float = 3.0
    #: of the workers, in turns
    slots: tuple[int, ...] = (1, 2, 3)
    settings: dict[str, Any] = field(default_factory=dict)


class Storm:
    """Runs a plan, to the end of all jobs and the drain of all workers."""

    def __init__(self, harness: Harness, plan: Plan, say: Callable[[str], None] = lambda _: None) -> None:
        self._harness, self._plan, self._say = harness, plan, say
        self._random = random.Random(plan.seed)
        self._lease: float = (SETTINGS | plan.settings)["lease_seconds"]
        self._proxy = Proxy(harness.redis.port)
        self._workers: dict[str, Child] = {}
        #: when to start a dead worker again, monotonic seconds
        self._due: dict[str, float] = {}
        #: what to do later: (when, what)
        self._later: list[tuple[float, Callable[[], None]]] = []

    def run(self) -> None:
        """Everything, from the first worker to the last."""
        self._proxy.start()
        try:
            for number in range(self._plan.workers):
                self._start(f"w{number}")
            submitters = [self._submitter(number) for number in range(self._plan.submitters)]
            url = self._harness.redis.url
            reader = self._harness.fork("rq-info", "reader", url=url, pause=0.5, times=10**6)
            self._rage()
            self._calm(submitters)
            self._harness.kill(reader)
            self._count()
            self._drain()
        finally:
            self._proxy.stop()

    def _submitter(self, number: int) -> Child:
        plan = self._plan
        share = plan.jobs // plan.submitters
        rounds = share / ((1 + plan.batch) / 2)
        return self._harness.fork(
            "submitter",
            f"s{number}",
            seed=plan.seed * 1000 + number,
            url=self._proxy.url if number % 2 == 0 else self._harness.redis.url,
            count=share,
            batch=plan.batch,
            shares=list(plan.shares),
            queues=list(plan.queues),
            slow=plan.slow,
            pause=0.8 * plan.seconds / rounds,
        )

    def _start(self, name: str) -> None:
        """Half of the workers go through the proxy, one in five believes in another time of day."""
        number = int(name[1:])
        slots = self._plan.slots[number % len(self._plan.slots)]
        self._workers[name] = self._harness.worker(
            name,
            url=self._proxy.url if number % 2 else None,
            host=f"h{number % 3}",
            output_dir=str(self._harness.folder / f"h{number % 3}"),
            slots=slots,
            resources={"cpus": slots, "memory_bytes": 2**30, "num_gpus": number % 2},
            labels={"zone": "ab"[number % 2]},
            queues=self._plan.queues,
            settings=self._plan.settings,
            clock_offset=3600.0 * (number % 5 == 4),
        )

    # -- faults --------------------------------------------------------------------------------

    def _rage(self) -> None:
        """Strike at random moments, as often as planned, and start again what died."""
        began = time.monotonic()
        for at, fault in self._schedule():
            while time.monotonic() < began + at:
                self._tend()
            self._strike(fault)
        while self._later:
            self._tend()

    def _schedule(self) -> list[tuple[float, str]]:
        plan, draw = self._plan, self._random
        others = draw.choices(list(_SHARES), list(_SHARES.values()), k=plan.other_faults)
        wanted = ["worker"] * plan.worker_kills + ["redis"] * plan.redis_restarts + others
        return sorted((draw.uniform(0.5, plan.seconds), fault) for fault in wanted)

    def _tend(self) -> None:
        """Start again who is due, and do what was put off."""
        now = time.monotonic()
        for name, child in self._workers.items():
            if child.status is not None and name not in self._due:
                absent = self._lease + self._plan.absent_seconds
                self._due[name] = now + self._random.choice((0.0, absent))
        for name in [name for name, at in self._due.items() if at <= now]:
            del self._due[name]
            self._start(name)
        for at, what in [one for one in self._later if one[0] <= now]:
            self._later.remove((at, what))
            what()
        time.sleep(0.02)

    def _strike(self, fault: str) -> None:
        self._harness.history.note("fault", fault=fault, wall=time.time())
        getattr(self, f"_strike_{fault}")()

    def _put_off(self, seconds: float, what: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, what))

    def _victim(self) -> Child | None:
        alive = [child for child in self._workers.values() if child.status is None]
        return self._random.choice(alive) if alive else None

    def _strike_worker(self) -> None:
        while not (victim := self._victim()):
            self._tend()
        self._harness.kill(victim)

    def _strike_term(self) -> None:
        if victim := self._victim():
            self._harness.kill(victim, signal.SIGTERM)

    def _strike_executor(self) -> None:
        self._kill_one_of("executor_main.py")

    def _strike_job(self) -> None:
        self._kill_one_of("CHAOS_HISTORY")

    def _strike_sidecar(self) -> None:
        self._kill_one_of("sidecar_main.py")

    def _kill_one_of(self, words: str) -> None:
        """Kill a process below some worker whose command line holds `words`."""
        found = [
            process
            for child in self._workers.values()
            if child.status is None
            for process in self._harness.descendants(child)
            if words in _command_line(process)
        ]
        if found:
            with suppress(psutil.Error):
                self._random.choice(found).kill()

    def _strike_stop(self) -> None:
        self._pause(frozen=False)

    def _strike_freeze(self) -> None:
        self._pause(frozen=True)

    def _pause(self, *, frozen: bool) -> None:
        """Stop a worker for longer than its lease, alone or with all its processes."""
        victim = self._victim()
        if victim is None:
            return
        seconds = self._lease * self._random.uniform(1.2, 2.0)
        self._harness.history.note("stopped", worker=victim.who, seconds=seconds, frozen=frozen)
        below = self._harness.descendants(victim) if frozen else []
        pids = [victim.pid, *(process.pid for process in below)]
        self._signal(pids, signal.SIGSTOP)
        self._put_off(seconds, lambda: self._signal(pids, signal.SIGCONT))

    def _signal(self, pids: list[int], number: int) -> None:
        for pid in pids:
            self._harness.signal(pid, number)

    def _strike_cut(self) -> None:
        self._proxy.cut()

    def _strike_deaf(self) -> None:
        """Requests arrive, replies do not, and then the connections are cut."""
        self._proxy.is_deaf = True
        self._put_off(self._random.uniform(0.1, 1.0), self._hear)

    def _hear(self) -> None:
        self._proxy.is_deaf = False
        self._proxy.cut()

    def _strike_delay(self) -> None:
        self._proxy.delay_seconds = self._random.uniform(0.02, 0.2)
        self._put_off(1.0, self._hurry)

    def _hurry(self) -> None:
        self._proxy.delay_seconds = 0.0

    def _strike_drop(self) -> None:
        """Redis itself closes everybody's connections."""
        with suppress(redis.RedisError), self._harness.client() as client:
            client.client_kill_filter(_type=self._random.choice(("normal", "pubsub")), skipme=True)

    def _strike_redis(self) -> None:
        """kill -9, or a clean end; then it is started again, after a while."""
        how = self._random.choice((self._harness.redis.kill, self._harness.redis.stop))
        self._say(f"{how.__name__} Redis")
        self._harness.history.note("redis-ended", how=how.__name__)
        how()
        until = time.monotonic() + self._random.uniform(0.0, 1.5)
        while time.monotonic() < until:
            self._tend()
        self._harness.redis.start()

    # -- the end -------------------------------------------------------------------------------

    def _calm(self, submitters: list[Child]) -> None:
        """No more faults: all jobs must end."""
        for child in submitters:
            while child.status is None:
                self._tend()
            assert child.status == 0, self._harness.log(child.who)
        deadline = time.monotonic() + 150 + 4 * self._lease
        while time.monotonic() < deadline:
            self._tend()
            with suppress(redis.RedisError), self._harness.client() as client:
                if not jobs.unfinished(client) and not self._due:
                    return
        self._say("not all jobs ended; the checker will say which")

    def _drain(self) -> None:
        """All leave; what one does that will not is said, and what it leaves is for the checker."""
        try:
            self._harness.drain(list(self._workers.values()))
        except AssertionError as exc:
            self._say(f"does not leave: {exc}")
            self._harness.history.note("drained")

    def _count(self) -> None:
        """What `rq info` says of the queues, and what we say."""
        with self._harness.client() as client:
            theirs = rq_counts(self._harness.redis.url)
            self._harness.history.note("counted", rq=theirs, ours=our_counts(client))


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
