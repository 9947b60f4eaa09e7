"""The application: a thread reads what there is to see, others act upon what is wished for.

So nothing that a key does waits for Redis. What is shown is made of what was read last.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer, Input, Static

from broker import control, selection
from broker.errors import FleetError
from broker.printable import printable
from cli import fleet_rows, tables
from cli.errors import explained
from cli.glyphs import Glyphs
from cli.top import views
from cli.top.pane import Table
from cli.top.reader import Reader, Seen
from cli.top.screens import Help, Log, Question
from cli.top.views import FAILURES, JOBS, WORKERS, Chosen

if TYPE_CHECKING:
    import redis

    from broker.running import RunningJob
    from broker.status import WorkerStatus
    from cli.context import Context

_INTERRUPTED, _TERMINATED = 130, 128 + signal.SIGTERM
_STYLE = """
#headline, #totals, #views, #note { height: 1; }
#views { margin-top: 1; }
#filter { height: 1; border: none; padding: 0; background: $boost; }
Table, Lines { height: 1fr; }
Help, Question { align: center middle; }
.box { width: auto; max-width: 95%; height: auto; padding: 1 2; }
.box { border: round $primary; background: $surface; }
.box Static { width: auto; }
.hint { color: $text-muted; margin-top: 1; }
"""


class TopApp(App[None]):
    """`fleet top`. Its return code is 0 after q, 130 after Ctrl-C, 143 after SIGTERM."""

    CSS = _STYLE
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "view(0)", show=False),
        Binding("2", "view(1)", show=False),
        Binding("3", "view(2)", show=False),
        Binding("4", "view(3)", show=False),
        Binding("tab", "next_view", show=False, priority=True),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", show=False),
        Binding("r", "reverse", show=False),
        # of high priority, or what is typed right after it would still go to the table, as commands
        Binding("slash", "filter", "Filter", priority=True),
        Binding("escape", "all_rows", show=False),
        Binding("d", "drain", "Drain"),
        Binding("u", "undrain", "Undrain"),
        Binding("c", "cancel", "Cancel"),
        Binding("l", "log", "Log"),
        Binding("question_mark", "help", "Help"),
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
    ]

    def __init__(self, context: Context, client: redis.Redis, interval_seconds: float) -> None:
        super().__init__()
        self._fleet, self._client = context, client
        self._glyphs = Glyphs()
        self._seen: Seen | None = None
        self._chosen = [Chosen(view, next(iter(view.orders))) for view in views.VIEWS]
        self._at = 0
        self._has_told = False
        self._reader = Reader(
            context,
            client,
            interval_seconds,
            found=self._on_look,
            failed=partial(self._from_thread, self._on_failure),
        )

    def compose(self) -> ComposeResult:
        yield Static("Looking...", id="headline")
        yield Static(id="totals")
        yield Static(id="views")
        yield Table()
        yield Static(id="note")
        yield Input(placeholder="words that rows must have; Enter", id="filter")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#filter", Input).display = False
        # not SIGHUP: then there is no terminal left to put in order
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._leave, _TERMINATED)
        self.action_view(0)
        self._reader.start()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Where something else is shown, or words are typed, that has its keys for itself."""
        return action == "interrupt" or (len(self.screen_stack) < 2 and not self._is_typing(action))

    def _is_typing(self, action: str) -> bool:
        return isinstance(self.focused, Input) and action != "all_rows"

    def _leave(self, code: int) -> None:
        self.exit(return_code=code)

    def on_unmount(self) -> None:
        self._reader.stop()

    # -- what was read ---------------------------------------------------------------------------

    def _from_thread(self, heed: Callable[..., object], *arguments: object) -> None:
        """Let the application heed something; a reader outlives it for a moment."""
        if self.is_running:
            with suppress(RuntimeError):  # it has just ended
                self.call_from_thread(heed, *arguments)

    def _on_look(self, seen: Seen) -> None:
        """In the reader's thread: what takes long for many rows is done here, lest a key wait for it."""
        chosen = self._now
        self._from_thread(self._on_seen, seen, chosen, chosen.rows(seen))

    def _on_seen(self, seen: Seen, chosen: Chosen, rows: list[Any]) -> None:
        self._seen = seen
        found = seen.status
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(f"{found.at:%H:%M:%SZ}  {fleet_rows.workers(len(found.workers))}", "bold")
        head.append(f": {seen.by_state}" if seen.by_state else "")
        head.append(f"  {self._fleet.redis_address}", "dim")
        self._static("headline").update(head)
        self._static("totals").update(fleet_rows.totals_line(seen.totals, self._glyphs, self.size.width))
        self._show(rows if chosen is self._now else None)

    def _on_failure(self, error: FleetError) -> None:
        """What was seen last stays, and since when it is old is said."""
        words = fleet_rows.no_news(error, self._seen.status.at if self._seen else None)
        self._static("headline").update(Text(words, "bold red", no_wrap=True, overflow="ellipsis"))

    def _static(self, name: str) -> Static:
        return self.screen_stack[0].query_one(f"#{name}", Static)

    @property
    def _table(self) -> Table[Any]:
        return self.screen_stack[0].query_one(Table)

    @property
    def _now(self) -> Chosen:
        return self._chosen[self._at]

    def _choose(self, chosen: Chosen) -> None:
        """Look at this view in another way."""
        self._chosen[self._at] = chosen
        self._show()

    def _show(self, rows: list[Any] | None = None) -> None:
        """The rows of the view that is chosen, which the caller may have made."""
        if self._seen is not None:
            self._table.show(self._now.rows(self._seen) if rows is None else rows, self._now.titles())
            shown = self._table.shown() if self._now.view is JOBS else ()
            self._reader.shown = frozenset(job.id for job in shown)
        self._static("views").update(self._tabs())

    def _tabs(self) -> Text:
        """The views with their numbers of rows; of the one that is shown how many its filter leaves."""
        counts = views.counts(self._seen) if self._seen else {}
        text = Text(no_wrap=True, overflow="ellipsis")
        for i, chosen in enumerate(self._chosen):
            words = f" {i + 1} {chosen.view.name} ({counts.get(chosen.view.name, 0):,}) "
            text.append(words, "reverse bold" if i == self._at else "").append(" ")
        if self._now.filter:
            words = printable(self._now.filter)
            text.append(f" {self._table.count():,} with '{words}' (Esc: all)", "bold")
        if self._table.count() > self._table.page_lines:
            text.append(f" row {self._table.cursor + 1:,}", "dim")
        return text

    def on_table_moved(self, event: Table.Moved) -> None:
        """Tell what the worker under the cursor has to say; what came of a wish stays until one moves on."""
        if self._has_told and not event.by_hand:
            return
        self._has_told = False
        row = self._table.row
        notice = row.notice if row is not None and self._now.view is WORKERS else ""
        self._note(f"! {row.name}: {printable(notice)}" if row and notice else "", "yellow")
        self._static("views").update(self._tabs())

    def _tell(self, words: str, style: str = "bold") -> None:
        """What came of a wish."""
        self._has_told = True
        self._note(words, style)

    def _note(self, words: str, style: str = "") -> None:
        self._static("note").update(Text(words, style, no_wrap=True, overflow="ellipsis"))

    # -- how it is looked at ---------------------------------------------------------------------

    def action_view(self, number: int) -> None:
        self._at = number
        view = self._now.view
        self._table.be(view.columns, self._cells, view.identity)
        self._show()

    def _cells(self, row: Any) -> list[tables.Cell]:
        return self._now.view.cells(row, self._glyphs, self._seen) if self._seen else []

    def action_next_view(self) -> None:
        self.action_view((self._at + 1) % len(self._chosen))

    def action_sort(self, step: int) -> None:
        self._choose(self._now.sorted_by_next(step))

    def action_reverse(self) -> None:
        self._choose(self._now.sorted_by(self._now.title))

    def on_table_head_clicked(self, event: Table.HeadClicked) -> None:
        title = self._now.view.columns[event.column].title
        if title in self._now.view.orders:
            self._choose(self._now.sorted_by(title))

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.value = self._now.filter
        box.display = True
        self.screen.set_focus(box)

    def on_input_changed(self, event: Input.Changed) -> None:
        self._filter(event.value)

    def on_input_submitted(self) -> None:
        self.query_one("#filter", Input).display = False
        self.screen.set_focus(self._table)

    def action_all_rows(self) -> None:
        self._filter("")
        self.on_input_submitted()

    def _filter(self, words: str) -> None:
        self._choose(replace(self._now, filter=words))

    def on_table_chosen(self) -> None:
        """The jobs of a worker, or of a queue; the output of a job."""
        row = self._table.row
        if self._now.view in (JOBS, FAILURES):
            self.action_log()
        elif row is not None:
            self.action_view(views.VIEWS.index(JOBS))
            self._filter(row.name)

    # -- what is wished for ----------------------------------------------------------------------

    def action_interrupt(self) -> None:
        self._leave(_INTERRUPTED)

    async def action_quit(self) -> None:
        self._leave(0)

    def action_help(self) -> None:
        self.push_screen(Help())

    def action_drain(self) -> None:
        if (worker := self._worker()) is not None:
            self._act(lambda: control.drain(self._client, {worker.name: worker.host}), _drained)

    def action_undrain(self) -> None:
        if (worker := self._worker()) is not None:
            self._act(lambda: control.undrain(self._client, [worker.name]), _drained)

    def action_cancel(self) -> None:
        job = self._job()
        if job is None:
            return

        def answered(is_meant: bool | None) -> None:
            if is_meant:
                target = selection.Target(job.id, job.id)
                self._act(lambda: selection.cancel(self._client, target), lambda word: f"{job.id}: {word}")

        name = printable(job.details.name if job.details else "")
        self.push_screen(
            Question(f"Cancel job {job.id}, which runs on {job.worker}?\n{name[:200]}"), answered
        )

    def action_log(self) -> None:
        row = self._table.row
        if self._now.view is FAILURES and row is not None:
            self._show_log(row.job_id, row.reason)
        elif (job := self._job()) is not None:
            self._show_log(job.id, job.details.name if job.details else "")

    def _show_log(self, job_id: str, title: str) -> None:
        self.push_screen(Log(self._fleet, self._client, job_id, title, self._glyphs))

    def _worker(self) -> WorkerStatus | None:
        """The worker under the cursor, or None, which is told."""
        row: WorkerStatus | None = self._table.row
        if self._now.view is not WORKERS or row is None:
            self._tell("Choose a worker first: 1 shows them.")
            return None
        return row

    def _job(self) -> RunningJob | None:
        """The job under the cursor, or None, which is told."""
        row: RunningJob | None = self._table.row
        if self._now.view is not JOBS or row is None:
            self._tell("Choose a job first: 3 shows those that run, Enter those of a worker or a queue.")
            return None
        return row

    def _act(self, change: Callable[[], Any], words: Callable[[Any], str]) -> None:
        """Change something in a thread of its own, and tell what came of it."""

        def work() -> None:
            try:
                told, style = words(change()), "bold"
            except Exception as exc:
                error = explained(exc, self._fleet)
                told, style = (error.message if error else f"{type(exc).__name__}: {exc}"), "bold red"
            self._from_thread(self._tell, told, style)
            self._reader.look_now()

        self.run_worker(work, thread=True, exit_on_error=False)


def _drained(told: dict[str, control.Told]) -> str:
    [(name, one)] = told.items()
    words = {
        "draining": "draining: takes no new jobs until it is undrained",
        "undrained": "takes jobs again",
        "not_drained": "was not drained",
    }
    return f"{name} {words.get(one.outcome, one.outcome)}"
