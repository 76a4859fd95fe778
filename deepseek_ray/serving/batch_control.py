"""How large a batch may grow, and when an item would be answered: pure arithmetic, no threads and no clock.

A batch of b items takes s(b) = a + c*b, times a ratio of its own; neither a nor c is below 0. The line goes through
running means of batches of about the same size, by least squares of relative errors; of the ratios the last hundred are
kept. Throughput b / s(b) grows with b. An item that comes just after a batch has started waits for
that one and then takes part in the next, so the best cap is the largest b for which s(b) + ratio * s(b) stays within
the objective for nearly all ratios. Where a machine pauses so often that no b does, or only batches so small that half
of the throughput is lost, it is the one with most answers in time: small batches would spare no one the pauses.

What the event loop takes to read a request and to send its answer is none of the worker's time, and is the client's all
the same: it is measured from answer to answer and taken off the objective.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 10
"""So many batches make a running mean: well below a second of busy time."""
FADE, LEAST = 0.9, 0.1
"""With each batch the means of other sizes lose a tenth of their weight, down to this: sizes that have long not come
say nothing of how fast the machine is now, and still what one item more costs."""
OUTLIER = 3.0
"""A batch counts for at most so many times what was expected: one pause of the machine moves little."""
NUM_RATIOS = 100
"""Of the last batches, observed / mean time: seconds of busy time, and enough to see one in a hundred."""
LOOP_BATCHES = 20
"""The event loop is reckoned with as the slowest of so many batches found it, and a bad moment is soon forgotten."""
MAX_LOOP = 0.5
"""The event loop is granted at most this share of the objective: a worker that refuses all has no answers to see."""
IN_TIME = 0.995
"""Share of answers that shall be in time: somewhat more than the 99 of 100 of the objective."""
WORTH = 0.5
"""The objective may cost this share of the answers in time that are possible; beyond it they come first."""
MAX_MARGIN = 3.0
"""Slow batches are reckoned with up to so many times the mean."""
GROWTH = 1.1
"""Between one size that is tried for the cap and the next."""
RATE_MEMORY_S = 0.1
"""Over how long the rate of arrivals is averaged."""
MIN_BATCHES = 5
"""Before so many batches nothing is known and nothing is restricted."""


class Ratios:
    """The last observed / mean times of batches, in order of size."""

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, ratio: float) -> None:
        """Take in one; the oldest goes."""
        if len(self._last) == NUM_RATIOS:
            self._sorted.pop(bisect_right(self._sorted, self._last.popleft()) - 1)
        self._last.append(ratio)
        insort(self._sorted, ratio)

    def within(self, bound: float) -> float:
        """Share that is at most ``bound``; 1 before the first."""
        return bisect_right(self._sorted, bound) / len(self._sorted) if self._sorted else 1.0

    def quantile(self, share: float) -> float:
        """The ratio that a share of all stays within; 1 before the first."""
        return self._sorted[math.ceil(share * len(self._sorted)) - 1] if self._sorted else 1.0


@dataclass(slots=True)
class _Mean:
    """Of batches of about the same size."""

    size: float
    seconds: float
    weight: float

    def add(self, size: int, seconds: float) -> None:
        self.weight = min(self.weight + 1.0, MEMORY)
        self.size += (size - self.size) / self.weight
        self.seconds += (seconds - self.seconds) / self.weight


class ServiceTime:
    """The time of a batch by its size, followed batch by batch.

    Batches of one size say nothing about others: until others come, an item more is taken to cost nothing, so that
    larger batches are tried and show what they cost.

    Attributes:
        batches: how many it has seen.
        ratios: how far they were from what was expected.
    """

    def __init__(self) -> None:
        self._base = self._slope = 0.0  # s(b) = base + slope * b
        self._means: dict[int, _Mean] = {}  # by the power of GROWTH that is nearest
        self.ratios = Ratios()
        self.batches = 0

    def mean_s(self, size: int) -> float:
        """Expected seconds of a batch of ``size``; 0 before the first."""
        return self._base + self._slope * size

    def observe(self, size: int, seconds: float) -> None:
        """Take in a batch of ``size`` that took ``seconds``."""
        seconds = max(seconds, 1e-6)
        key = round(math.log(size, GROWTH))
        if key in self._means:
            expected = self.mean_s(size)
            self.ratios.add(seconds / expected)
            seconds = min(seconds, OUTLIER * expected)
        self.batches += 1
        for mean in self._means.values():
            mean.weight = max(mean.weight * FADE, LEAST)
        self._means.setdefault(key, _Mean(size, seconds, 0.0)).add(size, seconds)
        self._fit()

    def _fit(self) -> None:
        points = [(mean.size, mean.seconds, mean.weight / mean.seconds**2) for mean in self._means.values()]
        weight = sum(w for _, _, w in points)
        x, y = sum(w * x for x, _, w in points) / weight, sum(w * y for _, y, w in points) / weight
        spread = sum(w * (size - x) ** 2 for size, _, w in points)
        both = sum(w * (size - x) * (seconds - y) for size, seconds, w in points)
        self._slope = min(max(both / spread, 0.0), y / x) if spread > 1e-9 * weight else 0.0
        self._base = y - self._slope * x


class BatchControl:
    """The cap of a batch, and predictions for what waits.

    Args:
        max_batch_size: bound of the cap.
        objective_s: seconds from arrival to answer that 99 of 100 items shall stay below; 0 for no objective, then
            the cap stays at its bound.
        buckets: sizes to which batches are padded, where a compiled model wants few shapes; the cap is one of them.

    Attributes:
        cap: items that a batch may hold now.
        objective_s: as given.
        loop_s: what a request waits for the event loop, when it comes and when its answer leaves; 0 while little is
            known.
    """

    def __init__(self, max_batch_size: int, objective_s: float = 0.0, buckets: Sequence[int] = ()) -> None:
        self._max = max_batch_size
        self.objective_s = objective_s
        self._buckets = tuple(sorted(set(buckets)))
        self._time = ServiceTime()
        self._loops: deque[float] = deque(maxlen=LOOP_BATCHES)
        self.loop_s = 0.0
        self._slow = 1.0  # a slow batch over the mean
        self._rate, self._arrived_s = 0.0, 0.0
        self._sizes = self._buckets or _sizes(max_batch_size)
        self.cap = self._sizes[-1]

    @property
    def knows(self) -> bool:
        """Whether enough batches have run for a prediction."""
        return self._time.batches >= MIN_BATCHES

    def padded(self, size: int) -> int:
        """The shape that a batch of ``size`` items runs with."""
        return pad_to(size, self._buckets)

    def observe(self, size: int, seconds: float) -> None:
        """Take in that a batch of ``size`` items kept the worker busy for ``seconds``; moves the cap."""
        self._time.observe(self.padded(size), seconds)
        if self.knows:
            self.loop_s = self._loop()
            if self.objective_s:
                self.cap = self._best()
            self._slow = self._margin()

    def answered(self, woke_s: float, left_s: float) -> None:
        """Take in how long after a batch the event loop woke up, and its last answer left.

        A request that comes waits for the loop as long as the loop took to wake up. Any thread may call this; what it
        means is seen with the next batch, by the one that observes.
        """
        self._loops.append(woke_s + left_s)

    def _loop(self) -> float:
        slowest_s = max(tuple(self._loops), default=0.0)
        return min(slowest_s, MAX_LOOP * self.objective_s) if self.objective_s else slowest_s

    def arrived(self, weight: int, now_s: float) -> None:
        """Take in that items came: batches fill up with what comes while they wait."""
        gap_s = max(now_s - self._arrived_s, 1e-6)
        self._arrived_s = now_s
        share = -math.expm1(-gap_s / RATE_MEMORY_S)
        self._rate += share * (weight / gap_s - self._rate)

    def batch_s(self, size: int) -> float:
        """Expected seconds of a batch; 0 while nothing is known."""
        if not self.knows:
            return 0.0
        return self._time.mean_s(pad_to(size, self._buckets) if self._buckets else size)

    def slow_s(self, size: int) -> float:
        """Seconds of a batch that is one of the slow ones; 0 while nothing is known."""
        return self._slow * self.batch_s(size)

    def _margin(self) -> float:
        """What a slow batch takes, over the mean: not more than the objective leaves for a batch of the cap."""
        bound = MAX_MARGIN
        if self.objective_s and (mean_s := self.batch_s(self.cap)):
            bound = min((self.objective_s - self.loop_s) / mean_s - 1.0, bound)
        return max(min(self._time.ratios.quantile(IN_TIME), bound), 1.0)

    def finish_s(self, left_s: float, ahead: int, weight: int) -> float:
        """Seconds until an item is answered that joins the queue now, should its batches be slow ones.

        Args:
            left_s: what the running batch still needs, as far as is known; 0 when none runs.
            ahead: items that wait before this one.
            weight: what this one counts for.
        """
        if not self.knows:
            return 0.0
        full, rest = divmod(ahead, self.cap)
        if rest and rest + weight > self.cap:  # it does not fit behind the others
            full, rest = full + 1, 0
        start_s = left_s + (full * self.slow_s(self.cap) if full else 0.0)
        own = rest + weight + int(self._rate * start_s)  # others join it until it starts
        return start_s + self.slow_s(min(own, max(self.cap, weight))) + self.loop_s

    def _best(self) -> int:
        fitting = most = self._sizes[-1]
        kept_rate = rate = 0.0
        for size in self._sizes:
            mean_s = self.batch_s(size)
            share = self._time.ratios.within((self.objective_s - self.loop_s) / mean_s - 1.0)
            if share * size / mean_s > rate:
                most, rate = size, share * size / mean_s
            if share >= IN_TIME:
                fitting, kept_rate = size, size / mean_s
        return fitting if kept_rate >= WORTH * rate else most


def _sizes(largest: int) -> tuple[int, ...]:
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(max(sizes[-1] + 1, int(sizes[-1] * GROWTH)), largest))
    return tuple(sizes)


def pad_to(size: int, buckets: Sequence[int]) -> int:
    """The smallest of ascending ``buckets`` that holds ``size``; beyond the last, a multiple of it.

    Without buckets the size itself.
    """
    if not buckets:
        return size
    for bucket in buckets:
        if size <= bucket:
            return bucket
    return math.ceil(size / buckets[-1]) * buckets[-1]
