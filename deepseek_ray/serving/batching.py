"""Dynamic batching: a batch forms the moment the worker is idle, from all that waits, up to a cap.

No timer delays a lone request, and under load batches grow by themselves. One worker thread runs
the batches in order of arrival, so what it owns (feature state, prediction log) needs no locks.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from deepseek_ray.errors import OverloadedError
from deepseek_ray.logs import get_logger

logger = get_logger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    weight: int
    future: asyncio.Future[Result]
    loop: asyncio.AbstractEventLoop


class Batcher(Generic[Item, Result]):
    """Queue in front of one worker thread.

    Args:
        work: maps a batch of items to as many results; an exception in a result's place fails
            that item only, an exception raised fails the whole batch.
        max_batch_size: cap on the summed weight of a batch; a heavier single item runs alone.
        max_queued: cap on the summed weight that waits; beyond it ``submit`` refuses.
        after: called by the worker when a batch's answers have been handed over, for deferred writes.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        max_batch_size: int,
        max_queued: int,
        after: Callable[[], None] | None = None,
        name: str = "batch-worker",
    ) -> None:
        self._work = work
        self._max_batch_size = max_batch_size
        self._max_queued = max_queued
        self._after = after
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._queued = 0
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Weight that waits now, the running batch not included."""
        return self._queued

    async def submit(self, item: Item, *, weight: int = 1) -> Result:
        """Wait for an item's result.

        Raises:
            OverloadedError: the queue is full, or the batcher is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        with self._wake:
            if self._closed:
                raise OverloadedError("The service is shutting down.", fix="retry against the next instance")
            if self._queued and self._queued + weight > self._max_queued:
                raise OverloadedError(
                    f"The queue holds {self._queued} of at most {self._max_queued} transactions.",
                    fix="retry after a second, or raise serving.max_queued_requests",
                )
            self._waiting.append(_Waiting(item, weight, future, loop))
            self._queued += weight
            self._wake.notify()
        return await future

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what waits, refuse what comes, stop the worker."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                _finish(batch, self._results(batch))
                self._run_after()

    def _next_batch(self) -> list[_Waiting[Item, Result]] | None:
        with self._wake:
            while not self._waiting and not self._closed:
                self._wake.wait()
            if not self._waiting:
                return None
            return self._take()

    def _take(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        weight = 0
        while self._waiting and (not batch or weight + self._waiting[0].weight <= self._max_batch_size):
            head = self._waiting.popleft()
            self._queued -= head.weight
            if not head.future.cancelled():  # its client has gone: nothing was done yet, nothing is lost
                batch.append(head)
                weight += head.weight
        return batch

    def _results(self, batch: Sequence[_Waiting[Item, Result]]) -> Sequence[Result | Exception]:
        try:
            results = self._work([waiting.item for waiting in batch])
        except Exception as error:
            return [error] * len(batch)
        assert len(results) == len(batch), f"{len(results)} results for {len(batch)} items"
        return results

    def _run_after(self) -> None:
        if self._after is None:
            return
        try:
            self._after()
        except Exception:  # the worker must outlive any deferred write
            logger.exception("work after a batch failed")


def _finish(batch: Sequence[_Waiting[Item, Result]], results: Sequence[Result | Exception]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Result], Result | Exception]]] = {}
    for waiting, result in zip(batch, results, strict=True):
        by_loop.setdefault(waiting.loop, []).append((waiting.future, result))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, pairs)
        except RuntimeError:  # the loop has closed: no one waits any more
            continue


def _settle(pairs: Sequence[tuple[asyncio.Future[Result], Result | Exception]]) -> None:
    for future, result in pairs:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
