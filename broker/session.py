"""Everything one worker says to Redis: it registers, beats, claims, reports ends, and leaves.

One class owns every change of state that a worker makes; nothing else in a worker touches
a job's hash. Nothing here is retried: a claim whose reply was lost is given back by the next
beat, and an end whose reply was lost is reported again and recognised if it had arrived.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from broker import __version__, failures, keys, labels, scripts
from broker.line import Line
from broker.work import NO_PLACES, Beat, Claim, End, Exchange, Places, Round, Tails, fence_of
from broker.worker_settings import WorkerSettings

#: seconds the record of a worker that died stays: one that stays, and one that leaves after a job
RECORD_TTL = 7 * 86400
EPHEMERAL_RECORD_TTL = 3600
#: bytes of ends in one round: while Redis reads them it serves nobody else
_ROUND_BYTES = 8 << 20


@dataclass(frozen=True)
class Identity:
    """Who a worker is. `incarnation` is new with each start: 16 hexadecimal digits."""

    name: str
    host: str
    queues: tuple[str, ...]
    pid: int
    python_version: str
    ephemeral: bool = False
    #: of the queues: how often each comes first; none: always in this order
    weights: tuple[int, ...] = ()
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
        #: the record that an earlier life of this worker left
        self._left_behind: bytes | str | None = None
        name = identity.name
        self._round_keys = [
            keys.worker_beat(name),
            keys.worker_leases(name),
            keys.worker_drain(name),
            keys.rq_worker(name),
            keys.worker_ended(name),
        ]

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
        self._look_back(client)
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

    def _look_back(self, client: redis.Redis) -> None:
        """Remember the record that an earlier life left, before it is overwritten."""
        [record] = client.mget([keys.worker_record(self.identity.name)])
        if record and not failures.is_of(record, self.identity.incarnation):
            self._left_behind = record

    def retire(self, client: redis.Redis, *, known_seconds: int = 0) -> bool:
        """Leave the registry; False where leases are left, or another life has the name.

        For `known_seconds` `broker.hosts.signs` tells that this life was here, and has left.
        """
        who = self.identity
        return retire(client, who.name, who.queues, who.incarnation, known_seconds=known_seconds)

    def begin(
        self,
        ends: Sequence[End],
        wanted: int,
        ahead: int = 0,
        *,
        is_deaf: bool = False,
        places: Places = NO_PLACES,
    ) -> Exchange:
        """A round trip that reports `ends` and claims up to `wanted` jobs, and `ahead` more.

        What comes ahead is to be started soon or handed back; no job that was lost before does.
        One that `is_deaf` waits for signals alone, and gets one should fewer than `wanted` come.
        Of many or large ends, as many are taken as fit into one call. It must be sent, and then
        either completed or abandoned, before the next is begun.
        """
        self.claims_sent += 1
        taken = _that_fit(ends)
        queues = self._in_order()
        names = [name for queue in queues for name in (keys.queue(queue), keys.wake(queue))]
        arguments = self._round_arguments(wanted, ahead, is_deaf)
        arguments += _placing(queues, places)
        for end in taken:
            arguments += end.arguments()
        return Exchange(self.claims_sent, tuple(taken), wanted, ahead, self._round_keys + names, arguments)

    def _in_order(self) -> Sequence[str]:
        """The queues, with the first to be claimed from in front: by weight, drawn anew each time.

        By u ** (1 / weight), u uniform: P. Efraimidis, P. Spirakis, Weighted random sampling (2006).
        """
        who = self.identity
        if not who.weights:
            return who.queues
        lots = {q: random.random() ** (1 / weight) for q, weight in zip(who.queues, who.weights, strict=True)}
        return sorted(who.queues, key=lambda queue: -lots[queue])

    def send(self, line: Line, exchange: Exchange) -> None:
        """Send it; the answer is what `complete` is to be given."""
        line.send(scripts.ROUND, exchange.keys, exchange.arguments)

    def complete(self, exchange: Exchange, reply: Any) -> Round:
        """What the answer means. Call `settle` once its claims are where a beat will see them."""
        outcomes, claims, given, registered, draining, suspended, more, held = reply
        accepted = tuple(outcome == 1 for outcome in outcomes)
        self._tally(exchange.ends, accepted)
        return Round(
            accepted,
            _claims(claims, given),
            registered == 1,
            draining == 1,
            suspended == 1,
            more == 1,
            held.decode(),
        )

    def settle(self, exchange: Exchange) -> None:
        """Its claims are known to the worker, or its reply will never come: from now on a beat may
        give back what the server holds of it and the beat does not name."""
        self.claims_settled = exchange.number

    def _round_arguments(self, wanted: int, ahead: int, is_deaf: bool) -> list[Any]:
        who, settings, number = self.identity, self.settings, self.claims_sent
        arguments: list[Any] = [who.name, who.incarnation, self.lease_ms, settings.result_ttl_seconds]
        arguments += [settings.losses_limit, number, wanted, ahead, f"{who.incarnation}{number:012x}"]
        arguments += [self.finished, self.failed, self.seconds_worked]
        arguments.append(int(is_deaf))
        return arguments

    def _tally(self, ends: Sequence[End], accepted: Sequence[bool]) -> None:
        for end, is_accepted in zip(ends, accepted, strict=True):
            if is_accepted:
                self.finished += end.outcome == "finished"
                self.failed += end.outcome in ("failed", "stopped", "retry")
                self.seconds_worked += end.duration_seconds or 0.0

    def beat(self, client: redis.Redis, record: str, leases: Mapping[str, str], settled: int) -> Beat:
        """Say that this worker lives and renew `leases` (lease -> job), in one round trip.

        `settled` is `claims_settled`, read before `leases` were: a claim under way is not an orphan.
        """
        who = self.identity
        flat = [part for lease, job in leases.items() for part in (job, lease)]
        state, lost, stop, foreign, draining, suspended, workers, labelled, sets_version = scripts.BEAT(
            client,
            [
                keys.worker_beat(who.name),
                keys.worker_record(who.name),
                keys.rq_worker(who.name),
                keys.worker_leases(who.name),
                keys.worker_drain(who.name),
                keys.worker_labels(who.name),
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
            labels.told(_pairs(labelled)),
            sets_version,
        )

    def restore_labels(self, client: redis.Redis, known: Mapping[str, str]) -> None:
        """Write back the labels that operators gave this worker, which Redis has lost."""
        ttl = EPHEMERAL_RECORD_TTL if self.identity.ephemeral else None
        labels.restore(client, self.identity.name, known, ttl)

    def lose_foreign(
        self, client: redis.Redis, leases: Iterable[tuple[str, str]], *, uncounted: bool = False
    ) -> int:
        """Count as lost what an earlier life of this worker held; its processes must be gone.

        `uncounted`: no job is to blame, so the losses count for none. Nor do they where `chores.elect`
        knows that Redis was away.
        """
        seen = failures.last_seen(self._left_behind)
        reason = f"WorkerLost: worker {self.identity.name} {seen}was restarted while it ran the job"
        newest_first = sorted(leases, key=lambda held: fence_of(held[1]), reverse=True)
        rows = [failures.lost_row(job, lease, reason, uncounted=uncounted) for job, lease in newest_first]
        reply: int = scripts.LOSE(
            client, [keys.LEASES, keys.LOSSES_NOT_BEFORE], [self.settings.losses_limit, 0, *rows]
        )
        return reply

    def save_output(self, client: redis.Redis, claim: Claim, tails: Tails) -> None:
        """Let others see the output of a running job; dropped if the lease is no longer ours."""
        scripts.OUTPUT(
            client,
            [keys.job(claim.job_id), keys.output(claim.job_id)],
            [claim.lease, self.settings.result_ttl_seconds, tails.stdout, tails.stdout_end]
            + [tails.stderr, tails.stderr_end],
        )


def retire(
    client: redis.Redis, name: str, queues: Iterable[str], incarnation: str = "", *, known_seconds: int = 0
) -> bool:
    """Remove the record of a worker: its own leaving, or an operator's `forget` of one offline."""
    names = [keys.worker_beat(name), keys.worker_record(name), keys.rq_worker(name)]
    names += [keys.worker_signals(name), keys.worker_leases(name), keys.worker_ended(name)]
    names.append(keys.worker_left(name))
    return bool(scripts.RETIRE(client, names, [name, incarnation, known_seconds, *queues]) == 1)


def _placing(queues: Sequence[str], places: Places) -> list[Any]:
    """The arguments of round.lua about where to claim."""
    rows = [word for queue in queues for word in (queue, places.sets.get(queue, ""))]
    return [places.free, " ".join(places.popped), len(queues), *rows]


def _that_fit(ends: Sequence[End]) -> Sequence[End]:
    """The first ends, at least one, that are not too many bytes for one call."""
    room = _ROUND_BYTES
    for count, end in enumerate(ends):
        room -= end.size()
        if room < 0:
            return ends[: max(1, count)]
    return ends


def _own_address(client: redis.Redis) -> str:
    """ip:port by which Redis knows this connection, as RQ shows it."""
    try:
        return str(client.client_info()["addr"])
    except (redis.ResponseError, KeyError):
        return "unknown"  # an ACL without CLIENT INFO


def _claims(rows: Sequence[Any], given: Sequence[bytes]) -> tuple[Claim, ...]:
    """The jobs of a round's reply, each with its hash as it is now."""
    changed = _pairs(given)
    return tuple(_claim(row, changed) for row in rows)


def _claim(row: Sequence[Any], changed: Mapping[bytes, bytes]) -> Claim:
    *flat, queue, job_id, lease = row
    fields = _pairs(flat)
    fields.update(changed)
    fields[b"fleet_lease"], fields[b"origin"] = lease, queue
    return Claim(job_id.decode(), queue.decode(), lease.decode(), fields)


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    parts = iter(flat)
    return dict(zip(parts, parts, strict=True))
