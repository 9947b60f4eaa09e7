"""`fleet hosts`: the hosts kept in Redis, so that `up`, `status` and `down` need no file again."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from cli.context import Context, pass_context, print_json


@click.group()
def hosts() -> None:
    """The hosts kept in Redis, for `fleet up` and `fleet down` without a file."""


@hosts.command()
@click.argument("entries", metavar="HOST...", nargs=-1, required=True)
@pass_context
def add(context: Context, entries: tuple[str, ...]) -> None:
    """Keep hosts, each as in a hosts file: 'alice@gpu7:2222 slots=2'."""
    from fleet import hosts as files

    _keep(context, files.parse("\n".join(entries), "HOST"))


@hosts.command("add-file")
@click.argument("file", metavar="FILE")
@pass_context
def add_file(context: Context, file: str) -> None:
    """Keep the hosts of a file; '-' reads stdin."""
    from fleet import hosts as files

    _keep(context, files.read(file))


@hosts.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@pass_context
def list_hosts(context: Context, as_json: bool) -> None:
    """The hosts kept."""
    from fleet import kept_hosts

    with context.redis() as client:
        found = kept_hosts.load(client)
    if as_json:
        print_json({"hosts": [_document(host) for host in found]})
        return
    for host in found:
        click.echo(_line(_document(host)))


@hosts.command()
@click.argument("names", metavar="HOST...", nargs=-1, required=True)
@pass_context
def remove(context: Context, names: tuple[str, ...]) -> None:
    """Keep these hosts no longer. Their workers run on: 'fleet down HOST' first ends them.

    A tunnel from here to one of them is closed.
    """
    from fleet import kept_hosts, tunnel

    with context.redis() as client:
        chosen = kept_hosts.choose(client, names)
        kept_hosts.remove(client, names)
        folder = tunnel.folder_for(client)
    if folder:
        asyncio.run(tunnel.end_all(folder, chosen))
    context.say(f"removed {', '.join(names)}")


def _keep(context: Context, found: tuple[Any, ...]) -> None:
    from fleet import kept_hosts

    with context.redis() as client:
        kept_hosts.check(client, found)
        kept_hosts.keep(client, kept_hosts.settled(client, found, {}, named=True))
    context.say(f"kept {', '.join(host.name for host in found)}")


def _document(host: Any) -> dict[str, Any]:
    from dataclasses import asdict

    fields = asdict(host)
    options: dict[str, Any] = fields.pop("options")
    return fields | options


def _line(document: dict[str, Any]) -> str:
    """As a hosts file would have it, so that the list can be one."""
    host, user, port = document["name"], document["user"], document["port"]
    bracketed = f"[{host}]" if ":" in host else host
    address = (f"{user}@" if user else "") + bracketed + (f":{port}" if port else "")
    words = [
        f"{name}={document[name]}" for name in ("slots", "workers", "python", "output_dir") if document[name]
    ]
    words += [f"tunnel={'yes' if document['tunnel'] else 'no'}"] if document["tunnel"] is not None else []
    words += [f"queues={','.join(document['queues'])}"] if document["queues"] else []
    words += [f"label.{name}={value}" for name, value in document["labels"].items()]
    line = "  ".join([address, *words])
    return line if document["launcher"] == "ssh" else f"# {line}  (this machine, without SSH)"
