"""What runs at a host: one file of Python's standard library, sent over stdin.

It imports nothing of ours, so it works before anything is installed, and beside any version
of it. `program(REQUEST)` is its whole text with a request; it answers with one line of JSON
after `MARK`, so whatever a login shell prints before it does no harm. ASCII only: the
host's locale is not ours. Python 3.11 or newer, started with -I -S.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Json = dict[str, Any]
#: what a line that answers begins with
MARK = "rq-fleet: "
#: seconds by which the start time of a process may be off: clocks are stepped, `ps` rounds
START_TIME_SLACK_SECONDS = 2.0
#: the variable in a worker's environment that tells it from a process with its PID and start time
TOKEN_VARIABLE = "RQ_FLEET_TOKEN"
#: the variable that has fleet.detach start a worker without asking systemd; workers do not inherit it
NO_UNIT_VARIABLE = "FLEET_NO_UNIT"
#: seconds a worker gets after the second SIGTERM, which hurries it, to hand back its jobs
HURRY_SECONDS = 5.0
#: seconds the children of a worker get to go when it has gone; its sidecar needs less
CHILDREN_SECONDS = 3.0
#: seconds for a process to vanish after SIGKILL
KILL_SECONDS = 5.0
#: verbs that agent_files.py has, which is sent with these alone
FILE_VERBS = ("list_files", "workers_there", "send_files", "remove_files", "remove_logs")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
#: how programs say the same
FULL = (b"No space left on device", b"Disk quota exceeded")
#: environments that are kept though nobody runs from them: to go back to them costs nothing
VENVS_KEPT = 3
#: seconds after which what was brought for an install is not waited for any more
OLD_SECONDS = 3600.0


class Failed(Exception):
    """A step failed; `kind` is for the launcher, `details` for people."""

    def __init__(self, kind: str, message: str, details: str = "") -> None:
        super().__init__(message)
        self.answer = {"kind": kind, "message": message, "details": details}


def program(request: Json) -> str:
    """This file with a request: to be fed to `python -I -S -` on stdin; below it agent_files.py if needed.

    The request is a statement of its own, so no traceback shows what it holds.
    """
    source = Path(__file__).read_text(encoding="ascii")
    if request["verb"] in FILE_VERBS:
        source += _part("agent_files.py")
    return f"{source}\nREQUEST = {json.dumps(request)!r}\nsys.exit(main(REQUEST))\n"


def _part(name: str) -> str:
    """A file beside this one, fit to stand below it: there, this one is the program itself."""
    text = Path(__file__).with_name(name).read_text(encoding="ascii")
    text = text.replace("from __future__ import annotations\n", "", 1)
    return text.replace("from fleet.launchers import agent\n", "agent = sys.modules[__name__]\n", 1)


def answer_in(output: str) -> Json | None:
    """The answer in what the program printed, or None."""
    for line in reversed(output.splitlines()):
        if line.startswith(MARK):
            found: Json = json.loads(line.removeprefix(MARK))
            return found
    return None


def main(text: str) -> int:
    """Do what the request says and print the answer."""
    request = json.loads(text)
    try:
        answer = VERBS[request["verb"]](request)
    except Failed as exc:
        answer = {"error": exc.answer}
    except OSError as exc:
        kind = "no_space" if exc.errno in _NO_SPACE else "os"
        answer = {"error": {"kind": kind, "message": str(exc), "details": ""}}
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
    return 0


# --- probe -----------------------------------------------------------------------------------------


def probe(request: Json) -> Json:
    """What this host is, and what of ours is installed. Sizes in bytes."""
    import importlib.util
    import shutil

    data, uv = data_dir(), uv_that_found_us()
    named = bool(request["named"]) and not uv
    can_make_venvs = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
    return {
        **resources(request["resources"]),
        "system": os.uname().sysname,
        "machine": os.uname().machine,
        # what was named may be a wrapper, and then it is wanted; what was found may be a shim
        "python": sys.argv[1] if named else sys.executable,
        "python_was_named": named,
        "python_version": ".".join(map(str, sys.version_info[:3])),
        "can_make_venvs": can_make_venvs,
        "uv": uv or (None if can_make_venvs else any_uv()),
        "fleet_version": fleet_version() if named else None,
        "free_disk_bytes": shutil.disk_usage(existing(data)).free,
        "time": time.time(),
        "home": str(Path.home()),
        "data_dir": str(data),
        "output_dir": str(state_dir() / "work"),
        "venvs": list(venvs(data)),
        "venv_tag": venv_tag(),
        "markers": markers(),
        "abi": f"cp{sys.version_info[0]}{sys.version_info[1]}{sys.abiflags}",
        "libc": libc(),
    }


def data_dir() -> Path:
    """Where the bundle is installed."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "rq-fleet"


def state_dir() -> Path:
    """What `fleet.worker_config.default_output_dir` has, at this host."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "rq-fleet"


def run_dir_of(request: Json) -> Path:
    """Where workers of an output folder leave notes; '~/' is this host's, none is the default one."""
    folder = request["output_dir"]
    return (Path(folder).expanduser() if folder else state_dir() / "work") / "run"


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def resources(source: str) -> Json:
    """What `fleet.resources`, whose text is `source`, finds: cpus, memory_bytes, gpus."""
    import dataclasses
    import types

    module = sys.modules["fleet_resources"] = types.ModuleType("fleet_resources")
    exec(compile(source, "resources.py", "exec"), module.__dict__)  # as trusted as this very program
    return dataclasses.asdict(module.detect())


def uv_that_found_us() -> str | None:
    """The uv that was asked for this Python: then it installs, too."""
    return sys.argv[2] if len(sys.argv) > 2 else None


def any_uv() -> str | None:
    """A uv where there is one: shells of SSH have short PATHs."""
    import shutil

    homes = (Path.home() / ".local/bin", Path.home() / ".cargo/bin")
    return shutil.which("uv") or next(
        (found for home in homes if (found := shutil.which("uv", path=home))), None
    )


def fleet_version() -> str | None:
    """The version of the rq-fleet that this Python, started with -I, would import; None: it has none."""
    import site
    from importlib import metadata

    site.main()
    try:
        return metadata.version("rq-fleet")
    except metadata.PackageNotFoundError:
        return None


def venv_tag() -> str:
    """What tells apart environments of one bundle: Python's version, ABI and place, and the machine.

    A home may be shared by machines that differ in all of these.
    """
    import importlib.machinery
    import zlib

    abi = (importlib.machinery.EXTENSION_SUFFIXES, os.uname().machine, os.path.realpath(sys.executable))
    return f"{sys.implementation.cache_tag}-{zlib.crc32(repr(abi).encode()):08x}"


def markers() -> Json:
    """This Python as requirements see it (PEP 508), but for what changes with each kernel."""
    version = ".".join(map(str, sys.version_info[:3]))
    name = sys.implementation.name
    return {
        "implementation_name": name,
        "implementation_version": version,
        "os_name": os.name,
        "platform_machine": os.uname().machine,
        "platform_python_implementation": {"cpython": "CPython", "pypy": "PyPy"}.get(name, name),
        "platform_release": "",
        "platform_system": os.uname().sysname,
        "platform_version": "",
        "python_full_version": version,
        "python_version": ".".join(version.split(".")[:2]),
        "sys_platform": sys.platform,
    }


def libc() -> str:
    """What compiled code relies on, as "glibc 2.36", "musl 1.2" or "macos 14.4"; "" elsewhere."""
    if sys.platform == "darwin":
        import platform

        return f"macos {platform.mac_ver()[0]}"
    if sys.platform != "linux":
        return ""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "musl 1.2"
    except (OSError, ValueError):
        return "musl 1.2"


def venvs(data: Path) -> Iterator[Json]:
    """The installs that were completed, newest last. One may just be removed, or be damaged."""
    found = []
    for path in (data / "venvs").glob("*/.complete"):
        with suppress(OSError, ValueError, KeyError):
            facts = json.loads(path.read_text())
            found.append({name: facts[name] for name in ("key", "tag", "version", "python", "completed_at")})
    yield from sorted(found, key=lambda venv: float(venv["completed_at"]))


# --- install ---------------------------------------------------------------------------------------


def install(request: Json) -> Json:
    """Make the environment of a bundle from the wheels that were brought into a folder.

    Virtual environments cannot be moved, so it is made in its place and counts from when
    `.complete` is there. One install at a time; what an install that was cut off left is
    removed. No environment that is of use is touched.
    """
    import shutil

    tag = venv_tag()
    venv = data_dir() / "venvs" / f"{request['key']}-{tag}"
    with lock(data_dir() / "install.lock", request["time_limit_seconds"]) as held:
        try:
            if not (venv / ".complete").exists():
                make(venv, {"key": request["key"], "tag": tag, "version": request["version"]}, request, held)
                tidy(data_dir(), venv)
        finally:
            shutil.rmtree(Path(request["wheel"]).parent, ignore_errors=True)
    return {"python": str(venv / "bin/python")}


def make(venv: Path, facts: Json, request: Json, held: int) -> None:
    """Make the environment, install the wheel and its dependencies, and try it; or leave nothing."""
    python, deadline = str(venv / "bin" / "python"), time.monotonic() + request["time_limit_seconds"]
    steps = with_uv(request["uv"], venv, request) if request["uv"] else with_pip(venv, request)
    remove(venv)
    try:
        for what, argv in (*steps, ("import", [python, "-I", "-c", "import fleet.assembly, fleet.detach"])):
            run(what, argv, deadline, held)
        complete(venv / ".complete", {**facts, "python": python})
    except BaseException:
        with suppress(OSError):
            remove(venv)
        raise


def with_pip(venv: Path, request: Json) -> list[tuple[str, list[str]]]:
    """What makes an environment with Python's own means."""
    python = [str(venv / "bin" / "python"), "-I", "-m"]
    return [
        ("make a virtual environment", [sys.executable, "-I", "-m", "venv", "--without-pip", str(venv)]),
        # not by venv, which does not tell why it could not
        ("install pip", [*python, "ensurepip", "--default-pip"]),
        (
            "install",
            [*python, "pip", "install", "--no-input", "--quiet", *sources(request), request["wheel"]],
        ),
    ]


def with_uv(uv: str, venv: Path, request: Json) -> list[tuple[str, list[str]]]:
    """What makes an environment with uv; it gets no pip."""
    pip = [uv, "pip", "install", "--python", str(venv / "bin" / "python"), "--compile-bytecode", "--quiet"]
    return [
        ("make a virtual environment", [uv, "venv", "--no-project", "--python", sys.executable, str(venv)]),
        ("install", [*pip, *sources(request), request["wheel"]]),
    ]


def sources(request: Json) -> list[str]:
    """Where dependencies come from: the index that this host is set up for, or what was brought alone."""
    return ["--no-index", "--find-links", str(Path(request["wheel"]).parent)] if request["offline"] else []


def run(what: str, argv: list[str], deadline: float, held: int) -> None:
    """Run `argv` until `deadline`; its last lines go into the error.

    It inherits the lock `held`: should we be killed, nobody comes into its way until it ends.
    """
    import subprocess

    environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_COLOR": "1", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, deadline - time.monotonic()),
            env=environ,
            pass_fds=(held,),
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise Failed("install", f"could not {what} in time", tail_of(exc.stdout or b"", 10)) from None
    if done.returncode:
        full = any(words in done.stdout for words in FULL)
        raise Failed("no_space" if full else "install", f"could not {what}", tail_of(done.stdout, 10))


def complete(mark: Path, facts: Json) -> None:
    """Declare the environment complete, at once or not at all."""
    part = mark.with_name(".complete.part")
    part.write_text(json.dumps({**facts, "completed_at": time.time()}))
    part.rename(mark)


def remove(folder: Path) -> None:
    """Remove a folder. Its mark goes first: what is left, should we be cut off, counts for nothing."""
    import shutil

    (folder / ".complete").unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def lock(path: Path, limit_seconds: float, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Hold the lock file `path`, and give its descriptor; waits for another holder, but not for ever.

    Holders with LOCK_SH for `how` exclude only those who want it alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + limit_seconds
    with path.open("a+") as file:
        while not taken(file.fileno(), how):
            if time.monotonic() > deadline:
                raise Failed("busy", f"another 'fleet up' or 'fleet down' is at work here and holds {path}")
            time.sleep(0.1)
        yield file.fileno()


def taken(descriptor: int, how: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- what installs leave behind --------------------------------------------------------------------


def tidy(data: Path, venv: Path) -> None:
    """Remove what installs left: all environments but a few, and what was brought and never installed.

    An environment that a process runs from stays, here or at another host that shares the home.
    """
    complete = [folder for folder in (data / "venvs").iterdir() if completed_at(folder)]
    newest = sorted(complete, key=completed_at, reverse=True)[:VENVS_KEPT]
    # what is being brought for another install right now is young
    old = time.time() - OLD_SECONDS
    useless = [folder for folder in (data / "wheels").iterdir() if changed_at(folder) < old]
    useless += [
        folder
        for folder in (data / "venvs").iterdir()
        if folder not in (venv, *newest) and not users_of(folder)
    ]
    for folder in useless:
        with suppress(OSError):
            remove(folder)


def completed_at(venv: Path) -> float:
    """When an environment was completed; 0.0: never."""
    return changed_at(venv / ".complete")


def changed_at(path: Path) -> float:
    """When a file or folder last changed; 0.0: it is not there, or no longer."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def users_of(venv: Path) -> list[str]:
    """The hosts that run from an environment: this one if a process does, others if they said so."""
    here = os.uname().nodename
    elsewhere = [mark.name for mark in (venv / ".hosts").glob("*") if mark.name != here]
    running = any(f"{venv}/" in line for line in command_lines())
    return elsewhere + ([here] if running else [])


def note_use(python: str) -> None:
    """Note in our environments that this host runs from that of `python`, and from what else it does."""
    here = os.uname().nodename
    for venv in (data_dir() / "venvs").glob("*"):
        mark = venv / ".hosts" / here
        if venv == Path(python).parent.parent:
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
        elif mark.exists() and here not in users_of(venv):
            mark.unlink(missing_ok=True)


def command_lines() -> Iterator[str]:
    """The command lines of all processes that we may see."""
    if sys.platform != "linux":
        import subprocess

        yield from subprocess.run(
            ["ps", "-axo", "command="], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        return
    for name in os.listdir("/proc"):  # noqa: PTH208 - thousands of names
        if name.isdigit():
            try:
                yield Path(f"/proc/{name}/cmdline").read_text(errors="replace")
            except OSError:  # it has gone, or is not ours
                continue


# --- start -----------------------------------------------------------------------------------------


def start(request: Json) -> Json:
    """Start each worker that does not live, one caller at a time for a base name.

    Those to be replaced are ended before that: should we be killed on the way, the next start
    finds them gone, or still there.
    """
    run_dir = run_dir_of(request)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(mode=0o700, exist_ok=True)
    note_use(request["python"])
    replaced = make_way(run_dir, request) if request["replace"] else {}
    with lock(lock_of(run_dir, request), request["time_limit_seconds"]):
        workers = [start_one(run_dir, request["python"], order) for order in request["orders"]]
    return {"workers": [{**worker, **replaced.get(worker["name"], {})} for worker in workers]}


def make_way(run_dir: Path, request: Json) -> Json:
    """End the workers to be replaced that are still of the version they had; what is told of each."""
    found = {}
    for order in request["orders"]:
        name = order["name"]
        worker = living(run_dir, name)
        if worker and name in request["replace"] and worker.get("version") == request["replace"][name]:
            same = runs_as(run_dir / f"{name}.config.json", order, request["python"])
            found[name] = {"replaced": worker.get("version") or "unknown", "other_options": not same}
    with lock(lock_of(run_dir, request), request["time_limit_seconds"], fcntl.LOCK_SH):
        ends = stop_all(run_dir, list(found), request)
    remaining = [f"{end['name']} (pid {end['pid']})" for end in ends if end["how"] == "remains"]
    if remaining:
        raise Failed("start", f"{', '.join(remaining)} did not end, so it was not replaced")
    return found


def lock_of(run_dir: Path, request: Json) -> Path:
    """What who starts or stops workers of a base name holds; hosts may share the folder."""
    return run_dir / f".{request['base']}.lock"


def start_one(run_dir: Path, python: str, order: Json) -> Json:
    """The worker of `order`: the one that lives, or a fresh one."""
    name = order["name"]
    config = run_dir / f"{name}.config.json"
    found = living(run_dir, name)
    if found:
        same = runs_as(config, order, python)
        return {
            "name": name,
            "pid": found["pid"],
            "fresh": False,
            "version": found.get("version"),
            "other_options": not same,
        }
    write_secret(config, json.dumps(order))
    log = run_dir.parent / "log" / f"{name}.log"
    offset = log.stat().st_size if log.exists() else 0
    process = {**detached(python, config), "log_offset": offset}
    write_secret(run_dir / f"{name}.started.json", json.dumps(process))
    return {"name": name, "fresh": True, "pid": process["pid"], "version": process.get("version")}


def runs_as(config: Path, order: Json, python: str) -> bool:
    """Whether a worker started with `config` is as `order` has it; unknown counts as yes.

    Redis may be reached by several addresses, and `python`, which would start it now, is the
    interpreter of functions where none was named: neither makes another worker.
    """
    try:
        old = json.loads(config.read_text())
        old["redis_url"] = redis_of(old["redis_url"])
        new = {**order, "redis_url": redis_of(order["redis_url"])}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return True
    ignored = {"output_dir", "startup_delay_seconds", "tunnel"} | (
        {"executor_python"} if order["executor_python"] == python else set()
    )
    return all(old[key] == new[key] for key in (old.keys() & new.keys()) - ignored)


def redis_of(url: str) -> list[object]:
    """A URL of Redis without its host, the defaults filled in."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    return [
        parts.scheme,
        parts.username,
        parts.password,
        parts.port or 6379,
        # of a unix socket that is the address, and the query has the database
        "" if parts.scheme == "unix" else parts.path.strip("/") or "0",
        parts.query,
    ]


def detached(python: str, config: Path) -> Json:
    """Run fleet.detach and read its line."""
    import subprocess

    argv = [python, "-I", "-m", "fleet.detach", "--config", str(config)]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
        if done.returncode == 0:
            process: Json = json.loads(done.stdout)
            if "unit_file" not in process:  # nor for the next ones: a systemd that hangs is waited for once
                os.environ[NO_UNIT_VARIABLE] = "1"
            return process
    except FileNotFoundError:
        raise not_installed(python, "there is no such file") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
        raise Failed("start", f"{python} could not start the worker: {exc}") from exc
    if b"No module named" in done.stderr:
        raise not_installed(python, tail_of(done.stderr, 1))
    raise Failed("start", f"{python} could not start the worker", tail_of(done.stderr, 10))


def not_installed(python: str, details: str) -> Failed:
    """That `python` does not do; an environment of ours counts for nothing from now on."""
    mark = Path(python).parent.parent / ".complete"
    if mark.exists():
        mark.unlink()
        return Failed("damaged", f"the install of rq-fleet in {mark.parent} is damaged", details)
    return Failed("not_installed", f"rq-fleet is not installed for {python}", details)


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner may read, at once or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    part.rename(path)


# --- inspect ---------------------------------------------------------------------------------------


def inspect(request: Json) -> Json:
    """The workers of a base name that left a trace, and whether their processes live."""
    run_dir = run_dir_of(request)
    return {
        "workers": [seen(run_dir, name, request["log_lines"]) for name in traces(run_dir, request["base"])]
    }


def seen(run_dir: Path, name: str, log_lines: int) -> Json:
    """One worker, as base.Seen has it."""
    found = living(run_dir, name)
    last = found or record(run_dir / f"{name}.started.json") or record(run_dir / f"{name}.json") or {}
    return {
        "name": name,
        "alive": found is not None,
        "pid": last.get("pid"),
        "version": last.get("version"),
        "log": log_tail(run_dir, name, log_lines) if log_lines else "",
    }


def log_tail(run_dir: Path, name: str, lines: int) -> str:
    """The last lines that the worker logged since it was last started."""
    offset = int((record(run_dir / f"{name}.started.json") or {}).get("log_offset", 0))
    try:
        with (run_dir.parent / "log" / f"{name}.log").open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(offset if offset <= end else 0, end - 16384))
            return tail_of(file.read(), lines)
    except FileNotFoundError:
        return ""


def tail_of(data: bytes, lines: int) -> str:
    """The last lines of some output."""
    return "\n".join(data.decode("utf-8", "replace").rstrip().splitlines()[-lines:])


def traces(run_dir: Path, base: str) -> list[str]:
    """The names BASE-0, BASE-1 ... for which there are files. A folder may be shared by hosts."""
    pattern = re.compile(rf"({re.escape(base)}-(\d+))(?:\.started|\.config)?\.json")
    found = {
        match[1]: int(match[2]) for path in run_dir.glob("*.json") if (match := pattern.fullmatch(path.name))
    }
    return sorted(found, key=lambda name: found[name])


def living(run_dir: Path, name: str) -> Json | None:
    """What is written of worker `name`, if that very process lives: by itself, or by its starter."""
    for path in (run_dir / f"{name}.json", run_dir / f"{name}.started.json"):
        found = record(path)
        if found and lives(found):
            return found
    return None


def record(path: Path) -> Json | None:
    """What a file says of a process; None where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text())
        return {**found, "pid": int(found["pid"]), "start_time": float(found["start_time"])}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


# --- processes -------------------------------------------------------------------------------------


def lives(process: Json) -> bool:
    """Whether that very process lives: its PID, started when it was, with its token if it has one."""
    began = started_at(process["pid"])
    if began is None or abs(began - process["start_time"]) >= START_TIME_SLACK_SECONDS:
        return False
    return "token" not in process or carries(process["pid"], process["token"])


def carries(pid: int, token: str) -> bool:
    """Whether process `pid` was started with that token; what is not ours cannot be read, or has gone."""
    if sys.platform != "linux":
        return True
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{TOKEN_VARIABLE}={token}".encode() in variables


def started_at(pid: int) -> float | None:
    """When process `pid` started, seconds since the epoch as psutil counts them; None: no such process."""
    if sys.platform != "linux":
        return started_at_by_ps(pid)
    fields = stat_of(pid)
    if fields is None or fields[0] in ("Z", "X"):
        return None
    return boot_time() + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def stat_of(pid: int) -> list[str] | None:
    """/proc/PID/stat from the third field on (proc(5)): the second may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def boot_time() -> float:
    """When the machine booted, seconds since the epoch."""
    lines = Path("/proc/stat").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("btime ")))


def started_at_by_ps(pid: int) -> float | None:
    """The same where there is no /proc."""
    import subprocess

    argv = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False
    )
    state, _, began = done.stdout.strip().partition(" ")
    if not began or state.startswith("Z"):
        return None
    return time.mktime(time.strptime(began.strip(), "%a %b %d %H:%M:%S %Y"))


def tree_of(root: int) -> list[Json]:
    """The descendants of a process, each with its start time."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents():
        children.setdefault(parent, []).append(pid)
    found, todo = [], list(children.get(root, ()))
    while todo:
        pid = todo.pop()
        found.append({"pid": pid, "start_time": started_at(pid) or 0.0})
        todo += children.get(pid, ())
    return found


def parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all processes."""
    if sys.platform != "linux":
        import subprocess

        done = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True)
        yield from ((int(pid), int(parent)) for pid, parent in map(str.split, done.stdout.splitlines()))
        return
    for name in os.listdir("/proc"):  # noqa: PTH208 - thousands of names
        fields = stat_of(int(name)) if name.isdigit() else None
        if fields:
            yield int(name), int(fields[1])


# --- stop ------------------------------------------------------------------------------------------


def stop(request: Json) -> Json:
    """End the workers of a base name and look whether they ended.

    Stops share the lock, so one with --force need not sit out the grace of another; no start
    comes in between, which would take a worker on its way out for one that runs.
    """
    run_dir = run_dir_of(request)
    if not run_dir.is_dir():
        return {"workers": []}
    with lock(lock_of(run_dir, request), request["time_limit_seconds"], fcntl.LOCK_SH):
        return {"workers": stop_all(run_dir, traces(run_dir, request["base"]), request)}


def stop_all(run_dir: Path, names: list[str], request: Json) -> list[Json]:
    """What became of each of the workers `names`."""
    found = {name: worker for name in names if (worker := living(run_dir, name))}
    trees = {name: tree_of(worker["pid"]) for name, worker in found.items()}
    ends = dict.fromkeys(names, "not running")
    ends |= dict.fromkeys(found, "stopped")
    for name in end_all(found, 0.0 if request["force"] else request["grace_seconds"], request["force"]):
        trees[name] += tree_of(found[name]["pid"])
        ends[name] = kill_group(found[name])
    for name, tree in trees.items():
        ends[name] = ends[name] if gone(tree) else "remains"
    return [forgotten(run_dir, name, found.get(name), ends[name]) for name in names]


def end_all(workers: dict[str, Json], grace_seconds: float, force: bool) -> list[str]:
    """SIGTERM, the grace, SIGTERM again to hurry; the names of those that live on."""
    for wait_seconds in () if force else (grace_seconds, HURRY_SECONDS):
        for worker in workers.values():
            send(worker, signal.SIGTERM)
        workers = still(workers, wait_seconds)
    return list(workers)


def still(workers: dict[str, Json], seconds: float) -> dict[str, Json]:
    """Those of `workers` that live after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while left := {name: worker for name, worker in workers.items() if lives(worker)}:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    return left


def send(process: Json, number: int) -> None:
    """Signal that very process, never another that has its PID; whether it could be is seen by looking."""
    if lives(process):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process["pid"], number)


def kill_group(worker: Json) -> str:
    """SIGKILL to the group that the worker leads; its sidecar sees to its jobs' groups."""
    if not lives(worker):
        return "stopped"
    try:
        os.killpg(worker["pid"], signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        send(worker, signal.SIGKILL)
    return "remains" if still({"": worker}, KILL_SECONDS) else "killed"


def gone(tree: list[Json]) -> bool:
    """Whether a worker's children have gone; those that have not are killed."""
    left = still({str(process["pid"]): process for process in tree}, CHILDREN_SECONDS)
    for process in left.values():
        send(process, signal.SIGKILL)
    return not still(left, KILL_SECONDS) if left else True


def forgotten(run_dir: Path, name: str, worker: Json | None, how: str) -> Json:
    """The worker's end, as base.Stopped has it; the file with its credentials is removed."""
    if how != "remains":
        unit = (record(run_dir / f"{name}.started.json") or {}).get("unit_file")
        if unit:
            Path(unit).unlink(missing_ok=True)
        for suffix in (".config.json", ".started.json", ".json"):
            (run_dir / f"{name}{suffix}").unlink(missing_ok=True)
    return {"name": name, "pid": worker and worker["pid"], "how": how}


VERBS: dict[str, Callable[[Json], Json]] = {
    "probe": probe,
    "install": install,
    "start": start,
    "inspect": inspect,
    "stop": stop,
}
