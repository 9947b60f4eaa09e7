"""Tab: verbs, options, queues and jobs; in the shells that are installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import fleet_script


def complete(line: str, **env: str) -> list[str]:
    """What the script of bash asks of `fleet` when Tab is pressed at the end of `line`."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_FLEET_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [fleet_script()], env={**os.environ, **asked, **env}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return [row.partition(",")[2] for row in done.stdout.splitlines() if row]


def test_verbs_and_options(fleet_redis_url):
    assert {"submit", "status"} <= set(complete("fleet s"))
    assert "jobs" not in complete("fleet s")
    assert "--queue" in complete("fleet submit --q")
    assert complete("fleet jobs --state fin") == ["finished"]
    assert complete("fleet completion z") == ["zsh"]


def test_the_files_of_a_command(fleet_redis_url):
    """Left to the shell, which knows them best."""
    asked = {"COMP_WORDS": "fleet submit -- ./si", "COMP_CWORD": "3", "_FLEET_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [fleet_script()], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "file,./si"


def test_queues_and_jobs(submit):
    job = submit("true", options=("--queue", "gpu"))
    assert complete("fleet submit --queue g") == ["gpu"]
    assert complete("fleet show ") == [job]
    assert complete(f"fleet wait {job} {job[:5]}") == [job]


def test_tab_is_silent_where_redis_is_not(free_port):
    nowhere = f"redis://127.0.0.1:{free_port()}"
    assert complete("fleet show ", FLEET_REDIS_URL=nowhere) == []
    assert complete("fleet show ", FLEET_REDIS_URL="nonsense") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_its_script(run_fleet, shell):
    script = run_fleet("completion", shell).stdout
    assert f"_FLEET_COMPLETE={shell}_complete" in script


def test_another_shell_is_a_usage_error(run_fleet):
    assert run_fleet("completion", "tcsh").returncode == 2


def test_bash_completes(fleet_redis_url):
    script = """
    eval "$(fleet completion bash)"
    COMP_WORDS=(fleet sub) COMP_CWORD=1
    _fleet_completion fleet
    echo "${COMPREPLY[@]}"
    """
    path = f"{Path(fleet_script()).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("submit\n", "")
