"""Manifests for Kubernetes: as its schema has them, and their containers run here as the kubelet would.

`kubectl create --dry-run=client` asks an API server what kinds there are, and none can be had; `kubectl set
--local --dry-run=client` asks nobody, and reads a manifest into the same types.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from broker import keys, status
from cli.main import main
from tests.integration.conftest import Workers
from tests.integration.test_worker import appending, lines, waiting_for

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGE = ("--image", "registry.lab/rq-fleet:0.1.0")
HOSTILE = "$(HOME) $$x ${y} \"'`z`: # - [{}]"
MANIFESTS = {
    "k8s-job.yaml": ("--workers", "20"),
    "k8s-ephemeral.yaml": ("--ephemeral", "--workers", "3", "--namespace", "sim", "--no-stagger"),
    "k8s-deployment.yaml": (
        *("--persistent", "--name", "gpu-workers", "--namespace", "sim", "--redis-secret", "redis.main"),
        *("--slots", "4", "--cpus", "8", "--memory", "1500M", "--gpus", "2", "--queues", "gpu:3,default:1"),
        *(
            "--label",
            f"note={HOSTILE}",
            "--startup-delay-seconds",
            "5",
            "--executor-python",
            "/opt/py/bin/python",
        ),
    ),
}


@pytest.fixture
def manifest(run_fleet: Callable[..., Any]) -> Callable[..., str]:
    """`manifest("--workers", "2", env={...})`: what `fleet k8s manifest` prints."""

    def printed(*options: str, env: Mapping[str, str] | None = None) -> str:
        done = run_fleet("k8s", "manifest", *IMAGE, *options, env=env)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    return printed


# --- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_written_as_it_was(name, manifest):
    assert manifest(*MANIFESTS[name]) == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("version", ["oldest", "latest"])
def test_a_manifest_is_as_the_published_schema_has_it(name, version):
    kubernetes_validate.validate(yaml.safe_load((GOLDEN / name).read_text()), schema(version), strict=True)


def test_that_schema_refuses_what_it_does_not_know():
    found = yaml.safe_load((GOLDEN / "k8s-job.yaml").read_text())
    found["spec"]["template"]["spec"]["terminationGracePeriod"] = 45
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(found, schema("latest"), strict=True)


def schema(which: str) -> str:
    """The first, or the last, version of which the schema is at hand."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    found = [re.fullmatch(r"v(\d+)\.(\d+)\.\d+-local", path.name) for path in folder.iterdir()]
    versions = sorted((int(one[1]), int(one[2])) for one in found if one)
    return "{}.{}".format(*versions[0 if which == "oldest" else -1])


@pytest.mark.needs("kubectl")
@pytest.mark.parametrize("name", MANIFESTS)
def test_kubectl_reads_a_manifest(name):
    found = yaml.safe_load((GOLDEN / name).read_text())
    command = ["kubectl", "set", "resources", "--local", "--dry-run=client", "--limits=cpu=77", "-f", "-"]
    done = subprocess.run(
        [*command, "-o", "yaml"], input=(GOLDEN / name).read_bytes(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)
    assert read["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"].pop("cpu") == "77"
    found["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"].pop("cpu")
    assert said_of(found["spec"]) == said_of(read["spec"])


def said_of(document: Any) -> Any:
    """A document without what is empty, which kubectl adds."""
    if isinstance(document, dict):
        return {name: said_of(value) for name, value in document.items() if value not in (None, {})}
    return [said_of(value) for value in document] if isinstance(document, list) else document


def test_the_kubelet_waits_longer_than_a_worker_does(manifest):
    env = {"FLEET_WORKER__STOP_GRACE_SECONDS": "299.5", "FLEET_WORKER__LEASE_SECONDS": "120"}
    pod = yaml.safe_load(manifest(env=env))["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300 + 15
    told = {row["name"]: row.get("value") for row in pod["containers"][0]["env"]}
    assert told["FLEET_WORKER__STOP_GRACE_SECONDS"] == "299.5", "the worker is told, too"
    assert told["FLEET_WORKER__LEASE_SECONDS"] == "120.0"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--name", "Rq_Fleet"), "--name 'Rq_Fleet': a name is lower-case letters"),
        (("--name", "x" * 47), "46 characters at most"),
        (("--namespace", "a b"), "--namespace 'a b'"),
        (("--redis-secret", "a/b"), "--redis-secret 'a/b'"),
        (("--image", "x; rm"), "--image 'x; rm'"),
        (("--persistent", "--until-done"), "workers of a Deployment are started again when they leave"),
        (("--persistent", "--idle-timeout", "5m"), "workers of a Deployment are started again"),
        (("--ephemeral", "--slots", "2"), "an --ephemeral worker has one slot"),
        (("--memory", "4"), "is no size"),
        (("--workers", "0"), "--workers"),
    ],
)
def test_what_kubernetes_would_not_take_is_refused_and_nothing_is_printed(capsys, options, told):
    with pytest.raises(SystemExit) as caught:
        main(["k8s", "manifest", *IMAGE, *options])
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out) == (2, "")
    assert told in printed.err


# --- what runs -------------------------------------------------------------------------------------


@dataclass
class Pod:
    """A pod of a manifest: its container runs as a process here, under the pod's host name."""

    name: str
    manifest: Mapping[str, Any]
    url: str
    folder: Path
    spawn: Callable[..., subprocess.Popen[Any]]
    process: subprocess.Popen[Any] = field(init=False)

    @property
    def spec(self) -> Any:
        return self.manifest["spec"]["template"]["spec"]

    def start(self) -> Pod:
        """Start its container, or start it again: what it wrote into its volume is still there."""
        container = self.spec["containers"][0]
        env = self.environ(container)
        words = [expanded(word, env) for word in (*container["command"], *container["args"])]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = self.spawn(self._here(words), env=env, stdout=log, stderr=log, cwd=self.folder)
        return self

    def environ(self, container: Mapping[str, Any]) -> dict[str, str]:
        """What is in the manifest, with the secret filled in and the volume a folder of this test."""
        found = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(self.folder / "home")}
        (mount,) = container["volumeMounts"]
        for row in container["env"]:
            value = expanded(row["value"], found) if "value" in row else self._secret(row["valueFrom"])
            found[row["name"]] = value.replace(mount["mountPath"], str(self.folder / mount["name"]))
        return found

    def _secret(self, source: Mapping[str, Any]) -> str:
        assert source == {"secretKeyRef": {"name": "rq-fleet-redis", "key": "url"}}
        return self.url

    def _here(self, words: list[str]) -> list[str]:
        return ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *words]

    def is_ready(self) -> bool:
        """What its probe says: nothing is expanded in it, and no shell is between."""
        container = self.spec["containers"][0]
        command, env = container["readinessProbe"]["exec"]["command"], self.environ(container)
        return subprocess.run(self._here(command), env=env, capture_output=True, check=False).returncode == 0

    def terminate(self) -> int:
        """As the kubelet does it, but more patient on a busy machine; returns the exit code."""
        self.process.terminate()
        return self.process.wait(self.spec["terminationGracePeriodSeconds"] + 60)

    def log(self) -> str:
        return (self.folder / "log").read_text()


def expanded(word: str, env: Mapping[str, str]) -> str:
    """As Kubernetes does it: $(NAME) where there is one, $$ is $ (third_party/forked/golang/expansion)."""
    return re.sub(
        r"\$(\$|\((\w+)\))",
        lambda found: "$" if found[1] == "$" else env.get(found[2], found[0]),
        word,
    )


@pytest.fixture
def pod(
    workers: Workers, manifest: Callable[..., str], tmp_path: Path, spawn: Callable[..., Any]
) -> Callable[..., Pod]:
    """`pod("p0", "--persistent")`: a pod of such a manifest, not started yet, on the workers' Redis."""

    def make(name: str, *options: str) -> Pod:
        quick = {"STOP_GRACE_SECONDS": "1", "HEARTBEAT_SECONDS": "0.5", "LEASE_SECONDS": "300"}
        env = {f"FLEET_WORKER__{setting}": value for setting, value in quick.items()}
        text = manifest(*options, env=env)
        # a secret made of what a command printed ends with a newline
        return Pod(name, yaml.safe_load(text), f"{workers.url}\n", tmp_path / name, spawn)

    return make


@pytest.mark.root
def test_pods_of_a_deployment_end_as_the_kubelet_ends_them_and_nothing_is_lost(pod, workers, tmp_path):
    options = ("--persistent", "--slots", "2", "--label", f"note={HOSTILE}")
    first = pod("fleet-abc-1", *options)
    assert not first.is_ready()
    first.start()
    workers.until(first.is_ready, "it is ready")
    (seen,) = status.read(workers.client).workers
    assert (seen.name, seen.host, seen.slots) == ("fleet-abc-1-0", "fleet-abc-1", 2)
    assert seen.labels["note"] == HOSTILE
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    (long,) = workers.submit_many([appending(runs, "long", waiting_for(gate))])
    short = workers.submit_many([appending(runs, f"{number}", "sleep 0.05") for number in range(30)])
    workers.until(lambda: len(lines(runs)) > 5, "it works")
    second = pod("fleet-abc-2", *options).start()
    assert first.terminate() == 0, first.log()
    assert "stopping:" in first.log()
    assert not workers.is_beating("fleet-abc-1-0")
    workers.until(lambda: lines(runs).count("long") == 2, "what did not end has begun elsewhere")
    gate.touch()
    assert {job.state for job in workers.wait([long, *short])} == {"finished"}
    assert sorted(lines(runs)) == sorted([*map(str, range(30)), "long", "long"])
    assert second.terminate() == 0
    workers.assert_clean()


@pytest.mark.root
def test_a_container_that_dies_comes_back_under_its_name_and_goes_on(pod, workers, tmp_path):
    pod = pod("fleet-x", "--persistent").start()
    workers.until(pod.is_ready, "it is ready")
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    (job,) = workers.submit_many([appending(runs, "x", f"[ -e {gate} ] || {waiting_for(gate)}")])
    workers.until(lambda: lines(runs), "it runs")
    os.killpg(pod.process.pid, signal.SIGKILL)
    pod.process.wait()
    assert not pod.is_ready()
    gate.touch()
    pod.start()
    (done,) = workers.wait([job])
    assert done.state == "finished", "long before its lease has run out"
    assert "taking over from pid" in pod.log()
    assert pod.terminate() == 0


@pytest.mark.root
@pytest.mark.parametrize("options", [(), ("--ephemeral",)], ids=["until done", "ephemeral"])
def test_the_workers_of_a_job_leave_when_it_is_done(pod, workers, tmp_path, options):
    runs = tmp_path / "runs"
    jobs = workers.submit_many([appending(runs, "x") for _ in range(2)])
    pods = [pod(f"fleet-{number}", "--workers", "2", "--no-stagger", *options).start() for number in range(2)]
    for one in pods:
        assert one.process.wait(60) == 0, one.log()
    assert {job.state for job in workers.wait(jobs)} == {"finished"}
    assert len(lines(runs)) == 2
    assert not workers.client.smembers(keys.FLEET_WORKERS)


@pytest.mark.root
def test_a_pod_of_a_job_that_is_taken_away_has_failed_so_that_another_is_started(pod, workers, tmp_path):
    runs = tmp_path / "runs"
    (job,) = workers.submit_many([appending(runs, "x", waiting_for(tmp_path / "gate"))])
    first = pod("fleet-a").start()
    workers.until(lambda: lines(runs), "it runs")
    assert first.terminate() == 143, first.log()
    assert workers.state(job) == "queued"
    second = pod("fleet-b", "--startup-delay-seconds", "1000").start()
    workers.until(lambda: "so that not all workers come at once" in second.log(), "it waits for its moment")
    assert second.terminate() == 143, "also before it has begun"


# --- fleet worker --check --------------------------------------------------------------------------


def test_a_check_says_whether_the_worker_lives_and_whether_redis_hears_of_it(workers, run_fleet):
    def check(url: str = workers.url) -> tuple[int, str]:
        told = ("--name", "w0", "--output-dir", workers.folder / "work")
        done = run_fleet("--redis", url, "worker", "--check", *told)
        return done.returncode, done.stdout + done.stderr

    assert check()[0] == 1
    worker = workers.start("w0", settings={"heartbeat_seconds": 100, "lease_seconds": 1000})
    beat = keys.worker_beat("w0")
    incarnation = workers.client.get(beat)
    assert check() == (0, f"w0 runs and beats (incarnation {incarnation.decode()}).\n")
    code, told = check("redis://127.0.0.1:1/0")
    assert (code, "is not reachable" in told) == (6, True)
    workers.client.delete(beat)
    code, told = check()
    assert (code, "no heartbeat of it has come for a lease" in told) == (1, True), told
    workers.client.set(beat, "another", ex=1000)
    code, told = check()
    assert (code, "another one has its name" in told) == (1, True), told
    workers.kill(worker)
    code, told = check()
    assert (code, "no worker named w0 runs here" in told) == (1, True), told
