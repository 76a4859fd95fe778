"""Dynamic batching: a batch forms the moment the worker is idle, from all that waits, up to a cap.

No timer delays a lone request, and under load batches grow by themselves. One worker thread runs
the batches in order of arrival, so what it owns (feature state, prediction log) needs no locks.
What would be answered after its deadline is refused at once, or passed over when its turn comes.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from deepseek_ray.errors import LateError, OverloadedError
from deepseek_ray.logs import get_logger, trace_of
from deepseek_ray.serving.batch_control import BatchControl
from deepseek_ray.serving.batch_queue import BatchQueue, Entry, Refusal

logger = get_logger(__name__)

IDLE_S = 0.002
"""Longer than a client on the same machine takes to send its next request."""

OVERLOAD_S = 1.0
"""So long after a refusal more are expected."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]
    loop: asyncio.AbstractEventLoop

    @property
    def gone(self) -> bool:
        """Its client has left: nothing was done yet, nothing is lost."""
        return self.future.cancelled()


class Batcher(Generic[Item, Result]):
    """Queue in front of one worker thread.

    Args:
        work: maps a batch of items to as many results; an exception in a result's place fails
            that item only, an exception raised fails the whole batch.
        max_batch_size: cap on the summed weight of a batch; a heavier single item runs alone.
        max_queued: cap on the summed weight that waits; beyond it ``submit`` refuses.
        after: called by the worker when a batch's answers have been handed over, for deferred writes.
        idle: called by the worker when nothing has come for ``IDLE_S`` after a batch, for what can wait till then.
        control: moves the cap and predicts; by default the cap stays at ``max_batch_size``.

    Attributes:
        queue: what waits, with its control; read it for metrics only.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        max_batch_size: int,
        max_queued: int,
        after: Callable[[], None] | None = None,
        idle: Callable[[], None] | None = None,
        control: BatchControl | None = None,
        name: str = "batch-worker",
    ) -> None:
        self._work = work
        self._max_queued = max_queued
        self._after, self._idle = after, idle
        self.queue: BatchQueue[_Waiting[Item, Result]] = BatchQueue(
            control or BatchControl(max_batch_size), max_queued, gone=lambda waiting: waiting.gone
        )
        self._wake = threading.Condition()
        self._closed = False
        self._refused_s = -math.inf
        self._busy_with: Sequence[_Waiting[Item, Result]] = ()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Weight that waits now, the running batch not included."""
        return self.queue.queued

    async def submit(
        self, item: Item, *, weight: int = 1, arrived_s: float | None = None, deadline_s: float = math.inf
    ) -> Result:
        """Wait for an item's result.

        Args:
            weight: what it counts for in a batch.
            arrived_s: when its request arrived, ``time.perf_counter``; now, if not given.
            deadline_s: when its answer is worth nothing any more, ``time.perf_counter``.

        Raises:
            OverloadedError: the queue is full, or the batcher is closed.
            LateError: it would be answered after its deadline, or was not reached before; no work was done.
        """
        loop = asyncio.get_running_loop()
        now_s = time.perf_counter()
        waiting: _Waiting[Item, Result] = _Waiting(item, loop.create_future(), loop)
        entry = Entry(waiting, weight, now_s if arrived_s is None else arrived_s, deadline_s)
        with self._wake:
            if self._closed:
                raise OverloadedError("The service is shutting down.", fix="retry against the next instance")
            refusal = self.queue.offer(entry, now_s)
            if refusal is None:
                self._wake.notify()
        if refusal is not None:
            raise self._refused(refusal, deadline_s, now_s)
        return await waiting.future

    @property
    def overloaded(self) -> bool:
        """Whether somebody was refused a moment ago: more are expected, and ``check`` is worth its cost."""
        return time.perf_counter() - self._refused_s < OVERLOAD_S

    def check(self, deadline_s: float) -> None:
        """Refuse an item of weight 1 that ``submit`` would refuse, before anything is done for it.

        Raises:
            OverloadedError, LateError: as ``submit``.
        """
        now_s = time.perf_counter()
        with self._wake:
            refusal = self.queue.refusal(1, deadline_s, now_s)
            if refusal is not None:
                self.queue.control.arrived(1, now_s)
        if refusal is not None:
            raise self._refused(refusal, deadline_s, now_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what waits, refuse what comes, stop the worker; what a worker that hangs leaves undone is refused."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._give_up(timeout_s)

    def _give_up(self, after_s: float) -> None:
        with self._wake:
            left = [*self._busy_with, *self.queue.drain()]
        logger.error("the batch worker has not ended after %g s; %d calls are refused", after_s, len(left))
        error = OverloadedError(
            "The service is shutting down and has not come to an answer.",
            fix="retry against the next instance under the same ids: what was done already is recognised",
        )
        _finish(left, [error] * len(left))

    def _refused(self, refusal: Refusal, deadline_s: float, now_s: float) -> OverloadedError:
        self._refused_s = now_s
        if refusal.reason == "queue_full":
            return OverloadedError(
                f"The queue holds {self.queued} of at most {self._max_queued} transactions.",
                fix="retry after a second, or raise serving.max_queued_requests",
                retry_after_s=refusal.wait_s,
            )
        what = f"would be answered in {refusal.wait_s * 1e3:.0f} ms"
        return _late(what, "deadline", deadline_s, now_s, refusal.wait_s)

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                _finish(batch, self._results(batch), self.queue.control.answered)
                _attempt(self._after)
                with self._wake:
                    self.queue.finished(time.perf_counter())
                    busy = self._idle is None or self._wake.wait_for(self._called, IDLE_S)
                if not busy:
                    _attempt(self._idle)

    def _called(self) -> bool:
        return bool(len(self.queue)) or self._closed

    def _next_batch(self) -> list[_Waiting[Item, Result]] | None:
        with self._wake:
            while not len(self.queue) and not self._closed:
                self._wake.wait()
            if not len(self.queue):
                return None
            now_s = time.perf_counter()
            batch, late = self.queue.take(now_s)
            self._busy_with = [entry.item for entry in batch]
        if late:
            _finish([entry.item for entry in late], [_expired(entry, now_s) for entry in late])
        return [entry.item for entry in batch]

    def _results(self, batch: Sequence[_Waiting[Item, Result]]) -> Sequence[Result | Exception]:
        try:
            results = self._work([waiting.item for waiting in batch])
            assert len(results) == len(batch), (
                f"{len(results)} results for {len(batch)} items"
            )  # the worker outlives it
        except Exception as error:
            return [error] * len(batch)
        return results


def _attempt(deferred: Callable[[], None] | None) -> None:
    if deferred is None:
        return
    try:
        deferred()
    except Exception as error:  # the worker must outlive any deferred write
        logger.error("work after a batch failed: %s", trace_of(error))


def _expired(entry: Entry[_Waiting[Item, Result]], now_s: float) -> LateError:
    return _late(f"has waited {(now_s - entry.arrived_s) * 1e3:.0f} ms", "expired", entry.deadline_s, now_s)


def _late(what: str, kind: str, deadline_s: float, now_s: float, wait_s: float = 0.0) -> LateError:
    left_ms = (deadline_s - now_s) * 1e3
    return LateError(
        f"The request {what}; its deadline {f'is in {left_ms:.0f} ms' if left_ms > 0 else 'is past'}.",
        fix="retry later, or allow more time with the header X-Request-Timeout-Ms",
        kind=kind,
        retry_after_s=wait_s,
    )


def _finish(
    batch: Sequence[_Waiting[Item, Result]],
    results: Sequence[Result | Exception],
    tell: Callable[[float, float], None] | None = None,
) -> None:
    """Hand results over to the event loops that wait for them; ``tell`` hears how long one took, see BatchControl."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Result], Result | Exception]]] = {}
    for waiting, result in zip(batch, results, strict=True):
        by_loop.setdefault(waiting.loop, []).append((waiting.future, result))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, loop, pairs, time.perf_counter(), tell)
        except RuntimeError:  # the loop has closed: no one waits any more
            continue


def _settle(
    loop: asyncio.AbstractEventLoop,
    pairs: Sequence[tuple[asyncio.Future[Result], Result | Exception]],
    done_s: float,
    tell: Callable[[float, float], None] | None,
) -> None:
    woke_s = time.perf_counter() - done_s
    for future, result in pairs:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
    if tell is not None:  # the loop runs what it was given in order: the answers leave first
        loop.call_soon(lambda: tell(woke_s, time.perf_counter() - done_s))
