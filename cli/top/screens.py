"""What comes before the tables: help, a question, the output of a job."""

from __future__ import annotations

import codecs
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, Static

from broker import jobs, outputs
from broker.printable import printable
from cli import tables
from cli.errors import explained
from cli.glyphs import Glyphs
from cli.top.pane import Lines

if TYPE_CHECKING:
    import redis

    from broker.outputs import View
    from cli.context import Context

#: seconds between two looks at the output of a job; its worker shows it once a second
_LOOK_SECONDS = 0.25

_KEYS = (
    ("1 to 4, Tab", "workers, queues, jobs that run, that failed"),
    ("arrows, PgUp, PgDn", "move; Home, End: to the first, the last"),
    ("Enter", "the jobs of a worker, a queue; a job's output"),
    ("s, S, r", "sort by the next column, the one before;"),
    ("", "the other way round. Or click a title"),
    ("/", "filter: rows with all these words; Esc: all"),
    ("d, u", "a worker takes no new jobs; does so again"),
    ("c", "cancel a job; it asks first"),
    ("l", "what a job prints, as it prints it"),
    ("q, Ctrl-C", "leave"),
)
_NOTES = """
CPUS, MEMORY, GPUS: promised to jobs, of how much. Sorted by STATE,
those come first that have a notice, are offline, then connecting."""


class Help(ModalScreen[None]):
    """The keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter,space", "dismiss", show=False)
    ]

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            lines = (Text.assemble((f"{keys:<20}", "bold"), does) for keys, does in _KEYS)
            yield Static(Text("\n").join(lines))
            yield Static(_NOTES)
            yield Static("Esc: back", classes="hint")


class Question(ModalScreen[bool]):
    """Yes or no; Enter alone is no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", show=False),
        Binding("n,escape,enter,q", "dismiss(False)", show=False),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(Text(self._question))
            yield Static("y: yes   n, Esc: no", classes="hint")


class Log(Screen[None]):
    """What one job prints, as it comes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "dismiss", "Back"),
        Binding("e", "other", "stdout/stderr"),
        Binding("end,G", "follow", "Follow", priority=True),
    ]

    def __init__(self, context: Context, client: redis.Redis, job_id: str, name: str, glyphs: Glyphs) -> None:
        super().__init__()
        self._fleet, self._client, self._job_id, self._title = context, client, job_id, name
        self._glyphs = glyphs
        self._follower: Follower | None = None
        self._stderr = False
        self._state = ""

    def compose(self) -> ComposeResult:
        yield Static(id="headline")
        yield Lines()
        yield Footer()

    def on_mount(self) -> None:
        self._follow()

    def on_unmount(self) -> None:
        if self._follower:
            self._follower.stop()

    def action_other(self) -> None:
        """The other of both streams."""
        self._stderr = not self._stderr
        self._follow()

    def action_follow(self) -> None:
        self.query_one(Lines).action_move(1_000_000_000)

    def _follow(self) -> None:
        if self._follower:
            self._follower.stop()
        self.query_one(Lines).clear()
        self._head("…")
        self._follower = Follower(self._fleet, self._client, self._job_id, self._stderr, self._from_thread)
        self._follower.start()

    def _from_thread(self, follower: Follower, state: str, text: str) -> None:
        self.app.call_from_thread(self._told, follower, state, text)

    def _told(self, follower: Follower, state: str, text: str) -> None:
        if follower is self._follower and self.is_mounted:
            self._head(state)
            if text:
                self.query_one(Lines).feed(text)

    def _head(self, state: str) -> None:
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{'stderr' if self._stderr else 'stdout'} of {self._job_id}", "bold").append("  ")
        text.append(*tables.state(state, self._glyphs.marked(state))).append(f"  {printable(self._title)}")
        self.query_one("#headline", Static).update(text)


class Follower:
    """Reads one stream of a job in a thread of its own; tells the job's state and what is new of the text."""

    def __init__(
        self,
        context: Context,
        client: redis.Redis,
        job_id: str,
        stderr: bool,
        tell: Callable[[Follower, str, str], None],
    ) -> None:
        self._context, self._client, self._job_id = context, client, job_id
        self._stderr, self._tell = stderr, tell
        self._stopped = threading.Event()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lease, self._position = "", 0
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        seen: outputs.Mark | None = None
        while not self._stopped.is_set():
            try:
                mark = outputs.mark(self._client, self._job_id)
                if mark != seen:
                    self._show(outputs.look(self._client, self._job_id))
                    seen = mark
            except Exception as exc:
                error = explained(exc, self._context)
                self._say(error.message if error else repr(exc), "")
                seen = None
            self._stopped.wait(_LOOK_SECONDS)

    def _show(self, view: View) -> None:
        """What came since the last look; what Redis does not keep any more is said to be left out."""
        tail, end = view.tails.stream(stderr=self._stderr)
        text = ""
        if self._lease and view.lease != self._lease:
            text, self._position = "\n--- the job starts anew ---\n", 0
            self._decoder.reset()
        self._lease = view.lease
        start = end - len(tail)
        if start > self._position:
            text += f"--- {tables.size(start - self._position)} left out; all of it is at the worker ---\n"
            self._decoder.reset()
        text += self._decoder.decode(tail[max(self._position - start, 0) :])
        self._position = max(end, self._position)
        if not end and view.state in jobs.ENDED:
            _, other = view.tails.stream(stderr=not self._stderr)
            text += f"--- nothing was printed here; e shows the other one, {tables.size(other)} ---\n"
        self._say("gone" if view.state is None else view.state, text)

    def _say(self, state: str, text: str) -> None:
        if not self._stopped.is_set():
            self._tell(self, state, text)
