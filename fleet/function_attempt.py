"""An attempt at a Python function: one execution in one executor of the pool."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from dataclasses import dataclass, field

from broker import failures
from broker.work import Claim, End, Tails
from fleet.attempt import Attempt, never_started
from fleet.executors import Execution, ExecutorPool, Outcome
from fleet.outputs import Folders, file_end, output_paths, tail_of


@dataclass
class FunctionAttempt(Attempt):
    """A function, in an executor that may live on for the next one."""

    execution: Execution = field(kw_only=True)
    pool: ExecutorPool = field(kw_only=True)
    paths: tuple[str, str] = field(kw_only=True)

    @classmethod
    def start(cls, claim: Claim, pool: ExecutorPool, folders: Folders) -> FunctionAttempt:
        """Give it to an executor; where none can be started, its end says so."""
        paths = output_paths(folders, claim)
        execution = pool.start(
            claim.job_id,
            claim.fields,
            execution_id=claim.execution_id,
            stdout_path=paths[0],
            stderr_path=paths[1],
        )
        limit = execution.kill_after_seconds
        return cls(claim, execution.pgid or 0, limit, execution=execution, pool=pool, paths=paths)

    def events(self) -> int:
        """What the selector is to wait for."""
        writing = selectors.EVENT_WRITE if self.execution.wants_write() else 0
        return selectors.EVENT_READ | writing

    def has_ended(self) -> bool:
        return self.execution.receive() is not None

    def collect(self, tail_bytes: int) -> End:
        outcome = self.execution.receive()
        self.pool.release(self.execution)
        if outcome is None:
            raise RuntimeError("collected before it ended")
        tails = self._final_tails(outcome, tail_bytes)
        if self.cause and (outcome.kind == "died" or self.cause == "lost"):
            return self.interrupted_end(self.cause, tails)
        if outcome.could_not_start:
            return never_started(self.claim, outcome.exc_string or "no executor", outcome="handed-back")
        return _ENDS[outcome.kind](self.claim, outcome, tails)

    def output_ends(self) -> tuple[int, int]:
        execution = self.execution
        return file_end(execution.stdout_live_path), file_end(execution.stderr_live_path)

    def tails(self, limit: int) -> Tails:
        execution = self.execution
        out, out_end = tail_of(execution.stdout_live_path, limit)
        err, err_end = tail_of(execution.stderr_live_path, limit)
        return Tails(out, err, out_end, err_end)

    def _final_tails(self, outcome: Outcome, limit: int) -> Tails:
        if not outcome.stdout_bytes and not outcome.stderr_bytes:
            return Tails()
        (out, out_end), (err, err_end) = (tail_of(path, limit) for path in self.paths)
        return Tails(out, err, out_end, err_end)


def _finished(claim: Claim, outcome: Outcome, tails: Tails) -> End:
    return End(
        claim,
        "finished",
        duration_seconds=outcome.duration_seconds,
        return_value=outcome.return_value_b64,
        tails=tails,
    )


def _retry(claim: Claim, outcome: Outcome, tails: Tails) -> End:
    return End(
        claim,
        "retry",
        "the function returned Retry",
        outcome.duration_seconds,
        return_value=outcome.return_value_b64,
        retry=outcome.retry,
        tails=tails,
    )


def _failed(claim: Claim, outcome: Outcome, tails: Tails) -> End:
    text = outcome.exc_string or "failed without a word"
    return End(
        claim,
        "failed",
        text.strip().splitlines()[-1][:500],
        outcome.duration_seconds,
        exc_string=failures.encoded(text),
        tails=tails,
    )


_ENDS: dict[str, Callable[[Claim, Outcome, Tails], End]] = {
    "finished": _finished,
    "retry": _retry,
    "failed": _failed,
    "died": _failed,
}
