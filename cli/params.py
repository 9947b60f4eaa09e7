"""What words on the command line may be: durations, job ids, queues, workers; and how Tab completes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker import amounts, names
from broker.errors import UsageError
from broker.requirements import FIELDS, FieldError, Requirements, parse
from cli.context import Context

if TYPE_CHECKING:
    import redis
    from click.shell_completion import CompletionItem

    from broker.selection import Word

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic since click 8.4 alone

#: seconds Tab waits for Redis
_PATIENCE_SECONDS = 1.0
#: jobs offered by Tab
_OFFERED = 50


class Duration(_ParamType):
    """`90`, `90s`, `5m`, `1.5h`, `2d`: a number of seconds, as a float; more than 0 unless `zero`."""

    name = "duration"

    def __init__(self, *, zero: bool = False) -> None:
        self._zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        try:
            return amounts.duration(value, zero=self._zero)
        except UsageError as exc:
            self.fail(exc.message, param, ctx)


class Size(_ParamType):
    """`512M`, `4G`: a size in bytes; more than 0."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return amounts.size(value)
        except UsageError as exc:
            self.fail(exc.message, param, ctx)


class Gibibytes(_ParamType):
    """`64`, `0.5`: a number of GiB, as bytes; more than 0."""

    name = "gib"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = round(float(value) * 2**30)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no number of GiB.", param, ctx)
        if size < 1:
            self.fail(f"{value!r}: must be more than 0.", param, ctx)
        return size


class Count(click.IntRange):
    """A whole number from 1 on."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = click.INT.convert(value, param, ctx)
        if number < 1:
            self.fail(f"must be at least 1, got {number}.", param, ctx)
        return number


class Folder(_ParamType):
    """The path of a folder, there or not; none is empty: that is a variable which was not set."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not str(value):
            self.fail("is empty: name a folder, or leave the option out.", param, ctx)
        return Path(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir")]


class JobId(_ParamType):
    """The id of a job; Tab offers the newest."""

    name = "job"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return names.job_id(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from broker import jobs

        return _offer(ctx, incomplete, lambda client: [job.id for job in jobs.listed(client, limit=_OFFERED)])


class JobWord(JobId):
    """A job, an array, or some of its tasks: `ID`, `ID-7`, `ID[1,4-6]`, `last`; `all` if the verb may."""

    name = "jobs"

    def __init__(self, *, may_be_all: bool = False) -> None:
        self._may_be_all = may_be_all

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Word:
        from broker import selection

        word = selection.parse(value)
        if word.job_id == selection.ALL and not self._may_be_all:
            self.fail("'all' are too many here: name jobs.", param, ctx)
        return word


class QueueName(_ParamType):
    """The name of a queue; Tab offers those there are."""

    name = "queue"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return names.queue_name(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from broker.chores import known_queues

        return _offer(ctx, incomplete, known_queues)


class WorkerName(_ParamType):
    """The name of a worker; Tab offers those there are."""

    name = "worker"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return names.worker_name(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from broker.control import hosts_of_workers

        return _offer(ctx, incomplete, hosts_of_workers)


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Files, which the shell itself knows best."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def _offer(ctx: click.Context, incomplete: str, ask: Any) -> list[CompletionItem[str]]:
    """What `ask(client)` returns and fits; nothing where Redis is not there at once."""
    from click.shell_completion import CompletionItem

    try:
        with _quick_client(ctx.ensure_object(Context)) as client:
            found = ask(client)
    except Exception:  # whatever it is: Tab stays silent, the command itself will tell
        return []
    return [CompletionItem(value) for value in found if value.startswith(incomplete)]


def _quick_client(context: Context) -> redis.Redis:
    from broker.connection import connect

    return connect(context.url(), timeout_seconds=_PATIENCE_SECONDS)


def pairs(option: str, words: tuple[str, ...]) -> dict[str, str]:
    """`("K=V", ...)`, the values of `option`, as a dictionary. Raises UsageError."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise UsageError(f"{option} {word!r}: not of the form NAME=VALUE")
        found[name] = value
    return found


def labels(option: str, words: tuple[str, ...]) -> dict[str, str]:
    """As `pairs`, of labels of workers. Raises UsageError."""
    found = pairs(option, words)
    for name, value in found.items():
        names.label_name(name)
        names.label_value(value)
    return found


def resource_options(command: Any) -> Any:
    """What a machine is said to have, for a verb that starts workers; `resources` reads them."""
    count = click.IntRange(min=0)
    for option in (
        click.option("--num-gpus", type=count, metavar="N", help="Not the GPUs detected."),
        click.option("--memory-gb", type=Gibibytes(), metavar="GB", help="Not the memory detected; GiB."),
        click.option("--num-cpus", type=click.IntRange(min=1), metavar="N", help="Not the CPUs detected."),
    ):
        command = option(command)
    return command


def resources(options: Mapping[str, Any]) -> dict[str, int]:
    """What `resource_options` said, as arguments of `fleet.resources.detect`."""
    said = {
        "cpus": options["num_cpus"],
        "memory_bytes": options["memory_gb"],
        "num_gpus": options["num_gpus"],
    }
    return {name: value for name, value in said.items() if value is not None}


def resource_words(options: Mapping[str, Any]) -> list[str]:
    """What `resource_options` said, as these options again."""
    gib = options["memory_gb"] and options["memory_gb"] / 2**30
    said = {"num-cpus": options["num_cpus"], "memory-gb": gib, "num-gpus": options["num_gpus"]}
    return [word for name, value in said.items() if value is not None for word in (f"--{name}", f"{value:g}")]


def stagger_options(command: Any) -> Any:
    """How workers that a script starts are kept from arriving at once; `stagger_seconds` reads them."""
    for option in (
        click.option("--no-stagger", is_flag=True, help="Workers begin at once, all of them."),
        click.option(
            "--startup-delay-seconds",
            type=Duration(zero=True),
            metavar="W",
            help="Workers begin within W, each at its own moment; default: by their number.",
        ),
    ):
        command = option(command)
    return command


def stagger_seconds(options: Mapping[str, Any], workers: int, registrations_per_second: float) -> float:
    """The window in which `workers`, all of one submission, begin. Raises UsageError."""
    from fleet import jitter

    said: float | None = options["startup_delay_seconds"]
    if options["no_stagger"] and said is not None:
        raise UsageError("--no-stagger and --startup-delay-seconds contradict each other", "Leave one out.")
    if options["no_stagger"]:
        return 0.0
    return jitter.window_seconds(workers, registrations_per_second) if said is None else said


def requirement_options(command: Any) -> Any:
    """What a job needs of the worker that runs it, for a verb that submits; `requirements` reads them."""
    for option in (
        click.option(
            "--priority", metavar="P", help="low, normal, high, urgent, critical, or any whole number."
        ),
        click.option("--exclusive", is_flag=True, help="Nothing else runs on its worker meanwhile."),
        click.option(
            "--time-request", metavar="TIME", help="Least that is left of its worker's life: 90, 5m, 2h."
        ),
        click.option(
            "--label",
            "labels",
            multiple=True,
            metavar="K=GLOB",
            help="Only on workers with such a label; K!=GLOB: without it; repeatable.",
        ),
        click.option("--gpu-memory", metavar="SIZE", help="Least memory of each GPU: 40G."),
        click.option("--gpus", metavar="N", help="GPUs for it alone; below 1 a share of one: 0.5."),
        click.option("--memory", metavar="SIZE", help="Memory for it: 512M, 4G."),
        click.option("--cpus", metavar="N", help="CPUs for it: 4, 0.5."),
    ):
        command = option(command)
    return command


def requirements(options: Mapping[str, Any]) -> Requirements:
    """What `requirement_options` said. Raises UsageError."""
    try:
        return parse({field: options[field] for field in FIELDS})
    except FieldError as exc:
        option = {"labels": "label"}.get(exc.name, exc.name).replace("_", "-")
        raise UsageError(f"--{option}: {exc.why}", exc.hint) from exc


def json_option(command: Any) -> Any:
    """`--json` for a verb that reports."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document.")(command)
