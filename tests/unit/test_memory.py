"""Which counters of the kernel tell of a job that was killed for want of memory, and what they say."""

from __future__ import annotations

import pytest

from broker.work import Tails
from fleet import memory
from fleet.memory import Counter, Memory, counters
from fleet.process import Exit

_V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
_V2 = "41 31 0:38 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
_HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
_OTHER = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
_DOCKER = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"

KILLED = Exit(None, 9)


@pytest.fixture
def machine(tmp_path):
    """`machine({"proc/vmstat": "oom_kill 0"})`: a root with these files."""

    def make(files: dict[str, str]):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return make


# --- where the counters are ------------------------------------------------------------------------

_MACHINES = {
    "version 1": ("4:memory:/jobs/7\n0::/", [_OTHER, _V1, _HYBRID], "memory/jobs/7/memory.oom_control"),
    "version 2": ("0::/user.slice/a", [_V2], "user.slice/a/memory.events"),
    "version 2, counted by an ancestor": ("0::/system.slice/a/b/c", [_V2], "system.slice/memory.events"),
    "a container, version 1": ("4:memory:/docker/abc", [_DOCKER], "memory/memory.oom_control"),
    "below a container": ("4:memory:/docker/abc/in", [_DOCKER], "memory/in/memory.oom_control"),
    "beside a container": ("4:memory:/docker/abcdef", [_DOCKER], "memory/memory.oom_control"),
    "outside the namespace": ("0::/../x", [_V2], "memory.events"),
    "controllers together": ("3:cpu,memory:/a", [_V1], "memory/a/memory.oom_control"),
}


@pytest.mark.parametrize(("own", "mounts", "expected"), _MACHINES.values(), ids=_MACHINES.keys())
def test_the_counter_of_our_own_cgroup_is_found(machine, own, mounts, expected):
    root = machine(
        {
            "proc/self/cgroup": own,
            "proc/self/mountinfo": "\n".join(mounts),
            "proc/vmstat": "nr_free 1\noom_kill 3",
            f"sys/fs/cgroup/{expected}": "low 0\noom 5\noom_kill 2",
        }
    )
    first, last = counters(root)
    assert (first.path, first.read()) == (root / "sys/fs/cgroup" / expected, 2)
    assert (last.path.name, last.read()) == ("vmstat", 3)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "nonsense", "proc/self/mountinfo": "x - y\n\n - cgroup2 a b"},
        {"proc/vmstat": "oom_kill many"},
        {"proc/vmstat": "oom_kill"},
        {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": _V2},
    ],
)
def test_a_machine_without_counters_has_none(machine, files):
    assert counters(machine(files)) == ()


# --- the verdict -----------------------------------------------------------------------------------


@pytest.fixture
def count(tmp_path):
    """`count(7)`: the counter of the fixture `watch` says 7."""

    def write(number: int) -> None:
        (tmp_path / "counter").write_text(f"oom 9\noom_kill {number}\n")

    write(4)
    return write


@pytest.fixture
def watch(tmp_path, count):
    return Memory((Counter(tmp_path / "counter", "here"),), total_bytes=1000)


def test_a_kill_that_was_counted_is_named(watch, count):
    count(5)
    assert watch.verdict(KILLED).startswith("OutOfMemory: killed by SIGKILL, by the kernel")
    assert watch.verdict(KILLED) is None, "one kill is put down to one job"


def test_a_shell_that_tells_of_its_child_is_believed(watch, count):
    count(5)
    assert watch.verdict(Exit(137, None)).startswith("OutOfMemory")


@pytest.mark.parametrize("ended", [Exit(1, None), Exit(None, 15), Exit(None, 11)])
def test_who_ended_otherwise_was_not_killed_for_memory(watch, count, ended):
    count(5)
    assert watch.verdict(ended) is None


def test_a_kill_that_nobody_counted_is_somebody_elses(watch):
    assert watch.verdict(KILLED) is None


def test_kills_of_long_ago_are_not_put_down_to_a_job_of_today(watch, count, monkeypatch):
    now = [memory.clock.monotonic()]
    monkeypatch.setattr(memory.clock, "monotonic", lambda: now[0])
    count(5)
    for _ in range(3):
        now[0] += 2
        watch.look()
    assert watch.verdict(KILLED) is None
    count(6)
    now[0] += 2
    watch.look()
    assert watch.verdict(KILLED), "counted just before the last look, so in time"


def test_a_counter_that_has_gone_is_no_evidence(watch, tmp_path):
    (tmp_path / "counter").unlink()
    assert watch.verdict(KILLED) is None


@pytest.mark.parametrize(("rss", "suspected"), [(400, False), (600, True)])
def test_without_counters_only_a_large_job_is_suspected(rss, suspected):
    said = Memory((), total_bytes=1000).verdict(Exit(None, 9, max_rss_bytes=rss))
    assert (said is not None) == suspected
    assert said is None or "out of memory?" in said


_WORDS = [
    "MemoryError",
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.45 GiB for an array",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    "  what():  std::bad_alloc",
    "fork: Cannot allocate memory",
    'Exception in thread "main" java.lang.OutOfMemoryError: Java heap space\n\tat Main.main(Main.java:5)',
]


@pytest.mark.parametrize("words", _WORDS)
@pytest.mark.parametrize("ended", [Exit(1, None), Exit(None, 6)])
def test_last_words_about_memory_are_heard(watch, words, ended):
    said = watch.verdict(ended, Tails(stderr=b"Traceback\n" + words.encode() + b"\n\n"))
    assert said.startswith(f"OutOfMemory: {'exit code 1' if ended.code else 'killed by signal 6'}, its last")


@pytest.mark.parametrize("words", ["", "out of memory\n1\n2\n3\n4", "KeyError: 'memory'", "MemoryErrors"])
def test_other_words_are_not(watch, words):
    assert watch.verdict(Exit(1, None), Tails(stderr=words.encode())) is None
