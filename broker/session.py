"""Everything one worker says to Redis: it registers, beats, claims, reports ends, and leaves.

One class owns every change of state that a worker makes; nothing else in a worker touches
a job's hash. Nothing here is retried: a claim whose reply was lost is given back by the next
beat, and an end whose reply was lost is reported again and found stale if it had arrived.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from broker import __version__, failures, keys, scripts
from broker.settings import WorkerSettings
from broker.work import Beat, Claim, End, Round, Tails

#: seconds the record of a worker that died stays: one that stays, and one that leaves after a job
RECORD_TTL = 7 * 86400
EPHEMERAL_RECORD_TTL = 3600


@dataclass(frozen=True)
class Identity:
    """Who a worker is. `incarnation` is new with each start: 16 hexadecimal digits."""

    name: str
    host: str
    queues: tuple[str, ...]
    pid: int
    python_version: str
    ephemeral: bool = False
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def record_ttl(self) -> int:
        """Seconds its record outlives its last beat."""
        return EPHEMERAL_RECORD_TTL if self.ephemeral else RECORD_TTL

    def rq_fields(self, address: str) -> dict[str, str | int]:
        """The fields of rq:worker:NAME that stay the same."""
        return {
            "queues": ",".join(self.queues),
            "pid": self.pid,
            "hostname": self.host,
            "ip_address": address,
            "version": f"fleet-{__version__}",
            "python_version": self.python_version,
        }


class Session:
    """A worker's side of the broker; one for each worker, shared by its threads.

    Each method takes the connection to speak on, for a thread has one of its own. All raise
    what redis-py raises; `lease_ms` counts on Redis's clock.
    """

    def __init__(self, identity: Identity, settings: WorkerSettings) -> None:
        self.identity = identity
        self.settings = settings
        self.lease_ms = int(settings.lease_seconds * 1000)
        #: claims sent so far; the beat says up to which of them replies are in
        self.claims_sent = 0
        self.claims_settled = 0
        #: attempts of this life that were accepted as finished, and as failed or stopped
        self.finished = 0
        self.failed = 0
        self.seconds_worked = 0.0
        name = identity.name
        self._round_keys = [
            keys.worker_beat(name),
            keys.worker_leases(name),
            keys.worker_drain(name),
            keys.rq_worker(name),
        ]
        for queue in identity.queues:
            self._round_keys += [keys.queue(queue), keys.wake(queue)]

    def register(self, client: redis.Redis, record: str, *, replaces: str = "") -> str:
        """Enter the registry. Returns '' or the JSON record of the live worker that has the name.

        `replaces` is the incarnation of an earlier life that is known to be over.
        """
        who = self.identity
        counts = {
            "successful_job_count": self.finished,
            "failed_job_count": self.failed,
            "total_working_time": self.seconds_worked,
        }
        fields = who.rq_fields(_own_address(client)) | counts
        flat = [part for row in fields.items() for part in row]
        reply: bytes = scripts.REGISTER(
            client,
            [
                keys.worker_beat(who.name),
                keys.worker_record(who.name),
                keys.rq_worker(who.name),
                keys.worker_signals(who.name),
            ],
            [who.name, who.incarnation, replaces, self.lease_ms, record, who.record_ttl]
            + [len(who.queues), *who.queues, *flat],
        )
        return reply.decode()

    def retire(self, client: redis.Redis) -> bool:
        """Leave the registry; False where leases are left, or another life has the name."""
        return retire(client, self.identity.name, self.identity.queues, self.identity.incarnation)

    def round(self, client: scripts.Runner, ends: Sequence[End], wanted: int, ahead: int = 0) -> Round:
        """Report `ends` and claim up to `wanted` jobs, and `ahead` more, in one round trip.

        What comes ahead is to be started soon or handed back; no job that was lost before does.

        Call `settle` once the claims are where a beat will see them.
        """
        self.claims_sent += 1
        number = self.claims_sent
        try:
            reply = scripts.ROUND(
                client, self._round_keys, self._round_arguments(ends, wanted, ahead, number)
            )
        except BaseException:
            # the reply will never come: the next beat may give back what the claim took
            self.claims_settled = number
            raise
        outcomes, claims, registered, draining, suspended = reply
        self._tally(ends, outcomes)
        return Round(
            number,
            tuple(outcome == 1 for outcome in outcomes),
            tuple(_claim(row) for row in claims),
            registered == 1,
            draining == 1,
            suspended == 1,
        )

    def _round_arguments(self, ends: Sequence[End], wanted: int, ahead: int, number: int) -> list[Any]:
        who, settings = self.identity, self.settings
        arguments: list[Any] = [who.name, who.incarnation, self.lease_ms, settings.result_ttl_seconds]
        arguments += [settings.losses_limit, number, wanted, ahead, f"{who.incarnation}{number:012x}"]
        arguments += [self.finished, self.failed, self.seconds_worked, len(who.queues), *who.queues]
        for end in ends:
            arguments += end.arguments()
        return arguments

    def _tally(self, ends: Sequence[End], outcomes: Sequence[int]) -> None:
        for end, outcome in zip(ends, outcomes, strict=True):
            if outcome == 1:
                self.finished += end.outcome == "finished"
                self.failed += end.outcome in ("failed", "stopped")
                self.seconds_worked += end.duration_seconds or 0.0

    def settle(self, done: Round) -> None:
        """The claims of `done` are known to the worker: a beat may give back what it does not name."""
        self.claims_settled = done.number

    def beat(self, client: redis.Redis, record: str, leases: Mapping[str, str], settled: int) -> Beat:
        """Say that this worker lives and renew `leases` (lease -> job), in one round trip.

        `settled` is `claims_settled`, read before `leases` were: a claim under way is not an orphan.
        """
        who = self.identity
        flat = [part for lease, job in leases.items() for part in (job, lease)]
        state, lost, stop, foreign, draining, suspended, workers = scripts.BEAT(
            client,
            [
                keys.worker_beat(who.name),
                keys.worker_record(who.name),
                keys.rq_worker(who.name),
                keys.worker_leases(who.name),
                keys.worker_drain(who.name),
            ],
            [who.name, who.incarnation, self.lease_ms, record, who.record_ttl, settled, *flat],
        )
        return Beat(
            state.decode(),
            frozenset(lease.decode() for lease in lost),
            frozenset(lease.decode() for lease in stop),
            tuple((job.decode(), lease.decode()) for job, lease in foreign),
            draining == 1,
            suspended == 1,
            workers,
        )

    def lose_foreign(self, client: redis.Redis, leases: Iterable[tuple[str, str]]) -> int:
        """Count as lost what an earlier life of this worker held; its processes must be gone."""
        reason = f"WorkerLost: worker {self.identity.name} was restarted while it ran the job"
        rows = [failures.lost_row(job, lease, reason, uncounted=False) for job, lease in leases]
        reply: int = scripts.LOSE(client, [keys.LEASES], [self.settings.losses_limit, 0, *rows])
        return reply

    def save_output(self, client: redis.Redis, claim: Claim, tails: Tails) -> None:
        """Let others see the output of a running job; dropped if the lease is no longer ours."""
        scripts.OUTPUT(
            client,
            [keys.job(claim.job_id), keys.output(claim.job_id)],
            [claim.lease, self.settings.result_ttl_seconds, tails.stdout, tails.stdout_end]
            + [tails.stderr, tails.stderr_end],
        )


def retire(client: redis.Redis, name: str, queues: Iterable[str], incarnation: str = "") -> bool:
    """Remove the record of a worker: its own leaving, or an operator's `forget` of one offline."""
    names = [keys.worker_beat(name), keys.worker_record(name), keys.rq_worker(name)]
    names += [keys.worker_signals(name), keys.worker_leases(name)]
    return bool(scripts.RETIRE(client, names, [name, incarnation, *queues]) == 1)


def _own_address(client: redis.Redis) -> str:
    """ip:port by which Redis knows this connection, as RQ shows it."""
    try:
        return str(client.client_info()["addr"])
    except (redis.ResponseError, KeyError):
        return "unknown"  # an ACL without CLIENT INFO


def _claim(row: Any) -> Claim:
    queue, job_id, lease, flat = row
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return Claim(job_id.decode(), queue.decode(), lease.decode(), fields)
