"""One worker in the foreground, for `fleet.worker` and `fleet worker`.

Puts the parts together, registers, runs the loop, and leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import platform
import selectors
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import redis

from broker import __version__, clock, jobs, names
from broker.connection import address, connect, translated
from broker.errors import FleetError, UsageError
from broker.session import Identity, Session
from broker.worker_settings import WorkerSettings
from fleet import jitter, ledger, lifecycle, logs, offer, resources
from fleet.attempt import CommandContext
from fleet.beater import Beater, patience
from fleet.chores import AllDone, ChoreThread
from fleet.executors import ExecutorConfig, ExecutorPool
from fleet.guard import Guard
from fleet.launchers.agent import TOKEN_VARIABLE
from fleet.limits import Limits
from fleet.links import Links
from fleet.logs import about
from fleet.loop import Parts, WorkerLoop
from fleet.mailbox import Mailbox
from fleet.memory import Memory
from fleet.meters import HostMeter
from fleet.offer import Offering
from fleet.outputs import Folders, Outputs, WorkingFolders
from fleet.placement import Placement
from fleet.room import Room
from fleet.sampler import Sampler, Sampling
from fleet.series import About, Series
from fleet.signals import StopSignals, kept_from_threads
from fleet.slots import Slots
from fleet.slurm import granted
from fleet.worker_config import WorkerConfig, state_dir

log = logging.getLogger("fleet.worker")

#: seconds for which `fleet up`, which may have missed its beats, sees that a worker left by itself
_KNOWN_SECONDS = 300

#: variables that jobs must not see: they may carry a secret
_SECRETS = ("FLEET_REDIS_URL", "FLEET_REDIS_PASSWORD_FILE", "REDIS_URL", "RQ_REDIS_URL")
#: what no job gets: secrets, and the mark of the worker's own process
_NOT_FOR_JOBS = (*_SECRETS, TOKEN_VARIABLE)


def run(config: WorkerConfig, settings: WorkerSettings, signals: StopSignals) -> int:
    """Run one worker until it is told to stop or has nothing left to do; returns the exit code.

    Raises UsageError for a folder or an interpreter that cannot be used, Conflict for a name
    that is taken, RedisUnreachable or RedisDenied where it cannot begin, and SystemExit where
    it is told to stop before it has.
    """
    config.checked()
    ends_at = offer.ends_at(config.time_limit_seconds)
    _wait_its_turn(config)
    if config.in_slurm:
        ends_at = min(
            (end for end in (ends_at, granted.ends_at(os.environ)) if end is not None), default=None
        )
    folders = Folders(config.output_dir)
    lifecycle.prepare(folders)
    lifecycle.check_executor(config.executor_python, folders)
    lock = lifecycle.NameLock(folders, config.name)
    try:
        lock.acquire()
        with _offering(config, ends_at) as offering:
            while True:
                code, has_work = _run_locked(config, settings, folders, lock, signals, offering)
                if not has_work:
                    return code
    finally:
        lock.release()


@contextmanager
def _offering(config: WorkerConfig, ends_at: float | None) -> Iterator[Offering]:
    """What it offers; what it has of its host is its own until the block is left."""
    file = ledger.path(state_dir())
    said = {"cpus": None, "memory_bytes": None, "num_gpus": None, **config.resources}
    wish = ledger.Wish(**said, is_modest=config.is_modest, number=config.sibling, of=config.siblings)
    promise = ledger.Promise(file, config.name, wish)
    try:
        yield Offering(config, promise.share, ends_at, promise)
    finally:
        ledger.release(file)


def _wait_its_turn(config: WorkerConfig) -> None:
    """Begin at its own moment of the window in which many start. Raises SystemExit if told to stop."""
    who = jitter.identity_of(config.host, config.name, os.environ)
    delay = jitter.delay_seconds(config.startup_delay_seconds, *who)
    if delay:
        log.info("starting in %.3f s, so that not all workers come at once", delay, extra=about("waiting"))
        time.sleep(delay)


def _run_locked(
    config: WorkerConfig,
    settings: WorkerSettings,
    folders: Folders,
    lock: lifecycle.NameLock,
    signals: StopSignals,
    offering: Offering,
) -> tuple[int, bool]:
    """Returns the exit code, and whether work came for it alone while it left, so that it must go on."""
    queues, weights = names.weighted_queues(config.queues)
    who = Identity(
        config.name,
        config.host,
        queues,
        os.getpid(),
        platform.python_version(),
        ephemeral=config.ephemeral,
        weights=weights,
    )
    session = Session(who, settings)
    client = _connect(config, settings)
    describe = _Description(config, session, lock.identity(), offering)
    with translated(address(client)):
        client.ping()  # what takes time comes first
        signals.hold()
        lifecycle.enter(session, client, describe(), lock, signals.sleep)
    log.info("worker %s registered at Redis %s", config.name, address(client), extra=about("registered"))
    if weights:
        shares = ", ".join(f"{queue} {weight}" for queue, weight in zip(queues, weights, strict=True))
        log.info("queues by weight: %s", shares, extra=about("queues"))
    try:
        with translated(address(client)):
            is_requeued = config.in_slurm and granted.was_requeued(os.environ)
            beat = lifecycle.inherit(session, client, describe(), uncounted=is_requeued)
            offering.heard(beat.labels or {})
        code = _work(config, session, client, folders, lock, describe, signals)
    finally:
        _leave(session, client, known_seconds=_KNOWN_SECONDS if config.ephemeral or config.until_done else 0)
    return code, config.only_set != "" and describe.was_done and _has_work(config, client)


def _has_work(config: WorkerConfig, client: redis.Redis) -> bool:
    """Whether there are jobs for it alone. Who submits one looks afterwards whether it still beats."""
    with suppress(redis.RedisError):
        return jobs.unfinished(client, config.served) > 0
    return False


def _work(
    config: WorkerConfig,
    session: Session,
    client: redis.Redis,
    folders: Folders,
    lock: lifecycle.NameLock,
    describe: _Description,
    signals: StopSignals,
) -> int:
    """Build the parts round the loop, run it, and take them down in the opposite order."""
    with ExitStack() as stack:
        note = lifecycle.write_run_file(folders, config.name, session.identity.incarnation)
        stack.callback(partial(note.unlink, missing_ok=True))
        guard = Guard(session.identity.incarnation, lock.fd)
        stack.callback(guard.close)
        parts = _parts(stack, config, session, client, folders, guard, describe.offering)
        loop = WorkerLoop(config, parts)
        describe.loop = loop
        if config.in_slurm:
            signals.hand_to(loop.end_with_allocation, parts.mail.wake_fd, loop.warn)
        else:
            signals.hand_to(loop.request_stop, parts.mail.wake_fd)
        loop.beater = Beater(
            session,
            _connect(config, session.settings),
            leases=parts.slots.leases,
            record=describe,
            renewed=guard.renew,
            post=parts.mail.post,
        )
        for thread in (loop.beater, _chores(config, session, folders, parts.mail), parts.sampler):
            with kept_from_threads():
                thread.start()
            stack.callback(thread.stop)
        _collect_garbage_rarely()
        return loop.run()


def _chores(config: WorkerConfig, session: Session, folders: Folders, mail: Mailbox) -> ChoreThread:
    return ChoreThread(
        session,
        _connect(config, session.settings),
        folders,
        all_done=partial(mail.post, AllDone()) if config.until_done else None,
        queues=config.served,
    )


def _collect_garbage_rarely() -> None:
    """What is there by now stays, and a job leaves no cycles: looking for some is a tenth of its cost."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _connect(config: WorkerConfig, settings: WorkerSettings) -> redis.Redis:
    """A client that gives up a silent connection while there is time for another beat."""
    return connect(config.redis_url, timeout_seconds=patience(settings.lease_seconds))


def _parts(
    stack: ExitStack,
    config: WorkerConfig,
    session: Session,
    client: redis.Redis,
    folders: Folders,
    guard: Guard,
    offering: Offering,
) -> Parts:
    settings = session.settings
    environ = job_environ(os.environ, config, session.identity.incarnation)
    executors = _executor_config(config, settings, folders, environ)
    selector = stack.enter_context(selectors.DefaultSelector())
    pool = ExecutorPool(executors, selector=selector, on_spawn=guard.add, on_exit=guard.remove)
    stack.callback(pool.close)
    links = Links(session, client, selector)
    stack.callback(links.close)
    context = _command_context(stack, config, settings, folders, environ)
    share = offering.share
    placement = Placement(
        session.identity.queues,
        offering.offer(),
        Room(share.total, config.slots, share.cpu_ids, share.gpu_ids),
        settings,
        config.only_set,
    )
    mail = Mailbox()
    sampler = Sampler(resources.gpu_uses, mail.post, _sampling(config, settings, folders))
    slots = Slots(
        config.slots, settings, context, pool, guard, placement, sampler, may_hear_late=config.in_slurm
    )
    return Parts(session, selector, links, slots, pool, guard, mail, folders, offering, placement, sampler)


def _command_context(
    stack: ExitStack,
    config: WorkerConfig,
    settings: WorkerSettings,
    folders: Folders,
    environ: Mapping[str, str],
) -> CommandContext:
    null, home = (os.open(path, os.O_RDONLY) for path in (os.devnull, "."))
    working = WorkingFolders(folders, config.name)
    stack.callback(working.close)
    outputs = Outputs(folders)
    stack.callback(outputs.clear)
    limits = Limits()
    stack.callback(limits.close)
    encoded = {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}
    return CommandContext(
        folders, outputs, working, encoded, null, home, Memory(), limits, settings.max_result_bytes
    )


def _sampling(config: WorkerConfig, settings: WorkerSettings, folders: Folders) -> Sampling | None:
    if not settings.sample_seconds:
        return None
    about = About(config.host, config.name, os.cpu_count() or 1, resources.machine_memory())
    series = Series(folders.log, about, settings.series_max_bytes, settings.result_ttl_seconds)
    host = HostMeter(folders.run / f"{config.host}.samples")
    return Sampling(settings.sample_seconds, series, host)


def _executor_config(
    config: WorkerConfig, settings: WorkerSettings, folders: Folders, environ: Mapping[str, str]
) -> ExecutorConfig:
    return ExecutorConfig(
        python=config.executor_python,
        redis_url=config.redis_url,
        worker_name=config.name,
        environ=environ,
        work_dir=str(Path.cwd()),
        live_dir=folders.run / "live",
        mode="fork" if config.executor == "fork" else "warm",
        paths=config.paths,
        max_jobs=settings.executor_max_jobs,
        max_rss_bytes=settings.executor_max_rss_bytes,
        max_idle=config.slots,
        max_idle_seconds=settings.executor_idle_seconds,
    )


def job_environ(environ: Mapping[str, str], config: WorkerConfig, incarnation: str) -> dict[str, str]:
    """What every job finds in its environment: the worker's own, less what may be secret."""
    kept = {name: value for name, value in environ.items() if name not in _NOT_FOR_JOBS}
    ours = {"FLEET_WORKER": config.name, "FLEET_HOST": config.host, "FLEET_INCARNATION": incarnation}
    return kept | ours


def _leave(session: Session, client: redis.Redis, *, known_seconds: int) -> None:
    """Take the record out of the registry, if Redis can be reached; else it lapses by itself."""
    try:
        if _is_retired(session, client, known_seconds):
            log.info("signed off", extra=about("signed_off"))
        else:
            log.warning(
                "leases are left; others recover them when they have run out", extra=about("leases_left")
            )
    except redis.RedisError as exc:
        log.warning("could not sign off: %s", exc, extra=about("leases_left"))


def _is_retired(session: Session, client: redis.Redis, known_seconds: int) -> bool:
    try:
        return session.retire(client, known_seconds=known_seconds)
    except (redis.ConnectionError, redis.TimeoutError):
        # it was cut unheard while it idled, or Redis was slow: now another one is opened
        return session.retire(client, known_seconds=known_seconds)


class _Description:
    """The record of a worker that `fleet status` reads: JSON, made anew with each beat."""

    def __init__(self, config: WorkerConfig, session: Session, lock: str, offering: Offering) -> None:
        who, ends_at = session.identity, offering.ends_at
        self._fixed = {
            "name": who.name,
            "host": who.host,
            "pid": who.pid,
            "incarnation": who.incarnation,
            "lock": lock,
            "queues": list(config.served),
            "slots": config.slots,
            "version": __version__,
            "ends_at": None if ends_at is None else datetime.fromtimestamp(ends_at, UTC).isoformat(),
            "ephemeral": who.ephemeral,
            "tunnel": config.tunnel,
            "heartbeat_seconds": session.settings.heartbeat_seconds,
            "started_at": clock.wall().isoformat(),
        }
        self._session = session
        self.offering = offering
        self.loop: WorkerLoop | None = None

    @property
    def was_done(self) -> bool:
        """Whether it left because no work was left."""
        return self.loop is not None and self.loop.was_done

    def __call__(self) -> str:
        elsewhere = self.offering.elsewhere
        now = {
            "at": clock.wall().isoformat(),
            **dataclasses.asdict(self.offering.share.total),
            "elsewhere": dataclasses.asdict(elsewhere) if elsewhere else None,
            "labels": dict(self.offering.labels),
            "finished": self._session.finished,
            "failed": self._session.failed,
            "notice": self.loop.notice if self.loop else "",
            "stopping": self.loop.is_stopping if self.loop else False,
            "free": self.loop.free if self.loop else None,
        }
        return json.dumps(self._fixed | now)


def main(signals: StopSignals) -> int:
    """Start from the command line of `fleet.worker`; returns the exit code."""
    arguments = sys.argv[1:]
    if len(arguments) != 2 or arguments[0] != "--config":  # argparse would stay, half a MiB of it
        is_asked_for = arguments == ["--help"]
        print(
            "usage: python -I -m fleet.worker --config FILE", file=sys.stdout if is_asked_for else sys.stderr
        )
        return 0 if is_asked_for else 2
    logs.set_up()
    try:
        config = WorkerConfig.from_json(_read(Path(arguments[1])))
        log_to_stderr(config)
        return run(config, WorkerSettings.from_json(config.settings), signals)
    except FleetError as exc:
        return refused(exc)


def log_to_stderr(config: WorkerConfig) -> None:
    """As the configuration has it, from now on."""
    logs.set_up(config.log_format, config.log_level, worker=config.name, host=config.host)


def refused(error: FleetError) -> int:
    """Log why it cannot work; returns the exit code."""
    log.error("%s %s", error.message, error.hint, extra=about("refused"))
    return error.exit_code


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read {path}: {exc}") from exc
