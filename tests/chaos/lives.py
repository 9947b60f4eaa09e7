"""Scripted lives: a worker runs a job of each kind, with a fault at one chosen call to Redis, and leaves."""

from __future__ import annotations

import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import redis

from broker import arrays, ranges
from broker.command import Command
from broker.session import retire
from broker.submit import Options, Submission, submit_all, submit_commands
from tests.chaos import commands, journal, story
from tests.chaos.evidence import Evidence
from tests.chaos.failpoints import HOWS
from tests.chaos.harness import Child, Harness, dumped
from tests.chaos.history import Event, read
from tests.chaos.roles import depend

#: lives lived side by side, each in a database of its own
_AT_ONCE = 24
_KINDS = ("plain", "long", "retried", "dependent", "failing", "hopeless", "anyway", "array")
#: tasks of the array, and how many of them may run at once
_TASKS, _MAX_PARALLEL = 3, 2
_LONGEST_SECONDS = 150.0


@dataclass(frozen=True)
class Fault:
    """Where a life is hit. `whose`: the worker itself, its next life, or the one that recovers its jobs."""

    call: str
    how: str
    whose: str = "first"


@dataclass
class Life:
    """One worker's life, in a database of its own."""

    harness: Harness
    database: int
    fault: Fault | None = None

    @property
    def name(self) -> str:
        return f"w{self.database}"

    @property
    def ids(self) -> list[str]:
        return [f"{self.name}-{kind}" for kind in _KINDS]

    def live(self) -> None:
        """Live it. A worker that dies is started again, and lives on without a fault."""
        with self.harness.client(self.database) as client:
            self._submit(client)
            worker = self._first_worker(client)
            self._until_ended(client, worker)
            while worker.status is not None:
                worker = self._start(worker.who)
                self.harness.until_registered(client, worker)  # before that it has nothing to sign off
                self._until_ended(client, worker)
            self._leave(worker, client)
            self._forget_the_dead(client)

    def _first_worker(self, client: redis.Redis) -> Child:
        fault = self.fault
        if fault is None or fault.whose == "first":
            return self._start(self.name, fault)
        killed = self._start(self.name, Fault("round#2", "die-before"))
        self._until_ended(client, killed)
        return self._start(self.name if fault.whose == "next" else f"{self.name}.heir", fault)

    def _start(self, name: str, fault: Fault | None = None) -> Child:
        url = f"redis://127.0.0.1:{self.harness.redis.port}/{self.database}"
        point = (fault.call, fault.how) if fault else ("none", "")
        return self.harness.worker(name, url=url, slots=2, failpoint=point)

    def _until_ended(self, client: redis.Redis, worker: Child) -> None:
        self.harness.until(
            lambda: worker.status is not None or self.harness.have_ended(client, self.ids),
            f"the jobs of {self.name} ended with {self.fault}",
            _LONGEST_SECONDS,
        )

    def _leave(self, worker: Child, client: redis.Redis) -> None:
        self.harness.kill(worker, signal.SIGTERM)
        if self.harness.wait(worker) == 0 and "could not sign off" not in self.harness.log(worker.who):
            return
        worker = self._start(worker.who)
        self.harness.until_registered(client, worker)
        self.harness.kill(worker, signal.SIGTERM)
        assert self.harness.wait(worker) == 0, self.harness.log(worker.who)

    def _forget_the_dead(self, client: redis.Redis) -> None:
        """What an operator does with a worker that never came back."""
        if self.fault and self.fault.whose == "other":
            assert retire(client, self.name, ["default"])

    def _submit(self, client: redis.Redis) -> None:
        plain, long, retried, dependent, failing, hopeless, anyway, array = self.ids
        tasks = [f"{array}-{number}" for number in range(1, _TASKS + 1)]
        more: dict[str, dict[str, Any]] = {
            retried: {"retries": 1},
            dependent: {"after": [plain]},
            hopeless: {"after": [failing]},
            anyway: {"after": [plain], "after_any": [hopeless]},
        }
        more |= {task: {"array": array, "max_parallel": _MAX_PARALLEL} for task in tasks}
        for job in [*self.ids, *tasks]:
            own = {"retries": 0} | more.get(job, {})
            self.harness.history.note("intent", job=job, queue="default", **own)
        rows = [(plain, Command(commands.work())), (long, Command(commands.work(1.2)))]
        submit_commands(client, "default", rows, Options())
        once_more = Options(retries=1, retry_delay_seconds=0.6)
        submit_commands(client, "default", [(retried, Command(commands.fail_at_first()))], once_more)
        depend(client, "default", plain, dependent)
        tree = [
            Submission(Command(commands.fail()), job_id=failing),
            Submission(Command(commands.work()), Options(after=(failing,)), job_id=hopeless),
            Submission(
                Command(commands.work()), Options(after=(plain,), after_any=(hopeless,)), job_id=anyway
            ),
        ]
        submit_all(client, tree)
        several = arrays.Tasks(ranges.first(_TASKS), max_parallel=_MAX_PARALLEL)
        arrays.submit(client, Submission(Command(commands.work()), job_id=array), several)
        self.harness.history.note("ack", jobs=[*self.ids, *tasks])


def calls_of_a_life(harness: Harness) -> list[str]:
    """Every call that a worker makes in an undisturbed life, once the scripts are known to Redis."""
    Life(harness, 0).live()
    life = Life(harness, 1)
    life.live()
    return [event["call"] for event in evidence_of(harness, [life])[life.database].named("call")]


def chosen(calls: Iterable[str], most: Mapping[str, int]) -> list[str]:
    """The first calls of each name; `most` of it, or one."""
    return [call for call in calls if int(call.partition("#")[2]) <= most.get(call.partition("#")[0], 1)]


def faults(calls: Iterable[str]) -> list[Fault]:
    """Each call with each fault, and those of the scripts that take jobs from a dead worker."""
    found = [Fault(call, how) for call in calls for how in HOWS]
    return found + [Fault("lose#1", how, whose) for how in HOWS for whose in ("next", "other")]


def live(harness: Harness, wanted: Sequence[Fault], first_database: int = 2) -> list[Life]:
    """Live one life for each fault."""
    lives = [Life(harness, number, fault) for number, fault in enumerate(wanted, first_database)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(Life.live, lives):
            pass
    return lives


def evidence_of(harness: Harness, lives: Iterable[Life]) -> dict[int, Evidence]:
    """What each life left, by the number of its database: its part of the history, and its database."""
    own: dict[str, list[Event]] = defaultdict(list)
    for event in read(harness.path):
        own[_whose(event)].append(event)
    stories = story.stories(journal.files(harness.redis.folder))
    found = {}
    for life in lives:
        with harness.client(life.database) as client:
            drained = {"at": 0.0, "event": "drained", "who": "harness"}
            events = [*own[life.name], drained]
            found[life.database] = Evidence(events, stories[life.database], dumped(client))
    return found


def _whose(event: Event) -> str:
    """The name of the life that an event belongs to: the worker's, or that before the kind of its job."""
    name = event["who"] if event["who"].startswith("w") else event.get("worker") or ""
    job = event.get("job") or event.get("jobs", [""])[0]
    return name.partition(".")[0] or job.partition("-")[0]


def tally(found: Iterable[Evidence]) -> Counter[str]:
    """How many faults there were of each kind."""
    return Counter(event["how"] for evidence in found for event in evidence.named("failpoint"))
