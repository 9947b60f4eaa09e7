"""`fleet drain`, `undrain`, `label` and `forget`: what operators do to workers by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from broker import names
from broker.errors import NotFound, UsageError
from cli import params
from cli.context import Context, pass_context, print_json
from cli.outcomes import NOT_FOUND, exit_code
from cli.params import WorkerName, json_option

if TYPE_CHECKING:
    import redis

    from broker.control import Told

Change = Callable[["redis.Redis", Mapping[str, str]], "dict[str, Told]"]
#: what people read of an outcome
_WORDS = {
    "draining": "draining: takes no new jobs until 'fleet undrain {0}'",
    "undrained": "takes jobs again",
    "not_drained": "was not drained",
    NOT_FOUND: "no such worker; 'fleet status' lists those there are",
    "forgotten": "forgotten",
    "alive": "not forgotten: it is alive; end it first ('fleet down HOST', or SIGTERM)",
    "leases": "not forgotten: {1} of its jobs are not given to others yet. That takes one lease and a "
    "worker that lives ('fleet status'); try again then",
}


def _chosen(command: Any) -> Any:
    """The ways to name workers that `drain` and `undrain` share."""
    for decorator in (
        pass_context,
        json_option,
        click.option("--all", "every", is_flag=True, help="All that there are now."),
        click.option("--host", metavar="H", help="All of this host, as 'fleet status' calls it."),
        click.argument("names", metavar="[WORKER]...", type=WorkerName(), nargs=-1),
    ):
        command = decorator(command)
    return command


@click.command()
@_chosen
def drain(context: Context, /, names: tuple[str, ...], host: str | None, every: bool, as_json: bool) -> int:
    """Let workers finish what runs and take nothing new, until 'fleet undrain'.

    Holds across restarts of the worker. An --ephemeral worker then leaves, any other stays.
    Exit code 0: all; 3: some are unknown; 4: there are no such workers.
    """
    from broker import control

    return _change(context, names, host, every, control.drain, as_json=as_json)


@click.command()
@_chosen
def undrain(context: Context, /, names: tuple[str, ...], host: str | None, every: bool, as_json: bool) -> int:
    """Let drained workers take jobs again.

    Exit code 0: none of them is drained now; 3: some are unknown; 4: there are no such workers.
    """
    from broker import control

    return _change(context, names, host, every, control.undrain, as_json=as_json)


def _change(
    context: Context, names: tuple[str, ...], host: str | None, every: bool, change: Change, *, as_json: bool
) -> int:
    from broker.control import Told

    with context.redis() as client:
        wanted, known = _select(client, names, host, every)
        told = change(client, {name: known[name] for name in wanted if name in known})
    outcomes = {name: told.get(name, Told(NOT_FOUND)) for name in wanted}
    if as_json:
        rows = [{"name": name, **_fields(one)} for name, one in outcomes.items()]
        print_json({"workers": rows})
    else:
        for name, one in outcomes.items():
            click.echo(f"{name}  {_WORDS[one.outcome].format(name)}{_running(one)}")
    good = ("draining", "undrained", "not_drained")
    return exit_code([one.outcome for one in outcomes.values()], good)


def _select(
    client: redis.Redis, names: tuple[str, ...], host: str | None, every: bool
) -> tuple[list[str], dict[str, str]]:
    """The names that are meant, and the host of each worker there is. Raises UsageError, NotFound."""
    from broker.control import hosts_of_workers

    if sum((bool(names), host is not None, every)) != 1:
        raise UsageError("name workers, or a host, or all", "WORKER... | --host H | --all")
    known = hosts_of_workers(client)
    if names:
        return list(dict.fromkeys(names)), known
    found = [name for name, where in known.items() if every or where == host]
    if not found:
        where = "there are no workers" if every else f"no worker of host {host}"
        raise NotFound(where, "'fleet status' lists workers and their hosts.")
    return found, known


def _fields(told: Told) -> dict[str, Any]:
    return {"outcome": told.outcome, "running": list(told.running)}


def _running(told: Told) -> str:
    """How much still runs there, after a wish to drain."""
    count = len(told.running)
    if told.outcome != "draining" or not count:
        return ""
    return f"; {count} job{'s' * (count != 1)} still run{'s' * (count == 1)}"


@click.command()
@click.argument("name", metavar="WORKER", type=WorkerName())
@click.argument("words", metavar="K=V|K-...", nargs=-1, required=True)
@json_option
@pass_context
def label(context: Context, /, name: str, words: tuple[str, ...], as_json: bool) -> None:
    """Give a worker labels (K=V), or take away such as were given so (K-); it is told at once.

    They outrank those it was started with, and are kept across its restarts until 'fleet forget'.
    """
    from broker import control

    given, taken = _told_apart(words)
    with context.redis() as client:
        if name not in control.hosts_of_workers(client):
            raise NotFound(f"no worker {name}", "'fleet status' lists workers.")
        labels = control.label(client, [name], given, taken)[name]
    if as_json:
        print_json({"worker": name, "labels": labels})
    else:
        click.echo(f"{name}  " + (",".join(f"{k}={v}" for k, v in labels.items()) or "no labels given so"))


def _told_apart(words: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The labels to give, and the names of those to take away. Raises UsageError."""
    taken = [word[:-1] for word in words if "=" not in word and word.endswith("-")]
    given = params.labels("label", tuple(word for word in words if "=" in word or not word.endswith("-")))
    for name in taken:
        names.label_name(name)
        if name in given:
            raise UsageError(f"{name} is given and taken away at once")
    return given, taken


@click.command()
@click.argument("names", metavar="WORKER...", type=WorkerName(), nargs=-1, required=True)
@json_option
@pass_context
def forget(context: Context, /, names: tuple[str, ...], as_json: bool) -> int:
    """Remove the records of workers that are offline, and of no others.

    Exit code 0: all; 3: some; 1: none, for they are alive or hold jobs; 4: there are no such workers.
    """
    from broker import control

    with context.redis() as client:
        outcomes = {name: control.forget(client, name) for name in dict.fromkeys(names)}
    if as_json:
        rows = [{"name": n, "outcome": outcome, "jobs": jobs} for n, (outcome, jobs) in outcomes.items()]
        print_json({"workers": rows})
    else:
        for name, (outcome, held) in outcomes.items():
            click.echo(f"{name}  {_WORDS[outcome].format(name, held)}")
    return exit_code([outcome for outcome, _ in outcomes.values()], ("forgotten",))
