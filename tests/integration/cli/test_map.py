"""`fleet map`: what a command becomes with each argument, and what comes back."""

from __future__ import annotations

import pytest


def dry(fleet, *words: str, **how) -> list[str]:
    return fleet("map", "--dry-run", *words, **how).stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        (["echo", ":::", "a", "b c"], ["echo a", "echo 'b c'"]),
        (["echo {}", ":::", "$(rm -rf x)", "it's"], ["echo '$(rm -rf x)'", "echo 'it'\"'\"'s'"]),
        (["cp {} {.}.bak", ":::", "d/a.tar.gz"], ["cp d/a.tar.gz d/a.tar.bak"]),
        (["x {/} {//} {/.} {#}", ":::", "d/a.txt", "b"], ["x a.txt d a 1", "x b . b 2"]),
        (["x {1}-{2}", ":::", "a", "b", ":::", "1", "2"], ["x a-1", "x a-2", "x b-1", "x b-2"]),
        (["x {2/} {1.}", ":::", "a.b", ":::", "c/d"], ["x d a"]),
        (["x", ":::", "a", ":::", "1 2"], ["x a '1 2'"]),
        (["awk '{print $1}' {}", ":::", "f"], ["awk '{print $1}' f"]),
        (["x", "{}", "a b", ":::", "1"], ["x 1 'a b'"]),
        (["--shell", "cat {} | wc > {.}.n", ":::", "a b.c"], ["cat 'a b.c' | wc > 'a b'.n"]),
        (["--shell", "echo", ":::", "a"], ["echo a"]),
    ],
)
def test_places_are_filled_as_gnu_parallel_does(fleet, words, commands):
    assert dry(fleet, *words) == commands


def test_arguments_come_from_files_and_stdin(fleet, tmp_path):
    file = tmp_path / "lines"
    file.write_text("a\nb c\n")
    assert dry(fleet, "x {2} {1}", "::::", str(file), ":::", "1") == ["x 1 a", "x 1 'b c'"]
    assert dry(fleet, "x", "-", input="l 1\nl2") == ["x 'l 1'", "x l2"]
    assert dry(fleet, "x", "::::", "-", input="l\n") == ["x l"]


def test_tasks_run_and_their_output_comes_in_the_order_of_the_arguments(fleet, spawn):
    spawn([*_fleet(), "worker", "--name", "w0", "--slots", "2"])
    arguments = ["b c", "\udcff", "", "$HOME `x` \"'", "-n"]
    done = fleet("map", "-k", "printf '<%s>\\n' {}", ":::", *arguments)
    assert done.stdout == "".join(f"<{argument}>\n" for argument in arguments)
    done = fleet("map", "--wait", "--shell", "echo {} | tr a-z A-Z; exit {#}", ":::", "a'b", "c", code=1)
    assert done.stdout == "A'B\nC\n"
    done = fleet("map", "--wait", "test {} = a", ":::", "a", "b", code=3)
    assert "1 of 2 tasks failed" in done.stderr


def _fleet() -> list[str]:
    import sys
    from pathlib import Path

    return [str(Path(sys.executable).parent / "fleet")]


def test_it_is_an_array(fleet, read):
    made = fleet("map", "--max-parallel", "1", "echo {}", ":::", "a", "b").stdout.strip()
    job = read("show", made)
    assert (job["name"], job["tasks"]["total"]) == ("echo {}", 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no arguments"),
        (["echo"], "no arguments"),
        (["echo", ":::"], "no arguments"),
        ([":::", "a"], "no command"),
        (["cat {} | wc", ":::", "a"], "--shell"),
        (["echo $HOME", ":::", "a"], "--shell"),
        (['echo "$HOME"', ":::", "a"], "--shell"),
        (["cat", "{}", "|", "wc", ":::", "a"], "--shell"),
        (["echo 'x", ":::", "a"], "no closing quotation"),
        (["echo {2}", ":::", "a"], "{2}"),
        (["echo", ":::", "a", ":::+", "b"], ":::+"),
        (["echo", "-"], "no lines"),
        (["echo", "::::", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(fleet, words, told):
    done = fleet("map", *words, code=2)
    assert (done.stdout, told in done.stderr) == ("", True), done.stderr
