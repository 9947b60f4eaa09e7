"""`fleet collect-logs` and `fleet delete-logs`: what workers and jobs left at their hosts.

Nothing is removed at a host before it is whole on the disk here, by size and SHA-256, and then only what
has not changed since and nobody uses: while a worker lives in an output folder, its log stays, and so do
the files of jobs that have not ended. What jobs do there we know from Redis; where that cannot know it -
a worker lives that does not beat there, or a folder is another fleet's, too - all that may be in use stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker import hosts as broker_hosts
from broker import jobs, tunnels
from broker.connection import address, translated
from fleet.copies import Copies
from fleet.fan_out import FanOut
from fleet.hosts import Host
from fleet.journey import Journey, Opener, opened, report
from fleet.launchers import base
from fleet.launchers.remote_files import Listing, Problem, RemoteFile, RemoteFolder, Removed, Users
from fleet.results import HostResult, OnEvent, Report

if TYPE_CHECKING:
    import redis

#: files asked for, or removed, in one command
_FILES_AT_ONCE = 1000
#: files named in a message
_NAMED = 3

#: (host, bytes that are here, bytes that there are)
OnBytes = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Found:
    """What became of the files of a host."""

    host: str
    #: where they are here; None: nothing was to be fetched
    folder: Path | None = None
    files: int = 0
    total_bytes: int = 0
    fetched_files: int = 0
    fetched_bytes: int = 0
    removed_files: int = 0
    removed_bytes: int = 0
    #: whole here, and yet not removed there: in use, or changed since
    kept: int = 0
    #: symbolic links and the like
    passed_over: int = 0
    #: files here that were put aside for others of their names
    put_aside: int = 0
    #: how many could not be read or removed; `problems` names the first of them
    failed: int = 0
    problems: tuple[Problem, ...] = ()


async def collect(
    hosts: Sequence[Host],
    folder: Path,
    *,
    opener: Opener,
    client: redis.Redis,
    max_parallel: int,
    on_event: OnEvent,
    on_bytes: OnBytes,
    output_dir: str | None = None,
    delete: bool = False,
) -> tuple[Report, tuple[Found, ...]]:
    """Fetch the files of `hosts` into FOLDER/HOST. Raises UsageError.

    `output_dir`: not the one kept with the host. `delete`: remove there what is safely here.
    """
    work = _Collection(opener, client, on_event, output_dir, folder, delete, on_bytes)
    fan_out: FanOut[HostResult] = FanOut(max_parallel)
    results = await fan_out.run(hosts, work.collect)
    return report(hosts, results, fan_out, "untouched"), work.found_of(hosts)


async def delete(
    hosts: Sequence[Host],
    *,
    opener: Opener,
    client: redis.Redis,
    max_parallel: int,
    on_event: OnEvent,
    output_dir: str | None = None,
    force: bool = False,
) -> tuple[Report, tuple[Found, ...]]:
    """Remove the files of `hosts` there; where a worker lives only with `force`. Raises UsageError."""
    work = _Deletion(opener, client, on_event, output_dir, force)
    fan_out: FanOut[HostResult] = FanOut(max_parallel)
    results = await fan_out.run(hosts, work.delete)
    return report(hosts, results, fan_out, "untouched"), work.found_of(hosts)


@dataclass
class _Work:
    """What both share."""

    opener: Opener
    client: redis.Redis
    on_event: OnEvent
    output_dir: str | None

    def __post_init__(self) -> None:
        self.found: dict[str, Found] = {}

    def found_of(self, hosts: Sequence[Host]) -> tuple[Found, ...]:
        return tuple(self.found.get(host.key, Found(host.name)) for host in hosts)

    def note(self, host: Host, **changes: Any) -> Found:
        """What is known of the host, now."""
        now = replace(self.found.get(host.key, Found(host.name)), **changes)
        self.found[host.key] = now
        return now

    def note_removed(self, host: Host, done: Removed) -> Found:
        before = self.note(host)
        return self.note(
            host,
            removed_files=before.removed_files + done.files,
            removed_bytes=before.removed_bytes + done.total_bytes,
            kept=before.kept + done.kept,
            failed=before.failed + done.failed,
            problems=(*before.problems, *done.problems),
        )

    def remote(self, host: Host, launcher: base.Launcher) -> RemoteFolder:
        return launcher.files(self.output_dir or host.options.output_dir, host.worker_base)

    async def use(self, remote: RemoteFolder) -> _Use:
        """Who uses the folder now."""
        return await asyncio.to_thread(self._use, await remote.users())

    def _use(self, users: Users) -> _Use:
        with translated(address(self.client)):
            signs = broker_hosts.signs(self.client, list(users.lives))
            fleet = tunnels.fleet_id(self.client, make=False)
        here = {name for name, lives in users.lives.items() if lives}
        beating = {name for name, sign in signs.items() if sign and not sign.has_left}
        return _Use(here, beating, users.fleets == {fleet})


@dataclass(frozen=True)
class _Use:
    """Who uses an output folder."""

    #: the workers of which a process lives at this host
    here: set[str]
    #: those that beat, wherever they are
    beating: set[str]
    #: whether all jobs there are of this fleet's Redis
    is_ours_alone: bool

    @property
    def alive(self) -> set[str]:
        return self.here | self.beating


@dataclass
class _Collection(_Work):
    """Collects from hosts."""

    folder: Path
    remove: bool
    on_bytes: OnBytes

    async def collect(self, host: Host) -> HostResult:
        """One host. Never raises but when cancelled before anything came."""
        journey = Journey(host, self.on_event)
        return await journey.taken(self._collected(journey))

    async def _collected(self, journey: Journey) -> HostResult:
        host = journey.host
        async with opened(journey, self.opener) as launcher:
            remote = self.remote(host, launcher)
            listing = await journey.take("list", remote.listing(), _told)
            copies = Copies(self.folder / host.key, self.remove, _Counter(self, host, listing))
            journey.result("unconfirmed", note="cut short: run it again to continue")
            with copies.alone():
                try:
                    await journey.take("fetch", self._fetch(remote, listing, copies))
                finally:
                    self._note(host, listing, copies)
                if self.remove:
                    await journey.take("delete", self._remove(host, remote, copies.whole))
        _judge(self.found[host.key])
        return journey.result("collected")

    async def _fetch(self, remote: RemoteFolder, listing: Listing, copies: Copies) -> None:
        """What is whole here is asked for again only where it is to be removed there: the hash decides."""
        todo = [file for file in listing.files if self.remove or not copies.has(file)]
        copies.on_bytes(sum(file.size for file in listing.files) - sum(file.size for file in todo))
        for some in _batches(todo):
            await remote.fetch(await asyncio.to_thread(copies.wanted, some), copies)
            await asyncio.to_thread(copies.make_safe)

    def _note(self, host: Host, listing: Listing, copies: Copies) -> None:
        self.note(
            host,
            folder=copies.folder,
            files=len(listing.files),
            total_bytes=sum(file.size for file in listing.files),
            fetched_files=copies.fetched_files,
            fetched_bytes=copies.fetched_bytes,
            passed_over=listing.passed_over,
            put_aside=copies.aside,
            failed=listing.failed + len(copies.problems),
            problems=(*listing.problems, *copies.problems),
        )

    async def _remove(self, host: Host, remote: RemoteFolder, files: Sequence[RemoteFile]) -> None:
        """Remove what is whole here and not in use there."""
        for some in _batches(files):
            use = await self.use(remote)
            free = await asyncio.to_thread(self._free, some, use)
            done = await remote.remove(free, sorted(use.here))
            self.note_removed(host, replace(done, kept=done.kept + len(some) - len(free)))

    def _free(self, files: Sequence[RemoteFile], use: _Use) -> list[RemoteFile]:
        """Those of `files` that nobody uses."""
        if not use.alive:
            return list(files)
        job_of = {file.path: job for file in files if (job := _job(file.path))}
        with translated(address(self.client)):
            states = jobs.states(self.client, sorted(set(job_of.values())))
        ended = {*jobs.ENDED, None} if use.is_ours_alone else jobs.ENDED
        # a worker that hangs, or is another fleet's, may run whatever there is
        knows = use.here <= use.beating
        busy = {job for job, state in states.items() if not knows or state not in ended}
        logs = tuple(f"log/{name}." for name in use.alive)
        return [f for f in files if job_of.get(f.path) not in busy and not f.path.startswith(logs)]


@dataclass
class _Deletion(_Work):
    """Deletes at hosts."""

    force: bool

    async def delete(self, host: Host) -> HostResult:
        """One host. Never raises but when cancelled before anything is known."""
        journey = Journey(host, self.on_event)
        return await journey.taken(self._deleted(journey))

    async def _deleted(self, journey: Journey) -> HostResult:
        async with opened(journey, self.opener) as launcher:
            remote = self.remote(journey.host, launcher)
            done = await journey.take("delete", self._clear(journey.host, remote), _told_removed)
        _judge(self.note_removed(journey.host, done))
        return journey.result("deleted")

    async def _clear(self, host: Host, remote: RemoteFolder) -> Removed:
        use = await self.use(remote)
        if use.alive and not self.force:
            raise base.InUse(
                f"{', '.join(sorted(use.alive))} runs there and uses these files",
                f"End it first: 'fleet down {host.name}'. --force deletes under its hands.",
            )
        return await remote.clear(force=self.force)


class _Counter:
    """Adds up the bytes of a host that are here."""

    def __init__(self, work: _Collection, host: Host, listing: Listing) -> None:
        self._tell, self._host = work.on_bytes, host.name
        self._total = sum(file.size for file in listing.files)
        self._done = 0

    def __call__(self, count: int) -> None:
        self._done += count
        self._tell(self._host, self._done, self._total)


def _batches(files: Sequence[RemoteFile]) -> Iterator[Sequence[RemoteFile]]:
    for start in range(0, len(files), _FILES_AT_ONCE):
        yield files[start : start + _FILES_AT_ONCE]


def _job(path: str) -> str | None:
    """The job that a file belongs to; None: a worker's own."""
    folder, _, rest = path.partition("/")
    return rest.partition("/")[0].partition(".")[0] if folder in ("jobs", "output") else None


def _judge(found: Found) -> None:
    """Raises HostError where files could not be read or removed."""
    if not found.failed:
        return
    named = "; ".join(f"{problem.path}: {problem.reason}" for problem in found.problems[:_NAMED])
    more = f"; and {found.failed - _NAMED} more" if found.failed > _NAMED else ""
    raise base.HostError(
        f"{found.failed} could not be fetched, or removed: {named}{more}",
        "All others were dealt with; run it again once that is mended.",
    )


def _told(listing: Listing) -> str:
    return f"{len(listing.files)} files"


def _told_removed(done: Removed) -> str:
    return f"{done.files} files"
