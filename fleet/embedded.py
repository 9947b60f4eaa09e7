"""The embedded Redis: one broker for each user of a machine, its data in the user's state folder.

It keeps an append-only file, evicts nothing, listens on loopback unless told otherwise and
always asks for its password. It outlives the command that started it, and its terminal.
Nothing here ever sends a signal: a server ends by its own SHUTDOWN, and whether it lives is
told by a lock that it holds. fleet/embedded_folder.py says which file is which.

What a kill -9 of the server may lose: while the disk is busy with an fsync, Redis answers
writes before it hands them to the kernel (for 2 s at the most: `aof_buffer_length` of INFO,
"appendfsync everysec" of redis.conf). A machine that loses power loses a second, as ever.
"""

from __future__ import annotations

import os
import pwd
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from broker import keys
from broker.errors import Conflict, FleetError, RedisUnreachable
from fleet import embedded_copies, redis_server
from fleet.embedded_folder import PATIENCE_SECONDS, BrokerFolder, Record, RunningBroker, Say
from fleet.embedded_server import BrokerStatus, client_of, shut_down, status_of
from fleet.listening import (
    LOOPBACK,
    PORTS_TRIED,
    addresses,
    bracketed,
    can_listen,
    covers,
    ports,
    still_ours,
)
from fleet.redis_server import ANSWER_SECONDS, ServerProgram, wait_until

#: seconds a clean shutdown may take: it writes what the append-only file lacks
STOP_SECONDS = 60.0
#: connections at once, of which a worker has up to 7; the server takes fewer where ulimit -Hn says so
CONNECTIONS = 65_000
#: seconds between two looks at a server that reads its data
_LOOK_SECONDS = 0.02
_NOT_RUNNING = "the embedded broker of this user is not running"


# --- what the rest of the program asks for ---------------------------------------------------------


def state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The broker's folder of this user: $XDG_STATE_HOME or ~/.local/state, /rq-fleet/broker.

    A relative $XDG_STATE_HOME is ignored, as the XDG base directory specification has it.
    Raises FleetError for a user without a home.
    """
    told = Path(environ.get("XDG_STATE_HOME", ""))
    if told.is_absolute():
        return told / "rq-fleet" / "broker"
    try:
        home = environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    except KeyError as exc:
        raise FleetError("this user has no home folder", "Set HOME or XDG_STATE_HOME.") from exc
    return Path(home) / ".local" / "state" / "rq-fleet" / "broker"


def embedded_url(*, start: bool, say: Say) -> str:
    """The URL, with its password, of this user's embedded broker.

    `start` starts it where it does not run, which `say` is told, and waits until it has read
    its data. Raises RedisUnreachable where it does not run and must not be started.
    """
    broker = EmbeddedBroker(state_dir())
    running = broker.running()
    if running is None and start:
        return broker.start(say=say).url
    if running is None:
        raise RedisUnreachable(
            f"no Redis is configured and {_NOT_RUNNING}",
            "Start it with 'fleet broker start', or name one with --redis URL or FLEET_REDIS_URL.",
        )
    if start:
        broker.await_loaded(running, say)
    return running.url


def embedded_addresses() -> tuple[str, ...]:
    """The addresses that this user's embedded broker listens on; none where it does not run."""
    running = EmbeddedBroker(state_dir()).running()
    return running.hosts if running else ()


def restart_command(host: str, port: int | None = None) -> str:
    """What a user types to have the broker that runs listen on `host` too.

    It keeps its port, for workers that run already know it by that, unless `port` is another.
    """
    moved = "" if port is None else f" --port {port}"
    return f"fleet broker stop && fleet broker start --host {host}{moved}"


def default_port(uid: int | None = None) -> int:
    """The port tried first: a user's own, below the ports that outgoing connections take."""
    return 16379 + (os.getuid() if uid is None else uid) % 10000


def _silent(message: str) -> None:
    del message


class EmbeddedBroker:
    """The broker whose files are in `folder`; many processes may call every method at once.

    `programs` lists the servers to choose from, best first. All methods raise FleetError, or
    a kind of it, for whatever is wrong with the folder, the disk or the server.
    """

    def __init__(
        self, folder: Path, *, programs: Callable[[], list[ServerProgram]] = redis_server.find_programs
    ) -> None:
        self.folder = BrokerFolder(folder)
        self._programs = programs

    def running(self) -> RunningBroker | None:
        """The broker if it lives (it may still be reading its data), without asking it.

        Raises Conflict when it lives on another machine that shares the folder.
        """
        return self.folder.running()

    def status(self) -> BrokerStatus | None:
        """What the broker says of itself, or None when it does not run.

        Raises RedisUnreachable when it runs and does not answer.
        """
        running = self.running()
        return status_of(running) if running else None

    # --- start ---

    def start(self, *, host: str | None = None, port: int | None = None, say: Say = _silent) -> RunningBroker:
        """Start the broker, or find it running, and wait until it has read its data.

        `host`: listen there too, not on loopback alone; `port`: the one tried first. Not told,
        both are as they were last, for that is where workers look for it.
        Raises Conflict when it runs without listening on `host`, UsageError for a host that is
        not this machine's.
        """
        hosts = addresses(host) if host else None
        running = self.running()
        if running is None:
            running = self._start(hosts, port, say)
        else:
            _check_as_wanted(running, hosts, port, say)
        self.await_loaded(running, say)
        return running

    def _start(self, hosts: tuple[str, ...] | None, port: int | None, say: Say) -> RunningBroker:
        with self.folder.one_command("start", say):
            running = self.running()
            if running is not None:  # another command started it while this one waited
                _check_as_wanted(running, hosts, port, say)
                return running
            self.folder.prepare(say)
            last = self.folder.read_record()
            running = self._launch(hosts, port, last, say)
        say(f"Started the embedded Redis on {running.address} (data in {running.data_dir}).")
        for other in running.hosts:
            if other != LOOPBACK:
                say(f"It listens on {bracketed(other)}:{running.port} too, and asks for its password.")
        if last is not None and last.port not in (0, running.port):
            say(
                f"WARNING: its port MOVED from {last.port} to {running.port}. Workers started before "
                "look for it on the old one and must be restarted: 'fleet down', then 'fleet up'."
            )
        return running

    def _launch(
        self, hosts: tuple[str, ...] | None, port: int | None, last: Record | None, say: Say
    ) -> RunningBroker:
        program = _best_program(self._programs(), last)
        if last is not None:
            hosts, port = hosts or still_ours(last.hosts, say), port or last.port
        hosts = hosts or (LOOPBACK,)
        for candidate in ports(port or default_port()):
            record = Record(socket.gethostname(), candidate, hosts, program)
            if not can_listen(hosts, candidate, say):
                continue
            running = self._launch_once(record, last)
            if running is not None:
                return running
            if can_listen(hosts, candidate, say):  # so it did not end because the port was snatched
                raise self._died(last)
        raise FleetError(f"{PORTS_TRIED} ports in a row are taken", "Name another one with --port.")

    def _launch_once(self, record: Record, last: Record | None) -> RunningBroker | None:
        """The broker as soon as it shows a sign of life, or None when it died first."""
        folder = self.folder
        folder.pid_file.unlink(missing_ok=True)
        folder.write_configuration(redis_server.configuration(self._directives(record)))
        folder.write_record(record)
        with folder.lock_for_server() as lock:
            redis_server.launch_detached(record.program, folder.configuration_file, folder.log, lock)
        settled = wait_until(lambda: not folder.is_locked() or self._first_sign(), ANSWER_SECONDS)
        running = self.running()
        if running is None and settled:
            folder.write_record(last)
            return None
        if running is None or not settled:
            raise FleetError(f"the embedded Redis was started and does not answer:\n{folder.log_tail()}")
        return running

    def _first_sign(self) -> bool:
        """Whether the server just launched answers anything."""
        running = self.running()
        if running is None:
            return False
        with client_of(running) as client:
            return redis_server.answer(client) is not None

    def _directives(self, record: Record) -> dict[str, str | int | Path | Sequence[str]]:
        return {
            "bind": record.hosts,
            "port": record.port,
            "requirepass": self.folder.read_password(),
            "dir": self.folder.data_dir,
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-load-truncated": "yes",
            # a job writes 3 KiB: at the default, 64 MiB, a busy fleet has it rewritten every few seconds
            "auto-aof-rewrite-min-size": "256mb",
            "stream-node-max-bytes": keys.RESULT_BYTES,
            "maxmemory-policy": "noeviction",
            "save": "",  # the append-only file keeps everything; snapshots are for backups
            "tcp-keepalive": 60,
            "maxclients": CONNECTIONS,
            "daemonize": "no",
            "pidfile": self.folder.pid_file,
            "logfile": self.folder.log,
        }

    def await_loaded(self, running: RunningBroker, say: Say = _silent) -> None:
        """Wait until `running` has read its data, for as long as it shows that it is at it.

        Raises FleetError when it dies of it or falls silent for ANSWER_SECONDS, RedisDenied when
        it no longer takes its password.
        """
        with client_of(running) as client:
            last_sign = started = time.monotonic()
            explain = True
            while (state := redis_server.answer(client)) != "ready":
                now = time.monotonic()
                last_sign = now if state == "loading" else last_sign
                if not self.folder.is_locked() or now - last_sign > ANSWER_SECONDS:
                    raise self._no_answer(running)
                if explain and now - started > PATIENCE_SECONDS:
                    say("Waiting for the embedded Redis to read its data ...")
                    explain = False
                time.sleep(_LOOK_SECONDS)

    def url(self) -> str:
        """Its URL on this machine, with the password. Raises RedisUnreachable when it does not run."""
        return self._running_or_raise().url

    # --- stop, backup, restore ---

    def stop(self, *, force: bool = False, say: Say = _silent) -> RunningBroker | None:
        """Shut the broker down, its data written, and wait until it is gone; None when it did not run.

        Raises Conflict, unless `force`, when its last changes could not be written to disk.
        """
        if self.running() is None:
            return None
        with self.folder.one_command("stop", say):
            running = self.running()
            if running is None:
                return None
            shut_down(running, force=force)
            if not wait_until(lambda: not self.folder.is_locked(), STOP_SECONDS):
                raise self._still_there(running)
            return running

    def backup(self, file: Path, *, force: bool = False, say: Say = _silent) -> int:
        """Copy all the data, as it is at one moment, to `file` (an RDB, 0600); returns its bytes.

        `file` appears whole or not at all. Raises Conflict when it exists, unless `force`;
        RedisUnreachable when the broker does not run.
        """
        self._running_or_raise()
        with self.folder.one_command("back up", say):
            running = self._running_or_raise()
            with client_of(running) as client:
                return embedded_copies.back_up(client, running.data_dir, file, force=force)

    def restore(self, file: Path, *, say: Say = _silent) -> tuple[int, Path | None]:
        """Make the RDB `file` the broker's data; returns (keys, folder the old data was moved to).

        Raises Conflict while the broker runs, UsageError for a file that no server here can
        load; the data is then as it was.
        """
        embedded_copies.check_magic(file)
        with self.folder.one_command("restore", say):
            if self.running() is not None or self.folder.is_locked():
                raise Conflict(
                    "the embedded Redis is running, and a restore replaces all it holds",
                    "Stop it first: 'fleet broker stop'.",
                )
            self.folder.finish_restore(say)
            return embedded_copies.restore(self.folder, file, self._programs)

    # --- what goes wrong ---

    def _running_or_raise(self) -> RunningBroker:
        running = self.running()
        if running is None:
            raise RedisUnreachable(_NOT_RUNNING, "Start it with 'fleet broker start'.")
        return running

    def _no_answer(self, running: RunningBroker) -> FleetError:
        fault = "does not answer" if self.folder.is_locked() else "ended as it read its data"
        return FleetError(
            f"the embedded Redis (pid {running.pid}) on {running.address} {fault}:\n{self.folder.log_tail()}",
            f"Log: {self.folder.log}.",
        )

    def _still_there(self, running: RunningBroker) -> FleetError:
        return FleetError(
            f"the embedded Redis (pid {running.pid}) still runs {STOP_SECONDS:.0f} s after SHUTDOWN:\n"
            f"{self.folder.log_tail()}"
        )

    def _died(self, last: Record | None) -> FleetError:
        wrote = f" The data was last written by {last.program.path} ({last.program.version})." if last else ""
        return FleetError(
            f"the embedded Redis ended as it started:\n{self.folder.log_tail()}",
            f"Log: {self.folder.log}.{wrote}",
        )


# --- choices ---------------------------------------------------------------------------------------


def _best_program(programs: list[ServerProgram], last: Record | None) -> ServerProgram:
    """The one that wrote the data, else one of its kind, else the first: not all read each other's files."""
    if last is None:
        return programs[0]
    return min(programs, key=lambda p: (p.path != last.program.path, p.name != last.program.name))


def _check_as_wanted(
    running: RunningBroker, hosts: tuple[str, ...] | None, port: int | None, say: Say
) -> None:
    """Say that it runs, and how that differs from what was asked for. Raises Conflict for a host."""
    say(f"The embedded Redis is already running on {running.address} (data in {running.data_dir}).")
    missing = [host for host in hosts or () if not covers(running.hosts, host)]
    if missing:
        moved_to = None if port == running.port else port
        raise Conflict(
            f"the embedded Redis does not listen on {', '.join(missing)}",
            f"Stop it, then start it there: {restart_command(missing[-1], moved_to)}",
        )
    beyond = [host for host in running.hosts if hosts and host not in hosts]
    if beyond:
        say(f"It goes on listening on {', '.join(beyond)}; stop it first to change that.")
    if port is not None and port != running.port:
        say(f"It stays on port {running.port}; stop it first to move it to {port}.")
