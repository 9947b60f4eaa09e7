"""`fleet collect-logs` and `delete-logs` against real sshd: nothing is lost, whatever comes in between."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker import jobs, keys
from broker.command import Command
from broker.submit import Options, submit_commands
from fleet.outputs import MARKER
from fleet.series import About, HostSample, JobSample, Series, opened
from fleet.series import files as files_of_series
from tests.conftest import fleet_script, wait_until
from tests.integration import fleets
from tests.integration.fleets import rows
from tests.integration.sshd import SshdFarm, SshdHost

pytestmark = pytest.mark.needs("sshd")


@pytest.fixture
def kept(farm: SshdFarm, run_fleet: Any, fleet_redis_url: str) -> Callable[..., SshdHost]:
    """`kept("host1", options="slots=2")`: a host that listens, and is kept."""

    def add(name: str, options: str = "", **environ: str) -> SshdHost:
        host = farm.add(name, **environ)
        made(host.output_dir)
        assert run_fleet("hosts", "add", f"{name} {options}").returncode == 0
        return host

    return add


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


@pytest.fixture
def collect(fleet: Callable[..., Any], here: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """`collect("--delete", code=3)`: the rows of the hosts."""

    def run(*options: str, code: int = 0, **how: Any) -> dict[str, dict[str, Any]]:
        done = fleet("collect-logs", options=("-l", str(here), "--json", *options), **how)
        assert done.returncode == code, done.stdout + done.stderr
        return rows(done)

    return run


def submit(client: Any, *scripts: str) -> list[str]:
    """Submit lines of shell; returns the jobs' ids."""
    commands = [(None, Command(("sh", "-c", script))) for script in scripts]
    return submit_commands(client, "default", commands, Options())


def write(root: Path, **files: str | bytes) -> None:
    """Files below `root`; in a name `__` stands for a slash."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def content(root: Path) -> dict[str, bytes]:
    """The regular files below `root`, but for our lock, and what marks our folders."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {}
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # a worker may just have renamed it
            found[path] = path.read_bytes()
    marks = (".lock", MARKER)
    return {str(path.relative_to(root)): data for path, data in found.items() if path.name not in marks}


def made(root: Path) -> None:
    """The folders of jobs, as a worker makes them."""
    write(root, **{f"jobs__{MARKER}": "", f"output__{MARKER}": ""})


def ours(root: Path) -> None:
    """What workers leave, in little."""
    made(root)
    write(
        root,
        **{"log__host1-0.log": "a log\n", "output__j1.7.out": "out\n", "output__j1.7.err": "err\n"},
        jobs__j1__result="result\n",
        jobs__j1__deep__er__x="x",
    )


# --- what there is comes, and once -----------------------------------------------------------------


def test_what_workers_and_jobs_left_is_fetched_once_and_removed_only_when_it_is_here(
    farm, fleet, collect, here, redis_client, eventually
):
    for name in ("host1", "host2"):
        farm.add(name)
    patient = {"FLEET_WORKER__HEARTBEAT_SECONDS": "1", "FLEET_WORKER__LEASE_SECONDS": "20"}
    assert fleet("up", "host1", "host2", env=patient).returncode == 0
    script = "echo said; echo wrong >&2; mkdir -p a/b; echo $FLEET_HOST > a/b/result"
    done = submit(redis_client, *[script] * 6)
    eventually(lambda: set(jobs.states(redis_client, done).values()) == {"finished"})
    (running,) = submit(redis_client, "echo begun; echo half > state; sleep 1000")
    everything = lambda: {p for host in farm.hosts.values() for p in content(host.output_dir)}  # noqa: E731
    eventually(lambda: f"jobs/{running}/state" in everything())

    found = collect()
    assert {row["outcome"] for row in found.values()} == {"collected"}
    for name, host in farm.hosts.items():
        there = {p: c for p, c in content(host.output_dir).items() if c and not p.startswith("run/")}
        came = content(here / name)
        log = f"log/{name}-0.log"
        assert there.pop(log).startswith(came.pop(log)), "it may have grown since"
        assert came == there
    job = next((here).rglob(f"{done[0]}/a/b/result"))
    assert job.read_text() == f"{job.relative_to(here).parts[0]}\n"
    assert not list(here.rglob("run")), "credentials are never fetched"
    assert here.stat().st_mode & 0o777 == 0o700

    again = collect("--delete")
    assert sum(row["fetched_bytes"] for row in again.values()) == 0, "it is verified, not fetched again"
    left = {p: c for host in farm.hosts.values() for p, c in content(host.output_dir).items() if c}
    fence = redis_client.hget(keys.job(running), "fleet_lease").decode().partition(":")[0]
    assert {path for path in left if not path.startswith("run/")} == {
        f"jobs/{running}/state",
        f"output/{running}.{fence}.out",
        "log/host1-0.log",
        "log/host2-0.log",
    }, "only what a running job writes is left, and the logs of workers that live"
    assert fleets.beating(redis_client) == ["host1-0", "host2-0"], "the workers live on"
    assert next(here.rglob(f"jobs/{running}/state")).read_text() == "half\n"

    refused = fleet("delete-logs")
    assert refused.returncode == 1
    assert "host1-0 runs there and uses these files" in refused.stdout
    assert fleet("down", options=("--force",)).returncode == 0
    assert fleet("delete-logs").returncode == 0
    assert {path for path in everything() if not path.startswith("run/")} == set()


def test_a_log_of_another_life_overwrites_nothing(kept, collect, here):
    host = kept("host1")
    write(host.output_dir, **{"log__host1-0.log": "the first life\n"})
    assert collect("--delete")["host1"]["removed_files"] == 1
    write(host.output_dir, **{"log__host1-0.log": "the second\n"})
    assert collect("--delete")["host1"]["put_aside"] == 1
    write(host.output_dir, **{"log__host1-0.log": "the third, which is longer than any\n"})
    collect()
    assert content(here / "host1/log") == {
        "host1-0.log.~1~": b"the first life\n",
        "host1-0.log.~2~": b"the second\n",
        "host1-0.log": b"the third, which is longer than any\n",
    }


def test_samples_come_and_are_drawn_and_go_only_once_they_are_here(kept, collect, here, run_fleet):
    host = kept("host1")
    one = Series(host.output_dir / "log", About("host1", "host1-0", 4, 2**30), 2**20, 1e9)
    now = time.time()
    for count in (100, 300):
        for _ in range(count - len(_rows_of(host.output_dir))):
            one.note_host(now - 10, HostSample(1.0, 2**29, None, None, None, None))
            one.note_job(now, "j1", 7, JobSample(1.0, 1, 1))
        one.write()
        wait_until(lambda count=count: len(_rows_of(host.output_dir)) == count)
        assert collect()["host1"]["put_aside"] == 0
        assert len(_rows_of(here)) == count
    one.close()
    drawn = run_fleet(
        "report", "--json", "--since", "1h", "-l", here, env={"XDG_STATE_HOME": str(here / "none")}
    )
    assert [row["name"] for row in json.loads(drawn.stdout)["hosts"]] == ["host1"]
    assert collect("--delete")["host1"]["removed_files"] == 1
    assert list(files_of_series(host.output_dir)) == []
    assert len(_rows_of(here)) == 300


def _rows_of(folder: Path) -> list[Any]:
    found: list[Any] = []
    for path in files_of_series(folder):
        with opened(path) as database:
            found += database.execute("SELECT * FROM hosts").fetchall()
    return found


def test_a_file_that_grew_is_continued_and_one_that_grows_is_not_removed(kept, collect, here):
    host = kept("host1")
    write(host.output_dir, jobs__j__grows="begin\n" * 1000)
    growing = host.output_dir / "jobs/j/grows"
    collect()
    with growing.open("a") as file:
        file.write("more\n")
    assert collect()["host1"]["fetched_bytes"] == len("more\n")
    ended = threading.Event()

    def grow() -> None:
        with growing.open("a", buffering=1) as file:
            while not ended.wait(0.001):
                file.write("line\n")

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        row = collect("--delete")["host1"]
    finally:
        ended.set()
        thread.join()
    assert (row["outcome"], row["removed_files"], row["kept"]) == ("collected", 0, 1)
    assert growing.read_bytes().startswith((here / "host1/jobs/j/grows").read_bytes())
    assert collect("--delete")["host1"]["removed_files"] == 1
    assert not growing.exists()


def test_a_copy_that_is_not_what_the_host_has_is_fetched_again_before_anything_is_removed(
    kept, collect, here
):
    host = kept("host1")
    write(host.output_dir, **{"output__j.1.out": b"precious" * 1000})
    collect()
    copy = here / "host1/output/j.1.out"
    times = copy.stat().st_mtime_ns
    copy.write_bytes(b"garbage!" * 1000)
    os.utime(copy, ns=(times, times))
    row = collect("--delete")["host1"]
    assert (row["removed_files"], row["put_aside"], row["fetched_bytes"]) == (1, 1, 8000)
    assert copy.read_bytes() == b"precious" * 1000


# --- what comes in between -------------------------------------------------------------------------

BEGIN_BYTES, REST_BYTES = 2**21, 2**20


def cut(collecting: subprocess.Popen[Any], host: SshdHost, how: str) -> int:
    """Cut it in the middle; returns its exit code."""
    if how == "interrupted":
        collecting.send_signal(signal.SIGINT)
    elif how == "killed":
        collecting.kill()
    else:
        host.stop()
    return collecting.wait(60)


@pytest.mark.parametrize(("how", "code"), [("interrupted", 130), ("killed", -9), ("host dies", 1)])
def test_a_run_that_was_cut_is_continued(kept, collect, here, farm, spawn, eventually, tmp_path, how, code):
    host = kept("host1")
    data = os.urandom(BEGIN_BYTES)
    write(host.output_dir, **{"log__host1-0.log": "short"}, jobs__j__big=data)
    big, copy = host.output_dir / "jobs/j/big", here / "host1/jobs/j/big"
    os.truncate(big, 2**33)  # a hole that both sides are busy with for seconds
    argv = [fleet_script(), "collect-logs", "-l", here, "--delete", "--ssh-config", farm.config]
    with (tmp_path / "told").open("wb") as told:
        collecting = spawn(argv, stdout=told, stderr=told)
        begun = lambda: copy.exists() and copy.stat().st_size == BEGIN_BYTES  # noqa: E731
        eventually(begun)
        assert cut(collecting, host, how) == code, (tmp_path / "told").read_text()
    assert big.exists(), "nothing was removed"
    if how == "host dies":
        assert "the SSH connection broke" in (tmp_path / "told").read_text()
        host.start()
    os.truncate(big, BEGIN_BYTES + REST_BYTES)
    row = collect("--delete")["host1"]
    assert row["fetched_bytes"] == REST_BYTES, "what had come was not fetched again"
    assert copy.read_bytes() == data + bytes(REST_BYTES)
    assert (row["put_aside"], row["removed_files"]) == (0, 2)
    assert content(host.output_dir) == {}


def test_a_host_that_hangs_ends_as_an_error(kept, collect, farm):
    hanging = farm.folder / "python"
    hanging.write_text(
        f'#!/bin/sh\n[ "$3" = -c ] && exec {sys.executable} "$@"\n'
        "cat > /dev/null; printf '\\nrq-fleet: frames\\nJ\\0\\0'\n"
        f"exec {sys.executable} -c 'import time; time.sleep(1000)' {farm.folder}\n"
    )
    hanging.chmod(0o755)
    kept("hangs", f"python={hanging}")
    row = collect(code=1, env={"FLEET_SSH__COMMAND_TIMEOUT_SECONDS": "8"})["hangs"]
    assert (row["step"], row["error"]["code"]) == ("list", "command_timeout")
    assert "nothing came from there for 8 s" in row["error"]["message"]


NONSENSE = {
    "huge": b"J\xff\xff\xff\xff",
    "unknown": b"Z\0\0\0\1x",
    "undecodable": b"J\0\0\0\1{",
    "shapeless": b"J\0\0\0\3[7]\n\nrq-fleet: {}\n",
    "answer": b"\nrq-fleet: nonsense\n",
    "empty": b"\nrq-fleet: {}\n",
    "elsewhere": b'J\0\0\0\x11[[".lock", 1, 1]]'
    b'\n\nrq-fleet: {"passed_over": 0, "failed": 0, "problems": []}\n',
}


def test_a_host_that_answers_nonsense_fails_alone(kept, collect, farm):
    ours(kept("good").output_dir)
    for name, data in {**NONSENSE, "endless": b"\n"}.items():
        (farm.folder / f"{name}.data").write_bytes(b"\nrq-fleet: frames\n" + data)
        liar = farm.folder / f"{name}.python"
        liar.write_text(
            f'#!/bin/sh\n[ "$3" = -c ] && exec {sys.executable} "$@"\n'
            f"cat > /dev/null; cat {farm.folder}/{name}.data\n" + "exec yes\n" * (name == "endless")
        )
        liar.chmod(0o755)
        kept(name, f"python={liar}")
    found = collect(code=3)
    assert found.pop("good")["files"] == 4
    assert {row["error"]["code"] for row in found.values()} == {"command_failed"}
    assert ".lock" in found.pop("elsewhere")["error"]["message"]
    assert {row["error"]["message"] for row in found.values()} == {"the host answers nonsense"}


def test_each_host_fails_alone(kept, collect, farm, run_fleet, free_port, here):
    host = kept("host1")
    ours(host.output_dir)
    farm.alias("away", free_port())
    assert run_fleet("hosts", "add", "away").returncode == 0
    found = collect(code=3)
    assert (found["away"]["error"]["code"], found["host1"]["files"]) == ("refused", 5)
    assert found["host1"]["folder"] == str(here / "host1")
    assert collect("away", code=1)["away"]["error"]["code"] == "refused"
    collect("host1")


def test_two_aliases_of_one_machine_do_not_collide(kept, collect, farm, run_fleet, here):
    """With --delete each finds some files gone that the other took."""
    host = kept("host1")
    farm.alias("alias", host.port)
    assert run_fleet("hosts", "add", "alias").returncode == 0
    files = {f"jobs__j{number}__x": f"{number}" * 2000 for number in range(400)}
    write(host.output_dir, **files, **{"log__host1-0.log": "one", "log__alias-0.log": "other"})
    found = collect("--delete")
    assert {row["outcome"] for row in found.values()} == {"collected"}
    got = [content(here / name) for name in ("host1", "alias")]
    for name, text in files.items():
        copies = [copy[name.replace("__", "/")] for copy in got if name.replace("__", "/") in copy]
        assert copies, name
        assert set(copies) == {text.encode()}
    assert got[0]["log/host1-0.log"] == b"one"
    assert got[1]["log/alias-0.log"] == b"other"
    assert content(host.output_dir) == {}


def test_one_folder_is_written_by_one_at_a_time(kept, collect, here, spawn, eventually, tmp_path):
    ours(kept("host1").output_dir)
    (here / "host1").mkdir(parents=True)
    script = f"exec 9> {here}/host1/.lock; flock 9; touch {tmp_path}/held; exec sleep 1000"
    spawn(["sh", "-c", script])
    eventually((tmp_path / "held").exists)
    error = collect(code=1)["host1"]["error"]
    assert (error["code"], "another 'fleet collect-logs' writes" in error["message"]) == ("conflict", True)


# --- odd files -------------------------------------------------------------------------------------


def test_odd_names_links_holes_and_pipes(kept, collect, here, tmp_path):
    host = kept("host1")
    job = host.output_dir / "jobs/j"
    names = [
        b"new\nline",
        b"-rf",
        b"\xff\xfe",
        b"x" * 255,
        "ümläut".encode(),
        b" ",
        b"tilde.~1~",
        b"\\",
        b"*",
    ]
    job.mkdir(parents=True)
    for name in names:
        (job / os.fsdecode(name)).write_bytes(name)
    deep = job.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("deep")
    with (job / "hole").open("wb") as file:
        file.write(b"begin")
        file.seek(2**28)
        file.write(b"end")
        file.truncate(2**28 + 2**26)
    (tmp_path / "secret").write_text("not ours")
    (job / "link").symlink_to(tmp_path / "secret")
    (job / "dirlink").symlink_to(tmp_path)
    os.mkfifo(job / "pipe")

    row = collect("--delete")["host1"]
    assert (row["outcome"], row["passed_over"], row["files"]) == ("collected", 3, len(names) + 2)
    copy = here / "host1/jobs/j"
    for name in names:
        assert (copy / os.fsdecode(name)).read_bytes() == name
    assert copy.joinpath(*["d"] * 200, "bottom").read_text() == "deep"
    hole = copy / "hole"
    assert (hole.stat().st_size, hole.stat().st_blocks * 512 < 2**20) == (2**28 + 2**26, True)
    with hole.open("rb") as file:
        assert file.read(5) == b"begin"
        file.seek(2**28)
        assert file.read(4) == b"end\0"
    assert not (copy / "link").exists()
    assert sorted(path.name for path in job.iterdir()) == ["dirlink", "link", "pipe"], (
        "what is not here is not removed"
    )
    assert (tmp_path / "secret").read_text() == "not ours"


def test_what_is_not_ours_is_neither_fetched_nor_removed(kept, collect, fleet, here):
    host = kept("host1", "output_dir=~/shared")
    root = host.home / "shared"
    others = {
        "notes.txt": b"mine",
        "log/nginx.log": b"mine",
        "log/host2-0.log": b"another host's, which shares this folder",
        "output/thesis.pdf": b"mine",
        "output/chapter.one.tex": b"mine",
        "jobs/my letters/to.txt": b"mine",
        "series/x": b"mine",
        "run/host1-0.config.json": b"a secret",
    }
    write(root, **{name.replace("/", "__"): data for name, data in others.items()})
    ours(root)
    assert collect("--delete")["host1"]["removed_files"] == 5
    (root / "run/.host1.lock").unlink()
    assert content(root) == others
    assert not (root / "jobs/j1").exists()
    ours(root)
    (root / "jobs/j1/link").symlink_to(root / "notes.txt")
    assert fleet("delete-logs").returncode == 0
    (root / "run/.host1.lock").unlink()
    assert content(root) == others
    assert not (root / "jobs/j1").exists()
    assert set(content(here / "host1")).isdisjoint(others)


def test_from_a_folder_that_no_worker_made_nothing_of_jobs_is_removed(
    farm, fleet, collect, redis_client, eventually
):
    host = farm.add("host1")
    root = host.home / "shared"
    others = {"jobs/letters/to.txt": b"mine", "output/photo.2024.jpg": b"mine"}
    write(root, **{name.replace("/", "__"): data for name, data in others.items()})
    (root / "jobs/empty").mkdir()
    assert fleet("up", "host1", options=("--output-dir", "~/shared")).returncode == 0
    (job,) = submit(redis_client, "echo result > x")
    eventually(lambda: jobs.states(redis_client, [job])[job] == "finished")
    assert fleet("down").returncode == 0
    others[f"jobs/{job}/x"] = b"result\n"
    row = collect("--delete", code=1)["host1"]
    assert "jobs/ was not made by a worker (no .rq-fleet in it)" in row["error"]["message"]
    assert row["removed_files"] == 1, "the log"
    done = fleet("delete-logs")
    assert (done.returncode, "/ was not made by a worker" in done.stdout) == (1, True)
    there = {path: data for path, data in content(root).items() if not path.startswith("run/")}
    assert there == others
    assert (root / "jobs/empty").is_dir()


def test_a_folder_named_on_the_command_line_is_taken(kept, collect, fleet):
    host = kept("host1")
    ours(host.home / "elsewhere")
    assert collect()["host1"]["files"] == 0
    assert collect("--remote-output-dir", "~/elsewhere")["host1"]["files"] == 5
    assert fleet("delete-logs", options=("--remote-output-dir", "~/elsewhere")).returncode == 0
    assert content(host.home / "elsewhere") == {}
    write(host.home, jobs__letters__to="mine")
    assert fleet("delete-logs", options=("--remote-output-dir", "~/")).returncode == 1
    assert (host.home / "jobs/letters/to").exists()
    done = fleet("collect-logs", options=("--remote-output-dir", "elsewhere"))
    assert (done.returncode, "must begin with / or ~/" in done.stderr) == (2, True)


def test_what_may_not_be_read_or_removed_is_told_and_the_rest_goes_on(kept, collect, fleet, here):
    host = kept("host1")
    if os.geteuid() == 0:  # root may read everything, but for one who has given up that right
        drop = 'exec setpriv --bounding-set=-dac_override,-dac_read_search -- sh -c "$SSH_ORIGINAL_COMMAND"'
        config = f"{host._config()}ForceCommand {drop}\n"
        host.stop()
        host._config = lambda: config  # type: ignore[method-assign]
        host.start()
    ours(host.output_dir)
    write(host.output_dir, jobs__locked__inside="x", jobs__stuck__inside="y", jobs__j1__unreadable="z")
    (host.output_dir / "jobs/j1/unreadable").chmod(0)
    (host.output_dir / "jobs/locked").chmod(0)
    (host.output_dir / "jobs/stuck").chmod(0o500)
    try:
        row = collect("--delete", code=1)["host1"]
        assert row["failed"] == 3
        for name in ("jobs/locked", "jobs/j1/unreadable", "jobs/stuck/inside"):
            assert f"{name}: Permission denied" in row["error"]["message"]
        assert row["removed_files"] == 5
        assert (here / "host1/jobs/stuck/inside").read_text() == "y"
        assert fleet("delete-logs").returncode == 1
        assert not (host.output_dir / "jobs/j1").exists()
    finally:
        for name in ("locked", "stuck"):
            (host.output_dir / "jobs" / name).chmod(0o700)


def test_a_file_that_cannot_be_had_here_is_told_and_the_rest_comes(kept, collect, fleet, here):
    host = kept("host1")
    name = os.fsdecode(b"\x1b[31m\xff" + b"x" * 249)  # too long for NAME.~1~
    ours(host.output_dir)
    write(host.output_dir, **{f"jobs__j1__{name}": "one"})
    collect()
    write(host.output_dir, **{f"jobs__j1__{name}": "two, which is another", "jobs__j1__z": "z"})
    row = collect("--delete", code=1)["host1"]
    assert (row["failed"], row["removed_files"], row["problems"][0]["reason"]) == (
        1,
        6,
        "cannot be written here: File name too long",
    )
    assert (here / f"host1/jobs/j1/{name}").read_text() == "one"
    assert content(host.output_dir) == {f"jobs/j1/{name}": b"two, which is another"}
    done = fleet("collect-logs", options=("-l", str(here)), env={"PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, "jobs/j1/\\x1b[31m\\xffxxx" in done.stdout) == (1, True), done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.fixture
def small_disk(here: Path) -> Iterator[Path]:
    """A file system of 3 MiB at `here`."""
    here.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(here)], check=True)
    try:
        yield here
    finally:
        subprocess.run(["umount", str(here)], check=True)


@pytest.mark.root
def test_a_full_disk_here_is_told_and_the_rest_comes_when_there_is_room(kept, collect, small_disk):
    host = kept("host1")
    data = os.urandom(5 * 2**20)
    write(host.output_dir, jobs__j__big=data)
    row = collect("--delete", code=1)["host1"]
    assert (row["step"], row["error"]["code"]) == ("fetch", "disk_full")
    assert "no space is left here" in row["error"]["message"]
    assert row["removed_files"] == 0
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    row = collect("--delete")["host1"]
    assert 0 < row["fetched_bytes"] < 4 * 2**20
    assert (small_disk / "host1/jobs/j/big").read_bytes() == data
    assert content(host.output_dir) == {}


# --- words -----------------------------------------------------------------------------------------


def test_delete_logs_by_force_takes_what_a_living_worker_writes(farm, fleet):
    host = farm.add("host1")
    assert fleet("up", "host1").returncode == 0
    assert (host.output_dir / "log/host1-0.log").exists()
    done = fleet("delete-logs", options=("--json",))
    assert (done.returncode, rows(done)["host1"]["error"]["code"]) == (1, "in_use")
    assert (host.output_dir / "log/host1-0.log").exists()
    assert fleet("delete-logs", options=("--force",)).returncode == 0
    assert not (host.output_dir / "log/host1-0.log").exists()
    assert fleet("down").returncode == 0


def test_a_folder_that_hosts_share_is_in_use_while_a_worker_of_it_beats(kept, collect, fleet, redis_client):
    """That worker's process is not seen from here."""
    host = kept("host1")
    ours(host.output_dir)
    write(host.output_dir, **{"run__host2-0.started.json": "{}"}, jobs__waits__x="x")
    redis_client.set(keys.worker_beat("host2-0"), "it beats")
    redis_client.hset(keys.job("waits"), "status", "queued")
    redis_client.hset(keys.job("j1"), "status", "finished")
    done = fleet("delete-logs")
    assert (done.returncode, "host2-0 runs there" in done.stdout) == (1, True)
    row = collect("--delete")["host1"]
    assert (row["removed_files"], row["kept"]) == (5, 1)
    assert (host.output_dir / "jobs/waits/x").exists()
    redis_client.delete(keys.worker_beat("host2-0"))
    assert collect("--delete")["host1"]["removed_files"] == 1


@pytest.mark.parametrize("trouble", ["it hangs", "Redis was emptied"])
def test_what_redis_may_not_know_of_stays_while_a_worker_lives(
    farm, fleet, run_fleet, collect, redis_client, eventually, trouble
):
    host = farm.add("host1")
    hasty = fleets.SHORT_LEASE if trouble == "it hangs" else {}
    up = fleet("up", "host1", options=("--slots", "2", "--json"), env=hasty)
    assert up.returncode == 0, up.stderr
    ended, running = submit(redis_client, "echo x > file", "echo half > state; sleep 1000")
    eventually(lambda: jobs.states(redis_client, [ended])[ended] == "finished")
    eventually((host.output_dir / f"jobs/{running}/state").exists)
    worker = fleets.pids(rows(up))["host1-0"]
    if trouble == "it hangs":
        os.kill(worker, signal.SIGSTOP)
        eventually(lambda: not fleets.beating(redis_client))
        redis_client.hset(keys.job(running), "status", "finished")  # elsewhere
    else:
        redis_client.flushdb()
        assert run_fleet("hosts", "add", "host1").returncode == 0
        eventually(lambda: fleets.beating(redis_client) == ["host1-0"])
    try:
        row = collect("--delete")["host1"]
    finally:
        os.kill(worker, signal.SIGCONT)
    assert (row["outcome"], row["removed_files"]) == ("collected", 0)
    assert (host.output_dir / f"jobs/{running}/state").read_text() == "half\n"
    assert (host.output_dir / f"jobs/{ended}/file").exists(), "it cannot be told from one that runs"
    assert fleet("down", options=("--force",)).returncode == 0
    assert collect("--delete")["host1"]["failed"] == 0
    assert not (host.output_dir / f"jobs/{running}").exists()


@pytest.mark.parametrize("verb", ["collect-logs", "delete-logs"])
def test_no_hosts_and_hosts_that_are_not_kept(fleet, run_fleet, verb):
    done = fleet(verb)
    assert done.returncode == 2
    assert "No hosts configured. Use 'fleet hosts add' or 'fleet up HOSTS'." in done.stderr
    assert run_fleet("hosts", "add", "host1").returncode == 0
    assert fleet(verb, options=("host9",)).returncode == 4


def test_a_terminal_shows_a_bar_with_bytes(kept, farm, here, spawn):
    write(kept("host1").output_dir, jobs__j__big=bytes(range(256)) * 2**14)
    ours_, theirs = pty.openpty()
    argv = [fleet_script(), "collect-logs", "-l", here, "--ssh-config", farm.config]
    process = spawn(argv, stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours_, 4096):
            shown += data
    except OSError:
        pass  # how Linux says that nobody has the other end any more
    finally:
        os.close(ours_)
    assert process.wait(60) == 0
    assert b"host1" in shown
    assert b"4.2/4.2 MB" in shown or b"4.0/4.0 MiB" in shown


def test_the_hosts_of_this_machine_need_no_ssh(run_fleet, fleet_redis_url, here, tmp_path, home):
    done = run_fleet("up", "--local", "1", env=fleets.FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run_fleet("submit", "--wait", "--", "echo", "hello").returncode == 0
    assert run_fleet("down").returncode == 0
    assert run_fleet("collect-logs", "-l", here, "--delete").returncode == 0
    assert b"hello\n" in content(here).values()
    assert not content(home / ".local/state/rq-fleet/work/output")
