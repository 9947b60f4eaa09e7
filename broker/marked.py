"""TOML, YAML and JSON as values that know the line they stand in, for messages about a file.

The only module that knows PyYAML, which tells where each value stands; the standard library reads the
other two, and does not.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

#: what a file's name ends with -> its format
FORMATS = {".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}


@dataclass(frozen=True)
class Fault:
    """What is wrong in a line, counted from 1."""

    line: int
    message: str


class Unreadable(Exception):
    """The text is not of its format; `fault` says where."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.fault = Fault(line, message)


@dataclass(frozen=True)
class Marked:
    """A value and its line: of its key where it has one. `value` is a plain scalar, a list of Marked, or
    a dictionary of them."""

    value: Any
    line: int


@dataclass
class Document:
    """What a text holds; `faults`: keys that are there twice, of which the later counts."""

    root: Marked
    faults: list[Fault] = field(default_factory=list)


def read(text: str, kind: str) -> Document:
    """The document that `text` is; `kind` is toml, yaml or json. Raises Unreadable."""
    readers: Mapping[str, Callable[[str], Document]] = {"toml": _toml, "yaml": _yaml, "json": _json}
    try:
        return readers[kind](text)
    except RecursionError as exc:
        raise Unreadable(1, "is nested too deeply, or in itself") from exc


def guess(text: str) -> str:
    """The format of a text without a name, by how it begins: `{` JSON, `[` TOML, else YAML."""
    significant = (line.strip() for line in text.splitlines())
    first = next((line[0] for line in significant if line and line[0] != "#"), "")
    return {"{": "json", "[": "toml"}.get(first, "yaml")


# --- YAML ------------------------------------------------------------------------------------------

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _yaml(text: str) -> Document:
    try:
        loader = _Loader(text)
        try:
            return _Composed(loader).document()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise Unreadable(mark.line + 1 if mark else 1, str(exc.problem or exc.context)) from exc
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise Unreadable(line, "a character that YAML does not allow") from exc
    except yaml.YAMLError as exc:
        raise Unreadable(1, str(exc)) from exc


class _Composed:
    """Turns nodes of PyYAML into marked values, each node once, however many aliases it has."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._done: dict[int, Any] = {}
        self._faults: list[Fault] = []

    def document(self) -> Document:
        node = self._loader.get_single_node()
        root = Marked(None, 1) if node is None else Marked(self._value(node), _line(node))
        return Document(root, self._faults)

    def _value(self, node: Any) -> Any:
        if id(node) not in self._done:
            self._done[id(node)] = None
            self._done[id(node)] = self._read(node)
        return self._done[id(node)]

    def _read(self, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [Marked(self._value(item), _line(item)) for item in node.value]
        try:
            return self._loader.construct_object(node)
        except (ValueError, OverflowError) as exc:
            raise Unreadable(_line(node), f"{node.value!r}: {exc}") from exc

    def _mapping(self, node: Any) -> dict[str, Marked]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise Unreadable(_line(key), "a key must be text")
            if key.value in seen:
                self._faults.append(Fault(_line(key), f"{key.value} is there twice"))
            seen.add(key.value)
        self._loader.flatten_mapping(node)  # `<<: *other`
        return {key.value: Marked(self._value(value), _line(key)) for key, value in node.value}


def _line(node: Any) -> int:
    number: int = node.start_mark.line
    return number + 1


# --- JSON ------------------------------------------------------------------------------------------

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|\n|[^\s\[\]{},:"]+')


def _json(text: str) -> Document:
    try:
        json.loads(text)
    except json.JSONDecodeError as exc:
        raise Unreadable(exc.lineno, exc.msg) from exc
    except ValueError as exc:  # a number of thousands of digits
        raise Unreadable(1, str(exc)) from exc
    return _Tokens(text).document()


class _Tokens:
    """Walks through the tokens of a JSON text that is known to be right."""

    def __init__(self, text: str) -> None:
        self._tokens = self._with_lines(text)
        self._token, self._line = next(self._tokens)
        self._faults: list[Fault] = []

    def document(self) -> Document:
        return Document(Marked(self._value(), 1), self._faults)

    def _with_lines(self, text: str) -> Iterator[tuple[str, int]]:
        line = 1
        for found in _JSON_TOKEN.finditer(text):
            if found[0] == "\n":
                line += 1
            elif found[0] not in ",:":
                yield found[0], line
        yield "", line

    def _next(self) -> str:
        token = self._token
        self._token, self._line = next(self._tokens, ("", self._line))
        return token

    def _value(self) -> Any:
        token = self._next()
        if token == "{":
            return self._object()
        return self._array() if token == "[" else json.loads(token)

    def _array(self) -> list[Marked]:
        found = []
        while self._token != "]":
            line = self._line
            found.append(Marked(self._value(), line))
        self._next()
        return found

    def _object(self) -> dict[str, Marked]:
        found: dict[str, Marked] = {}
        while self._token != "}":
            line, key = self._line, json.loads(self._next())
            if key in found:
                self._faults.append(Fault(line, f"{key} is there twice"))
            found[key] = Marked(self._value(), line)
        self._next()
        return found


# --- TOML ------------------------------------------------------------------------------------------

_TOML_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|'
    r"'''.*?'{3,5}|"
    r'"(?:\\.|[^"\\\n])*"|'
    r"'[^'\n]*'|"
    r"#[^\n]*|\n|[\[\]{}=]|[^\n\"'#\[\]{}=]+",
    re.DOTALL,
)
_TOML_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", re.DOTALL)
_Path = tuple[str | int, ...]


def _toml(text: str) -> Document:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        place = _TOML_PLACE.fullmatch(str(exc))
        message = place[1] if place else str(exc)
        line = int(place[2]) if place and place[2] else text.count("\n") + 1
        raise Unreadable(line, message) from exc
    except ValueError as exc:  # a date that is none, a number of thousands of digits
        raise Unreadable(1, str(exc)) from exc
    return Document(_marked(found, (), _lines_of(text), 1))


def _marked(value: Any, path: _Path, lines: Mapping[_Path, int], above: int) -> Marked:
    line = lines.get(path, above)
    if isinstance(value, dict):
        value = {name: _marked(part, (*path, name), lines, line) for name, part in value.items()}
    elif isinstance(value, list):
        value = [_marked(part, (*path, index), lines, line) for index, part in enumerate(value)]
    return Marked(value, line)


def _lines_of(text: str) -> dict[_Path, int]:
    """Where the keys and tables of a TOML text that is known to be right stand."""
    lines: dict[_Path, int] = {}
    counts: dict[_Path, int] = {}
    table: _Path = ()
    for line, head in _statements(text):
        if not head.startswith("["):
            _add(lines, table, _keys(head), line)
            continue
        *above, last = _keys(head.strip("[] \t"))
        table = _entered((*above, last), counts, is_array=head.startswith("[["))
        lines[table] = line
        for depth in range(1, len(table)):
            lines.setdefault(table[:depth], line)
    return lines


def _add(lines: dict[_Path, int], table: _Path, keys: list[str], line: int) -> None:
    for depth in range(1, len(keys) + 1):
        lines.setdefault((*table, *keys[:depth]), line)


def _entered(keys: tuple[str, ...], counts: dict[_Path, int], *, is_array: bool) -> _Path:
    """The table that a header is about: of an array of tables the last one, or one more."""
    path: _Path = ()
    for depth, key in enumerate(keys, 1):
        path = (*path, key)
        if is_array and depth == len(keys):
            counts[path] = counts.get(path, 0) + 1
        if path in counts:
            path = (*path, counts[path] - 1)
    return path


def _keys(dotted: str) -> list[str]:
    """`a."b c".d` as its parts."""
    found: list[str] = []
    inner: Any = tomllib.loads(f"{dotted} = 0")
    while isinstance(inner, dict):
        (name, inner), *_ = inner.items()
        found.append(name)
    return found


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, what stands before `=`, or the whole header) of each key and table."""
    line, depth, began, head, is_over = 1, 0, 0, "", False
    for found in _TOML_TOKEN.finditer(text + "\n"):
        token = found[0]
        if token == "\n" and depth == 0:
            if head.strip():
                yield began, head.strip()
            head, is_over = "", False
        elif token == "=" and depth == 0:
            is_over = True
        elif not is_over and not token.startswith("#"):
            began = began if head.strip() else line
            head += token
        if token in ("[", "{"):
            depth += 1
        elif token in ("]", "}"):
            depth -= 1
        line += token.count("\n")
