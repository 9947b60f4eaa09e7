"""Hosts that are machines of their own: Redis on a network, a plug pulled and put back in.

The machines are network namespaces with an address, a name, a home and an sshd each; what is
typed is typed at one of them. They share a disk, so jobs and test see each other's files.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import find_free_port, fleet_script
from tests.integration.network import OUR_ADDRESS, Host, Network
from tests.integration.sshd import PYTHON

pytestmark = [pytest.mark.root, pytest.mark.needs("sshd", "ip")]

SETTINGS = {
    "FLEET_WORKER__HEARTBEAT_SECONDS": "1",
    "FLEET_WORKER__LEASE_SECONDS": "8",
    "FLEET_WORKER__STOP_GRACE_SECONDS": "5",
}
#: what a job does: note its start, whether processes of an earlier start live, and its own;
#: then wait to be let go
JOB = """\
cd "$1"
for pid in $(cat "$FLEET_JOB_ID.pids" 2>/dev/null); do
  grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$pid/status" && echo "$FLEET_JOB_ID $pid" >> overlaps
done
sleep 1000 & echo $! >> "$FLEET_JOB_ID.pids"
setsid sleep 1000 & echo $! >> "$FLEET_JOB_ID.pids"
echo $$ >> "$FLEET_JOB_ID.pids"
echo "$FLEET_HOST $(hostname)" >> "$FLEET_JOB_ID.starts"
until [ -e "$FLEET_JOB_ID.go" ]; do sleep 0.05; done
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path / "network") as network:
        yield network


class Fleet:
    """The command line at our machine."""

    def __init__(self, network: Network, folder: Path, eventually: Callable[..., Any]) -> None:
        self.network = network
        self.board = folder / "board"
        self.board.mkdir()
        self.eventually = eventually
        self._path = f"{Path(fleet_script()).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.typed("fleet", *words)

    def typed(self, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """A command as a user types it."""
        environ = {**SETTINGS, "PATH": self._path, **environ}
        done = self.network.run(argv, env=environ)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def up(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        ssh = ("--ssh-config", str(self.network.ssh_config))
        return self.typed("fleet", "up", *words, *ssh, "--no-install", "--python", PYTHON, **environ)

    def hosts_file(self) -> str:
        file = self.network.folder / "hosts.txt"
        file.write_text("".join(f"{host.name} slots=2\n" for host in self.network.hosts))
        return str(file)

    def workers(self) -> dict[str, dict[str, Any]]:
        document = json.loads(self("status", "--json").stdout)
        return {worker["host"]: worker for worker in document["workers"]}

    def submit(self) -> str:
        done = self("submit", "--", "sh", "-c", JOB, "job", str(self.board))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def starts(self, job: str) -> list[str]:
        """The hosts where it was started, by the name that they were given and the one they have."""
        file = self.board / f"{job}.starts"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.split()[0] for line in lines if line.split()[0] == line.split()[1]]

    def started(self, job: str, times: int) -> list[str]:
        """Wait until it was started so many times."""
        return self.eventually(
            lambda: len(found := self.starts(job)) >= times and found,
            timeout_seconds=90,
            message=f"{job} started {times} times",
        )

    def let_go(self, *jobs: str) -> None:
        for job in jobs:
            (self.board / f"{job}.go").touch()

    def pids(self, job: str) -> list[int]:
        return [int(line) for line in (self.board / f"{job}.pids").read_text().split()]

    def show(self, job: str) -> dict[str, Any]:
        return dict(json.loads(self("show", job, "--json").stdout))


@pytest.fixture
def fleet(network: Network, tmp_path: Path, eventually: Callable[..., Any]) -> Fleet:
    return Fleet(network, tmp_path, eventually)


@pytest.fixture
def hosts(network: Network) -> dict[str, Host]:
    return {name: network.add(name) for name in ("fh1", "fh2")}


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {row["host"]: row for row in json.loads(done.stdout)["hosts"]}


def commands(text: str) -> str:
    """What a message says to type, to the end of its line."""
    found = re.search(r"fleet broker stop.*", text)
    assert found, text
    return found[0]


def follow(fleet: Fleet, text: str) -> None:
    """Type what the message says, letter by letter."""
    done = fleet.typed("sh", "-c", commands(text))
    assert done.returncode == 0, done.stderr
    assert f"It listens on {OUR_ADDRESS}:" in done.stderr


def bring_up(fleet: Fleet) -> dict[str, int]:
    """From nothing to a fleet, by doing what the messages say; returns the workers' pids."""
    refused = fleet.up(fleet.hosts_file())
    assert refused.returncode == 1, refused.stdout
    assert refused.stdout.count("out of that machine's reach") == 2, refused.stdout
    assert f"fleet broker start --host {OUR_ADDRESS}\n" in refused.stdout
    follow(fleet, refused.stdout)
    done = fleet.up(fleet.hosts_file(), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return pids(rows(done))


def pids(found: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {host: row["workers"][0]["pid"] for host, row in found.items()}


def test_a_host_that_is_cut_off_loses_its_jobs_to_another_and_comes_back(
    fleet: Fleet, hosts: dict[str, Host], is_alive: Callable[[int], bool]
) -> None:
    workers = bring_up(fleet)
    again = fleet.up("--json")
    assert {row["outcome"] for row in rows(again).values()} == {"running"}
    assert pids(rows(again)) == workers, "nothing is started twice"
    assert fleet.workers().keys() == hosts.keys(), "we ourselves still reach Redis by loopback"

    jobs = [fleet.submit() for _ in range(4)]
    place = {job: fleet.started(job, 1)[0] for job in jobs}
    assert sorted(place.values()) == ["fh1", "fh1", "fh2", "fh2"]

    cut, other = hosts["fh1"], hosts["fh2"]
    ending, held = (job for job in jobs if place[job] == cut.name)
    before = [pid for job in (ending, held) for pid in fleet.pids(job)]
    assert all(map(is_alive, fleet.pids(held)))
    cut.cut_off()
    # one of its jobs ends where nobody hears of it, and the other host has room
    fleet.let_go(ending, *(job for job in jobs if place[job] == other.name))
    assert fleet.started(held, 2) == [cut.name, other.name]
    assert not [pid for pid in before if is_alive(pid)]
    fleet.let_go(held)
    waited = fleet("wait", "--timeout", "90", *jobs)
    assert waited.returncode == 0, waited.stderr
    overlaps = fleet.board / "overlaps"
    assert not overlaps.exists(), f"ran on beside a second start: {overlaps.read_text()}"
    for job in (ending, held):
        shown = fleet.show(job)
        ends = [(attempt["worker"], attempt["outcome"]) for attempt in shown["attempts"]]
        assert (shown["state"], ends) == ("finished", [("fh1-0", "lost"), ("fh2-0", "finished")])
    assert fleet.workers()["fh1"]["state"] == "offline"

    cut.join()
    fleet.eventually(lambda: fleet.workers()["fh1"]["state"] == "idle")
    assert fleet.workers()["fh1"]["pid"] == workers["fh1"], "it came back by itself"
    fleet.eventually(
        lambda: cut.worker_log().count("its lease was no longer ours") == 2,
        timeout_seconds=90,
        message="what it had to say of both jobs is refused",
    )
    assert [len(fleet.starts(job)) for job in (ending, held)] == [2, 2]
    more = [fleet.submit() for _ in range(4)]
    assert sorted(fleet.started(job, 1)[0] for job in more) == ["fh1", "fh1", "fh2", "fh2"]
    fleet.let_go(*more)
    assert fleet("wait", "--timeout", "90", *more).returncode == 0

    ended = fleet("down", "--ssh-config", str(fleet.network.ssh_config))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    fleet.eventually(lambda: not any(host.processes() for host in hosts.values()))
    assert fleet("broker", "stop").returncode == 0


def test_a_worker_whose_connections_broke_comes_back_too(fleet: Fleet, hosts: dict[str, Host]) -> None:
    workers = bring_up(fleet)
    for host in hosts.values():
        host.cut_off()
    for host in hosts.values():
        fleet.eventually(
            lambda host=host: "Redis does not answer" in host.worker_log(),
            timeout_seconds=90,
            message="it has given up its connections",
        )
    fleet.eventually(
        lambda: {worker["state"] for worker in fleet.workers().values()} == {"offline"},
        timeout_seconds=90,
        message="their leases have run out",
    )
    jobs = [fleet.submit() for _ in range(4)]
    for host in hosts.values():
        host.join()
    assert sorted(fleet.started(job, 1)[0] for job in jobs) == ["fh1", "fh1", "fh2", "fh2"]
    fleet.let_go(*jobs)
    assert fleet("wait", "--timeout", "90", *jobs).returncode == 0
    assert {host: worker["pid"] for host, worker in fleet.workers().items()} == workers
    assert fleet("down", "--ssh-config", str(fleet.network.ssh_config)).returncode == 0
    fleet.eventually(lambda: not any(host.processes() for host in hosts.values()))


def test_a_broker_that_runs_says_itself_how_it_is_moved_to_a_network(
    fleet: Fleet, hosts: dict[str, Host]
) -> None:
    port = find_free_port()
    assert fleet("broker", "start", "--port", str(port)).returncode == 0
    refused = fleet("broker", "start", "--host", OUR_ADDRESS)
    assert refused.returncode == 1
    assert f"does not listen on {OUR_ADDRESS}" in refused.stderr
    follow(fleet, refused.stderr)
    assert json.loads(fleet("broker", "status", "--json").stdout)["port"] == port
    assert fleet.up(fleet.hosts_file()).returncode == 0
    config = next(hosts["fh1"].home.rglob("fh1-0.config.json"))
    assert f"@{OUR_ADDRESS}:{port}/0" in json.loads(config.read_text())["redis_url"]
    assert fleet("down", "--ssh-config", str(fleet.network.ssh_config)).returncode == 0


def test_another_redis_on_loopback_is_refused_with_what_fits(fleet: Fleet, hosts: dict[str, Host]) -> None:
    assert fleet("broker", "start").returncode == 0
    status = json.loads(fleet("broker", "status", "--json").stdout)
    password = Path(status["password_file"]).read_text().strip()
    url = f"redis://:{password}@127.0.0.1:{status['port']}/0"
    refused = fleet.up(fleet.hosts_file(), FLEET_REDIS_URL=url)
    assert refused.returncode == 1
    assert refused.stdout.count(f"--redis redis://{OUR_ADDRESS}:{status['port']}/0\n") == 2, refused.stdout
    assert password not in refused.stdout + refused.stderr


@pytest.mark.needs("nft", "tc")
def test_a_bad_line_makes_it_slow_and_loses_nothing(
    fleet: Fleet, hosts: dict[str, Host], eventually: Callable[..., Any]
) -> None:
    hosts["fh1"].make_bad(lost_percent=5, kilobits=1000)
    assert fleet("broker", "start", "--host", OUR_ADDRESS).returncode == 0
    patient = {"FLEET_WORKER__HEARTBEAT_SECONDS": "2", "FLEET_WORKER__LEASE_SECONDS": "20"}
    up = fleet.up(fleet.hosts_file(), "--json", **patient)
    assert up.returncode == 0, up.stdout + up.stderr
    assert {name: row["outcome"] for name, row in rows(up).items()} == {"fh1": "started", "fh2": "started"}
    words = ("sh", "-c", 'echo "$FLEET_HOST"; head -c 20000 /dev/zero')
    jobs = [fleet("submit", "--", *words).stdout.strip() for _ in range(6)]
    assert fleet("wait", "--all", "--timeout", "90").returncode == 0
    shown = [fleet.show(job) for job in jobs]
    assert {job["state"] for job in shown} == {"finished"}
    ends = [[attempt["outcome"] for attempt in job["attempts"]].count("finished") for job in shown]
    assert ends == [1] * len(jobs)
    down = fleet("down", "--ssh-config", str(fleet.network.ssh_config))
    assert down.returncode == 0, down.stdout + down.stderr
    eventually(lambda: not any(host.processes() for host in hosts.values()))
