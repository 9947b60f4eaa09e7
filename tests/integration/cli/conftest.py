"""What tests of the command line ask for: `fleet("jobs")` on a Redis that is theirs, and a worker."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def fleet(run_fleet: Callable[..., Done], fleet_redis_url: str) -> Callable[..., Done]:
    """`fleet("submit", "--", "true", code=0)`: run it on the test's Redis; its exit code must be `code`."""

    def run(*arguments: str, code: int | None = 0, **options: Any) -> Done:
        done = run_fleet(*arguments, **options)
        if code is not None:
            assert done.returncode == code, (arguments, done.stdout[-2000:], done.stderr[-2000:])
        return done

    return run


@pytest.fixture
def read(fleet: Callable[..., Done]) -> Callable[..., Any]:
    """`read("jobs")`: the one document that `--json` prints."""

    def run(*arguments: str, **options: Any) -> Any:
        verb, *rest = arguments
        document = json.loads(fleet(verb, "--json", *rest, **options).stdout)
        assert document["schema"] == 1
        return document

    return run


@pytest.fixture
def submit(fleet: Callable[..., Done]) -> Callable[..., str]:
    """`submit("sh", "-c", "exit 3", options=["--queue", "q"])`: the id of a new job."""

    def run(*argv: str, options: tuple[str, ...] = ()) -> str:
        return fleet("submit", *options, "--", *argv).stdout.strip()

    return run


@pytest.fixture
def burst(fleet: Callable[..., Done]) -> Callable[..., Done]:
    """`burst()`: a worker runs all that waits, and leaves."""
    return lambda *options: fleet("worker", "--burst", "--name", "w0", *options)


@pytest.fixture
def fault(fleet: Callable[..., Done]) -> Callable[..., Any]:
    """`fault("show", "nope", code=4)`: the error that `--json` prints on stderr; stdout stays empty."""

    def run(*arguments: str, code: int, **options: Any) -> Any:
        verb, *rest = arguments
        done = fleet(verb, "--json", *rest, code=code, **options)
        assert done.stdout == ""
        document = json.loads(done.stderr)
        assert document["schema"] == 1
        return document["error"]

    return run
