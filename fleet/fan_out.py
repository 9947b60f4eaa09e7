"""One task for each host, so many at once; an interrupt cuts what may be cut and waits for the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Generic, TypeVar

from broker.errors import UsageError
from fleet.hosts import Host

Result = TypeVar("Result")


class FanOut(Generic[Result]):
    """Runs `work(host)` for every host, at most `limit` of them at once.

    When the caller is cancelled (Ctrl-C), hosts that wait or are on their way are given up,
    but one inside `uncut(host)` comes to its end first; cancelled again, that is given up too.
    """

    def __init__(self, limit: int) -> None:
        """Raises UsageError for a limit below 1."""
        if limit < 1:
            raise UsageError(f"--max-parallel-ssh must be at least 1, got {limit}")
        self._gate = asyncio.Semaphore(limit)
        self._uncut: set[str] = set()
        #: whether the work was cut short
        self.interrupted = False

    @contextmanager
    def uncut(self, host: Host) -> Iterator[None]:
        """What is done inside is done to its end, even when interrupted once."""
        self._uncut.add(host.key)
        try:
            yield
        finally:
            self._uncut.discard(host.key)

    def turn(self) -> asyncio.Semaphore:
        """A place among those at work, to be entered: for work of a host that is `aside`."""
        return self._gate

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Leave the host's place to another, to wait for what costs nothing."""
        self._gate.release()
        try:
            yield
        finally:
            await self._gate.acquire()

    async def run(
        self, hosts: Sequence[Host], work: Callable[[Host], Awaitable[Result]]
    ) -> list[Result | None]:
        """The results in the order of `hosts`; None for those that were given up."""
        tasks = [asyncio.create_task(self._one(host, work)) for host in hosts]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            self.interrupted = True
            self._give_up([task for host, task in zip(hosts, tasks, strict=True) if not self._is_uncut(host)])
            await self._ended(tasks)
            _swallow_cancel()
        return [None if task.cancelled() else task.result() for task in tasks]

    async def _one(self, host: Host, work: Callable[[Host], Awaitable[Result]]) -> Result:
        async with self._gate:
            return await work(host)

    def _is_uncut(self, host: Host) -> bool:
        return host.key in self._uncut

    def _give_up(self, tasks: Sequence[asyncio.Task[Result]]) -> None:
        for task in tasks:
            task.cancel()

    async def _ended(self, tasks: Sequence[asyncio.Task[Result]]) -> None:
        """Wait for those that may still come to their end; told again, for none."""
        while not all(task.done() for task in tasks):
            try:
                await asyncio.wait(tasks)
            except asyncio.CancelledError:
                self._give_up(tasks)
                _swallow_cancel()


def _swallow_cancel() -> None:
    """We go on to report what was done: asyncio is told that the cancel was dealt with."""
    task = asyncio.current_task()
    if task:
        task.uncancel()
