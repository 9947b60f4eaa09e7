"""What a process of the harness can be: a worker, a submitter, a reader, or RQ's own worker."""

from __future__ import annotations

import faulthandler
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import redis
import rq
import rq.cli.cli
from rq.serializers import JSONSerializer

import fleet.assembly
import fleet.worker
from broker import arrays, clock, ranges
from broker.command import FUNCTION, Command
from broker.connection import connect
from broker.errors import Conflict
from broker.queue import Queue
from broker.requirements import parse
from broker.submit import Options, Submission, submit_all
from tests.chaos import commands, witness
from tests.chaos.failpoints import Failpoints
from tests.chaos.history import VARIABLE, History

Order = Mapping[str, Any]

#: what jobs of a storm ask for; its workers have one to three CPUs, labels and, some of them, a GPU
ASKED: Sequence[dict[str, Any]] = (
    {"cpus": 1},
    {"cpus": 2, "priority": "high"},
    {"cpus": 0.5, "priority": "low"},
    {"memory": "600M"},
    {"cpus": 1, "memory": "300M"},
    {"gpus": 1},
    {"gpus": 0.5},
    {"labels": ["zone=a"]},
    {"cpus": 1, "labels": ["zone!=a"]},
    {"exclusive": True},
)


def be_worker(order: Order) -> int:
    """A worker of the fleet: `config` is its file, `failpoint` [call, how], `clock_offset` seconds."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    history = History(os.environ[VARIABLE], order["who"])
    witness.install(history)
    if order.get("failpoint"):
        Failpoints(history, order["who"], *order["failpoint"]).install()
    if order.get("clock_offset"):
        _shift_clock(order["clock_offset"])
    sys.argv[1:] = ["--config", order["config"]]
    return fleet.worker.main()


def _shift_clock(seconds: float) -> None:
    """Let this process believe in another wall clock."""
    true_time, true_wall = time.time, clock.wall
    time.time = lambda: true_time() + seconds
    clock.wall = lambda: true_wall() + timedelta(seconds=seconds)


def be_submitter(order: Order) -> int:
    """Submit `count` jobs to `queues`, in batches, each kind by its share; what happens is the seed's choice.

    Redis may be away or a reply lost at any moment: commands have ids of their own, so they are asked
    for again until Redis says that they are in; plain RQ jobs, whose client cannot ask so, are given up
    and submitted anew.
    """
    history = History(os.environ[VARIABLE], order["who"])
    submitter = _Submitter(order, history)
    submitter.run()
    return 0


class _Submitter:
    def __init__(self, order: Order, history: History) -> None:
        self._order, self._history = order, history
        self._random = random.Random(order["seed"])
        self._client = connect(order["url"], timeout_seconds=5.0)
        self._left: int = order["count"]
        self._serial = 0

    def run(self) -> None:
        kinds = (
            *(self._commands, self._functions, self._retried, self._dependents, self._trees),
            *(self._asking, self._arrays),
        )
        while self._left > 0:
            batch = min(self._left, self._random.randint(1, self._order["batch"]))
            kind = self._random.choices(kinds, self._order["shares"])[0]
            queue = self._random.choice(self._order["queues"])
            self._left -= kind(queue, batch)
            time.sleep(self._order.get("pause", 0.0))

    def _intend(self, queue: str, **more: Any) -> str:
        self._serial += 1
        job = f"{self._order['who']}-{self._serial}-{secrets.token_hex(3)}"
        self._history.note("intent", job=job, queue=queue, **({"retries": 0, "after": []} | more))
        return job

    def _some(self, ids: list[str]) -> list[str]:
        """Two at most, of the last ones."""
        recent = ids[-6:]
        return self._random.sample(recent, min(len(recent), self._random.randint(0, 2)))

    def _seconds(self) -> float:
        """How long a job is to run: most end at once."""
        return self._random.choice((0.1, 0.3, 0.6)) if self._random.random() < self._order["slow"] else 0.0

    def _commands(self, queue: str, count: int) -> int:
        rows = [self._command(queue, commands.work(self._seconds())) for _ in range(count)]
        self._insist(rows)
        return count

    def _command(self, queue: str, argv: tuple[str, ...], **options: Any) -> Submission:
        job = self._intend(queue, retries=options.get("retries", 0))
        return Submission(Command(argv), Options(**options), queue, job)

    def _retried(self, queue: str, count: int) -> int:
        how = {"retries": 2, "retry_delay_seconds": self._random.choice((0.0, 1.0))}
        self._insist([self._command(queue, commands.fail_at_first(), **how) for _ in range(count)])
        return count

    def _asking(self, queue: str, count: int) -> int:
        """Commands that ask for something of their worker; each has some worker that has it."""
        rows = []
        for _ in range(count):
            asked = self._random.choice(ASKED)
            job = self._intend(queue, asked=asked)
            options = Options(requirements=parse(asked))
            rows.append(Submission(Command(commands.work(self._seconds())), options, queue, job))
        self._insist(rows)
        return count

    def _insist(self, rows: list[Submission]) -> None:
        """One atomic batch; asked for again it is refused only because it is in."""
        while True:
            with suppress(redis.RedisError, OSError):
                with suppress(Conflict):
                    submit_all(self._client, rows)
                self._history.note("ack", jobs=[row.job_id for row in rows])
                return
            time.sleep(0.2)

    def _functions(self, queue: str, count: int) -> int:
        """Plain RQ's own way, many in one transaction."""
        plain = rq.Queue(queue, connection=self._client)
        ids = [self._intend(queue, retries=2) for _ in range(count)]
        data = [
            rq.Queue.prepare_data(
                "chaos_jobs.work", (self._seconds(),), job_id=job, retry=rq.Retry(max=2), result_ttl=604800
            )
            for job in ids
        ]
        return self._try(ids, lambda: plain.enqueue_many(data))

    def _dependents(self, queue: str, count: int) -> int:
        """Chains of two: a function, and a command that waits for it."""
        plain = Queue(queue, connection=self._client)
        for _ in range(max(1, count // 2)):
            self._chain(plain, queue)
        return 2 * max(1, count // 2)

    def _chain(self, plain: rq.Queue, queue: str) -> None:
        first = self._intend(queue, retries=2)
        how: dict[str, Any] = {"job_id": first, "retry": rq.Retry(max=2), "result_ttl": 604800}
        if self._try([first], lambda: plain.enqueue("chaos_jobs.work", 0.0, **how)):
            second = self._intend(queue, after=[first])
            self._try([second], lambda: depend(self._client, queue, first, second))

    def _trees(self, queue: str, count: int) -> int:
        """Commands that wait for one another, in any queue, and for a job of plain RQ; some of them fail."""
        plain = rq.Queue(queue, connection=self._client)
        first = self._intend(queue, retries=2)
        how: dict[str, Any] = {"job_id": first, "retry": rq.Retry(max=2), "result_ttl": 604800}
        ids = [first] if self._try([first], lambda: plain.enqueue("chaos_jobs.work", 0.0, **how)) else []
        rows = []
        for _ in range(count):
            after, other = self._some(ids), self._random.choice(self._order["queues"])
            after_any = [job for job in self._some(ids) if job not in after]
            job = self._intend(other, after=after, after_any=after_any)
            argv = commands.fail() if self._random.random() < 0.2 else commands.work(self._seconds())
            options = Options(after=tuple(after), after_any=tuple(after_any))
            rows.append(Submission(Command(argv), options, other, job))
            ids.append(job)
        self._insist(rows)
        return 1 + count

    def _arrays(self, queue: str, count: int) -> int:
        """An array, and one that follows it task by task; some of its tasks fail at first, or for good."""
        limit = self._random.choice((None, 1, 3))
        first = self._array(
            queue, count, self._random.choice((commands.work(), commands.fail_at_first())), limit
        )
        if first and self._random.random() < 0.5:
            self._array(queue, count, commands.work(), None, after=first)
        return count

    def _array(
        self, queue: str, count: int, argv: tuple[str, ...], limit: int | None, after: str | None = None
    ) -> str | None:
        """Its id; None where it may not be in, for a reply was lost."""
        array = self._intend(queue)
        ids = [f"{array}-{number}" for number in range(1, count + 1)]
        for number, job in enumerate(ids, 1):
            own = {"array": array, "max_parallel": limit, "after": [f"{after}-{number}"] if after else []}
            self._history.note("intent", job=job, queue=queue, retries=2, **own)
        options = Options(retries=2, retry_delay_seconds=0.0)
        submission = Submission(Command(argv), options, queue, array)
        tasks = arrays.Tasks(ranges.first(count), max_parallel=limit, after=after)
        is_in = self._try([array, *ids], lambda: arrays.submit(self._client, submission, tasks))
        return array if is_in else None

    def _try(self, ids: list[str], submit: Callable[[], Any]) -> int:
        try:
            submit()
        except (redis.RedisError, OSError):
            time.sleep(0.2)
            return 0
        self._history.note("ack", jobs=ids)
        return len(ids)


def depend(client: redis.Redis, queue: str, parent: str, job_id: str) -> None:
    """A command that waits for another job, made by RQ's own client.

    In a pipeline of ours: in its own, RQ takes a lost reply for a change of what it watched, and enqueues
    the job again. Raises redis.WatchError where the other job ended meanwhile: then nothing was done.
    """
    document = {"argv": list(commands.work())}
    job = rq.job.Job.create(
        FUNCTION,
        args=(document,),
        id=job_id,
        connection=client,
        serializer=JSONSerializer,
        depends_on=rq.job.Dependency(jobs=[parent]),
        timeout=-1,
        result_ttl=604800,
    )
    with client.pipeline() as pipe:
        Queue(queue, connection=client, serializer=JSONSerializer).enqueue_job(job, pipeline=pipe)
        pipe.execute()


def be_rq_info(order: Order) -> int:
    """RQ's own `rq info`, over and over; it must change nothing, whatever else is going on."""
    for _ in range(order["times"]):
        with suppress(redis.RedisError, OSError):
            rq.cli.cli.main(["info", "--raw", "--url", order["url"]], standalone_mode=False)
        time.sleep(order["pause"])
    return 0


def be_rq_worker(order: Order) -> int:
    """RQ's own worker, as `rq worker` starts it, with a failpoint; see `_HurriedWorker`."""
    history = History(os.environ[VARIABLE], order["who"])
    if order.get("failpoint"):
        Failpoints(history, order["who"], *order["failpoint"]).install()
    sys.path.insert(0, str(Path(__file__).parent))
    client = redis.Redis.from_url(order["url"])
    queues = [rq.Queue(name, connection=client) for name in order["queues"]]
    worker = _HurriedWorker(queues, connection=client, name=order["who"], job_monitoring_interval=1)
    worker.work(burst=order.get("burst", False), with_scheduler=False)
    return 0


class _HurriedWorker(rq.Worker):
    """RQ's worker, whose 60 seconds of grace in each heartbeat are 2: a test need not wait for them."""

    def get_heartbeat_ttl(self, job: rq.job.Job) -> int:
        return max(1, super().get_heartbeat_ttl(job) - 58)


ROLES: dict[str, Callable[[Order], int]] = {
    "worker": be_worker,
    "submitter": be_submitter,
    "rq-info": be_rq_info,
    "rq-worker": be_rq_worker,
}
