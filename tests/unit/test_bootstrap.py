"""Many hosts at once: bounds, interrupts and results, with launchers that are only told what to do."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from broker import keys
from broker.errors import UsageError
from fleet import bootstrap, kept_hosts, teardown
from fleet.bootstrap import Orders, workers_for
from fleet.bundle import Bundle
from fleet.hosts import Host, HostOptions
from fleet.launchers import base
from fleet.results import Event, Report, WorkerResult
from fleet.tunnel_folder import TunnelFolder
from fleet.worker_config import WorkerConfig

PROBE = base.Probe(
    system="Linux",
    machine="x86_64",
    python="/usr/bin/python3",
    python_version="3.12.1",
    can_make_venvs=True,
    cpus=8,
    memory_bytes=2**34,
    free_disk_bytes=2**40,
    gpus=(),
    clock_skew_seconds=0.0,
    home="/home/me",
    data_dir="/home/me/.local/share/rq-fleet",
    output_dir="/home/me/.local/state/rq-fleet/work",
    is_here=True,
)
URL = "redis://127.0.0.1:6379/0"


class StubLauncher:
    """A host made of attributes: what `steps` says for a step is awaited when it comes to it."""

    def __init__(self, stub: Stub, host: Host) -> None:
        self.stub, self.host, self.is_open = stub, host, True

    async def probe(self, *, fetch_python: bool = False) -> base.Probe:
        await self.stub.step("probe", self.host)
        return self.stub.probe

    async def install(self, bundle: Bundle, wheelhouse: Path | None = None) -> str:
        await self.stub.step("install", self.host)
        return "/venv/bin/python"

    async def start(
        self, python: str, orders: Sequence[WorkerConfig], **how: Any
    ) -> tuple[base.Started, ...]:
        await self.stub.step("start", self.host)
        self.stub.started += orders
        for order in orders:
            if self.stub.registers:
                self.stub.client.set(keys.worker_beat(order.name), f"new-{python}")
        fresh, version = self.stub.fresh, self.stub.version
        return tuple(base.Started(order.name, 100 + n, fresh, version) for n, order in enumerate(orders))

    async def inspect(
        self, output_dir: str | None, name: str, *, log_lines: int = 0
    ) -> tuple[base.Seen, ...]:
        return (base.Seen(f"{name}-0", self.stub.alive, 100, "0.1.0", "Redis at x:1 is not reachable"),)

    async def stop(
        self, output_dir: str | None, name: str, *, grace_seconds: float, force: bool = False
    ) -> tuple[base.Stopped, ...]:
        await self.stub.step("stop", self.host)
        return (base.Stopped(f"{name}-0", 100, self.stub.how),)

    async def close(self) -> None:
        self.stub.open -= self.is_open
        self.is_open = False
        await self.stub.step("close", self.host)


class Stub:
    """What all stub hosts share, and what they were seen to do."""

    def __init__(self) -> None:
        self.client = fakeredis.FakeRedis()
        self.steps: dict[tuple[str, str], Callable[[], Any]] = {}
        self.probe = PROBE
        self.registers = self.alive = self.fresh = True
        self.version, self.how = "0.1.0", "stopped"
        self.open = self.most_open = 0
        self.started: list[WorkerConfig] = []
        self.events: list[Event] = []

    async def step(self, step: str, host: Host) -> None:
        await asyncio.sleep(0)
        found = self.steps.get((step, host.name))
        if found:
            result = found()
            if asyncio.iscoroutine(result):
                await result

    async def opener(self, host: Host) -> base.Launcher:
        await self.step("connect", host)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        return StubLauncher(self, host)

    async def up(self, names: Sequence[str], *, max_parallel: int = 10, **orders: Any) -> Report:
        return await bootstrap.up(
            [Host(name) for name in names],
            Orders(**{"redis_url": URL, **orders}),
            opener=self.opener,
            client=self.client,
            max_parallel=max_parallel,
            on_event=self.events.append,
            confirm_seconds=0.2,
        )

    async def down(self, names: Sequence[str], tunnels: Any = None) -> Report:
        return await teardown.down(
            [Host(name) for name in names],
            opener=self.opener,
            max_parallel=10,
            on_event=self.events.append,
            grace_seconds=1,
            tunnels=tunnels,
        )


@pytest.fixture
def stub() -> Stub:
    return Stub()


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def outcomes(report: Report) -> list[str]:
    return [result.outcome for result in report.hosts]


def test_each_host_goes_through_all_steps(stub):
    report = asyncio.run(stub.up(["a", "b"]))
    assert outcomes(report) == ["started", "started"]
    assert report.exit_code == 0
    done = [event.step for event in stub.events if event.host == "a" and event.state == "done"]
    assert done == ["connect", "probe", "install", "start", "confirm"]
    assert stub.open == 0, "every connection is closed"


@pytest.mark.parametrize("step", ["connect", "probe", "install", "start"])
def test_a_host_fails_alone_at_the_step_where_it_failed(stub, step):
    stub.steps[step, "b"] = failing(base.HostError("no luck"))
    report = asyncio.run(stub.up(["a", "b", "c"]))
    assert outcomes(report) == ["started", "failed", "started"]
    failed = report.hosts[1]
    assert (failed.step, failed.error.message) == (step, "no luck")
    assert report.exit_code == 3
    assert stub.open == 0


def test_what_nobody_foresaw_fails_one_host_too(stub):
    stub.steps["probe", "a"] = failing(ZeroDivisionError("oops"))
    report = asyncio.run(stub.up(["a", "b"]))
    assert outcomes(report) == ["failed", "started"]
    assert "unexpected: ZeroDivisionError('oops')" in report.hosts[0].error.message


def test_all_failed_is_exit_1(stub):
    stub.probe = dataclasses.replace(PROBE, is_here=False)
    report = asyncio.run(stub.up(["a", "b"]))
    assert report.exit_code == 1
    assert isinstance(report.hosts[0].error, base.RedisOutOfReach)
    assert report.hosts[0].step == "probe"
    assert not stub.started


def test_a_host_elsewhere_is_told_our_address_and_one_that_is_here_loopback(stub):
    stub.registers = False
    for is_here in (True, False):
        stub.probe = dataclasses.replace(PROBE, is_here=is_here, our_address="10.0.0.5")
        (result,) = asyncio.run(stub.up(["a"], bound_to=("0.0.0.0",))).hosts
        address = "127.0.0.1" if is_here else "10.0.0.5"
        assert stub.started[-1].redis_url == f"redis://{address}:6379/0"
        assert f"did not register at redis://{address}:6379/0" in result.error.message


def test_the_bound_on_connections_is_true(stub):
    asyncio.run(stub.up([f"h{number}" for number in range(20)], max_parallel=3))
    assert stub.most_open == 3


def test_a_bound_of_zero_is_refused(stub):
    with pytest.raises(UsageError, match="must be at least 1, got 0"):
        asyncio.run(stub.up(["a"], max_parallel=0))


def test_a_worker_that_dies_is_told_with_its_log_and_how_to_mend(stub, monkeypatch):
    monkeypatch.setattr("fleet.confirmation._LOOK_SECONDS", 0.0)
    stub.registers = stub.alive = False
    (result,) = asyncio.run(stub.up(["a"], redis_url="redis://:secret@127.0.0.1:6379/0")).hosts
    assert isinstance(result.error, base.WorkerDied)
    assert result.step == "confirm"
    assert result.error.code == "redis_not_reached"
    assert result.error.message == (
        "no Redis at redis://127.0.0.1:6379/0 from there:"
        " worker a-0 died. Last log:\nRedis at x:1 is not reachable"
    )
    assert "Can a reach redis://127.0.0.1:6379/0?" in result.error.hint
    assert "--tunnel" in result.error.hint


def test_a_worker_that_never_registers_is_told(stub):
    stub.registers = False
    (result,) = asyncio.run(stub.up(["a"])).hosts
    assert isinstance(result.error, base.NotRegistered)
    assert result.workers == (WorkerResult("a-0", "started", 100, "0.1.0"),), "it runs"
    assert "a-0 runs, but did not register at redis://127.0.0.1:6379/0 within 0.2 s" in result.error.message


def test_the_beat_of_an_earlier_life_confirms_nothing(stub):
    stub.client.set(keys.worker_beat("a-0"), "old")
    stub.registers = False
    (result,) = asyncio.run(stub.up(["a"])).hosts
    assert isinstance(result.error, base.NotRegistered)


def test_a_worker_that_lives_already_is_left_alone(stub):
    stub.client.set(keys.worker_beat("a-0"), "old")
    stub.registers = stub.fresh = False
    stub.version = "0.0.9"
    (result,) = asyncio.run(stub.up(["a"])).hosts
    assert result.outcome == "running"
    assert result.note == "runs version 0.0.9, here it is 0.1.0: 'fleet up --upgrade' replaces it"


def test_a_worker_that_has_done_all_and_left_was_started(stub):
    stub.registers = False
    stub.client.set(keys.worker_left("b-0"), "an earlier one")
    for name in "ab":
        stub.steps["start", name] = lambda name=name: stub.client.set(keys.worker_left(f"{name}-0"), "new")
    report = asyncio.run(stub.up(["a", "b"], until_done=True))
    assert outcomes(report) == ["started", "started"]
    assert {worker.state for host in report.hosts for worker in host.workers} == {"left"}


def test_that_an_earlier_one_left_lately_confirms_nothing(stub):
    stub.registers = False
    stub.client.set(keys.worker_left("a-0"), "an earlier one")
    (result,) = asyncio.run(stub.up(["a"], ephemeral=True)).hosts
    assert isinstance(result.error, base.NotRegistered)


@pytest.mark.parametrize(
    ("hosts", "workers", "said", "window"),
    [(10, 10, None, 0.0), (101, 1, None, 60.0), (2, 2000, None, 80.0), (1, 1, 9.0, 9.0), (101, 1, 0.0, 0.0)],
)
def test_the_start_of_many_workers_is_spread(stub, hosts, workers, said, window):
    names = [f"h{number}" for number in range(hosts)]
    report = asyncio.run(stub.up(names, workers_per_host=workers, startup_delay_seconds=said))
    assert outcomes(report) == ["started"] * hosts
    assert {order.startup_delay_seconds for order in stub.started} == {window}


def test_a_host_whose_workers_wait_to_begin_keeps_no_other_from_its_turn(stub, monkeypatch):
    monkeypatch.setattr("fleet.confirmation._CALM_POLL_SECONDS", 0.01)
    stub.registers = False

    def begin() -> None:
        stub.client.mset({keys.worker_beat(f"{name}-0"): "new" for name in "ab"})

    stub.steps["start", "b"] = begin
    report = asyncio.run(stub.up(["a", "b"], max_parallel=1, startup_delay_seconds=100.0))
    assert outcomes(report) == ["started", "started"]
    assert (stub.open, stub.most_open) == (0, 1)


def test_a_worker_that_dies_while_it_waits_to_begin_is_looked_for(stub, monkeypatch):
    monkeypatch.setattr("fleet.confirmation._CALM_POLL_SECONDS", 0.01)
    monkeypatch.setattr("fleet.confirmation._LOOK_SECONDS", 0.0)
    stub.registers = stub.alive = False
    (result,) = asyncio.run(stub.up(["a"], startup_delay_seconds=0.2)).hosts
    assert isinstance(result.error, base.WorkerDied)
    assert (stub.open, stub.most_open) == (0, 1)


def test_an_interrupt_while_workers_wait_to_begin_leaves_them_started_and_known(stub):
    stub.registers = False

    async def up(ready: asyncio.Event) -> Report:
        stub.steps["close", "a"] = ready.set
        return await stub.up(["a"], startup_delay_seconds=100.0)

    (result,) = interrupted(up).hosts
    assert (result.outcome, [worker.name for worker in result.workers]) == ("unconfirmed", ["a-0"])
    assert stub.open == 0


def interrupted(work: Callable[[asyncio.Event], Any]) -> Report:
    """Cancel `work` when it sets the event, as the first Ctrl-C does."""

    async def run() -> Report:
        ready = asyncio.Event()
        task = asyncio.create_task(work(ready))
        await ready.wait()
        task.cancel()
        report: Report = await task
        return report

    return asyncio.run(run())


def test_an_interrupt_leaves_hosts_started_and_known_or_untouched(stub):
    release = asyncio.Event()

    async def starting(ready: asyncio.Event) -> None:
        ready.set()
        for _ in range(5):
            await asyncio.sleep(0)
        release.set()

    async def up(ready: asyncio.Event) -> Report:
        stub.steps["connect", "hung"] = asyncio.Event().wait
        stub.steps["install", "installing"] = asyncio.Event().wait
        stub.steps["start", "starting"] = lambda: starting(ready)
        return await stub.up(["hung", "installing", "starting"])

    report = interrupted(up)
    assert outcomes(report) == ["untouched", "untouched", "unconfirmed"]
    assert report.exit_code == 130
    assert release.is_set(), "a start is never cut"
    assert [order.name for order in stub.started] == ["starting-0"]
    assert stub.open == 0


@pytest.mark.parametrize(
    ("times", "note"), [(1, "interrupted; it is kept"), (2, "interrupted while it was being kept")]
)
def test_an_interrupt_while_a_host_is_being_kept_starts_nothing_and_tells_that_it_is_kept(
    stub, monkeypatch, times, note
):
    keep, go_on = kept_hosts.keep, threading.Event()

    async def run() -> Report:
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def held(*arguments: Any) -> None:
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(30)
            keep(*arguments)

        monkeypatch.setattr(kept_hosts, "keep", held)
        task = asyncio.create_task(stub.up(["a"]))
        await begun.wait()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        if times == 1:
            go_on.set()
        report: Report = await task
        go_on.set()
        return report

    (result,) = asyncio.run(run()).hosts
    assert (result.outcome, result.note, result.kept) == ("untouched", note, True)
    assert stub.client.hkeys(keys.HOSTS) == [b"a"]
    assert (stub.started, stub.open) == ([], 0)


def test_workers_that_ended_are_told_though_their_tunnel_could_not_be_closed(stub, monkeypatch, tmp_path):
    async def end(*_: Any) -> bool:
        raise OSError("disk is away")

    monkeypatch.setattr("fleet.tunnel.end", end)
    (result,) = asyncio.run(stub.down(["a"], tunnels=TunnelFolder(tmp_path))).hosts
    assert (result.outcome, result.workers) == ("failed", (WorkerResult("a-0", "stopped", 100),))
    assert "its tunnel could not be closed: disk is away" in result.error.message


def test_an_interrupt_while_a_tunnel_is_closed_does_not_forget_who_was_stopped(stub, monkeypatch, tmp_path):
    async def down(ready: asyncio.Event) -> Report:
        async def end(*_: Any) -> bool:
            ready.set()
            await asyncio.Event().wait()
            return True

        monkeypatch.setattr("fleet.tunnel.end", end)
        return await stub.down(["a"], tunnels=TunnelFolder(tmp_path))

    (result,) = interrupted(down).hosts
    assert (result.outcome, result.note) == ("stopped", "its tunnel was being closed")
    assert result.workers == (WorkerResult("a-0", "stopped", 100),)


def test_what_was_done_before_an_interrupt_is_told_though_the_connection_hangs(stub):
    async def up(ready: asyncio.Event) -> Report:
        async def hang() -> None:
            ready.set()
            await asyncio.Event().wait()

        stub.steps["close", "a"] = hang
        return await (stub.down(["a"]) if stub.started else stub.up(["a"]))

    for outcome in ("started", "stopped"):
        report = interrupted(up)
        assert (outcomes(report), report.exit_code) == ([outcome], 130)


def test_a_host_whose_workers_were_not_seen_to_beat_yet_is_not_called_untouched(stub):
    stub.registers = False

    async def up(ready: asyncio.Event) -> Report:
        def begun(event: Event) -> None:
            if (event.step, event.state) == ("confirm", "begun"):
                ready.set()

        stub.events = _Calling(begun)
        return await stub.up(["a"])

    (result,) = interrupted(up).hosts
    assert (result.outcome, result.note) == ("unconfirmed", "started, not confirmed")
    assert [worker.name for worker in result.workers] == ["a-0"]


class _Calling(list):
    """A list that tells of each element."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell

    def append(self, event: Event) -> None:
        super().append(event)
        self.tell(event)


def test_hosts_that_wait_their_turn_are_untouched(stub):
    async def up(ready: asyncio.Event) -> Report:
        async def hang() -> None:
            ready.set()
            await asyncio.Event().wait()

        stub.steps["connect", "a"] = hang
        return await stub.up(["a", "b"], max_parallel=1)

    assert outcomes(interrupted(up)) == ["untouched", "untouched"]
    assert not [event for event in stub.events if event.host == "b"]


def test_a_dry_run_starts_nothing_and_tells_what_would_be(stub):
    stub.probe = dataclasses.replace(PROBE, is_here=False)
    report = asyncio.run(stub.up(["a"], workers_per_host=2, dry_run=True))
    (result,) = report.hosts
    assert (result.outcome, result.note, report.exit_code) == ("planned", "would install", 0)
    assert [(worker.name, worker.state) for worker in result.workers] == [
        ("a-0", "running"),
        ("a-1", "would start"),
    ]
    assert not stub.started


def test_a_clock_that_is_off_is_told(stub):
    stub.probe = dataclasses.replace(PROBE, clock_skew_seconds=-3600.0)
    asyncio.run(stub.up(["a"]))
    (detail,) = [event.detail for event in stub.events if event.step == "probe" and event.state == "done"]
    assert detail == "Linux, Python 3.12.1, 8 CPUs, 16 GiB, clock 3600 s behind"


@pytest.mark.parametrize(
    ("how", "outcome", "exit_code"),
    [
        ("stopped", "stopped", 0),
        ("killed", "stopped", 0),
        ("not running", "not running", 0),
        ("remains", "failed", 1),
    ],
)
def test_down_tells_what_became_of_the_workers(stub, how, outcome, exit_code):
    stub.how = how
    report = asyncio.run(stub.down(["a"]))
    assert outcomes(report) == [outcome]
    assert report.exit_code == exit_code
    assert report.hosts[0].workers[0].state == how


def test_down_does_not_take_unreachable_for_stopped(stub):
    stub.steps["connect", "a"] = failing(base.TimedOut("no answer"))
    report = asyncio.run(stub.down(["a", "b"]))
    assert outcomes(report) == ["failed", "stopped"]
    assert report.exit_code == 3
    assert report.hosts[0].error.hint == "What runs on a runs on."


def test_an_interrupted_down_does_not_claim_what_it_did_not_see(stub):
    async def down(ready: asyncio.Event) -> Report:
        async def hang() -> None:
            ready.set()
            await asyncio.Event().wait()

        stub.steps["stop", "a"] = hang
        return await stub.down(["a"])

    report = interrupted(down)
    assert (outcomes(report), report.exit_code) == (["unconfirmed"], 130)
    assert stub.open == 0


def test_an_interrupted_down_leaves_what_it_has_not_reached_untouched(stub):
    async def down(ready: asyncio.Event) -> Report:
        async def hang() -> None:
            ready.set()
            await asyncio.Event().wait()

        stub.steps["connect", "a"] = hang
        return await stub.down(["a"])

    assert outcomes(interrupted(down)) == ["untouched"]


def test_a_second_interrupt_waits_for_nothing_and_tells_what_was_being_started(stub):
    async def run() -> Report:
        ready = asyncio.Event()

        async def hang() -> None:
            ready.set()
            await asyncio.Event().wait()

        stub.steps["start", "a"] = hang
        task = asyncio.create_task(stub.up(["a"]))
        await ready.wait()
        for _ in range(2):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
        return await task

    report = asyncio.run(run())
    (result,) = report.hosts
    assert (result.outcome, result.note, report.exit_code) == ("unconfirmed", "was being started", 130)
    assert [(worker.name, worker.state) for worker in result.workers] == [("a-0", "unknown")]
    assert stub.open == 0


def test_a_hosts_own_options_come_before_those_of_the_command_line():
    orders = Orders(
        URL, workers_per_host=2, slots=3, labels={"a": "1", "b": "1"}, output_dir="~/out", paths=("~/p",)
    )
    plain = workers_for(Host("h"), orders, PROBE, "/venv/python")
    assert [worker.name for worker in plain] == ["h-0", "h-1"]
    assert plain[0].output_dir == "/home/me/out"
    assert plain[0].paths == ("/home/me/p",)
    assert plain[0].executor_python == "/venv/python"
    own = HostOptions(slots=1, workers=1, labels={"b": "2"}, queues=("q",), output_dir="/o")
    (worker,) = workers_for(Host("h", options=own), orders, PROBE, "/venv/python")
    assert (worker.slots, worker.queues, worker.output_dir) == (1, ("q",), "/o")
    assert worker.labels == {"a": "1", "b": "2"}


def test_slots_are_the_cpus_shared_among_the_workers():
    (first, *_), (alone,) = (workers_for(Host("h"), Orders(URL, n), PROBE, "p") for n in (3, 1))
    assert (first.slots, alone.slots) == (2, 8)
    (said,) = workers_for(Host("h"), Orders(URL, resources={"cpus": 3}), PROBE, "p")
    assert (said.slots, said.resources) == (3, {"cpus": 3})


def test_workers_divide_what_their_host_has_or_is_said_to_have():
    first, second = workers_for(Host("h"), Orders(URL, 2), PROBE, "p")
    assert [(one.sibling, one.siblings, one.resources) for one in (first, second)] == [(0, 2, {}), (1, 2, {})]
    orders = Orders(URL, 2, resources={"cpus": 7, "memory_bytes": 2**31, "num_gpus": 1})
    first, second = workers_for(Host("h"), orders, PROBE, "p")
    assert first.resources == {"cpus": 4, "memory_bytes": 2**30, "num_gpus": 1}
    assert second.resources == {"cpus": 3, "memory_bytes": 2**30, "num_gpus": 0}


def test_an_ephemeral_worker_has_one_slot_whatever_its_host_says():
    host = Host("h", options=HostOptions(slots=4))
    (one,) = workers_for(host, Orders(URL, ephemeral=True, until_done=True), PROBE, "p")
    assert (one.slots, one.max_jobs, one.ephemeral, one.until_done) == (1, 1, True, True)
