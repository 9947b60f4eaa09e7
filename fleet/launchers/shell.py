"""The launcher's verbs for any place that runs a command and takes files: SSH, this machine.

Only `/bin/sh -s` and `PYTHON -I -S -` are ever run, everything else goes over stdin: whatever
shell the user has there (bash, zsh, fish, csh), nothing needs its quoting, and no secret is
in a command line.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fleet import resources
from fleet.bundle import Bundle
from fleet.launchers import agent, base
from fleet.launchers.frames import Frame, FrameReader, Source, understood
from fleet.launchers.remote_files import RemoteFolder
from fleet.worker_config import WorkerConfig

#: tried in this order where no Python was named; shells of SSH have short PATHs
CANDIDATES = (
    *("python3", "python3.13", "python3.12", "python3.11", "python3.14", "python"),
    *("/usr/local/bin/python3", "/opt/homebrew/bin/python3", "/usr/bin/python3"),
    *("~/.local/bin/python3", "~/.pyenv/shims/python3", "~/miniconda3/bin/python", "~/miniforge3/bin/python"),
    # these know of Pythons that are on no PATH
    *("uv", "~/.local/bin/uv", "~/.cargo/bin/uv"),
)
#: what a uv fetches where there is no Python: of those supported, the one that most wheels are for
FETCHED_PYTHON = "3.12"
#: an install gets this many times the limit of other commands
INSTALL_FACTOR = 10
#: what the environment of a bundle takes, with pip's own room to unpack
INSTALL_BYTES = 250 * 2**20
#: of what a uv says when it fails
_LINES_OF_UV = 5
_NO_PYTHON = "rq-fleet-no-python:"
_NO_PYTHON_BUT_UV = "rq-fleet-uv:"
#: stands in for the first Python that is new enough, or that a uv finds, and feeds it the program
_FINDER = """\
try() {{
  "$1" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1 || return
  exec "$1" -I -S - "$@" <<'RQ_FLEET_PROGRAM'
{program}
RQ_FLEET_PROGRAM
}}
seen= uv=
for candidate in {candidates}; do
  found=$(command -v "$candidate" 2>/dev/null) || continue
  try "$found"
  version=$("$found" -V 2>&1 </dev/null)
  case $version in "uv "*)
    uv=$found
    if python=$("$uv" python find --no-project --system '>=3.11' 2>/dev/null </dev/null); then
      try "$python" "$uv"
    fi ;;
  esac
  seen="$seen $found ($version),"
done
echo "{uv_mark}$uv"
echo "{mark}$seen"
"""
_KINDS: dict[str, type[base.HostError]] = {
    "busy": base.HostBusy,
    "in_use": base.InUse,
    "install": base.InstallFailed,
    "no_space": base.DiskFull,
    "damaged": base.InstallFailed,
    "not_installed": base.InstallFailed,
    "os": base.CommandFailed,
    "start": base.StartFailed,
}
_HINTS = {
    "damaged": "Run it again: it is installed anew.",
    "in_use": "Run it again; 'fleet down' ends what runs there.",
    "install": "The host needs an index that pip can reach; where it has none, --offline brings all along.",
    "no_space": "Free some space there; --output-dir writes elsewhere.",
    "not_installed": "Install rq-fleet for that Python, or leave out --no-install.",
}


@dataclass(frozen=True)
class Output:
    """What a command printed, and how it ended."""

    exit_status: int | None
    stdout: str
    stderr: str


class Running(Source, Protocol):
    """A command that runs."""

    async def ended(self) -> tuple[int | None, str]:
        """Its exit status and the end of its stderr, once its output was read. Raises Disconnected."""
        ...


class ShellLauncher(ABC):
    """A host where commands can be run. `python` names its interpreter; None looks for one.

    `limit_seconds` bounds every command; `is_here` says that it is this very machine,
    `our_address` by which address it sees this machine, where that is known.
    """

    is_here = False
    our_address: str | None = None

    def __init__(self, *, python: str | None, limit_seconds: float) -> None:
        self._candidates = (python,) if python else CANDIDATES
        self._named = python
        self._limit = limit_seconds
        self._found: base.Probe | None = None

    def try_first(self, python: str) -> None:
        """Look for an interpreter there first; the others are still tried where it has gone."""
        self._candidates = (python, *self._candidates)

    @abstractmethod
    async def _execute(self, command: str, stdin: str, limit_seconds: float) -> Output:
        """Run `command` with `stdin` as its input. Raises CommandTimeout, Disconnected."""

    @abstractmethod
    def _opened(self, command: str, stdin: str) -> AbstractAsyncContextManager[Running]:
        """Run `command` with `stdin` as its input, for as long as the context lasts. Raises HostError."""

    @abstractmethod
    async def _upload(self, files: Mapping[str, bytes]) -> None:
        """Write files, path -> content, into folders that are made for them. Raises HostError."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of the host."""

    async def probe(self, *, fetch_python: bool = False) -> base.Probe:
        try:
            return await self._probe()
        except base.NoPython as exc:
            if not fetch_python or not exc.uv:
                raise
            await self._fetch_python(exc.uv)
            return await self._probe()

    async def _probe(self) -> base.Probe:
        began = time.time()
        source = Path(resources.__file__).read_text(encoding="ascii")
        answer = await self._ask({"verb": "probe", "named": bool(self._named), "resources": source})
        middle = (began + time.time()) / 2
        self._found = _probe(
            answer,
            clock_skew_seconds=answer["time"] - middle,
            is_here=self.is_here,
            our_address=self.our_address,
        )
        return self._found

    async def _fetch_python(self, uv: str) -> None:
        """Have the uv there fetch a Python. Raises NoPython."""
        command = f"exec {shlex.quote(uv)} python install {FETCHED_PYTHON} 2>&1"
        output = await self._execute(
            "exec /bin/sh -s", f"{command} </dev/null\n", self._limit * INSTALL_FACTOR
        )
        if output.exit_status:
            said = "\n".join(output.stdout.strip().splitlines()[-_LINES_OF_UV:])
            raise base.NoPython(
                f"no Python 3.11 or newer there, and {uv} could not fetch one:\n{said}",
                "Install one, and name it: python=/path/to/python3 in the hosts file.",
            )

    async def install(self, bundle: Bundle, wheelhouse: Path | None = None) -> str:
        found = self._found or await self.probe()
        ready = found.installed(bundle.key)
        if ready:
            return ready
        if found.free_disk_bytes < INSTALL_BYTES:
            raise base.DiskFull(
                f"{found.free_disk_bytes / 2**20:.0f} MiB are free at {found.data_dir}:"
                f" an install takes up to {INSTALL_BYTES / 2**20:.0f} MiB",
                _HINTS["no_space"],
            )
        if not found.can_make_venvs and not found.uv:
            raise base.InstallFailed(
                f"{found.python} cannot make virtual environments: its module venv or ensurepip is missing",
                "Debian and Ubuntu: apt install python3-venv. Or name another Python, or a uv: python=PATH.",
            )
        return await self._install(bundle, found, wheelhouse)

    async def _install(self, bundle: Bundle, found: base.Probe, wheelhouse: Path | None) -> str:
        # one of its own: another may do the same at once, and take away what it brought
        folder = f"{found.data_dir}/wheels/{uuid.uuid4().hex}"
        wheels = sorted(wheelhouse.iterdir()) if wheelhouse else []
        brought = {f"{folder}/{wheel.name}": wheel.read_bytes() for wheel in wheels}
        await self._upload({**brought, f"{folder}/{bundle.filename}": bundle.data})
        request = {
            "verb": "install",
            "key": bundle.key,
            "version": bundle.version,
            "wheel": f"{folder}/{bundle.filename}",
            "uv": found.uv,
            "offline": wheelhouse is not None,
        }
        python: str = (await self._ask(request, self._limit * INSTALL_FACTOR))["python"]
        return python

    async def start(
        self,
        python: str,
        orders: Sequence[WorkerConfig],
        *,
        replace: Mapping[str, str | None] | None = None,
        grace_seconds: float = 0.0,
    ) -> tuple[base.Started, ...]:
        answer = await self._ask(
            {
                "verb": "start",
                "python": python,
                "output_dir": orders[0].output_dir,
                "base": orders[0].name.rpartition("-")[0],
                "orders": [dataclasses.asdict(order) for order in orders],
                "replace": dict(replace or {}),
                "grace_seconds": grace_seconds,
                "force": False,
            },
            self._limit
            + _SECONDS_A_WORKER * len(orders)
            + (grace_seconds + _AFTER_GRACE_SECONDS if replace else 0),
        )
        return tuple(base.Started(**worker) for worker in answer["workers"])

    async def inspect(
        self, output_dir: str | None, base_name: str, *, log_lines: int = 0
    ) -> tuple[base.Seen, ...]:
        request = {"verb": "inspect", "output_dir": output_dir, "base": base_name, "log_lines": log_lines}
        answer = await self._ask(request)
        return tuple(base.Seen(**worker) for worker in answer["workers"])

    async def stop(
        self, output_dir: str | None, base_name: str, *, grace_seconds: float, force: bool = False
    ) -> tuple[base.Stopped, ...]:
        request = {
            "verb": "stop",
            "output_dir": output_dir,
            "base": base_name,
            "grace_seconds": grace_seconds,
            "force": force,
        }
        answer = await self._ask(
            request, self._limit + (0 if force else grace_seconds) + _AFTER_GRACE_SECONDS
        )
        return tuple(base.Stopped(**worker) for worker in answer["workers"])

    def files(self, output_dir: str | None, base_name: str) -> RemoteFolder:
        return RemoteFolder(self._stream, output_dir, base_name)

    async def unlink(self, paths: Sequence[str]) -> None:
        output = await self._execute("exec /bin/sh -s", f"rm -f {shlex.join(paths)}\n", self._limit)
        if output.exit_status:
            raise self._unreadable(output)

    async def _ask(self, request: agent.Json, limit_seconds: float | None = None) -> agent.Json:
        """Have the host do what `request` says. Raises HostError."""
        limit = limit_seconds or self._limit
        output = await self._execute(*self._program(request, limit), limit)
        return self._answer(output)

    async def _stream(self, request: agent.Json) -> AsyncGenerator[Frame, None]:
        """Have the host do what `request` says: its frames as they come, and last its answer, as b"A".

        Raises HostError.
        """
        async with self._opened(*self._program(request, self._limit)) as source:
            reader = FrameReader(source, self._limit)
            async for frame in reader.frames():
                yield frame
            text = await reader.rest()
            status, errors = await reader.limited(source.ended())
            answer = self._answer(Output(status, text, errors))
            yield b"A", json.dumps(answer).encode()

    def _program(self, request: agent.Json, limit_seconds: float) -> tuple[str, str]:
        """The command that does what `request` says, and what it reads."""
        program = agent.program({**request, "time_limit_seconds": limit_seconds * 0.9})
        if self._found:
            return f"exec {shlex.quote(self._found.python)} -I -S -", program
        return "exec /bin/sh -s", _finder(self._candidates, program)

    def _answer(self, output: Output) -> agent.Json:
        """The answer in what a command printed. Raises HostError."""
        with understood():
            answer = agent.answer_in(output.stdout)
            if answer is None:
                raise self._unreadable(output)
            if "error" in answer:
                raise _explained(answer["error"])
            return answer

    def _unreadable(self, output: Output) -> base.HostError:
        """Why there is no answer in `output`."""
        uv = ""
        for line in output.stdout.splitlines():
            if line.startswith(_NO_PYTHON_BUT_UV):
                uv = line.removeprefix(_NO_PYTHON_BUT_UV)
            if line.startswith(_NO_PYTHON):
                return self._no_python(line.removeprefix(_NO_PYTHON).strip(" ,"), uv)
        said = (output.stderr.strip() or output.stdout.strip()).splitlines()[-3:]
        return base.CommandFailed(
            f"the command there ended with {output.exit_status}: {' / '.join(said) or 'it said nothing'}",
            "Can that user log in and run /bin/sh? Try: ssh HOST true",
        )

    def _no_python(self, seen: str, uv: str) -> base.NoPython:
        what = f"{self._named} is no Python 3.11 or newer" if self._named else "no Python 3.11 or newer"
        if uv and uv == self._named:
            what = f"{uv} knows of no Python 3.11 or newer"
        return base.NoPython(
            f"{what} there" + (f"; found {seen}" if seen else ""),
            "Install one (uv python install 3.12), or name it: python=/path/to/python3 in the hosts file.",
            uv=uv,
        )


#: what one worker adds to the limit of `start`: they are started one after the other
_SECONDS_A_WORKER = 1.0
#: what `stop` at the host may take after the grace
_AFTER_GRACE_SECONDS = agent.HURRY_SECONDS + agent.CHILDREN_SECONDS + 2 * agent.KILL_SECONDS


def _finder(candidates: Sequence[str], program: str) -> str:
    words = " ".join(_word(candidate) for candidate in candidates)
    return _FINDER.format(candidates=words, program=program, mark=_NO_PYTHON, uv_mark=_NO_PYTHON_BUT_UV)


def _word(path: str) -> str:
    """`path` as a word of sh; the home is the host's."""
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)


def _explained(error: agent.Json) -> base.HostError:
    """The error of base.py for what the agent answered."""
    text = error["message"] + (f":\n{error['details']}" if error["details"] else "")
    return _KINDS.get(error["kind"], base.HostError)(text, _HINTS.get(error["kind"], ""))


def _probe(answer: agent.Json, **more: Any) -> base.Probe:
    fields = {name: value for name, value in answer.items() if name != "time"}
    fields["gpus"] = tuple(resources.Gpu(**gpu) for gpu in answer["gpus"])
    fields["venvs"] = tuple(base.Venv(**venv) for venv in answer["venvs"])
    return base.Probe(**fields, **more)
