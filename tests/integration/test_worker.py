"""Real workers, a real Redis: what a fleet does with jobs, and what it does when parts of it die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import rq
from rq.command import send_kill_horse_command, send_shutdown_command, send_stop_job_command

from broker import control, jobs, keys
from fleet import resources
from tests.integration.conftest import HASTY, Workers

#: slots with which a worker claims ahead
MORE_THAN_CORES = resources.find_cpus() + 2


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A file to which each run of a job appends a line."""
    return tmp_path / "runs"


def appending(runs: Path, word: str, then: str = "true") -> tuple[str, ...]:
    return ("sh", "-c", f"echo {word} >> {runs}; {then}")


def lines(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def waiting_for(gate: Path) -> str:
    return f"while [ ! -e {gate} ]; do sleep 0.02; done"


def enqueue(workers: Workers, function: str, *args: Any, **options: Any) -> rq.job.Job:
    return rq.Queue("default", connection=workers.client).enqueue(f"rq_jobs.{function}", *args, **options)


def rq_info(url: str) -> str:
    command = [Path(sys.executable).parent / "rq", "info", "--url", url, "--raw"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


# -- commands ------------------------------------------------------------------------------


def test_a_command_ends_as_its_exit_code_says_and_its_output_is_kept(workers: Workers) -> None:
    good = workers.submit("sh", "-c", "echo out; echo err >&2; echo $FLEET_JOB_ID")
    bad = workers.submit("sh", "-c", "echo why >&2; exit 7")
    killed = workers.submit("sh", "-c", "kill -KILL $$")
    workers.start("w0", slots=2, burst=True, wait=False)
    shown = workers.wait([good, bad, killed])
    assert [(job.state, job.exit_code, job.reason) for job in shown] == [
        ("finished", 0, None),
        ("failed", 7, "exit code 7"),
        ("failed", 137, "killed by SIGKILL"),
    ]
    tails = jobs.output(workers.client, good)
    assert (tails.stdout, tails.stderr) == (f"out\n{good}\n".encode(), b"err\n")
    assert shown[1].result.endswith("Its last output:\nwhy")


def test_a_command_that_cannot_start_fails_with_the_reason_and_the_worker_goes_on(
    workers: Workers, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program\n")
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    ids = workers.submit_many(
        [("no-such-command",), (str(plain),), (str(script),), ("./nowhere",), (str(tmp_path),), ("true",)]
    )
    workers.start("w0", burst=True, wait=False)
    shown = workers.wait(ids)
    assert [job.reason for job in shown] == [
        "command not found: no-such-command",
        f"not executable: {plain}",
        f"the interpreter named by {script} was not found",
        "command not found: ./nowhere (jobs run in folders of their own: give its whole path, or --cwd)",
        f"not executable: {tmp_path}",
        None,
    ]
    assert [job.state for job in shown] == ["failed"] * 5 + ["finished"]


def test_a_command_runs_in_a_folder_of_its_own_or_where_it_was_told(workers: Workers, tmp_path: Path) -> None:
    own = workers.submit("sh", "-c", "pwd; echo kept > result")
    told = workers.submit_in(tmp_path, "pwd")
    workers.start("w0", burst=True, wait=False)
    workers.wait([own, told])
    folder = Path(jobs.output(workers.client, own).stdout.decode().strip())
    assert folder.name == own
    assert (folder / "result").read_text() == "kept\n"
    assert jobs.output(workers.client, told).stdout.decode().strip() == str(tmp_path)


def test_a_missing_working_directory_is_the_reason_of_a_failure(workers: Workers) -> None:
    job = workers.submit_in("/no/such/folder", "true")
    workers.start("w0", burst=True, wait=False)
    assert workers.wait([job])[0].reason == "working directory /no/such/folder: No such file or directory"


def test_a_command_sees_no_secret_of_the_fleet(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_REDIS_URL", "redis://:hidden@127.0.0.1:1/0")
    job = workers.submit("env")
    workers.start("w0", burst=True, wait=False)
    workers.wait([job])
    seen = jobs.output(workers.client, job).stdout.decode()
    assert f"FLEET_JOB_ID={job}" in seen
    assert "hidden" not in seen


def test_a_command_that_runs_too_long_is_ended_with_what_it_left_in_the_background(
    workers: Workers, runs: Path
) -> None:
    script = f"trap '' TERM; sleep 300 & echo $! >> {runs}; sleep 300"
    job = workers.submit("sh", "-c", script, timeout_seconds=1)
    workers.start("w0", burst=True, wait=False)
    assert workers.wait([job])[0].reason == "Timeout: ran longer than 1 s"
    workers.until(lambda: not is_live(int(lines(runs)[0])), "the background process is gone")


def test_what_a_command_leaves_in_the_background_ends_with_it(workers: Workers, runs: Path) -> None:
    job = workers.submit("sh", "-c", f"sleep 300 & echo $! > {runs}")
    workers.start("w0")
    assert workers.wait([job])[0].state == "finished"
    workers.until(lambda: not is_live(int(lines(runs)[0])), "the background process is gone")


def test_output_of_an_earlier_attempt_is_not_taken_for_that_of_the_last(workers: Workers, runs: Path) -> None:
    script = f"[ -e {runs} ] && exit 0; touch {runs}; echo early; exit 1"
    job = workers.submit("sh", "-c", script, retries=1, retry_delay_seconds=0)
    workers.start("w0", burst=True, wait=False)
    assert workers.wait([job])[0].state == "finished"
    assert jobs.output(workers.client, job).stdout == b""


def test_a_failed_command_is_tried_again_after_a_pause(workers: Workers, runs: Path) -> None:
    job = workers.submit(
        *appending(runs, "x", f"[ $(wc -l < {runs}) -ge 3 ]"), retries=3, retry_delay_seconds=0.2
    )
    workers.start("w0")
    [shown] = workers.wait([job])
    assert shown.state == "finished"
    assert [attempt.outcome for attempt in shown.attempts] == ["failed", "failed", "finished"]
    assert len(lines(runs)) == 3


def test_output_of_a_running_job_is_seen_while_it_runs(workers: Workers, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = workers.submit("sh", "-c", f"echo early; {waiting_for(gate)}; echo late")
    workers.start("w0", burst=True, wait=False)
    workers.until(lambda: jobs.output(workers.client, job).stdout == b"early\n", "early output")
    gate.touch()
    workers.wait([job])
    assert jobs.output(workers.client, job).stdout == b"early\nlate\n"


def test_only_the_tail_of_a_large_output_goes_to_redis_and_the_whole_stays_here(workers: Workers) -> None:
    job = workers.submit("sh", "-c", "yes x | head -c 50000000; printf end")
    worker = workers.start("w0")
    workers.wait([job])
    tails = jobs.output(workers.client, job)
    assert tails.stdout_end == 50_000_003
    assert len(tails.stdout) == 65536
    assert tails.stdout.endswith(b"x\nend")
    [file] = (workers.folder / "work" / "output").glob(f"{job}.*.out")
    assert file.stat().st_size == 50_000_003
    assert psutil.Process(worker.pid).memory_info().rss < 150 << 20


# -- functions -----------------------------------------------------------------------------


def test_plain_rq_functions_work_as_they_are(workers: Workers) -> None:
    workers.start("w0", slots=2)
    good, bad, dead, said = (
        enqueue(workers, "add", 2, 3),
        enqueue(workers, "fail"),
        enqueue(workers, "die"),
        enqueue(workers, "say", "aloud"),
    )
    shown = workers.wait([job.id for job in (good, bad, dead, said)])
    assert [job.state for job in shown] == ["finished", "failed", "failed", "finished"]
    assert good.return_value() == 5
    assert "ValueError: as asked" in bad.latest_result().exc_string
    assert "SIGKILL" in dead.latest_result().exc_string
    assert jobs.output(workers.client, said.id).stdout == b"aloud\n"


def test_callbacks_meta_retry_and_returned_retry_follow_rq(workers: Workers, tmp_path: Path) -> None:
    client = workers.client
    workers.start("w0", slots=2)
    won = enqueue(workers, "add", 1, 1, on_success=rq.Callback("rq_jobs.on_success"))
    lost = enqueue(workers, "fail", on_failure=rq.Callback("rq_jobs.on_failure"))
    meta = enqueue(workers, "keep_meta")
    tried = enqueue(workers, "fail_until", str(tmp_path / "a"), 3, retry=rq.Retry(max=5))
    asked = enqueue(workers, "ask_again", str(tmp_path / "b"))
    workers.wait([job.id for job in (won, lost, meta, tried, asked)])
    assert client.get(f"test:success:{won.id}") == b"2"
    assert client.get(f"test:failure:{lost.id}") == b"as asked"
    assert meta.get_meta() == {"seen": True}
    assert (tried.return_value(), asked.return_value()) == ("done", "done")
    assert len(lines(tmp_path / "a")) == len(lines(tmp_path / "b")) == 3


def test_dependents_start_when_their_condition_is_met_and_not_before(workers: Workers, runs: Path) -> None:
    first = enqueue(workers, "note", str(runs), "first")
    broken = enqueue(workers, "fail")
    then = enqueue(workers, "note", str(runs), "then", depends_on=first)
    never = enqueue(workers, "note", str(runs), "never", depends_on=broken)
    anyway = enqueue(
        workers, "note", str(runs), "anyway", depends_on=rq.job.Dependency([broken], allow_failure=True)
    )
    workers.start("w0", slots=3)
    workers.wait([job.id for job in (first, broken, then, anyway)])
    assert lines(runs).index("first") < lines(runs).index("then")
    assert "never" not in lines(runs)
    assert never.get_status() == "deferred"


def test_scheduled_and_repeated_jobs_run_when_due(workers: Workers, runs: Path) -> None:
    from datetime import timedelta

    workers.start("w0")
    queue = rq.Queue("default", connection=workers.client)
    later = queue.enqueue_in(timedelta(seconds=1), "rq_jobs.note", str(runs), "later")
    enqueue(workers, "note", str(runs), "again", repeat=rq.Repeat(times=2, interval=0))
    workers.wait([later.id])
    workers.until(lambda: sorted(lines(runs)) == ["again"] * 3 + ["later"], "three repeats and one later")


def test_json_serialised_functions_work(workers: Workers) -> None:
    from rq.serializers import JSONSerializer

    queue = rq.Queue("default", connection=workers.client, serializer=JSONSerializer)
    job = queue.enqueue("rq_jobs.add", 2, 2)
    workers.start("w0")
    workers.wait([job.id])
    assert job.return_value() == 4


def test_a_function_in_fork_mode_has_a_process_of_its_own(workers: Workers) -> None:
    ids = [enqueue(workers, "add", 1, 1).id for _ in range(3)]
    workers.start("w0", executor="fork")
    assert [job.state for job in workers.wait(ids)] == ["finished"] * 3


@pytest.mark.parametrize(
    ("python", "why"),
    [("/no/such/python", "No such file"), ("/bin/false", "exit code 1"), ("rqless", "No module named 'rq'")],
)
def test_a_worker_whose_executors_could_run_nothing_does_not_start(
    workers: Workers, tmp_path: Path, python: str, why: str
) -> None:
    if python == "rqless":
        python = str(tmp_path / "rqless")
        Path(python).write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        Path(python).chmod(0o755)
    worker = workers.start("w0", executor_python=python, wait=False)
    assert worker.wait(60) == 2
    assert why in workers.log("w0")
    assert "Traceback" not in workers.log("w0")


# -- rq's own hands ------------------------------------------------------------------------


def test_rqs_stop_kill_and_shutdown_commands_are_honoured(workers: Workers, tmp_path: Path) -> None:
    worker = workers.start("w0", slots=3)
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    stopped = enqueue(
        workers, "note_and_wait", str(runs), "f", str(gate), on_stopped=rq.Callback("rq_jobs.on_stopped")
    )
    command = workers.submit(*appending(runs, "c", waiting_for(gate)))
    workers.until(lambda: len(lines(runs)) == 2, "both run")
    send_stop_job_command(workers.client, stopped.id)
    send_stop_job_command(workers.client, command)
    assert [job.state for job in workers.wait([stopped.id, command])] == ["stopped", "stopped"]
    workers.until(lambda: workers.client.get(f"test:stopped:{stopped.id}"), "the stopped callback ran")
    killed = enqueue(workers, "note_and_wait", str(runs), "k", str(gate))
    workers.until(lambda: len(lines(runs)) == 3, "the third runs")
    send_kill_horse_command(workers.client, "w0")
    assert workers.wait([killed.id])[0].state == "failed"
    send_shutdown_command(workers.client, "w0")
    assert worker.wait(60) == 0


def test_rq_suspend_holds_claims_and_resume_lets_them_go(workers: Workers) -> None:
    from rq.suspension import resume, suspend

    workers.start("w0")
    suspend(workers.client)
    job = workers.submit("true")
    workers.until(lambda: workers.client.llen(keys.wake("default")) == 0, "its token was taken")
    assert workers.state(job) == "queued"
    resume(workers.client)
    assert workers.wait([job])[0].state == "finished"


def test_rq_info_counts_what_we_count(workers: Workers, redis_url: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    ids = workers.submit_many([("true",)] * 5 + [("false",)] * 2)
    workers.start("w0", slots=2)
    workers.wait(ids)
    running = workers.submit_many([("sh", "-c", waiting_for(gate))] * 3)
    workers.until(lambda: workers.client.hlen(keys.worker_leases("w0")) == 2, "two run")
    for _ in range(10):
        info = rq_info(redis_url)
        assert "queue default 1, 2 executing, 5 finished, 2 failed" in info
        assert "worker w0 (here" in info
        assert "busy default. jobs: 5 finished, 2 failed" in info
    gate.touch()
    assert [job.state for job in workers.wait(running)] == ["finished"] * 3
    workers.assert_clean()


# -- interruptions -------------------------------------------------------------------------


def test_cancel_stops_a_running_job_with_its_group_and_waits_for_no_beat(
    workers: Workers, runs: Path
) -> None:
    job = workers.submit("sh", "-c", f"sleep 300 & echo $! > {runs}; wait")
    workers.start("w0", settings={"heartbeat_seconds": 100, "lease_seconds": 1000})
    workers.until(lambda: lines(runs), "it runs")
    assert control.cancel(workers.client, job) == "stopping"
    assert workers.wait([job])[0].state == "stopped"
    workers.until(lambda: not is_live(int(lines(runs)[0])), "its child is gone")


def test_a_running_job_that_is_deleted_is_ended_and_stays_deleted(workers: Workers, runs: Path) -> None:
    job = workers.submit("sh", "-c", f"echo $$ > {runs}; exec sleep 300")
    workers.start("w0", settings=HASTY)
    workers.until(lambda: lines(runs), "it runs")
    rq.job.Job.fetch(job, connection=workers.client).delete()
    workers.until(lambda: not is_live(int(lines(runs)[0])), "its process is gone")
    workers.until(lambda: not any(workers.leftovers().values()), "nothing is left of it")
    assert not workers.client.exists(keys.job(job))


def test_sigterm_finishes_what_runs_and_takes_nothing_new(workers: Workers, tmp_path: Path) -> None:
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    running = workers.submit(*appending(runs, "a", waiting_for(gate)))
    worker = workers.start("w0")
    workers.until(lambda: lines(runs), "it runs")
    waiting = workers.submit("true")
    workers.kill(worker, signal.SIGTERM)
    gate.touch()
    assert worker.wait(60) == 0
    assert workers.state(running) == "finished"
    assert workers.state(waiting) == "queued"
    assert [key for key in workers.client.scan_iter("*") if b"w0" in key] == []


def test_what_does_not_finish_within_the_grace_is_handed_back(workers: Workers, runs: Path) -> None:
    job = workers.submit("sh", "-c", f"echo $$ >> {runs}; exec sleep 300")
    worker = workers.start("w0", settings={"stop_grace_seconds": 0.2})
    workers.until(lambda: lines(runs), "it runs")
    workers.kill(worker, signal.SIGTERM)
    assert worker.wait(60) == 0
    assert not is_live(int(lines(runs)[0]))
    shown = jobs.show(workers.client, job)
    assert (shown.state, shown.attempts[0].outcome) == ("queued", "handed-back")
    workers.assert_clean()


def test_a_second_sigterm_hurries(workers: Workers, runs: Path) -> None:
    workers.submit("sh", "-c", f"echo x >> {runs}; exec sleep 300")
    worker = workers.start("w0", settings={"stop_grace_seconds": 300})
    workers.until(lambda: lines(runs), "it runs")
    workers.kill(worker, signal.SIGTERM)
    workers.until(lambda: "stopping" in workers.log("w0"), "it heard the first")
    workers.kill(worker, signal.SIGTERM)
    assert worker.wait(60) == 0


# -- deaths --------------------------------------------------------------------------------


def test_jobs_of_a_killed_worker_finish_elsewhere_once_and_no_process_of_it_is_left(
    workers: Workers, tmp_path: Path
) -> None:
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    commands = workers.submit_many([("sh", "-c", f"echo $$ >> {runs}; {waiting_for(gate)}")] * 2)
    function = enqueue(workers, "note_and_wait", str(runs), str(os.getpid()), str(gate)).id
    dead = workers.start("dead", slots=3, settings=HASTY)
    workers.until(lambda: len(lines(runs)) == 3, "three run")
    children = psutil.Process(dead.pid).children(recursive=True)
    workers.start("alive", slots=3, settings=HASTY)
    workers.kill(dead)
    workers.until(lambda: not any(is_live(child.pid) for child in children), "none of them lives")
    gate.touch()
    shown = workers.wait([*commands, function])
    for job in shown:
        assert [(attempt.worker, attempt.outcome) for attempt in job.attempts] == [
            ("dead", "lost"),
            ("alive", "finished"),
        ]
    assert len(lines(runs)) == 6
    workers.assert_clean()


def test_a_stopped_worker_loses_its_job_before_another_starts_it(workers: Workers, tmp_path: Path) -> None:
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    job = workers.submit("sh", "-c", f"echo $$ >> {runs}; {waiting_for(gate)}")
    paused = workers.start("paused", settings=HASTY)
    workers.until(lambda: len(lines(runs)) == 1, "it runs")
    workers.start("other", settings=HASTY)
    workers.kill(paused, signal.SIGSTOP)
    workers.until(lambda: len(lines(runs)) == 2, "another runs it")
    assert not is_live(int(lines(runs)[0])), "two of one job"
    workers.kill(paused, signal.SIGCONT)
    workers.until(lambda: workers.is_beating("paused"), "it registers again")
    gate.touch()
    [shown] = workers.wait([job])
    assert [(attempt.worker, attempt.outcome) for attempt in shown.attempts] == [
        ("paused", "lost"),
        ("other", "finished"),
    ]
    after = workers.submit("true")
    assert workers.wait([after])[0].state == "finished"
    workers.assert_clean()


def is_live(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_worker_started_again_takes_its_name_and_its_jobs_at_once(workers: Workers, runs: Path) -> None:
    slow = {"heartbeat_seconds": 100, "lease_seconds": 1000}
    job = workers.submit(*appending(runs, "x", f"[ $(wc -l < {runs}) -ge 2 ] || sleep 300"))
    first = workers.start("w0", settings=slow)
    workers.until(lambda: lines(runs), "it runs")
    workers.kill(first)
    workers.start("w0", settings=slow)
    [shown] = workers.wait([job])
    assert [attempt.outcome for attempt in shown.attempts] == ["lost", "finished"]


def test_two_workers_of_one_name_cannot_be(workers: Workers, tmp_path: Path) -> None:
    workers.start("w0")
    here = workers.start("w0", wait=False)
    elsewhere = workers.start("w0", wait=False, output_dir=str(tmp_path / "elsewhere"), host="there")
    assert here.wait(60) == 1
    assert elsewhere.wait(60) == 1
    log = workers.log("w0")
    assert "a worker named w0 runs here already" in log
    assert "a worker named w0 is alive on host here" in log
    assert "Traceback" not in log
    job = workers.submit("true")
    assert workers.wait([job])[0].state == "finished"


def test_a_sidecar_that_dies_is_replaced(workers: Workers, runs: Path) -> None:
    worker = workers.start("w0")
    [sidecar] = workers.until(psutil.Process(worker.pid).children, "it has a sidecar")
    sidecar.kill()
    workers.until(lambda: "starting another" in workers.log("w0"), "it was noticed")
    job = workers.submit("sh", "-c", f"echo $$ >> {runs}; exec sleep 300")
    workers.until(lambda: lines(runs), "it runs")
    workers.kill(worker)
    workers.until(lambda: not is_live(int(lines(runs)[0])), "the new sidecar killed it")
    assert workers.state(job) == "started"


def test_nothing_is_lost_when_redis_is_killed_amid_a_thousand_jobs(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any], runs: Path
) -> None:
    server = own_redis()
    workers = workers_of(server.url)
    ids = workers.submit_many([appending(runs, str(number)) for number in range(1000)])
    for name in ("w0", "w1", "w2", "w3"):
        workers.start(name, slots=1, settings={"heartbeat_seconds": 1, "lease_seconds": 10})
    for fraction in (200, 500):
        workers.until(lambda fraction=fraction: len(lines(runs)) > fraction, "under way", 60)
        server.kill()
        server.start()
    shown = workers.wait(ids, 90)
    assert [job.state for job in shown] == ["finished"] * 1000
    assert set(lines(runs)) == {str(number) for number in range(1000)}
    workers.assert_clean()


def test_a_wrong_password_ends_the_worker_with_a_message(
    workers_of: Callable[[str], Workers], own_redis: Callable[..., Any]
) -> None:
    server = own_redis("--requirepass", "right")
    workers = workers_of(server.url.replace("redis://", "redis://:right@"))
    worker = workers.start("w0")
    workers.wait([workers.submit("true")])  # it is at work, and all its connections are there
    workers.client.config_set("requirepass", "changed")
    workers.client.client_kill_filter(_type="normal", skipme=True)
    assert worker.wait(60) == 6
    assert "Redis refused us" in workers.log("w0")


def test_no_redis_at_all_ends_a_worker_at_its_start(workers: Workers, free_port: Callable[[], int]) -> None:
    workers.url = f"redis://127.0.0.1:{free_port()}/0"
    worker = workers.start("w0", wait=False)
    assert worker.wait(60) == 6
    assert "is not reachable" in workers.log("w0")
    assert "Traceback" not in workers.log("w0")


# -- limits of a worker --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "left"), [({"burst": True}, 0), ({"max_jobs": 2}, 3), ({"ephemeral": True, "max_jobs": 1}, 4)]
)
def test_a_worker_leaves_when_its_limit_is_reached(
    workers: Workers, fields: dict[str, Any], left: int
) -> None:
    workers.submit_many([("true",)] * 5)
    worker = workers.start("w0", wait=False, **fields)
    assert worker.wait(60) == 0
    assert workers.client.llen(keys.queue("default")) == left
    workers.assert_clean()


def test_a_worker_looks_for_jobs_before_its_idle_time_is_up(workers: Workers) -> None:
    job = workers.submit("true")
    worker = workers.start("w0", wait=False, idle_timeout_seconds=0.0)
    assert worker.wait(60) == 0
    assert workers.state(job) == "finished"


def test_an_idle_worker_leaves_after_its_time(workers: Workers) -> None:
    worker = workers.start("w0", wait=False, idle_timeout_seconds=0.5)
    assert worker.wait(60) == 0


def test_a_host_with_a_full_disk_takes_no_jobs_and_another_does(workers: Workers, tmp_path: Path) -> None:
    from broker import status

    workers.start("full", settings={"min_free_disk_bytes": 1 << 60})
    job = workers.submit("true")
    workers.until(
        lambda: [one.notice for one in status.read(workers.client).workers if "disk full" in one.notice],
        "it says so",
    )
    assert workers.state(job) == "queued"
    workers.start("roomy", output_dir=str(tmp_path / "roomy"))
    assert workers.wait([job])[0].worker == "roomy"


@pytest.mark.root
def test_a_disk_that_fills_up_costs_no_job(workers: Workers, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], check=True)
    try:
        worker = workers.start("w0", output_dir=str(small / "work"), settings={"min_free_disk_bytes": 0})
        big = workers.submit("sh", "-c", "head -c 1000000 /dev/zero")
        assert workers.wait([big])[0].state == "failed"
        after = workers.submit("sh", "-c", "echo hello")
        workers.start("other")
        assert workers.wait([after])[0].state in ("finished", "failed")
        assert worker.poll() is None
        worker.terminate()
        assert worker.wait(60) == 0
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_damaged_jobs_fail_by_name_and_harm_nobody(workers: Workers) -> None:
    no_data, garbage, good = workers.submit_many([("true",)] * 3)
    workers.client.hdel(keys.job(no_data), "data")
    workers.client.hset(keys.job(garbage), mapping={"data": b"\xff\xfe", "timeout": "soon"})
    workers.start("w0", burst=True, wait=False)
    workers.until(lambda: workers.state(good) == "finished", "the good one ran")
    for job in (no_data, garbage):
        assert workers.state(job) == "failed"
        assert workers.client.hget(keys.job(job), "fleet_reason").startswith(b"DamagedJob: ")


def test_what_was_claimed_ahead_does_not_wait_while_another_worker_is_idle(
    workers: Workers, tmp_path: Path
) -> None:
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    slots = MORE_THAN_CORES
    workers.start("w0", slots=slots)
    workers.wait(workers.submit_many([("true",)] * 30))  # jobs are short, it learns
    workers.start("w1", slots=2)
    ids = workers.submit_many([appending(runs, "x", waiting_for(gate))] * (slots + 2))
    workers.until(lambda: len(lines(runs)) == slots + 2, "all run")
    gate.touch()
    assert {job.worker for job in workers.wait(ids)} == {"w0", "w1"}
    workers.assert_clean()


def test_what_was_claimed_ahead_goes_back_when_the_worker_stops(workers: Workers, runs: Path) -> None:
    pid = runs.with_name("pid")
    end_it = f"until [ -s {pid} ]; do sleep 0.01; done; kill -TERM $(cat {pid})"
    scripts = [appending(runs, str(number), end_it if number == 50 else "true") for number in range(400)]
    ids = workers.submit_many(scripts)
    settings = {"stop_grace_seconds": 0.1}
    worker = workers.start("w0", slots=MORE_THAN_CORES, settings=settings, wait=False)
    pid.write_text(str(worker.pid))
    assert worker.wait(60) == 0
    workers.assert_clean()
    assert {workers.state(job) for job in ids} == {"finished", "queued"}
    workers.start("w1", slots=2)
    assert {job.state for job in workers.wait(ids)} == {"finished"}
    assert len(lines(runs)) - 400 <= MORE_THAN_CORES, "only what ran when the grace ended ran twice"


def test_four_workers_share_fifty_jobs_and_run_each_once(workers: Workers, runs: Path) -> None:
    for name in ("w0", "w1", "w2", "w3"):
        workers.start(name, slots=2)
    for round_ in range(5):
        ids = workers.submit_many([appending(runs, f"{round_}-{number}") for number in range(50)])
        workers.wait(ids)
    assert sorted(lines(runs)) == sorted(f"{round_}-{number}" for round_ in range(5) for number in range(50))
    workers.assert_clean()


def test_a_queue_whose_name_ends_in_a_number_is_served_and_weights_are_told(
    workers: Workers, eventually: Callable[..., Any]
) -> None:
    workers.start("w0", queues=("proj:3",))
    (job,) = workers.submit_many([["true"]], queue="proj:3")
    assert workers.wait([job])[0].worker == "w0"
    assert "by weight" not in workers.log("w0")
    workers.start("w1", queues=("mail:2", "proj:3:1"))
    eventually(lambda: "queues by weight: mail 2, proj:3 1\n" in workers.log("w1"))


def test_a_job_wakes_one_worker_of_many(workers: Workers) -> None:
    def waits() -> int:
        """How often a worker has begun to wait; once more when it has answered a token."""
        return int(workers.client.info("commandstats").get("cmdstat_blpop", {"calls": 0})["calls"])

    def idle() -> bool:
        return sum(one["cmd"] == "blpop" for one in workers.client.client_list()) == 6

    for number in range(6):
        workers.start(f"w{number}", settings={"heartbeat_seconds": 20.0, "lease_seconds": 60.0})
    workers.until(idle, "all wait")
    workers.wait([workers.submit("true")])
    workers.until(idle, "all wait again")
    before = waits()
    for _ in range(12):
        workers.wait([workers.submit("true")])
        workers.until(idle, "all wait again")
    assert waits() - before <= 12 * 2, "all six would be 72"


def test_a_job_that_is_silent_for_longer_than_its_lease_keeps_it(workers: Workers, runs: Path) -> None:
    workers.start("w0", settings={"heartbeat_seconds": 0.5, "lease_seconds": 5.0})
    [shown] = workers.wait([workers.submit(*appending(runs, "x", "exec sleep 8"))])
    assert [attempt.outcome for attempt in shown.attempts] == ["finished"]
    assert lines(runs) == ["x"]
