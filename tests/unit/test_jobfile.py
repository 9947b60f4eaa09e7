"""Files of jobs: what they say, and what is said of them where they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from broker import jobfile, marked, ranges
from broker.requirements import parse
from broker.submit import Options

FOLDER = Path("/work")


def read(text: str, kind: str = "yaml", **options: object) -> jobfile.JobFile:
    return jobfile.read(text, kind, FOLDER, queue="default", options=Options(**options))


def faults(text: str, kind: str = "yaml") -> list[str]:
    return [f"{fault.line}: {fault.message}" for fault in read(text, kind).faults]


TOML = """
[defaults]
queue = "gpu"
env = {A = "1", B = "2"}

[[jobs]]
name = "prepare"
command = "sed 's/a b/c/' in > out"
shell = true

[[jobs]]
name = "train"
id = "mine"
argv = ["train", "--seed", "7"]
after = ["prepare"]
after_any = "j1"
timeout = "1.5m"
retries = 2
retry_delay = 0
cwd = "sub"
env.B = "3"
"""
YAML = """
defaults:
  queue: gpu
  env: {A: "1", B: "2"}
jobs:
  - name: prepare
    command: sed 's/a b/c/' in > out
    shell: true
  - name: train
    id: mine
    argv: [train, --seed, "7"]
    after: [prepare]
    after_any: j1
    timeout: 1.5m
    retries: 2
    retry_delay: 0
    cwd: sub
    env: {B: "3"}
"""


@pytest.mark.parametrize("kind", ["toml", "yaml", "json"])
def test_the_three_formats_say_the_same(kind: str) -> None:
    text = {"toml": TOML, "yaml": YAML, "json": json.dumps(yaml.safe_load(YAML), indent="\t")}[kind]
    file = read(text, kind)
    assert file.faults == ()
    prepare, train = file.jobs
    assert prepare.command.argv == ("/bin/sh", "-c", "sed 's/a b/c/' in > out")
    assert (prepare.queue, dict(prepare.command.env)) == ("gpu", {"A": "1", "B": "2"})
    assert (train.name, train.id) == ("train", "mine")
    assert train.command.argv == ("train", "--seed", "7")
    assert train.command.cwd == "/work/sub"
    assert dict(train.command.env) == {"A": "1", "B": "3"}
    options = train.options
    assert (options.timeout_seconds, options.retries, options.retry_delay_seconds) == (90, 2, 0)
    assert list(file.outside()) == ["j1"]
    first, second = file.submissions().values()
    assert second.options.after == (first.job_id,)
    assert (second.job_id, second.options.after_any) == ("mine", ("j1",))


def test_a_command_is_split_as_a_shell_would() -> None:
    (job,) = read("jobs: [{command: echo 'a b' $HOME}]").jobs
    assert job.command.argv == ("echo", "a b", "$HOME")


def test_all_faults_are_told_with_their_lines() -> None:
    text = """
defaults: {queu: x}
jobs:
  - name: a
    comand: echo
    after: [b]
  - name: prepare
    command: "echo 'x"
    xyzzy: 1
  - name: b
    argv: [echo, 1]
    after: a
    env: {N: 1}
    timeout: soon
  - name: b
    command: x
    argv: [x]
  - command: x
    cwd: 3
    retries: -1
    name: ""
    queue: "a b"
    shell: 1
    on_failed_dependency: no
  - 7
  - {}
"""
    assert faults(text) == [
        "2: unknown field 'queu': did you mean 'queue'?",
        "4: jobs wait for each other: a waits for b, which waits for a",
        "5: unknown field 'comand': did you mean 'command'?",
        "8: command: cannot be split into words: No closing quotation",
        "9: unknown field 'xyzzy': there are " + ", ".join(jobfile._OF_A_JOB),
        "11: argv: word 2 must be text, in quotes",
        "13: env: N must be text, in quotes",
        "14: timeout: 'soon' is no duration: use seconds, or 90s, 5m, 2h, 1d",
        "15: a job 'b' is there already, in line 10",
        "17: a job has either a command or an argv",
        "19: cwd: must be text, in quotes",
        "20: retries: must be from 0 to 1000",
        "21: name: is empty",
        "22: queue: 'a b' is no queue name. Use letters, digits, '_', '.', ':' and '-', at most 128 of them.",
        "23: shell: must be true or false",
        "24: on_failed_dependency: must be fail or wait",
        "25: a job must be a table",
        "26: a job has either a command or an argv",
    ]


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("yaml", "", "1: the file must be a table"),
        ("yaml", "jobs: []", "1: there are no jobs: 'jobs' is a list of tables, each with a command"),
        ("yaml", "a: 1\njobs:\n\tb", "3: found character that cannot start any token"),
        ("yaml", "jobs:\n - command: x\n   command: y", "3: command is there twice"),
        ("yaml", "jobs:\n - &a\n   - *a", "2: a job must be a table"),
        ("yaml", "jobs:\n - {command: x, timeout: 2001-99-99}", "2: '2001-99-99': month must be in 1..12"),
        ("json", '{"jobs": [\n{"command": "x",}]}', None),
        ("json", '{"jobs": [\n{"command": "x",\n"command": "y"}]}', "3: command is there twice"),
        ("json", '{"jobs": [{"command": "\\ud800"}]}', "1: command: is not UTF-8 text"),
        ("toml", '[[jobs]]\ncommand = "x"\ncommand = "y"', "3: Cannot overwrite a value"),
        ("toml", '[[jobs]]\ncommand = "x"\ntimeout = 1979-05-27', "3: timeout: must be a number, or text"),
        ("toml", '[[jobs]]\ncommand = """\nx\n"""\n[jobs.env]\nA = 1', "5: env: A must be text, in quotes"),
        ("toml", "jobs = [{command = 'x'}, {}]", "1: a job has either a command or an argv"),
        ("json", "[" * 100_000, "1: is nested too deeply, or in itself"),
    ],
)
def test_files_that_are_not_right(kind: str, text: str, fault: str | None) -> None:
    found = faults(text, kind)
    assert len(found) == 1
    assert fault is None or found == [fault]


def test_a_name_that_is_almost_right_is_told() -> None:
    file = read("jobs:\n - {name: prepare, command: x}\n - command: y\n   after: [prepar, j1, prepare]")
    assert file.faults == ()
    (fault,) = file.unknown({"j1"})
    assert (fault.line, fault.message) == (
        4,
        "no job 'prepar' in this file or in Redis: did you mean 'prepare'?",
    )


def test_every_circle_is_told() -> None:
    text = "jobs:\n" + "\n".join(
        f" - {{name: {name}, command: x, after: [{after}]}}"
        for name, after in {"a": "b", "b": "c", "c": "a", "d": "d", "e": "f, g", "f": "", "g": "a"}.items()
    )
    found = faults(text)
    assert len(found) == 2
    assert "5: jobs wait for each other: d waits for d" in found
    circle = "jobs wait for each other: a waits for b, which waits for c, which waits for a"
    assert circle in found[0] or circle.split(": ")[1].split()[0] in "abc"


@pytest.mark.parametrize("labels", ["[gpu_type=a100*]", "{gpu_type: a100*}"])
def test_jobs_ask_for_what_they_need(labels: str) -> None:
    text = f"defaults: {{cpus: 2, priority: high}}\njobs:\n- {{command: x, memory: 4G, labels: {labels}}}\n"
    (job,) = read(text + "- {command: x, cpus: 0.5, time_request: 2h, exclusive: true}").jobs[:1]
    assert job.options.requirements == parse(
        {"cpus": 2, "priority": "high", "memory": "4G", "labels": ["gpu_type=a100*"]}
    )


def test_what_cannot_be_asked_for_is_told_with_its_line() -> None:
    text = (
        "jobs:\n- command: x\n  memory: 4\n  cpus: -1\n  labels: [x]\n  gpus: 1.5\n  exclusive: 1\n  cpu: 1"
    )
    found = faults(text)
    assert [line.split()[:2] for line in found] == [
        ["3:", "memory:"],
        ["4:", "cpus:"],
        ["5:", "labels:"],
        ["6:", "gpus:"],
        ["7:", "exclusive:"],
        ["8:", "unknown"],
    ]


def test_a_job_may_be_an_array() -> None:
    (job,) = read("jobs: [{command: x, array: 1-9:2, max_fails: 0, max_parallel: 3}]").jobs
    assert job.tasks is not None
    assert (list(job.tasks.numbers), job.tasks.max_fails, job.tasks.max_parallel) == ([1, 3, 5, 7, 9], 0, 3)
    assert faults("jobs:\n- command: x\n  max_fails: 1\n- command: x\n  array: x\n  max_parallel: 0") == [
        "3: max_fails: is for arrays, and there is no array",
        "5: array: 'x' names no tasks: 'x' is no range. " + ranges._hint("x"),
        "6: max_parallel: must be from 1 to 10000000",
    ]


def test_one_job_is_not_among_both() -> None:
    text = "jobs:\n - {name: a, id: i, command: x}\n - {command: x, after: a, after_any: i}"
    assert faults(text) == ["3: 'i' is among both after and after_any"]


# --- properties ------------------------------------------------------------------------------------

texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1, max_size=8
)
scalars = st.one_of(texts, st.booleans(), st.integers(-(2**60), 2**60), st.none())
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def plain(mark: marked.Marked) -> object:
    """A marked value without its marks."""
    if isinstance(mark.value, dict):
        return {name: plain(item) for name, item in mark.value.items()}
    if isinstance(mark.value, list):
        return [plain(item) for item in mark.value]
    return mark.value


@given(trees, st.sampled_from([None, 2, "\t"]))
def test_json_is_read_as_json_reads_it(tree: object, indent: int | str | None) -> None:
    document = marked.read(json.dumps(tree, indent=indent), "json")
    assert plain(document.root) == tree
    assert document.faults == []


@given(trees)
def test_yaml_is_read_as_yaml_reads_it(tree: object) -> None:
    assert plain(marked.read(yaml.safe_dump(tree, allow_unicode=True), "yaml").root) == tree


words = st.text("abc ", min_size=1, max_size=3)


@given(
    st.dictionaries(
        words, st.lists(st.sampled_from(["x", '"y"', "'z'", '"""\nm\n"""', "[ 1,\n 2 ]"])), max_size=5
    )
)
def test_toml_lines_are_those_of_the_text(tables: dict[str, list[str]]) -> None:
    lines, expected = ["# = ["], {}
    for name, values in tables.items():
        lines.append(f'[t."{name}"] # [')
        expected[(name,)] = len("\n".join(lines).split("\n"))
        for number, value in enumerate(values):
            lines.append(f'k{number} = {value if value != "x" else 1} # """')
            expected[(name, f"k{number}")] = len("\n".join(lines).split("\n")) - value.count("\n")
    root = marked.read("\n".join(lines), "toml").root
    found = {}
    for name, table in (root.value.get("t") or marked.Marked({}, 0)).value.items():
        found[(name,)] = table.line
        found |= {(name, key): item.line for key, item in table.value.items()}
    assert found == expected


@given(st.sampled_from(["toml", "yaml", "json"]), st.text(max_size=60))
def test_no_text_brings_it_down(kind: str, text: str) -> None:
    read(text, kind)


fields = st.dictionaries(st.sampled_from(sorted(jobfile._OF_A_JOB)), trees, max_size=5)


@given(st.lists(fields | scalars, max_size=4), fields)
def test_no_values_bring_it_down(rows: list[object], defaults: dict[str, object]) -> None:
    text = json.dumps({"defaults": defaults, "jobs": rows}, indent=1)
    file = read(text, "json")
    if not file.faults and not file.outside():
        assert len(file.submissions()) == len(rows)


@given(st.data(), st.integers(1, 12))
def test_circles_are_found_and_all_else_comes_after_what_it_waits_for(
    data: st.DataObject, count: int
) -> None:
    numbers = st.integers(0, count - 1)
    links = data.draw(st.lists(st.tuples(numbers, numbers), max_size=15))
    jobs = [
        {"name": f"n{n}", "id": f"i{n}", "argv": ["x"], "after": [f"n{b}" for a, b in links if a == n]}
        for n in range(count)
    ]
    file = read(json.dumps({"jobs": jobs}), "json")
    above = {n: {b for a, b in links if a == n} for n in range(count)}
    for _ in range(count):
        above = {n: found | {c for b in found for c in above[b]} for n, found in above.items()}
    is_circular = any(n in found for n, found in above.items())
    assert bool(file.faults) == is_circular
    if not is_circular:
        order = [row.job_id for row in file.submissions().values()]
        assert sorted(order) == sorted(f"i{n}" for n in range(count))
        assert all(order.index(f"i{b}") < order.index(f"i{a}") for a, b in links)
        roots = [n for n in range(count) if not above[n]]
        assert [job for job in order if int(job[1:]) in roots] == [f"i{n}" for n in roots]
