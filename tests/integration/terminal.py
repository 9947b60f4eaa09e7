"""A real terminal, tmux's, in which a command runs: what it shows, keys that are pressed, changes of size."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import wait_until

#: variables of a tmux in which the tests may run, and of its size: pytest-xdist sets that for its workers
_NOT_ITS = ("TMUX", "COLUMNS", "LINES")
#: what a shell says after the command has ended: how it ended, and whether lines are edited and echoed again
_AFTER = 'echo "ended with $?"; stty -a | tr " " "\\n" | grep -x -e "-*icanon" -e "-*echo"; exec cat'


class Terminal:
    """One pane; `keys` are tmux's names of them, or text."""

    def __init__(self, socket: Path, argv: Sequence[object], width: int, height: int) -> None:
        self._socket = socket
        # the shell shall outlive a Ctrl-C
        script = f"trap : INT; echo before; {shlex.join(map(str, argv))}; {_AFTER}"
        size = ("-x", str(width), "-y", str(height))
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, "sh", "-c", script)

    def text(self, *, colours: bool = False) -> str:
        """What it shows, without blanks at the ends of lines; `colours`: with escape sequences."""
        return self._tmux("capture-pane", "-p", *(["-e"] if colours else []))

    def lines(self) -> list[str]:
        return self.text().splitlines()

    def keys(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def click(self, x: int, y: int) -> None:
        """Press the left button of the mouse at that cell, from 0, and let it go, as a terminal tells it."""
        for kind in "Mm":
            self._tmux("send-keys", "-H", *(f"{ord(c):x}" for c in f"\x1b[<0;{x + 1};{y + 1}{kind}"))

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def shows(self, *words: str) -> str:
        """Wait until it shows all of these, and return what it shows."""

        def look() -> str:
            text = self.text()
            return text if all(word in text for word in words) else ""

        def fail() -> str:
            return f"{words} in:\n{self.text()}"

        return str(_until(look, fail))

    def until(self, condition: Callable[[str], object]) -> str:
        """Wait until `condition` holds of what it shows, and return that."""
        return str(_until(lambda: (text := self.text()) and condition(text) and text, self.text))

    def ended(self, code: int) -> None:
        """Wait until the command has ended so; the terminal is as it was: its lines, its echo, its screen."""
        text = self.shows(f"ended with {code}", "icanon", "echo")
        words = text.split()
        assert "icanon" in words, text
        assert "echo" in words, text
        # what was there before is there again; where the size has changed tmux moves it
        assert re.search(rf"^ *before\n+ended with {code}$", text, re.MULTILINE), text

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *words: str) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_ITS)}
        env |= {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        command = ["tmux", "-u", "-S", str(self._socket), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=60).stdout


def _until(look: Callable[[], object], shown: Callable[[], str]) -> object:
    class Message:
        def __str__(self) -> str:
            return shown()

    return wait_until(look, message=Message())  # type: ignore[arg-type]


@contextmanager
def opened(
    folder: Path, argv: Sequence[object], width: int = 80, height: int = 30, *, environ: Sequence[str] = ()
) -> Iterator[Terminal]:
    """A terminal in which `argv` runs, with variables `NAME=VALUE`; gone afterwards."""
    socket = folder / f"tmux{len(list(folder.glob('tmux*')))}"
    terminal = Terminal(socket, ["env", *environ, *argv], width, height)
    try:
        yield terminal
    finally:
        terminal.close()


def end(pid: int) -> None:
    """SIGTERM, as a service manager sends it."""
    os.kill(pid, signal.SIGTERM)
