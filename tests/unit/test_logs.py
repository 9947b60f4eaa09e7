"""Whatever a worker logs by itself names an event that docs/cli.md tells of."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

DOCS = (REPOSITORY / "docs" / "cli.md").read_text()
#: loggers of other processes: of tunnels, of verbs
_OTHERS = ("fleet.tunnel", "fleet.up", "fleet.metrics", "fleet.slurm")
_CALLS = {f"log.{name}" for name in ("debug", "info", "warning", "error", "critical", "exception", "log")}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Each call of `log.info` and the like in modules that log for a worker, and where it is."""
    for path in sorted((REPOSITORY / "fleet").glob("*.py")):
        text = path.read_text()
        if "log = logging.getLogger(" not in text or any(f'getLogger("{name}")' in text for name in _OTHERS):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in _CALLS:
                yield f"{path.name}:{node.lineno}", node


@pytest.mark.parametrize(("where", "call"), [pytest.param(*one, id=one[0]) for one in calls()])
def test_each_line_names_an_event_of_the_docs(where: str, call: ast.Call) -> None:
    extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), None)
    assert extra is not None, f"{where} names no event"
    if isinstance(extra, ast.Call):  # else it was made before
        [event, *_] = extra.args
        assert not isinstance(event, ast.Constant) or f"`{event.value}`" in DOCS, ast.unparse(event)


def test_there_are_such_lines() -> None:
    assert len(list(calls())) > 20
