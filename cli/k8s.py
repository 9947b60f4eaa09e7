"""`fleet k8s`: manifests for Kubernetes."""

from __future__ import annotations

from typing import Any

import click

from broker.errors import UsageError
from cli.context import Context, pass_context
from cli.params import Size, stagger_options, stagger_seconds
from cli.worker_options import worker_options, worker_words


@click.group()
def k8s() -> None:
    """Workers on Kubernetes."""


@k8s.command()
@click.option("--image", required=True, help="Built from the Dockerfile of rq-fleet, or from one upon that.")
@click.option("--workers", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Pods.")
@click.option("--persistent", is_flag=True, help="A Deployment of workers that stay; else a Job.")
@click.option("--ephemeral", is_flag=True, help="A pod for each of so many jobs: one slot, leaves after one.")
@click.option("--name", default="rq-fleet", show_default=True, help="Of the Job or Deployment, and its pods.")
@click.option("--namespace", default="", help="Default: where kubectl puts it.")
@click.option("--redis-secret", default="rq-fleet-redis", show_default=True, help="The secret with `url`.")
@click.option("--slots", type=click.IntRange(min=1), help="Jobs at once; default 1.")
@click.option("--cpus", type=click.IntRange(min=1), help="CPUs of each; default: as many as slots.")
@click.option("--memory", type=Size(), metavar="SIZE", help="Memory of each: 4G; default: 1G a slot.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, help="NVIDIA GPUs of each; default 0.")
@worker_options
@stagger_options
@pass_context
def manifest(context: Context, /, **options: Any) -> None:
    """Print the manifest of a Job, or Deployment, of workers. It asks neither Redis nor the cluster.

    fleet k8s manifest --image registry.lab/rq-fleet:0.1.0 --workers 20 | kubectl apply -f -
    """
    from broker.settings import worker_environ
    from fleet.kubernetes import Manifest

    worker = context.settings.worker
    slots = _slots(options)
    window = stagger_seconds(options, options["workers"], worker.registrations_per_second)
    found = Manifest(
        **{name: options[name] for name in ("name", "namespace", "image", "redis_secret", "workers", "gpus")},
        words=[*_life(options, slots), *worker_words(options, window)],
        environ=worker_environ(context.settings),
        cpus=options["cpus"] or slots,
        memory_bytes=options["memory"] or slots * 2**30,
        stop_grace_seconds=worker.stop_grace_seconds,
        persistent=options["persistent"],
        ephemeral=options["ephemeral"],
    )
    click.echo(found.rendered(), nl=False)


def _slots(options: dict[str, Any]) -> int:
    if options["ephemeral"] and options["slots"] not in (None, 1):
        raise UsageError("an --ephemeral worker has one slot", "Leave out --slots, or --ephemeral.")
    return options["slots"] or 1


def _life(options: dict[str, Any], slots: int) -> list[str]:
    """Slots, and when workers leave: those of a Job, which is complete then, have to; others must not."""
    said = options["until_done"] or options["idle_timeout"] is not None or options["ephemeral"]
    if options["persistent"] and said:
        raise UsageError(
            "workers of a Deployment are started again when they leave",
            "Leave out --persistent, or --until-done, --idle-timeout and --ephemeral.",
        )
    options["until_done"] = not options["persistent"] and (options["until_done"] or not said)
    return ["--ephemeral"] if options["ephemeral"] else ["--slots", str(slots)]
