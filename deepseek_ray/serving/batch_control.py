"""How large a batch may grow, and when an item would be answered: pure arithmetic, no threads and no clock.

A batch of b items takes s(b) = a + c*b. Both are followed from the batches that run, by recursive least squares
with forgetting (a Kalman filter whose state may drift; Ljung, System Identification, 1999, chapter 11). Throughput
b / s(b) grows with b, so the best cap is the largest that the objective allows: an item that arrives just after a
batch has started waits for that one and then for its own, which is 2*s(b) at worst.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MEMORY = 0.9
"""Share of the past that each batch leaves: about ten batches count, well below a second of busy time."""
NOISE = 0.2
"""Spread of a batch's time around its mean, as a share of it."""
OUTLIER = 3.0
"""A surprise counts for at most so many of its standard deviations: one pause of the machine moves little."""
TAIL, TAIL_STEP, MAX_TAIL = 0.97, 0.05, 3.0
"""Which quantile of (observed time / mean time) is kept free, how fast it is followed, and its bound."""
RATE_MEMORY_S = 0.1
"""Over how long the rate of arrivals is averaged."""
MIN_BATCHES = 5
"""Before so many batches nothing is known and nothing is restricted."""


class ServiceTime:
    """The time of a batch by its size, followed batch by batch.

    Args:
        scale: a size that is typical of large batches; keeps the arithmetic well conditioned.

    Attributes:
        tail: what a slow batch takes, as a multiple of the mean; at least 1.
    """

    def __init__(self, scale: int) -> None:
        self._scale = scale
        self._base = self._slope = 0.0  # s(b) = base + slope * b / scale
        self._cov = (0.0, 0.0, 0.0)  # of (base, slope): variance, covariance, variance
        self.tail = 1.0
        self.batches = 0

    def mean_s(self, size: int) -> float:
        """Expected seconds of a batch of ``size``; 0 before the first."""
        base, slope = self._base, self._slope  # either may fall below 0 for a moment, by noise
        return (base if base > 0 else 0.0) + (slope * size / self._scale if slope > 0 else 0.0)

    def largest(self, seconds: float, at_most: int) -> int:
        """The largest size, 1 to ``at_most``, whose slow batch stays within ``seconds``."""
        slope = self.tail * max(self._slope, 0.0) / self._scale
        left = seconds - self.tail * max(self._base, 0.0)
        if left >= slope * at_most:
            return at_most
        return max(1, math.floor(left / slope)) if slope else 1

    def observe(self, size: int, seconds: float) -> None:
        """Take in a batch of ``size`` that took ``seconds``."""
        self.batches += 1
        if self.batches == 1:
            self._begin(size, seconds)
            return
        mean = max(self.mean_s(size), 1e-6)
        self._follow_tail(max(seconds, 1e-6) / mean)
        self._update(size / self._scale, seconds, mean)

    def _begin(self, size: int, seconds: float) -> None:
        # a first guess between "all fixed cost" and "all per item", and great doubt about it
        per_item = 0.5 * seconds / size
        self._base, self._slope = seconds - per_item * size, per_item * self._scale
        self._cov = ((10 * seconds) ** 2, 0.0, (10 * seconds * self._scale / size) ** 2)

    def _follow_tail(self, ratio: float) -> None:
        step = TAIL_STEP * (TAIL if ratio > self.tail else TAIL - 1.0)
        self.tail = min(max(self.tail * math.exp(step), 1.0), MAX_TAIL)

    def _update(self, x: float, seconds: float, mean: float) -> None:
        p, q, r = self._forget(x, mean)
        gain = (p + q * x, q + r * x)
        variance = gain[0] + gain[1] * x + (NOISE * mean) ** 2
        bound = OUTLIER * math.sqrt(variance)
        surprise = min(max(seconds - (self._base + self._slope * x), -bound), bound) / variance
        self._base += gain[0] * surprise
        self._slope += gain[1] * surprise
        self._cov = (p - gain[0] ** 2 / variance, q - gain[0] * gain[1] / variance, r - gain[1] ** 2 / variance)

    def _forget(self, x: float, mean: float) -> tuple[float, float, float]:
        """Grow the doubt, up to a bound: batches of one size say nothing about the others, however many there are."""
        p, q, r = self._cov
        if p < (10 * mean) ** 2 and r < (10 * mean / x) ** 2:
            return p / MEMORY, q / MEMORY, r / MEMORY
        return p, q, r


class BatchControl:
    """The cap of a batch, and predictions for what waits.

    Args:
        max_batch_size: bound of the cap.
        objective_s: seconds from arrival to answer that 99 of 100 items shall stay below; 0 for no objective, then
            the cap stays at its bound.
        buckets: sizes to which batches are padded, where a compiled model wants few shapes; the cap is one of them.

    Attributes:
        cap: items that a batch may hold now.
    """

    def __init__(self, max_batch_size: int, objective_s: float = 0.0, buckets: Sequence[int] = ()) -> None:
        self._max = max_batch_size
        self._objective_s = objective_s
        self._buckets = tuple(sorted(set(buckets)))
        self._time = ServiceTime(max_batch_size)
        self._rate, self._arrived_s = 0.0, 0.0
        self.cap = self._fit(max_batch_size)

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
        if self._objective_s and self.knows:
            self.cap = self._fit(self._time.largest(self._objective_s / 2, self._max))

    def arrived(self, weight: int, now_s: float) -> None:
        """Take in that items came: batches fill up with what comes while they wait."""
        gap_s = max(now_s - self._arrived_s, 1e-6)
        self._arrived_s = now_s
        share = -math.expm1(-gap_s / RATE_MEMORY_S)
        self._rate += share * (weight / gap_s - self._rate)

    def batch_s(self, size: int) -> float:
        """Expected seconds of a batch; 0 while nothing is known."""
        if self._time.batches < MIN_BATCHES:
            return 0.0
        return self._time.mean_s(pad_to(size, self._buckets) if self._buckets else size)

    def slow_s(self, size: int) -> float:
        """Seconds that 97 of 100 batches of a size stay below; 0 while nothing is known."""
        return self._time.tail * self.batch_s(size)

    def finish_s(self, left_s: float, ahead: int, weight: int) -> float:
        """Seconds until an item is answered that joins the queue now, should its batches be slow ones.

        Args:
            left_s: what the running batch still needs, as far as is known; 0 when none runs.
            ahead: items that wait before this one.
            weight: what this one counts for.
        """
        if self._time.batches < MIN_BATCHES:
            return 0.0
        full, rest = divmod(ahead, self.cap)
        if rest and rest + weight > self.cap:  # it does not fit behind the others
            full, rest = full + 1, 0
        start_s = left_s + (full * self.slow_s(self.cap) if full else 0.0)
        own = rest + weight + int(self._rate * start_s)  # others join it until it starts
        return start_s + self.slow_s(min(own, max(self.cap, weight)))

    def _fit(self, size: int) -> int:
        fitting = [bucket for bucket in self._buckets if bucket <= size]
        return fitting[-1] if fitting else min(size, self._buckets[0]) if self._buckets else size


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
