"""`fleet submit --file`: many jobs, checked whole before any of them is queued."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.errors import FleetError, UsageError
from cli.context import Context, print_json

if TYPE_CHECKING:
    import redis

    from broker.jobfile import JobFile
    from broker.marked import Fault
    from broker.submit import Submitted

#: options that say how, and nothing about a job
_ABOUT_THE_CALL = ("file", "wait", "as_json")


def submit_file(context: Context, path: str, *, wait: bool, as_json: bool) -> int:
    """Submit the jobs of a file ('-': stdin); returns the exit code. Raises JobFileError."""
    source, file = _read(context, path)
    if file.faults:
        _refuse(source, [*file.faults, *_unknown_if_asked(context, file)])
    with context.redis(start=True) as client:
        faults = _unknown(client, file)
        if faults:
            _refuse(source, faults)
        done = _submitted(client, file)
        return _told(context, client, file, [done[number] for number in sorted(done)], wait, as_json)


def _submitted(client: redis.Redis, file: JobFile) -> dict[int, Submitted]:
    """Submit all jobs; what became of each, by its place in the file."""
    from broker import arrays
    from broker.submit import submit_together

    rows = file.submissions()
    try:
        for number, submission in rows.items():
            if tasks := file.jobs[number].tasks:
                rows[number] = arrays.prepare(client, submission, tasks)
        return dict(zip(rows, submit_together(client, rows.values()), strict=True))
    except FleetError:
        arrays.forget(client, rows.values())
        raise


def refuse_other_options(argv: Sequence[str]) -> None:
    """Raises UsageError for what is said on the command line about one job."""
    if argv:
        raise UsageError("--file and a command exclude each other", "The file says what is to be run.")
    ctx = click.get_current_context()
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name or "")
        if option.name not in _ABOUT_THE_CALL and source is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"--file and {max(option.opts, key=len)} exclude each other",
                "Say it in the file: for a job, or under 'defaults' for all.",
            )


def _read(context: Context, path: str) -> tuple[str, JobFile]:
    """What messages call the file, and what it says. Raises UsageError, JobFileError."""
    from broker import jobfile, marked
    from broker.submit import Options

    source = "<stdin>" if path == "-" else path
    kind = marked.FORMATS.get(Path(path).suffix.lower())
    if path != "-" and kind is None:
        raise UsageError(
            f"{path}: not the name of a file of jobs", "It ends with .toml, .yaml, .yml or .json."
        )
    text = _text(path, source)
    options = Options(on_failed_dependency=context.settings.jobs.on_failed_dependency)
    folder = Path.cwd() if path == "-" else Path(path).expanduser().absolute().parent
    return source, jobfile.read(text, kind or marked.guess(text), folder, queue="default", options=options)


def _text(path: str, source: str) -> str:
    from broker.jobfile import JobFileError

    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as exc:
        raise UsageError(f"cannot read the file of jobs {path}: {exc.strerror or exc}") from exc
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise JobFileError([f"{source}:{line}: is not UTF-8 text"]) from exc


def _refuse(source: str, faults: Sequence[Fault]) -> None:
    from broker.jobfile import JobFileError

    ordered = sorted(faults, key=lambda fault: fault.line)
    raise JobFileError([f"{source}:{fault.line}: {fault.message}" for fault in ordered])


def _unknown(client: redis.Redis, file: JobFile) -> list[Fault]:
    """Faults for jobs to wait for that are nowhere."""
    from broker import jobs, names

    ids = [word for word in file.outside() if names.is_job_id(word)]
    states = jobs.states(client, ids) if ids else {}
    return file.unknown({job_id for job_id, state in states.items() if state})


def _unknown_if_asked(context: Context, file: JobFile) -> list[Fault]:
    """The same for a file with other faults: told with these, if Redis can be asked."""
    if file.outside():
        with suppress(FleetError), context.redis() as client:
            return _unknown(client, file)
    return []


def _told(
    context: Context, client: redis.Redis, file: JobFile, done: Sequence[Submitted], wait: bool, as_json: bool
) -> int:
    """Say the ids, wait where asked to; returns the exit code."""
    if not as_json:
        for job, submitted in zip(file.jobs, done, strict=True):
            click.echo(f"{job.name or '-'} {submitted.id}")
        sys.stdout.flush()
    states: dict[str, Any] = {submitted.id: submitted.state for submitted in done}
    code = 0
    if wait:
        states, code = _wait(context, client, list(states))
    if as_json:
        rows = zip(file.jobs, done, strict=True)
        fields = [
            {"name": job.name, "id": one.id, "queue": job.queue, "state": states[one.id]} for job, one in rows
        ]
        print_json({"jobs": fields})
    return code


def _wait(context: Context, client: redis.Redis, ids: list[str]) -> tuple[dict[str, Any], int]:
    from broker import control
    from cli import wait

    try:
        with wait.bar(context) as progress:
            states = control.wait(client, ids, progress=progress)
    except KeyboardInterrupt:
        context.say("The jobs go on; 'fleet cancel JOB...' ends them.")
        raise
    wait.say(context, states)
    return dict(states), wait.exit_code(states)
