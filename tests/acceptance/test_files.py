"""The files round the code keep what they promise: pins, ops files, links, nothing of one machine."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import psutil
import pytest
import redis
import yaml
from compose_spec import PyCompose
from redis.backoff import NoBackoff
from redis.retry import Retry

from broker.worker_settings import WorkerSettings

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = REPOSITORY / "compose.yaml"
PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+]+")
#: put together here, or this file would be its own finding
PLACES_OF_ONE_MACHINE = [
    "/".join(("", *parts))
    for parts in (("tmp", "dev"), ("work", "main"), ("work", "shared"), ("opt", "pypi"))
]
REGISTRIES = [
    ".".join(parts)
    for parts in (("pypi", "org"), ("pythonhosted", "org"), ("docker", "io"), ("ghcr", "io"), ("quay", "io"))
]


def tracked(pattern: str = "") -> list[Path]:
    """The files that git knows, or those whose path ends with `pattern`."""
    # whoever owns the clone: it is only listed
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    paths = [REPOSITORY / name for name in listed.split("\0") if name.endswith(pattern) and name]
    return [path for path in paths if path.is_file()]


def short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


# --- text ------------------------------------------------------------------------------------------


def test_no_file_names_a_registry_or_a_place_of_one_machine():
    found = [
        f"{short(path)}: {word}"
        for path in tracked()
        for word in REGISTRIES + PLACES_OF_ONE_MACHINE
        if word.encode() in path.read_bytes()
    ]
    assert found == []


def test_lines_end_as_unix_ends_them():
    text = [path for path in tracked() if path.suffix != ".png"]
    assert [short(path) for path in text if b"\r\n" in path.read_bytes()] == []


def test_every_module_says_what_it_is_for():
    silent = [short(path) for path in tracked(".py") if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_links_between_documents_lead_somewhere():
    broken = [
        f"{short(path)}: {link}"
        for path in tracked(".md")
        for link in _links(path.read_text())
        if not (path.parent / link).exists()
    ]
    assert broken == []


def _links(text: str) -> list[str]:
    """The files that `text` links to: no addresses, no anchors, nothing in a code block."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = (target.partition("#")[0] for target in re.findall(r"\]\(<?([^)>\s]+)", prose))
    return [target for target in targets if target and not re.match(r"[a-z]+:", target)]


# --- commands and pins -----------------------------------------------------------------------------


def test_the_documents_name_targets_that_make_knows():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        target
        for path in tracked(".md")
        for target in re.findall(r"(?:`|^ {4}|^)make ([a-z][a-z-]*)", path.read_text(), flags=re.MULTILINE)
    }
    assert {"demo", "test"} | named <= targets


def test_ci_runs_the_test_command_and_nothing_else():
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test"]


@pytest.mark.parametrize("name", ["constraints.txt", "benchmarks/constraints.txt"])
def test_constraints_are_names_and_versions_alone(name):
    lines = (REPOSITORY / name).read_text().splitlines()
    assert [line for line in lines if not line.startswith("#") and not PIN.fullmatch(line)] == []


@pytest.mark.parametrize(
    ("extra", "name"), [("test", "constraints.txt"), ("bench", "benchmarks/constraints.txt")]
)
def test_every_dependency_is_pinned(extra, name):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"][extra]
    pinned = {_normal(line) for line in (REPOSITORY / name).read_text().splitlines()}
    assert {_normal(line) for line in wanted} <= pinned


def _normal(requirement: str) -> str:
    """The name of `requirement` as indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement)[0]).lower()


# --- Compose ---------------------------------------------------------------------------------------

#: the keys of a service that we use; a misspelt one is a start that fails at the user's
SERVICE_KEYS = {
    *("build", "command", "depends_on", "entrypoint", "environment", "healthcheck", "image", "init", "ports"),
    *("restart", "secrets", "stop_grace_period", "volumes"),
}


@pytest.fixture(scope="module")
def compose():
    """compose.yaml, parsed."""
    return yaml.safe_load(COMPOSE.read_text())


@pytest.fixture(scope="module")
def services(compose):
    return compose["services"]


def test_compose_says_only_what_the_specification_knows(compose, services):
    assert set(compose) <= {"name", "services", "secrets", "volumes"}
    assert {key for service in services.values() for key in service} <= SERVICE_KEYS


def test_a_reader_of_the_specification_takes_compose():
    text = COMPOSE.read_text().replace("${HOME}", "/home/me")
    text = re.sub(r"\$\{\w+:-([^{}]*)\}", r"\1", text)
    found = PyCompose.from_yaml(text)
    found.validate()
    assert set(found.service_names()) == {"redis", "worker", "metrics", "prometheus", "grafana"}
    with pytest.raises(ValueError, match="retsart"):
        PyCompose.from_yaml(text.replace("restart:", "retsart:", 1))


def test_compose_refers_to_what_it_defines(compose, services):
    for service in services.values():
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        assert set(service.get("depends_on", {})) <= set(services)
        sources = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        folders = {source for source in sources if source.startswith("./")}
        assert sources - folders <= set(compose["volumes"])
        assert all((REPOSITORY / folder).is_dir() for folder in folders)
        if "build" in service:
            assert (REPOSITORY / service["build"] / "Dockerfile").is_file()


def test_images_are_pinned(services):
    images = [service["image"] for service in services.values()]
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    images += re.findall(r"^FROM (\S+)", dockerfile, flags=re.MULTILINE)
    assert len(images) >= 3
    assert [
        image for image in images if not re.fullmatch(r"[a-z0-9/-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*", image)
    ] == []


def test_what_the_image_copies_is_there_and_not_ignored():
    copies = re.findall(r"^COPY (.+) \S+$", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    allowed = re.findall(r"^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), flags=re.MULTILINE)
    assert sources == set(allowed)
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []


def test_ports_are_published_on_loopback_alone(services):
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert {name for name, service in services.items() if service.get("ports")} == {"redis", "grafana"}


def test_workers_wait_for_a_healthy_redis_and_can_be_scaled(services):
    assert services["redis"]["healthcheck"]["test"]
    worker = services["worker"]
    assert worker["depends_on"] == {"redis": {"condition": "service_healthy"}}
    # either would clash with a second copy
    assert not {"container_name", "hostname", "ports"} & set(worker)


def test_a_worker_gets_longer_to_stop_than_it_gives_its_jobs(services):
    unit = (REPOSITORY / "ops" / "systemd" / "fleet-worker@.service").read_text()
    (of_systemd,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, flags=re.MULTILINE)
    assert "OOMPolicy=continue" in unit.splitlines(), "one job without memory ends no other"
    of_compose = services["worker"]["stop_grace_period"].removesuffix("s")
    assert min(int(of_systemd), int(of_compose)) > WorkerSettings().stop_grace_seconds


def test_the_exporter_of_compose_is_where_prometheus_looks_for_it(services):
    """Its command is one that the program takes, and its port the one that is scraped."""
    verb, *words = services["metrics"]["entrypoint"][1:]
    command = importlib.import_module(f"cli.{verb}").metrics
    options = command.make_context(verb, words).params
    assert options["host"] == "0.0.0.0"  # that of its container
    config = yaml.safe_load((REPOSITORY / "ops/prometheus/prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets["fleet"] == [f"metrics:{options['port']}"]
    assert services["metrics"]["environment"] == services["worker"]["environment"]


@pytest.mark.needs("redis-server")
def test_the_redis_of_compose_asks_for_a_password_that_no_command_line_shows(
    services, tmp_path, spawn, eventually, free_port
):
    """Its script is run for real; only what the image brings is stood in for."""
    port = free_port()
    run, environ = _stand_in_for_the_image(tmp_path, "hush")
    script = services["redis"]["command"][2].replace("$$", "$").replace("/run/", f"{run}/")
    script = script.replace("--appendonly", f"--bind 127.0.0.1 --port {port} --dir {tmp_path} --appendonly")
    process = spawn(["sh", "-ec", script], env=environ, stdout=subprocess.DEVNULL)
    with redis.Redis(host="127.0.0.1", port=port, password="hush", decode_responses=True) as client:
        eventually(lambda: _pings(client), message="a ping with the password")
        config = client.config_get("maxmemory-policy", "appendonly")
        assert config == {"maxmemory-policy": "noeviction", "appendonly": "yes"}
    with (
        redis.Redis(host="127.0.0.1", port=port, retry=Retry(NoBackoff(), 0)) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    assert "hush" not in " ".join(psutil.Process(process.pid).cmdline())
    health = services["redis"]["healthcheck"]["test"][1].replace("$$", "$").replace("/run/", f"{run}/")
    health = health.replace("redis-cli", f"redis-cli -h 127.0.0.1 -p {port}")
    assert subprocess.run(["sh", "-c", health], env=environ, check=False).returncode == 0


def _stand_in_for_the_image(folder: Path, password: str) -> tuple[Path, dict[str, str]]:
    """/run with the secret in it, and a PATH with the image's entry point and a chown."""
    run, programs = folder / "run", folder / "bin"
    (run / "secrets").mkdir(parents=True)
    (run / "secrets" / "redis_password").write_text(f"{password}\n")
    programs.mkdir()
    for name, text in {"docker-entrypoint.sh": 'exec "$@"', "chown": "exit 0"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return run, {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
