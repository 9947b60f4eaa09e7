"""`fleet up` and `fleet down` as typed, against real sshd, real workers and a real Redis."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from broker import keys
from fleet import jitter
from fleet.launchers.agent import TOKEN_VARIABLE
from fleet.resources import find_cpus, find_memory
from fleet.worker_config import this_host
from tests.conftest import fleet_script
from tests.integration.fleets import FAST, beating, pids, rows, submit
from tests.integration.sshd import PYTHON, fleet_processes

pytestmark = pytest.mark.needs("sshd")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for init to collect it does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_five_hosts_of_which_one_is_down(farm, fleet, redis_client):
    names = ["host1", "host2", "host3", "host4", "host5"]
    for name in names:
        farm.add(name, start=name != "host3")

    done = fleet("up", *names)
    assert done.returncode == 3, done.stdout + done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines() if not line.startswith(" "))
    assert "refused the connection" in lines.pop("host3")
    assert all(line.startswith("started: ") for line in lines.values())
    assert "[FAILED] host3: connect: " in done.stderr
    assert beating(redis_client) == ["host1-0", "host2-0", "host4-0", "host5-0"]

    opened = [farm.hosts[name].log.count("Accepted publickey") for name in names if name != "host3"]
    assert opened == [1] * 4, "one connection a host serves every step"

    again = rows(fleet("up", *names, options=("--json",)))
    assert {row["outcome"] for name, row in again.items() if name != "host3"} == {"running"}
    assert (again["host3"]["error"]["code"], again["host3"]["kept"]) == ("refused", False)
    kept = rows(fleet("up", options=("--json",)))
    assert pids(kept) == pids(again), "nothing is started twice"
    assert set(kept) == {"host1", "host2", "host4", "host5"}
    assert len([p for p in fleet_processes(farm.folder) if "fleet.worker" in p.cmdline()]) == 4

    farm.hosts["host3"].start()
    mended = fleet("up", *names, options=("--json",))
    assert mended.returncode == 0
    assert (rows(mended)["host3"]["outcome"], rows(mended)["host3"]["kept"]) == ("started", True)

    ended = fleet("down")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert fleet_processes(farm.folder) == []
    assert beating(redis_client) == []
    assert not list(farm.folder.rglob("*.config.json")), "no credentials are left behind"


def test_a_host_at_which_nothing_was_ever_started_is_not_kept(farm, fleet, run_fleet, free_port):
    farm.add("host1")
    farm.alias("typo", free_port())
    done = fleet("up", "host1", "typo")
    assert done.returncode == 3
    assert "Not kept, for nothing was started there: typo." in done.stderr
    assert run_fleet("hosts", "list").stdout.split() == ["host1"]
    assert fleet("up").returncode == fleet("down").returncode == 0, "it haunts nobody"

    assert run_fleet("hosts", "add", "typo slots=2").returncode == 0
    done = fleet("up", "host1", "typo slots=3", options=("--json",))
    assert (done.returncode, rows(done)["typo"]["kept"]) == (3, True)
    assert run_fleet("hosts", "list").stdout.splitlines() == ["host1", "typo  slots=2"], "as it was"
    assert "Not kept" not in done.stderr
    assert fleet("down", options=("host1",)).returncode == 0


def test_a_host_is_kept_before_anything_is_started_there(farm, fleet, redis_client):
    """Else whoever kills `fleet up` at that moment leaves a worker that no `fleet down` finds."""
    host = farm.add("host1")
    (host.home / "out").mkdir()
    (host.home / "out/log").write_text("a file where the worker wants a folder")
    done = fleet("up", "host1", options=("--output-dir", "~/out", "--json"))
    row = rows(done)["host1"]
    assert (done.returncode, row["step"], row["kept"]) == (1, "start", True)
    assert redis_client.hkeys(keys.HOSTS) == [b"host1"]


def test_down_does_not_take_a_host_that_is_away_for_stopped(farm, fleet):
    farm.add("host1")
    farm.add("host2")
    assert fleet("up", "host1", "host2").returncode == 0
    farm.hosts["host2"].stop()
    done = fleet("down", options=("--json",))
    assert done.returncode == 3
    assert rows(done)["host1"]["outcome"] == "stopped"
    assert rows(done)["host2"]["error"]["code"] == "refused"
    assert fleet_processes(farm.folder / "host2") != []
    farm.hosts["host2"].start()
    assert fleet("down", options=("host2",)).returncode == 0
    assert fleet_processes(farm.folder) == []


def test_down_force_leaves_nothing_of_a_running_job(farm, fleet, redis_client, eventually):
    farm.add("host1")
    assert fleet("up", "host1").returncode == 0
    submit(redis_client, f"echo up > {farm.folder}/job; sleep 1000")
    eventually((farm.folder / "job").exists)
    done = fleet("down", options=("--force",))
    assert (done.returncode, "killed" in done.stdout) == (0, True), done.stdout
    assert fleet_processes(farm.folder) == []


def test_a_down_with_grace_hands_back_what_runs(farm, fleet, redis_client, eventually):
    farm.add("host1")
    assert fleet("up", "host1").returncode == 0
    job = submit(redis_client, f"echo up > {farm.folder}/job; sleep 1000")
    eventually((farm.folder / "job").exists)
    done = fleet("down", options=("--grace", "0.5"))
    assert (done.returncode, "stopped" in done.stdout) == (0, True), done.stdout
    assert redis_client.hget(keys.job(job), "status") == b"queued"
    assert fleet_processes(farm.folder) == []


@pytest.mark.parametrize(
    "options", [("--workers-per-host", "2"), ("--workers-per-host", "2", "--slots", "3")]
)
def test_what_is_started_is_what_was_asked_for(farm, fleet, redis_client, options):
    farm.add("host1")
    more = ("--queues", "high,low", "--label", "kind=test", "--output-dir", "~/out", *options)
    done = fleet("up", "host1 label.own=yes", options=(*more, "--json"))
    assert done.returncode == 0, done.stderr
    assert beating(redis_client) == ["host1-0", "host1-1"]
    record = json.loads(redis_client.get(keys.worker_record("host1-1")))
    assert (record["host"], record["queues"]) == ("host1", ["high", "low"])
    assert record["labels"].items() >= {"kind": "test", "own": "yes"}.items()
    assert record["slots"] == (3 if "--slots" in options else max(1, find_cpus() // 2))
    half = (find_cpus() // 2, find_memory() // 2, [])
    assert (record["cpus"], record["memory_bytes"], record["gpus"]) == half
    assert (farm.hosts["host1"].home / "out/log/host1-1.log").exists()
    note = json.loads((farm.hosts["host1"].home / "out/run/host1-1.json").read_text())
    assert psutil.Process(record["pid"]).environ()[TOKEN_VARIABLE] == note["token"]
    assert fleet("down").returncode == 0, "it is known where they write"
    assert fleet_processes(farm.folder) == []


def test_where_a_worker_writes_is_kept_until_it_is_said_anew(farm, fleet, run_fleet):
    farm.add("host1")
    first = fleet("up", "host1", options=("--output-dir", "~/out", "--json"))
    assert first.returncode == 0, first.stderr
    again = fleet("up", "host1", options=("--json",))
    assert (again.returncode, pids(rows(again))) == (0, pids(rows(first))), again.stderr
    assert run_fleet("hosts", "add", "host1 slots=3").returncode == 0
    (kept,) = json.loads(run_fleet("hosts", "list", "--json").stdout)["hosts"]
    assert (kept["output_dir"], kept["slots"]) == ("~/out", 3)
    down = fleet("down", options=("--json",))
    assert (down.returncode, rows(down)["host1"]["outcome"]) == (0, "stopped"), down.stderr
    assert fleet_processes(farm.folder) == []
    assert run_fleet("hosts", "add", "host1 output_dir=~/other").returncode == 0
    assert "output_dir=~/other" in run_fleet("hosts", "list").stdout


def test_what_a_host_is_said_to_have_is_believed_and_its_workers_divide_it(farm, fleet, run_fleet):
    farm.add("host1")
    said = ("--num-cpus", "6", "--memory-gb", "1.5", "--num-gpus", "2")
    assert fleet("up", "host1", options=("--workers-per-host", "2", *said)).returncode == 0
    for row in json.loads(run_fleet("status", "--json").stdout)["workers"]:
        assert (row["slots"], row["cpus"], row["memory_bytes"]) == (3, 3, 3 * 2**28)
        assert [gpu["name"] for gpu in row["gpus"]] == ["unknown"]
    assert fleet("down").returncode == 0


def test_a_worker_that_dies_after_its_wait_is_looked_for_over_a_new_connection(farm, fleet):
    farm.add("host1")
    done = fleet("up", "host1", options=("--startup-delay-seconds", "1", "--executor-python", "/no/python"))
    assert done.returncode == 1
    assert "[FAILED] confirm: worker host1-0 died. Last log:" in done.stdout
    assert "--executor-python /no/python cannot be run" in done.stdout
    assert farm.hosts["host1"].log.count("Accepted publickey") >= 2


def test_workers_that_are_to_leave_run_what_was_submitted_before_and_leave(
    farm, fleet, redis_client, eventually
):
    farm.add("host1")
    jobs = [submit(redis_client, "true") for _ in range(4)]
    for option, names in (("--ephemeral", {"host1-0", "host1-1"}), ("--until-done", {"host1-0"})):
        done = fleet("up", "host1", options=(option, "--workers-per-host", str(len(names)), "--json"))
        row = rows(done)["host1"]
        assert (done.returncode, row["outcome"]) == (0, "started"), done.stderr
        assert {worker["state"] for worker in row["workers"]} <= {"started", "left"}
        eventually(lambda: fleet_processes(farm.folder) == [], message="they leave")
    assert {redis_client.hget(keys.job(job), "status") for job in jobs} == {b"finished"}
    assert redis_client.smembers(keys.FLEET_WORKERS) == set()


def test_workers_begin_at_their_own_moments_and_up_waits_for_them(farm, fleet, redis_client):
    for name in ("host1", "host2"):
        farm.add(name)
    spread = ("--startup-delay-seconds", "4", "--max-parallel-ssh", "1", "--json")
    done = rows(fleet("up", "host1", "host2", options=spread))
    assert [row["outcome"] for row in done.values()] == ["started", "started"]
    assert beating(redis_client) == ["host1-0", "host2-0"]
    for name in done:
        delay = jitter.delay_seconds(4.0, name, f"{name}-0")
        log = (farm.hosts[name].output_dir / f"log/{name}-0.log").read_text()
        assert f"starting in {delay:.3f} s" in log
    again = rows(fleet("up", options=("--json",)))
    assert [(row["outcome"], row["note"]) for row in again.values()] == [("running", "")] * 2
    assert fleet("down").returncode == 0


@pytest.mark.parametrize(
    "changed",
    [
        ("--slots", "4"),
        ("--path", "/opt/functions"),
        ("--label", "kind=other"),
        ("--queues", "high"),
        ("--num-gpus", "1"),
        ("--executor-python", "/usr/bin/python3"),
    ],
)
def test_a_worker_that_runs_with_other_options_is_left_alone_and_that_is_said(farm, fleet, changed):
    farm.add("host1")
    options = ("--slots", "3", "--label", "kind=test", "--json")
    first = fleet("up", "host1", options=options)
    assert (first.returncode, rows(first)["host1"]["note"]) == (0, ""), first.stderr
    same = rows(fleet("up", "host1", options=options))
    assert (same["host1"]["outcome"], same["host1"]["note"]) == ("running", "")
    other = fleet("up", "host1", options=(*options, *changed))
    row = rows(other)["host1"]
    assert (other.returncode, row["outcome"]) == (0, "running")
    assert row["note"] == "runs with other options: 'fleet down host1', then 'fleet up'"
    assert pids(rows(other)) == pids(rows(first))
    assert fleet("down").returncode == 0


def test_a_hosts_file_with_faults_starts_nothing_and_no_broker(farm, run_fleet, tmp_path, home):
    farm.add("host1")
    file = tmp_path / "hosts.txt"
    file.write_text("host1\n@nobody\nhost1:0 slot=1\n")
    done = run_fleet("up", file, "--ssh-config", farm.config)
    assert done.returncode == 2
    for line in (2, 3):
        assert f"{file}:{line}: " in done.stderr
    assert not list(home.rglob("broker*")), "no broker was started"
    assert not farm.known_hosts.exists(), "no host was reached"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-parallel-ssh", "0"), "'--max-parallel-ssh': must be at least 1, got 0."),
        (("--connect-timeout", "0"), "0.0 is not in the range"),
        (("--workers-per-host", "0"), "0 is not in the range"),
        (("--queues", "a b"), "is no queue name"),
        (("--label", "novalue"), "NAME=VALUE"),
        (("--output-dir", "relative"), "must begin with / or ~/"),
        (("--local", "2"), "exclude each other"),
        (("--startup-delay-seconds", "nan"), "is no duration"),
        (("--ephemeral", "--slots", "2"), "exclude each other"),
        (("--num-cpus", "0"), "0 is not in the range"),
        (("--memory-gb", "nan"), "is no number of GiB"),
        (("--memory-gb", "0"), "must be more than 0"),
        (("--num-gpus", "-1"), "-1 is not in the range"),
    ],
)
def test_words_that_are_off_are_refused_before_anything_happens(farm, fleet, options, said):
    done = fleet("up", "host1", options=options)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("verb", ["up", "down"])
def test_an_ssh_config_that_is_not_there_is_told(run_fleet, fleet_redis_url, verb, tmp_path):
    (tmp_path / "hosts.txt").write_text("host1\n")
    words = [verb, "--ssh-config", "/none", *([tmp_path / "hosts.txt"] if verb == "up" else [])]
    done = run_fleet(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot read --ssh-config /none" in done.stderr


@pytest.mark.parametrize("verb", ["up", "down"])
def test_no_hosts_at_all(fleet, verb):
    done = fleet(verb)
    assert done.returncode == 2
    assert "No hosts configured. Use 'fleet hosts add' or 'fleet up HOSTS'." in done.stderr


def test_down_of_a_host_that_is_not_kept(fleet, run_fleet):
    assert run_fleet("hosts", "add", "host1").returncode == 0
    done = fleet("down", options=("host9",))
    assert done.returncode == 4
    assert "no host host9 is kept" in done.stderr


def test_a_dry_run_changes_nothing(farm, fleet, redis_client):
    host = farm.add("host1")
    done = fleet("up", "host1", options=("--dry-run", "--python", PYTHON, "--json"))
    assert done.returncode == 0, done.stderr
    row = rows(done)["host1"]
    assert (row["outcome"], row["note"]) == ("planned", "would install")
    assert [worker["state"] for worker in row["workers"]] == ["would start"]
    assert list(host.home.iterdir()) == []
    assert redis_client.dbsize() == 0


def test_a_worker_that_dies_is_told_with_its_log(farm, fleet):
    host = farm.add("host1")
    (host.home / "out").mkdir()
    (host.home / "out/jobs").write_text("a file where the worker wants a folder")
    done = fleet("up", "host1", options=("--output-dir", "~/out", "--json"))
    assert done.returncode == 1
    row = rows(done)["host1"]
    assert (row["step"], row["error"]["code"]) == ("confirm", "worker_died")
    assert row["error"]["message"].startswith("worker host1-0 died. Last log:\n")
    assert f"cannot write to {host.home}/out" in row["error"]["message"]
    shown = fleet("up", "host1", options=("--output-dir", "~/out"))
    assert "[FAILED] host1: confirm: worker host1-0 died. Last log:" in shown.stderr


def test_rq_fleet_that_is_not_there_is_told(farm, fleet):
    farm.add("host1")
    done = fleet("up", "host1", options=("--no-install", "--python", "/usr/bin/python3", "--json"))
    assert done.returncode == 1
    assert rows(done)["host1"]["error"]["code"] == "install_failed"


def test_an_interrupt_tells_who_was_started_and_who_was_not(
    farm, fleet_redis_url, spawn, tmp_path, eventually
):
    farm.add("host1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        farm.alias("silent", silent.getsockname()[1], ConnectTimeout="250")
        file = tmp_path / "hosts.txt"
        file.write_text("host1\nsilent\n")
        argv = [fleet_script(), "up", file, "--ssh-config", farm.config, "--no-install", "--python", PYTHON]
        out, err = tmp_path / "out", tmp_path / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            up = spawn(argv, stdout=stdout, stderr=stderr)
            eventually(lambda: "host1: confirm ok" in err.read_text())
            up.send_signal(signal.SIGINT)
            assert up.wait(timeout=60) == 130
    lines = out.read_text().splitlines()
    assert lines[0].startswith("host1   started: host1-0")
    assert lines[1].startswith("silent  untouched")
    assert "Traceback" not in err.read_text()


def test_no_secret_is_seen_in_a_process_list_a_log_or_an_environment(farm, fleet, own_redis, eventually):
    secret = uuid.uuid4().hex
    server = own_redis("--requirepass", secret)
    url = f"redis://:{secret}@127.0.0.1:{server.port}/0"
    farm.add("host1")
    with Watcher(secret, but=server.pid) as watcher:
        done = fleet("up", "host1", env={"FLEET_REDIS_URL": url})
        assert done.returncode == 0, done.stderr
        with server.client(password=secret) as client:
            submit(client, f"env > {farm.folder}/environ")
        eventually(lambda: (farm.folder / "environ").exists() and (farm.folder / "environ").read_text())
        workers = fleet_processes(farm.folder)
        assert workers
        assert not [process for process in workers if secret in environ(process)]
        assert secret not in (farm.folder / "environ").read_text()
        assert TOKEN_VARIABLE not in (farm.folder / "environ").read_text()
        (config,) = [path for path in farm.folder.rglob("*") if holds(path, secret)]
        assert config.name == "host1-0.config.json"
        assert [path.stat().st_mode & 0o777 for path in (config, config.parent)] == [0o600, 0o700]
        assert all(path.stat().st_mode & 0o077 == 0 for path in farm.folder.rglob("log/*.log"))
        with server.client(password=secret) as client:
            dumps = {key: client.dump(key) for key in client.scan_iter()}
        assert keys.worker_record("host1-0").encode() in dumps
        assert not [key for key, dump in dumps.items() if secret.encode() in (dump or b"")]
        farm.alias("gone", 1)
        debug = fleet("up", "host1", "gone", options=("--debug",), env={"FLEET_REDIS_URL": url})
        assert (debug.returncode, secret in debug.stdout + debug.stderr) == (3, False)
        assert fleet("down", env={"FLEET_REDIS_URL": url}).returncode == 0
    assert watcher.rounds > 10
    assert watcher.found == set()
    assert secret not in done.stdout + done.stderr
    assert [path for path in farm.folder.rglob("*") if holds(path, secret)] == []


def environ(process: psutil.Process) -> str:
    """The values of its variables; of one that is just ending, nothing."""
    try:
        return " ".join(process.environ().values())
    except psutil.Error:
        return ""


def holds(path: Path, word: str) -> bool:
    try:
        return path.is_file() and word.encode() in path.read_bytes()
    except FileNotFoundError:
        return False


class Watcher:
    """Looks for a word in all command lines, again and again, from a thread; in one it may be."""

    def __init__(self, word: str, *, but: int) -> None:
        self.word, self.found, self.rounds = word, set[str](), 0
        self._but = Path(f"/proc/{but}/cmdline")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.rounds += 1
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                self._look(file)

    def _look(self, file: Path) -> None:
        try:
            line = file.read_bytes().decode("utf-8", "replace")
        except OSError:
            return
        if self.word in line and file != self._but:
            self.found.add(line)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.timeout(300)
def test_the_bundle_is_installed_for_real(farm, fleet, redis_client):
    host = farm.add("host1", **{name: value for name, value in os.environ.items() if name.startswith("PIP_")})
    done = fleet("up", "host1", options=("--python", PYTHON, "--json"), timeout_seconds=250)
    assert done.returncode == 0, done.stderr
    assert beating(redis_client) == ["host1-0"]
    (worker,) = [p for p in fleet_processes(host.folder) if "fleet.worker" in p.cmdline()]
    venvs = host.home / ".local/share/rq-fleet/venvs"
    assert worker.cmdline()[0].startswith(str(venvs))
    again = fleet("up", "host1", options=("--no-install", "--json", "--python", PYTHON))
    assert rows(again)["host1"]["outcome"] == "running"
    assert fleet("down").returncode == 0
    assert fleet_processes(farm.folder) == []


def test_workers_on_this_machine_without_ssh(run_fleet, redis_client, fleet_redis_url, home, tmp_path):
    name = this_host()
    done = run_fleet("up", "--local", "2", "--json", env=FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert beating(redis_client) == [f"{name}-0", f"{name}-1"]
    first = pids(rows(done))
    again = run_fleet("up", "--local", "2", "--json", env=FAST)
    assert pids(rows(again)) == first
    assert rows(again)[name]["outcome"] == "running"
    assert run_fleet("hosts", "list").stdout.startswith(f"# {name}"), "as a hosts file it would need SSH"
    assert run_fleet("down", env=FAST).returncode == 0
    assert not [pid for pid in first.values() if is_alive(pid)]
    assert "not running" in run_fleet("down", name).stdout


def test_hosts_are_kept_listed_and_removed(run_fleet, fleet_redis_url, tmp_path):
    file = tmp_path / "hosts.txt"
    file.write_text("alice@gpu7:2222 slots=2 label.a=b\n[2001:db8::1]\n")
    assert run_fleet("hosts", "add-file", file).returncode == 0
    assert run_fleet("hosts", "add", "one", "GPU7 slots=3").returncode == 0
    listed = run_fleet("hosts", "list")
    assert listed.stdout.splitlines() == ["[2001:db8::1]", "GPU7  slots=3", "one"]
    assert run_fleet("hosts", "add", "two", "bad:0").returncode == 2
    assert run_fleet("hosts", "remove", "one", "three").returncode == 4
    clash = run_fleet("hosts", "add", "four", "2001-db8--1")
    assert (clash.returncode, "named like those of 2001:db8::1" in clash.stderr) == (2, True)
    assert run_fleet("hosts", "remove", "one", "2001:DB8::1").returncode == 0
    document = json.loads(run_fleet("hosts", "list", "--json").stdout)
    assert [(row["name"], row["slots"]) for row in document["hosts"]] == [("GPU7", 3)]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with no space left."""
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    try:
        with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("how", [("--no-install",), ()])
def test_a_full_disk_is_told_and_the_other_host_goes_on(farm, fleet, full_disk, how):
    farm.add("host1", XDG_STATE_HOME=str(full_disk), XDG_DATA_HOME=str(full_disk))
    farm.add("host2")
    # what is to be installed would be so at both hosts: the second is given what is there
    options = ("--python", PYTHON, "--json", *how)
    names = ("host1", "host2") if how else ("host1",)
    done = fleet("up", *names, options=options)
    row = rows(done)["host1"]
    assert row["error"]["code"] == "disk_full"
    assert row["step"] == ("start" if how else "install")
    assert done.returncode == (3 if how else 1)
    assert rows(done)["host1"]["kept"] == bool(how), "it is where something was written, or might have been"
    if how:
        assert fleet("down").returncode == 0
