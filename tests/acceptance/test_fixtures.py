"""The fixtures do what the other tests lean on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_redis_is_empty_and_real(redis_client):
    assert redis_client.dbsize() == 0
    redis_client.set("left", "behind")


def test_redis_is_empty_again(redis_client):
    assert redis_client.dbsize() == 0


def test_own_redis_keeps_its_data_over_kill_9(own_redis):
    server = own_redis()
    with server.client() as client:
        client.config_set("appendfsync", "always")
        client.set("k", "v")
        old = server.pid
        server.kill()
        server.start()
        assert client.get("k") == b"v"
        assert server.pid != old


def test_own_redis_may_ask_for_a_password(own_redis):
    assert own_redis("--requirepass", "secret").port


def test_the_home_is_the_tests_own(home):
    assert Path("~").expanduser() == home
    assert not [name for name in os.environ if name.startswith("FLEET_")]


def test_the_command_line_runs(run_fleet):
    done = run_fleet("--version")
    assert (done.returncode, done.stdout) == (0, "fleet, version 0.1.0\n")


def test_a_spawned_process_runs(spawn, eventually, tmp_path):
    spawn(["sh", "-c", f"sleep 100 & echo $! > {tmp_path}/pid; wait"])
    assert eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())


def test_a_process_that_nobody_has_waited_for_is_not_alive(is_alive):
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as process:
        assert process.stdout.read() == b""
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(process.pid)
    assert is_alive(os.getpid())


def test_eventually_has_a_limit(eventually):
    with pytest.raises(pytest.fail.Exception, match="never came"):
        eventually(lambda: 0, timeout_seconds=0.05, message="never came")


@pytest.fixture
def run_of_its_own(tmp_path):
    """`run_of_its_own(test, CI="true")`: what pytest says of a file with `test` under our conftest."""
    shutil.copytree(REPOSITORY / "tools", tmp_path / "tools")
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tests)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)

    def run(test, *options, **environ):
        (tests / "test_it.py").write_text("import pytest, subprocess\n\n" + textwrap.dedent(test))
        argv = [sys.executable, "-m", "pytest", f"--basetemp={tmp_path / 'base'}", *options]
        env = {name: value for name, value in os.environ.items() if name != "CI"} | environ
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return run


A_SKIP = """
    def test_passes():
        pass

    def test_skips():
        pytest.skip("no reason")
    """


def test_a_skip_is_counted_loudly(run_of_its_own):
    done = run_of_its_own(A_SKIP)
    assert done.returncode == 0
    assert "1 SKIPPED, so NOT TESTED" in done.stdout
    assert "test_it.py::test_skips: no reason" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout.splitlines()[-1]


@pytest.mark.root
@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_skip_fails_ci_as_root(run_of_its_own, options):
    done = run_of_its_own(A_SKIP, *options, CI="true")
    assert done.returncode == 1
    assert "1 SKIPPED, and in CI as root nothing may be: THIS RUN FAILED" in done.stdout


@pytest.mark.root
def test_a_module_skipped_as_a_whole_fails_ci_too(run_of_its_own, tmp_path):
    (tmp_path / "tests" / "test_other.py").write_text("def test_passes():\n    pass\n")
    done = run_of_its_own("pytest.importorskip('no_such_module')", CI="true")
    assert done.returncode == 1
    assert "THIS RUN FAILED" in done.stdout


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_process_left_behind_fails_the_run_and_is_ended(run_of_its_own, is_alive, tmp_path, options):
    """Even one that was detached, and though the last test is one that is expected to fail."""
    done = run_of_its_own(
        f"""
        def test_leaks():
            subprocess.run(["sh", "-c", "setsid sleep 1000 & echo $! > {tmp_path}/pid"], check=True)

        @pytest.mark.xfail
        def test_fails():
            assert not "as expected"
        """,
        *options,
    )
    assert done.returncode == 1
    assert "1 PROCESSES OUTLIVED THEIR TESTS: THIS RUN FAILED" in done.stdout
    assert "test_it.py::test_leaks" in done.stdout
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_program_nobody_knows_how_to_get_is_an_error(run_of_its_own):
    done = run_of_its_own(
        """
        @pytest.mark.needs("no-such-program")
        def test_it():
            pass
        """
    )
    assert done.returncode == 1
    assert "say in tools/test-packages where no-such-program comes from" in done.stdout
