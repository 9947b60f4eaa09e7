"""An attempt at a Python function: one execution in one executor of the pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from broker import failures
from broker.usage import Usage
from broker.work import Claim, End, Tails
from fleet.attempt import Attempt, CommandContext, never_started
from fleet.executors import Execution, ExecutorPool, Outcome
from fleet.limits import Limit
from fleet.memory import Memory
from fleet.outputs import file_end, output_paths, tail_of
from fleet.process import Exit
from fleet.processes import TICK, Process
from fleet.room import Grant


@dataclass
class FunctionAttempt(Attempt):
    """A function, in an executor that may live on for the next one."""

    execution: Execution = field(kw_only=True)
    pool: ExecutorPool = field(kw_only=True)
    paths: tuple[str, str] = field(kw_only=True)
    memory: Memory = field(kw_only=True)
    max_result_bytes: int = field(kw_only=True)

    @classmethod
    def start(
        cls, claim: Claim, pool: ExecutorPool, context: CommandContext, grant: Grant | None = None
    ) -> FunctionAttempt:
        """Give it to an executor, in a fresh process where it is held to what it was given.

        Where none can be started, its end says so.
        """
        paths, limit = output_paths(context.folders, claim), context.limits.of(claim, grant)
        try:
            execution = pool.start(*_work(claim), *paths, limits=limit.for_executor() if limit else None)
        except BaseException:
            if limit:
                limit.close()
            raise
        return cls._of(claim, pool, context, paths, execution, limit)

    @classmethod
    def line_up(cls, claim: Claim, pool: ExecutorPool, context: CommandContext) -> FunctionAttempt | None:
        """Let it wait for an executor that is busy; None where there is no room."""
        paths = output_paths(context.folders, claim)
        execution = pool.line_up(*_work(claim), *paths)
        return cls._of(claim, pool, context, paths, execution) if execution else None

    @classmethod
    def _of(
        cls,
        claim: Claim,
        pool: ExecutorPool,
        context: CommandContext,
        paths: tuple[str, str],
        execution: Execution,
        limit: Limit | None = None,
    ) -> FunctionAttempt:
        return cls(
            claim,
            execution.pgid or 0,
            execution.kill_after_seconds,
            limit=limit,
            execution=execution,
            pool=pool,
            paths=paths,
            memory=context.memory,
            max_result_bytes=context.max_result_bytes,
        )

    def signal(self, number: int) -> None:
        self.execution.kill(number)  # and not the next job of its executor, should this one just have ended

    @property
    def has_own_processes(self) -> bool:
        return self.execution.lane.executor.mode == "fork"

    def counts(self, pid: int, found: Process) -> bool:
        """Of one that has a process forked for it, its executor does not count, nor, where it is held to
        limits, what was there before."""
        if pid == self.pgid:
            return not self.has_own_processes
        return self.limit is None or found.started >= self.limit.made_at - TICK

    def has_ended(self) -> bool:
        return self.execution.outcome is not None

    def collect(self, tail_bytes: int) -> End:
        outcome = self.execution.outcome
        self.pool.release(self.execution)
        if outcome is None:
            raise RuntimeError("collected before it ended")
        tails = self._final_tails(outcome, tail_bytes)
        usage = self.used(outcome.cpu_seconds, outcome.peak_bytes)
        if self.cause and (outcome.kind == "died" or self.cause in ("lost", "memory")):
            return self.interrupted_end(self.cause, tails, usage)
        if outcome.could_not_start:
            return never_started(self.claim, outcome.exc_string or "no executor", outcome="handed-back")
        if outcome.unbegun:
            return End(self.claim, "handed-back", "its executor died before it began", 0.0)
        if outcome.signal is not None:
            outcome = self._judged(outcome)
        outcome = self._explained(outcome, usage)
        outcome = _limited(outcome, self.max_result_bytes)
        return _ENDS[outcome.kind](self.claim, outcome, tails, usage)

    def _judged(self, outcome: Outcome) -> Outcome:
        """The death of an executor by a signal that we did not send."""
        reason = self.memory.verdict(Exit(None, outcome.signal, max_rss_bytes=outcome.peak_bytes))
        return outcome._replace(exc_string=reason) if reason else outcome

    def _explained(self, outcome: Outcome, usage: Usage) -> Outcome:
        """A function that was refused memory says so itself."""
        if outcome.kind != "failed" or not self.limit:
            return outcome
        text = (outcome.exc_string or "").rstrip()
        last_words = text.split("\n")[-1]
        if not last_words.startswith("MemoryError"):
            return outcome
        why = self.limit.explained(f"OutOfMemory: {last_words}", usage)
        return outcome._replace(exc_string=f"{text}\n{why}\n")

    def output_ends(self) -> tuple[int, int]:
        execution = self.execution
        return file_end(execution.stdout_live_path), file_end(execution.stderr_live_path)

    def tails(self, limit: int) -> Tails:
        execution = self.execution
        out, out_end = tail_of(execution.stdout_live_path, limit)
        err, err_end = tail_of(execution.stderr_live_path, limit)
        if execution.lane.executor.channel.has_news():  # it may have ended, and that be the next one's output
            return Tails()
        return Tails(out, err, out_end, err_end)

    def _final_tails(self, outcome: Outcome, limit: int) -> Tails:
        if not outcome.stdout_bytes and not outcome.stderr_bytes:
            return _SILENT
        (out, out_end), (err, err_end) = (tail_of(path, limit) for path in self.paths)
        return Tails(out, err, out_end, err_end)


#: of a function that wrote nothing
_SILENT = Tails()


def _work(claim: Claim) -> tuple[str, Mapping[bytes, bytes], str]:
    return claim.job_id, claim.fields, claim.execution_id


def _limited(outcome: Outcome, limit: int) -> Outcome:
    """One that Redis can keep: a value that is too large fails the job, a long traceback lacks its middle."""
    size = len(outcome.return_value_b64 or "") * 3 // 4
    if size > limit:
        reason = (
            f"ResultTooLarge: {size} bytes, more than worker.max_result_bytes; "
            "let the job write a file and return its path"
        )
        return outcome._replace(kind="failed", return_value_b64=None, retry=None, exc_string=reason)
    text = outcome.exc_string or ""
    if len(text) > limit:
        half = limit // 2
        cut = f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"
        return outcome._replace(exc_string=cut)
    return outcome


def _finished(claim: Claim, outcome: Outcome, tails: Tails, usage: Usage) -> End:
    return End(
        claim,
        "finished",
        duration_seconds=outcome.duration_seconds,
        callback_seconds=outcome.callback_seconds,
        return_value=outcome.return_value_b64,
        tails=tails,
        usage=usage,
    )


def _retry(claim: Claim, outcome: Outcome, tails: Tails, usage: Usage) -> End:
    return End(
        claim,
        "retry",
        "the function returned Retry",
        outcome.duration_seconds,
        return_value=outcome.return_value_b64,
        retry=outcome.retry,
        tails=tails,
        usage=usage,
    )


def _failed(claim: Claim, outcome: Outcome, tails: Tails, usage: Usage) -> End:
    text = outcome.exc_string or "failed without a word"
    return End(
        claim,
        "failed",
        text.strip().splitlines()[-1][:500],
        outcome.duration_seconds,
        callback_seconds=outcome.callback_seconds,
        exc_string=failures.encoded(text),
        tails=tails,
        usage=usage,
    )


_ENDS: dict[str, Callable[[Claim, Outcome, Tails, Usage], End]] = {
    "finished": _finished,
    "retry": _retry,
    "failed": _failed,
    "died": _failed,
}
