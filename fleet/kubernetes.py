"""A manifest of workers for Kubernetes. Whoever reads it starts them; nothing here speaks to a cluster."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from broker.errors import UsageError
from fleet import rendering

#: seconds beyond the grace that a worker gives its jobs before the kubelet kills it
MARGIN_SECONDS = 15
#: characters of a name: what a Deployment puts after it must fit into a pod's host name, of 63
_LONGEST = 46
# RFC 1123; names of secrets may have dots
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")


@dataclass(frozen=True)
class Manifest:
    """`workers` of `fleet worker` with the arguments `words`, each in a pod of its own.

    A Job whose workers leave, or, `persistent`, a Deployment. Each has `cpus`, `memory_bytes` and `gpus`, no
    more. `environ`: settings of workers.
    """

    name: str
    namespace: str
    image: str
    redis_secret: str
    workers: int
    words: Sequence[str]
    environ: Mapping[str, str]
    cpus: int
    memory_bytes: int
    gpus: int
    stop_grace_seconds: float
    persistent: bool = False
    ephemeral: bool = False

    def rendered(self) -> str:
        """The YAML. Raises UsageError for a name that Kubernetes would not take."""
        _check("--name", self.name, _LABEL, _LONGEST)
        _check("--redis-secret", self.redis_secret, _SUBDOMAIN, 253)
        _check("--image", self.image, _IMAGE, 1000)
        if self.namespace:
            _check("--namespace", self.namespace, _LABEL, 63)
        grace = math.ceil(self.stop_grace_seconds)
        values = {
            **vars(self),
            "in_namespace": f" --namespace {self.namespace}" if self.namespace else "",
            "cpus": f"{self.cpus}",
            "memory": _quantity(self.memory_bytes),
            "grace_seconds": grace,
            "termination_seconds": grace + MARGIN_SECONDS,
        }
        return rendering.ours("kubernetes.yaml.j2").render(values)


def _check(option: str, value: str, shape: re.Pattern[str], longest: int) -> None:
    if not shape.fullmatch(value) or len(value) > longest:
        what = "that of an image" if shape is _IMAGE else "lower-case letters, digits and '-'"
        raise UsageError(f"{option} {value!r}: a name is {what}, {longest} characters at most")


def _quantity(size: int) -> str:
    """Bytes as Kubernetes has them."""
    for unit, scale in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if size % scale == 0:
            return f"{size // scale}{unit}"
    return str(size)
