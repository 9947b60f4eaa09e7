"""The forwarder: keeps each host that is wished for hanging on Redis, and tells how that goes."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from broker import streams, tunnels
from broker.connection import address, connect, translated
from broker.errors import FleetError
from fleet.launchers import base
from fleet.launchers.ssh_connect import Address, SshOptions
from fleet.launchers.ssh_forward import Forward, open_forward
from fleet.tunnel_folder import Settings, State, TunnelFolder, Wish

log = logging.getLogger("fleet.tunnel")

#: seconds between two looks at the wishes
_LOOK_SECONDS = 0.2
#: seconds before the first attempt to connect again, at most; doubled with each that fails
_FIRST_PAUSE_SECONDS = 1.0
#: seconds between two notes to the fleet, of which each is believed for thrice as long
_NOTE_SECONDS = tunnels.NOTE_SECONDS / 3
#: seconds that Redis gets to answer
_PATIENCE_SECONDS = 5.0


class Rhythm:
    """When a connection is given up and tried again, all well within a lease (seconds)."""

    def __init__(self, lease_seconds: float) -> None:
        self._quarter = lease_seconds / 4
        #: silence for thrice as long ends a connection
        self.keepalive_seconds = min(5.0, max(0.2, lease_seconds / 8))

    def pause(self, failures: int) -> float:
        """Before the next attempt after so many that failed: jittered, at most a quarter of the lease."""
        longest = min(self._quarter, _FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 10))
        return random.uniform(0.1, 1.0) * longest

    def connect_limit(self, failures: int) -> float:
        """For a host that could be reached before: short at first, for packets may just have been lost."""
        return max(1.0, self._quarter) * 2.0 ** min(failures, 10)


class Keeper:
    """All hosts of a folder."""

    def __init__(self, folder: TunnelFolder) -> None:
        self._folder = folder
        self._settings = _settings(folder)
        self._hosts: dict[str, HostKeeper] = {}
        self._gate = asyncio.Semaphore(self._settings.max_parallel)
        self._teller = Teller(folder.path.name, self._settings.redis_url)
        self._ended = asyncio.Event()
        self._supervisor = os.getppid()

    async def run(self) -> bool:
        """Until no host is left, or SIGTERM; false where the supervisor has died before."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._ended.set)
        supervisor = await _supervisor()
        telling = asyncio.create_task(self._teller.run())
        try:
            while not self._ended.is_set() and not supervisor.at_eof():
                self._raise_what_ended(telling)
                await self._look()
                if not self._hosts:
                    return True
                await _within(_LOOK_SECONDS, self._ended)
            return self._ended.is_set()
        finally:
            await self._drop(list(self._hosts))
            telling.cancel()

    def _raise_what_ended(self, telling: asyncio.Task[None]) -> None:
        """Die of the error that ended a task, a full disk's say: whoever is started next begins anew."""
        for task in (telling, *(host.task for host in self._hosts.values())):
            if task.done():
                task.result()

    async def _look(self) -> None:
        """Do what is wished by now."""
        if not self._folder.has_changed():
            return
        self._heed(self._folder.settings() or self._settings)
        wishes = self._folder.wishes()
        gone = [key for key in self._hosts if key not in wishes]
        await self._drop([key for key, host in self._hosts.items() if wishes.get(key) != host.wish])
        for key in gone:
            self._folder.forget(key)
        for key, wish in wishes.items():
            if key not in self._hosts:
                self._hosts[key] = HostKeeper(self, key, wish)
            self._hosts[key].heed(wish)

    def _heed(self, settings: Settings) -> None:
        if settings.max_parallel != self._settings.max_parallel:
            self._gate = asyncio.Semaphore(settings.max_parallel)
        self._settings = settings
        self._teller.redis_url = settings.redis_url
        if settings.auth_sock:
            os.environ["SSH_AUTH_SOCK"] = settings.auth_sock

    async def _drop(self, keys: Sequence[str]) -> None:
        """Let go of hosts."""
        hosts = [self._hosts.pop(key) for key in keys]
        await asyncio.gather(*(host.end() for host in hosts))
        if not self._is_orphan:
            await self._teller.forget([host.wish.tunnel_id for host in hosts])

    # --- what the hosts ask for ---

    async def dial(self) -> streams.Stream:
        """Connect to Redis, for somebody at a host."""
        return await streams.open_stream(self._settings.redis_url)

    async def open(self, key: str, wish: Wish, failures: int, *, again: bool) -> Forward:
        """Have the host listen. Raises HostError, TimeoutError."""
        rhythm = self.rhythm
        config = Path(wish.ssh_config) if wish.ssh_config else None
        limit = rhythm.connect_limit(failures) if again else None
        async with self._gate, asyncio.timeout(limit):
            forward = await open_forward(
                Address(wish.host, wish.user, wish.port),
                SshOptions(config, **wish.timeouts),
                name=f"redis-{wish.tunnel_id}.sock",
                path=self._folder.socket_path(key),
                dial=self.dial,
                keepalive_seconds=rhythm.keepalive_seconds,
            )
        try:
            self._folder.write_socket_path(key, forward.path)
        except OSError:
            await forward.close()
            raise
        return forward

    def was_up(self, key: str) -> bool:
        """Whether the host was held before, by a forwarder that died maybe."""
        return self._folder.socket_path(key) is not None

    @property
    def rhythm(self) -> Rhythm:
        return Rhythm(self._settings.lease_seconds)

    def tell(self, key: str, wish: Wish, state: State) -> None:
        """Write down how a host is, here and in Redis."""
        if self._is_orphan:
            return
        self._folder.write_state(key, state)
        self._teller.tell(wish.tunnel_id, tunnels.Note(state.state, me(), state.error.get("message", "")))

    @property
    def _is_orphan(self) -> bool:
        """Whether the supervisor is dead: another may be at work, whose word it is now."""
        return os.getppid() != self._supervisor


class HostKeeper:
    """One host: connected, or on the way to it."""

    def __init__(self, keeper: Keeper, key: str, wish: Wish) -> None:
        self.wish = wish
        self._keeper = keeper
        self._key = key
        self._hurry = asyncio.Event()
        self._state: State | None = None
        self.task = asyncio.create_task(self._keep())

    def heed(self, wish: Wish) -> None:
        """Another `fleet up` waits to hear how it is: at once if it is up, else after another attempt."""
        if wish.token == self.wish.token:
            return
        self.wish = wish
        if self._state and self._state.state == "up":
            self._tell("up", self._state.path)
        else:
            self._hurry.set()

    async def end(self) -> None:
        """Let go of the host."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _keep(self) -> None:
        failures, again = 0, False
        if self._keeper.was_up(self._key):  # with many others, all of which a forwarder that died has left
            await _within(self._keeper.rhythm.pause(0), self._hurry)
        while True:
            self._hurry.clear()
            try:
                forward = await self._keeper.open(self._key, self.wish, failures, again=again)
            except TimeoutError:
                self._failed(base.TimedOut("the host does not answer"))
                failures += 1
            except Exception as exc:  # whatever it is, it may be better next time
                self._failed(exc)
                failures += 1
            else:
                failures, again = 0, True
                await self._hold(forward)
            await _within(self._keeper.rhythm.pause(failures), self._hurry)

    async def _hold(self, forward: Forward) -> None:
        """Until the connection breaks."""
        try:
            self._tell("up", forward.path)
            log.info("%s hangs on Redis at %s", self.wish.host, forward.path)
            await forward.wait_closed()
        finally:
            await asyncio.shield(asyncio.create_task(forward.close()))
        self._failed(base.Disconnected("the SSH connection broke"))

    def _failed(self, exc: Exception) -> None:
        error = exc if isinstance(exc, FleetError) else base.HostError(f"unexpected: {exc!r}")
        if not self._state or self._state.error.get("message") != error.message:
            log.warning("%s: %s %s", self.wish.host, error.message, error.hint)
        self._tell("down", error={"code": error.code, "message": error.message, "hint": error.hint})

    def _tell(self, state: Any, path: str = "", error: dict[str, str] | None = None) -> None:
        self._state = State(self.wish.token, state, path, error or {})
        self._keeper.tell(self._key, self.wish, self._state)


class Teller:
    """Tells the fleet how the tunnels are: at once when one changes, and again while the notes hold."""

    def __init__(self, fleet: str, redis_url: str) -> None:
        self._fleet = fleet
        self.redis_url = redis_url
        self._notes: dict[str, tunnels.Note] = {}
        self._changed = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._said = ""

    def tell(self, tunnel_id: str, note: tunnels.Note) -> None:
        self._notes[tunnel_id] = note
        self._changed.set()

    async def run(self) -> None:
        while True:
            self._changed.clear()
            async with self._one_at_a_time:
                await self._ask(tunnels.report, self._fleet, dict(self._notes))
            await _within(_NOTE_SECONDS, self._changed)

    async def forget(self, tunnel_ids: Sequence[str]) -> None:
        for tunnel_id in tunnel_ids:
            self._notes.pop(tunnel_id, None)
        async with self._one_at_a_time:  # a note under way would come back
            await self._ask(tunnels.forget, tunnel_ids)

    async def _ask(self, what: Any, *words: Any) -> None:
        """Redis may be away: the notes lapse, and the next ones mend it."""
        said = await asyncio.to_thread(self._asked, what, *words)
        if said and said != self._said:
            log.warning("%s", said)
        self._said = said

    def _asked(self, what: Any, *words: Any) -> str:
        try:
            client = connect(self.redis_url, timeout_seconds=_PATIENCE_SECONDS)
            with client, translated(address(client)):
                what(client, *words)
        except FleetError as exc:
            return exc.message
        return ""


def me() -> str:
    """Who holds the tunnel, for people."""
    return f"{os.environ.get('USER') or os.getuid()}@{socket.gethostname()}"


def _settings(folder: TunnelFolder) -> Settings:
    found = folder.settings()
    if found is None:
        raise SystemExit(f"{folder.path}/tunnel.json cannot be read: 'fleet up' writes it anew")
    return found


async def _supervisor() -> asyncio.StreamReader:
    """A pipe that ends when the supervisor does."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for `event`, but no longer than that."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
