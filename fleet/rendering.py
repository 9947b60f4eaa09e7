"""Templates of scripts and manifests become text: the one room that knows Jinja.

Nothing is rendered in part: a name that the template asks for and nobody gave, or that is None, is an error
with the template's name and line. In a template `{{ value | sh }}` is one word of a shell, whatever it
holds, and `{{ value | json }}` is JSON, and so YAML too. Pages are escaped as a whole.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from broker.errors import UsageError
from broker.printable import printable

_OURS = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Template:
    """A template's text, and its name in messages."""

    name: str
    text: str

    def render(self, values: Mapping[str, Any]) -> str:
        """The text with all values in it. Raises UsageError."""
        try:
            # the name of the "file" by which the line of an error is found again
            code = _ENVIRONMENT.compile(self.text, self.name, self.name)
            template = jinja2.Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.make_globals(None))
            return template.render(values)
        except jinja2.TemplateSyntaxError as exc:
            raise self._error(exc.message or "cannot be read", exc.lineno) from exc
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as exc:
            raise self._error(str(exc), self._line_of(exc)) from exc

    def _error(self, message: str, line: int | None) -> UsageError:
        return UsageError(f"{self.name}:{line or 0}: {message}", "Mend the template.")

    def _line_of(self, exc: Exception) -> int | None:
        """The last line of this template that was at work."""
        line, step = None, exc.__traceback__
        while step is not None:
            if step.tb_frame.f_code.co_filename == self.name:
                line = step.tb_lineno
            step = step.tb_next
        return line


def ours(name: str) -> Template:
    """The template of that name in fleet/templates."""
    return Template(name, (_OURS / name).read_text("utf-8"))


def html(name: str, values: Mapping[str, Any]) -> str:
    """A page of ours: whatever a value holds is text there, and no markup."""
    return _PAGES.from_string((_OURS / name).read_text("utf-8")).render(values)


def from_file(path: Path) -> Template:
    """A user's template. Raises UsageError."""
    try:
        return Template(str(path), path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read the template {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def _shell_word(value: object) -> str:
    return shlex.quote(_given(value))


def _json(value: object) -> str:
    return json.dumps(_given(value, as_text=False), ensure_ascii=False)


def _given(value: Any, *, as_text: bool = True) -> Any:
    """The value, where there is one: None would be printed as a word."""
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises, and tells its name
    if value is None:
        raise jinja2.UndefinedError("a value that is not set")
    return str(value) if as_text else value


def _shown(value: Any) -> Any:
    """What HTML cannot hold, as a control character, spelled out; its lines stay."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(printable, value.split("\n")))


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_given,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"sh": _shell_word, "json": _json}
    return found


_ENVIRONMENT = _environment()
_PAGES = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
)
