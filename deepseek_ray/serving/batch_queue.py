"""The queue before a worker: what is let in, what becomes the next batch, what is not worth doing any more.

Pure decisions on times that the caller gives, so that the batcher runs them by the clock and the tests by recorded
arrivals in virtual time. Order is that of arrival, always: a card's transactions must not overtake each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

from deepseek_ray.serving.batch_control import BatchControl

T = TypeVar("T")

Reason = Literal["queue_full", "deadline"]
"""Why an item is not let in: no room; it would be late."""


class Entry(NamedTuple, Generic[T]):
    """An item that waits.

    Attributes:
        weight: what it counts for in a batch; 0 costs nothing.
        arrived_s: when its request arrived.
        deadline_s: when its answer is worth nothing any more; infinity for never.
    """

    item: T
    weight: int
    arrived_s: float
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Refusal:
    """An item that is not let in, and when it would have been answered."""

    reason: Reason
    wait_s: float


class BatchQueue(Generic[T]):
    """Entries in order of arrival before one worker.

    Args:
        control: says how large a batch may be and how long it takes.
        max_queued: bound on the summed weight that waits.
        gone: tells whether nobody waits for an item any more; it is passed over.

    Attributes:
        queued: weight that waits, the running batch not included.
    """

    def __init__(self, control: BatchControl, max_queued: int, gone: Callable[[T], bool] = lambda _: False) -> None:
        self.control = control
        self._gone = gone
        self.queued = 0
        self._max_queued = max_queued
        self._waiting: deque[Entry[T]] = deque()
        self._running: tuple[int, float] | None = None  # weight and start of the batch that runs

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, entry: Entry[T], now_s: float) -> Refusal | None:
        """Let an entry in, or say why not. One that finds the worker free and nothing waiting always gets in."""
        self.control.arrived(entry.weight, now_s)
        refusal = self.refusal(entry.weight, entry.deadline_s, now_s)
        if refusal is None:
            self._waiting.append(entry)
            self.queued += entry.weight
        return refusal

    def refusal(self, weight: int, deadline_s: float, now_s: float) -> Refusal | None:
        """Why an item would not be let in now."""
        wait_s = self.wait_s(weight, now_s)
        if self.queued and self.queued + weight > self._max_queued:
            return Refusal("queue_full", wait_s)
        if (self._waiting or self._running) and now_s + wait_s > deadline_s:
            return Refusal("deadline", wait_s)
        return None

    def wait_s(self, weight: int, now_s: float) -> float:
        """Seconds until an item that comes now would be answered, as far as is known."""
        left_s = 0.0
        if self._running is not None:
            size, start_s = self._running
            left_s = max(0.0, start_s + self.control.batch_s(size) - now_s)
        return self.control.finish_s(left_s, self.queued, weight)

    def take(self, now_s: float) -> tuple[list[Entry[T]], list[Entry[T]]]:
        """The next batch, and what is late: answered without work. Both are empty when nothing waits."""
        batch: list[Entry[T]] = []
        late: list[Entry[T]] = []
        weight = 0
        while self._waiting and (not batch or weight + self._waiting[0].weight <= self.control.cap):
            entry = self._waiting.popleft()
            self.queued -= entry.weight
            if self._gone(entry.item):
                continue
            if self._is_late(entry, weight, now_s):
                late.append(entry)
            else:
                batch.append(entry)
                weight += entry.weight
        if batch:
            self._running = (weight, now_s)
        return batch, late

    def drain(self) -> list[T]:
        """Take out all that waits, for good."""
        items = [entry.item for entry in self._waiting]
        self._waiting.clear()
        self.queued = 0
        return items

    def finished(self, now_s: float) -> None:
        """The batch that ran is done, the work after it too."""
        if self._running is not None:
            size, start_s = self._running
            self._running = None
            if size:
                self.control.observe(size, now_s - start_s)

    def age_s(self, now_s: float) -> float:
        """How long the oldest entry has been here; 0 when nothing waits."""
        try:
            return max(0.0, now_s - self._waiting[0].arrived_s)
        except IndexError:  # read without the lock, for a metric
            return 0.0

    def _is_late(self, entry: Entry[T], before: int, now_s: float) -> bool:
        if entry.deadline_s == math.inf:
            return False
        if not before and not self._waiting:  # alone: the estimate may be wrong, only trying shows it
            return now_s >= entry.deadline_s
        size = min(before + entry.weight + self.queued, max(self.control.cap, entry.weight))
        return now_s + self.control.slow_s(size) + self.control.loop_s > entry.deadline_s
