"""A file of jobs: many of them, with what each needs and which others it waits for. No Redis here.

    [defaults]                      what holds for each job that does not say otherwise
    queue = "gpu"
    [[jobs]]
    name = "train"                  by which others of the file wait for it
    command = "train --seed 7"      split as a shell would, or `argv`, or `shell = true`
    after = ["prepare"]             names of this file, or ids of jobs that are there

The same in YAML and JSON. All faults of a file are found before anything is queued, and told at once.
"""

from __future__ import annotations

import difflib
import graphlib
import math
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from broker import amounts, marked, names, ranges, requirements
from broker.arrays import Tasks
from broker.command import Command
from broker.errors import UsageError
from broker.marked import Fault, Marked
from broker.ranges import Ranges
from broker.submit import LONGEST_NAME, OnFailedDependency, Options, Submission

#: what runs a command with `shell = true`
SHELL = ("/bin/sh", "-c")
_MOST_RETRIES = 1000
#: faults of waiting in a circle that are told
_MOST_CYCLES = 20
_MISSING = Marked(None, 0)


class JobFileError(UsageError):
    """A file of jobs has faults; `faults` holds one line for each, with file and line."""

    code = "job_file"

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(
            "\n".join(faults), "Nothing was queued. docs/cli.md shows what a file of jobs holds."
        )
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Reference:
    """A word of `after` or `after_any`: the name of a job of the file, or an id."""

    word: str
    line: int
    may_fail: bool


@dataclass(frozen=True)
class FileJob:
    """One job of a file; `options` lacks what it waits for."""

    line: int
    name: str | None
    id: str | None
    command: Command
    queue: str
    options: Options
    references: tuple[Reference, ...]
    #: of an array
    tasks: Tasks | None = None


@dataclass(frozen=True)
class JobFile:
    """What a file says. `faults`: what is wrong with it, as far as the file alone tells."""

    jobs: tuple[FileJob, ...]
    faults: tuple[Fault, ...]

    def outside(self) -> dict[str, list[Reference]]:
        """The ids of jobs outside of the file that it waits for, and where it says so."""
        found: dict[str, list[Reference]] = {}
        known = _known(self.jobs)
        for job in self.jobs:
            for reference in job.references:
                if reference.word not in known:
                    found.setdefault(reference.word, []).append(reference)
        return found

    def unknown(self, there: Collection[str]) -> list[Fault]:
        """Faults for what it waits for though it is neither in the file nor `there`, the ids of jobs."""
        known = list(_known(self.jobs))
        return [
            Fault(reference.line, f"no job {word!r} in this file or in Redis{_did_you_mean(word, known)}")
            for word, references in self.outside().items()
            if word not in there
            for reference in references
        ]

    def submissions(self) -> dict[int, Submission]:
        """The submission of each job, by its place in `jobs`; those first that others wait for.

        Only for a file without faults.
        """
        ids = {number: job.id or names.new_job_id() for number, job in enumerate(self.jobs)}
        known = _known(self.jobs)
        graph = _graph(self.jobs)
        order: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter(dict.fromkeys(graph, ()))
        for number, others in graph.items():
            order.add(number, *others)
        ordered = ((number, self.jobs[number]) for number in order.static_order())
        return {
            number: Submission(job.command, _with_parents(job, known, ids), job.queue, ids[number])
            for number, job in ordered
        }


def read(text: str, kind: str, folder: Path, *, queue: str, options: Options) -> JobFile:
    """What a file's text says; `kind` is one of `marked.FORMATS`, `folder` where relative ones begin.

    `queue` and `options` are for what neither a job nor the file's defaults say.
    """
    try:
        document = marked.read(text, kind)
    except marked.Unreadable as exc:
        return JobFile((), (exc.fault,))
    reader = _Reader(folder, queue, options, list(document.faults))
    jobs = tuple(reader.jobs(document.root))
    faults = [*reader.faults, *_double(jobs), *_ambiguous(jobs), *_cycles(jobs)]
    return JobFile(jobs, tuple(sorted(set(faults), key=lambda fault: (fault.line, fault.message))))


# --- one job ---------------------------------------------------------------------------------------


def _any_text(mark: Marked) -> str:
    if not isinstance(mark.value, str):
        raise UsageError("must be text, in quotes")
    if any(
        "\ud800" <= character <= "\udfff" for character in mark.value
    ):  # half a pair, as JSON may spell it
        raise UsageError("is not UTF-8 text")
    return mark.value


def _text(mark: Marked) -> str:
    if not _any_text(mark):
        raise UsageError("is empty")
    return _any_text(mark)


def _name(mark: Marked) -> str:
    text = _text(mark)
    if len(text) > LONGEST_NAME or not text.isprintable():
        raise UsageError(f"must be at most {LONGEST_NAME} printable characters")
    return text


def _range(mark: Marked) -> Ranges:
    if not isinstance(mark.value, str):
        raise UsageError("must be a range in quotes, such as '1-100'")
    return ranges.parse(mark.value)


def _flag(mark: Marked) -> bool:
    if not isinstance(mark.value, bool):
        raise UsageError("must be true or false")
    return mark.value


def _number(mark: Marked, least: int = 0, most: int = ranges.MOST_TASKS) -> int:
    if not isinstance(mark.value, int) or isinstance(mark.value, bool):
        raise UsageError("must be a whole number")
    if not least <= mark.value <= most:
        raise UsageError(f"must be from {least} to {most}")
    return mark.value


def _amount(mark: Marked) -> Any:
    """What durations and sizes are read from."""
    if mark.value is None or not isinstance(mark.value, str | int | float):
        raise UsageError("must be a number, or text")
    return mark.value


def _conditions(mark: Marked) -> list[str] | dict[str, str]:
    """`["k=glob", "k!=glob"]`, or a table of keys and globs."""
    if isinstance(mark.value, dict):
        return _variables(mark)
    return list(_words(mark))


def _words(mark: Marked) -> tuple[str, ...]:
    if not isinstance(mark.value, list):
        raise UsageError("must be a list of words, in quotes")
    return tuple(_each(f"word {number}", item) for number, item in enumerate(mark.value, 1))


def _variables(mark: Marked) -> dict[str, str]:
    if not isinstance(mark.value, dict):
        raise UsageError("must be a table of names and texts")
    return {name: _each(name, item) for name, item in mark.value.items()}


def _each(name: str, item: Marked) -> str:
    """A text among several."""
    try:
        return _any_text(item)
    except UsageError as exc:
        raise UsageError(f"{name} {exc.message}") from exc


def _job_names(mark: Marked) -> list[Marked]:
    """One, or a list of them."""
    items = mark.value if isinstance(mark.value, list) else [mark]
    for item in items:
        _text(item)
    return items


def _on_failed(mark: Marked) -> str:
    if mark.value not in get_args(OnFailedDependency):
        raise UsageError("must be fail or wait")
    return str(mark.value)


#: what may also stand among the defaults -> how it is read
_COMMON: Mapping[str, Callable[[Marked], Any]] = {
    "queue": lambda mark: names.queue_name(_text(mark)),
    "env": _variables,
    "cwd": _text,
    "shell": _flag,
    "timeout": lambda mark: math.ceil(amounts.duration(_amount(mark))),
    "retries": lambda mark: _number(mark, most=_MOST_RETRIES),
    "retry_delay": lambda mark: amounts.duration(_amount(mark), zero=True),
    "on_failed_dependency": _on_failed,
    **dict.fromkeys(requirements.FIELDS, _amount),
    "labels": _conditions,
    "exclusive": _flag,
}
_OF_A_JOB: Mapping[str, Callable[[Marked], Any]] = {
    "name": _name,
    "id": lambda mark: names.job_id(_text(mark)),
    "command": _text,
    "argv": _words,
    "after": _job_names,
    "after_any": _job_names,
    "array": _range,
    "max_fails": _number,
    "max_parallel": lambda mark: _number(mark, 1),
    **_COMMON,
}
_OF_A_FILE = ("defaults", "jobs")
#: fields of a job -> those of Options
_OPTIONS = {
    "name": "name",
    "timeout": "timeout_seconds",
    "retries": "retries",
    "retry_delay": "retry_delay_seconds",
    "on_failed_dependency": "on_failed_dependency",
}


@dataclass
class _Reader:
    """Reads the jobs of one file, and gathers what is wrong with them."""

    folder: Path
    queue: str
    options: Options
    faults: list[Fault]
    _defaults: dict[str, Any] = field(default_factory=dict)

    def jobs(self, root: Marked) -> Iterator[FileJob]:
        """The jobs of a document; one with faults has its names, for others to wait for, and little else."""
        top = self._table(root, "the file", _OF_A_FILE)
        if not isinstance(root.value, dict):
            return
        if "defaults" in top:
            self._defaults = self._fields(top["defaults"], "defaults", _COMMON)
        listed = top.get("jobs", _MISSING).value
        if not isinstance(listed, list) or not listed:
            line = top["jobs"].line if "jobs" in top else root.line
            self._fault(line, "there are no jobs: 'jobs' is a list of tables, each with a command")
            return
        yield from map(self._job, listed)

    def _fault(self, line: int, message: str) -> None:
        self.faults.append(Fault(line, message))

    def _table(self, mark: Marked, what: str, known: Iterable[str]) -> dict[str, Marked]:
        """The entries of a table that have names we know."""
        if not isinstance(mark.value, dict):
            self._fault(mark.line, f"{what} must be a table")
            return {}
        names_known = list(known)
        for name, item in mark.value.items():
            if name not in names_known:
                near = _did_you_mean(name, names_known) or f": there are {', '.join(names_known)}"
                self._fault(item.line, f"unknown field {name!r}{near}")
        return {name: item for name, item in mark.value.items() if name in names_known}

    def _fields(
        self, mark: Marked, what: str, known: Mapping[str, Callable[[Marked], Any]]
    ) -> dict[str, Any]:
        found = {}
        for name, item in self._table(mark, what, known).items():
            try:
                value = known[name](item)
                requirements.parse({name: value} if name in requirements.FIELDS else {})
                found[name] = value
            except UsageError as exc:
                said = exc.message.removeprefix(f"{name}: ").rstrip(".")
                self._fault(item.line, f"{name}: {said}" + (f". {exc.hint}" if exc.hint else ""))
        return found

    def _job(self, mark: Marked) -> FileJob:
        before = len(self.faults)
        said = self._fields(mark, "a job", _OF_A_JOB)
        every = {**self._defaults, **said}
        command, options = Command(("?",)), self.options
        what = said.keys() & {"command", "argv"}
        if what or len(self.faults) == before:
            try:
                command = self._command(said, every).checked()
                options = self._options(every)
            except UsageError as exc:
                self._fault(mark.value[min(what)].line if what else mark.line, exc.message)
        name, job_id, queue = said.get("name"), said.get("id"), every.get("queue", self.queue)
        references, tasks = tuple(_references(said)), self._tasks(mark, said)
        return FileJob(mark.line, name, job_id, command, queue, options, references, tasks)

    def _tasks(self, mark: Marked, said: Mapping[str, Any]) -> Tasks | None:
        """Those of an array."""
        limits = {name: said[name] for name in ("max_fails", "max_parallel") if name in said}
        if "array" in said:
            return Tasks(said["array"], **limits)
        if limits and "array" not in mark.value:
            for name in limits:
                self._fault(mark.value[name].line, f"{name}: is for arrays, and there is no array")
        return None

    def _command(self, said: Mapping[str, Any], every: Mapping[str, Any]) -> Command:
        env = {**self._defaults.get("env", {}), **said.get("env", {})}
        cwd = every.get("cwd")
        folder = None if cwd is None else str(self.folder / Path(cwd).expanduser())
        return Command(_argv(said, shell=every.get("shell", False)), env, folder)

    def _options(self, every: Mapping[str, Any]) -> Options:
        changes = {_OPTIONS[name]: value for name, value in every.items() if name in _OPTIONS}
        need = {name: value for name, value in every.items() if name in requirements.FIELDS}
        return replace(self.options, **changes, requirements=requirements.parse(need)).checked()


def _references(said: Mapping[str, Any]) -> Iterator[Reference]:
    for name, may_fail in (("after", False), ("after_any", True)):
        for item in said.get(name, ()):
            yield Reference(item.value, item.line, may_fail)


def _argv(said: Mapping[str, Any], *, shell: bool) -> tuple[str, ...]:
    if ("command" in said) == ("argv" in said):
        raise UsageError("a job has either a command or an argv")
    if "argv" in said:
        if said.get("shell"):
            raise UsageError("shell: a shell is given a command, not an argv")
        return tuple(said["argv"])
    if shell:
        return (*SHELL, said["command"])
    try:
        return tuple(shlex.split(said["command"]))
    except ValueError as exc:
        raise UsageError(f"command: cannot be split into words: {exc}") from exc


# --- all of them -----------------------------------------------------------------------------------


def _known(jobs: Sequence[FileJob]) -> dict[str, int]:
    """Where the job of each name, and of each id that was chosen, stands in `jobs`."""
    found: dict[str, int] = {}
    for number, job in enumerate(jobs):
        for word in (job.name, job.id):
            if word is not None:
                found.setdefault(word, number)
    return found


def _double(jobs: Sequence[FileJob]) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for number, job in enumerate(jobs):
        for word in {job.name, job.id} - {None}:
            other = first.setdefault(str(word), number)
            if other != number:
                yield Fault(job.line, f"a job {word!r} is there already, in line {jobs[other].line}")


def _ambiguous(jobs: Sequence[FileJob]) -> Iterator[Fault]:
    """What is to finish, and may end in whatever way."""
    known = _known(jobs)
    for job in jobs:
        strict = {known.get(one.word, one.word) for one in job.references if not one.may_fail}
        for one in job.references:
            if one.may_fail and known.get(one.word, one.word) in strict:
                yield Fault(one.line, f"{one.word!r} is among both after and after_any")


def _graph(jobs: Sequence[FileJob]) -> dict[int, list[int]]:
    """For each job, those of the file that it waits for."""
    known = _known(jobs)
    return {
        number: [known[reference.word] for reference in job.references if reference.word in known]
        for number, job in enumerate(jobs)
    }


def _cycles(jobs: Sequence[FileJob]) -> Iterator[Fault]:
    """Each circle of jobs that wait for each other, as far as they share no link."""
    graph = _graph(jobs)
    for _ in range(_MOST_CYCLES):
        try:
            graphlib.TopologicalSorter(graph).prepare()
            return
        except graphlib.CycleError as exc:
            circle: list[int] = list(reversed(exc.args[1]))  # each waits for the next
            yield Fault(jobs[circle[0]].line, f"jobs wait for each other: {_told(jobs, circle)}")
            graph[circle[0]] = [other for other in graph[circle[0]] if other != circle[1]]


def _told(jobs: Sequence[FileJob], circle: Sequence[int]) -> str:
    words = [jobs[number].name or jobs[number].id or "?" for number in circle]
    return f"{words[0]} waits for " + ", which waits for ".join(words[1:])


def _with_parents(job: FileJob, known: Mapping[str, int], ids: Mapping[int, str]) -> Options:
    def parents(may_fail: bool) -> tuple[str, ...]:
        words = [reference.word for reference in job.references if reference.may_fail == may_fail]
        return tuple(ids[known[word]] if word in known else word for word in words)

    return replace(job.options, after=parents(False), after_any=parents(True)).checked()


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f": did you mean {near[0]!r}?" if near else ""
