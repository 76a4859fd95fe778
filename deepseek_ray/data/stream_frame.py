"""The frames of the stream engine: one key of the current event, all its windows at once.

M  remembered events of the key, the current one last     W  windows     L  fraud labels
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from deepseek_ray.data.formulas import CAPPED_CENTS, Frame, IntArray
from deepseek_ray.data.ranges import prefix


class StreamFrame(Frame):
    """Every array is int64 [W].

    Args:
        windows: [W] window lengths in microseconds.
        delay: label delay in microseconds.
        order: [M] orders of the key's events.
        amount: [M] their amounts in cents.
        other: [M] hashes for distinct counts; not read for a key within a card.
        large: [M] flags of large events; not read for a key within a card.
        labels: [2, L] positions and amounts of fraud labels.
    """

    def __init__(
        self,
        windows: IntArray,
        delay: int,
        order: IntArray,
        amount: IntArray,
        other: IntArray,
        large: IntArray | None,
        labels: IntArray,
    ) -> None:
        self._windows, self._delay = windows, delay
        self._order, self._amount, self._other, self._large, self._labels = order, amount, other, large, labels
        self.now, self.amount = order[-1], amount[-1]
        self._start = order.searchsorted(self.now - windows, "right")
        self._count: IntArray = len(order) - self._start

    def count(self) -> IntArray:
        return self._count

    def _sum(self, values: IntArray) -> IntArray:
        sums = prefix(values)
        return sums[-1] - sums[self._start]

    @cached_property
    def _totals(self) -> IntArray:
        return prefix(self._amount)

    @cached_property
    def _total(self) -> IntArray:
        return self._totals[-1] - self._totals[self._start]

    def total(self) -> IntArray:
        return self._total

    @cached_property
    def _moments(self) -> tuple[IntArray, IntArray]:
        capped = np.minimum(self._amount, CAPPED_CENTS)
        return self._sum(capped), self._sum(capped * capped)

    def moments(self) -> tuple[IntArray, IntArray]:
        return self._moments

    def largest(self) -> IntArray:
        return np.maximum.accumulate(self._amount[::-1])[self._count - 1]

    def smaller(self) -> IntArray:
        return self._sum((self._amount < self.amount).astype(np.int64))

    def large(self) -> IntArray:
        assert self._large is not None
        return self._sum(self._large)

    def distinct(self) -> IntArray:
        backwards = np.unique(self._other[::-1], return_index=True)[1]  # newest occurrence of each value
        backwards.sort()
        return backwards.searchsorted(self._count, "left")

    def first_order(self) -> IntArray:
        return self._order[self._start]

    def previous_order(self) -> IntArray:
        return self._order[-2:-1] if len(self._order) > 1 else self._order

    @cached_property
    def _matured(self) -> tuple[IntArray, IntArray]:
        until = self.now - self._delay
        first, last = self._order.searchsorted(until - self._windows, "right"), self._order.searchsorted(until, "right")
        return last - first, self._totals[last] - self._totals[first]

    def matured(self) -> tuple[IntArray, IntArray]:
        return self._matured

    @cached_property
    def _label_range(self) -> tuple[IntArray, IntArray]:
        positions = self._labels[0]
        return positions.searchsorted(self.now - self._windows, "right"), positions.searchsorted(self.now, "right")

    @cached_property
    def _frauds(self) -> tuple[IntArray, IntArray]:
        first, last = self._label_range
        sums = prefix(self._labels[1])
        return last - first, sums[last] - sums[first]

    def frauds(self) -> tuple[IntArray, IntArray]:
        return self._frauds

    def fraud_times(self) -> tuple[IntArray, IntArray]:
        positions, (first, last) = self._labels[0], self._label_range
        if not len(positions):
            return first, last
        return positions.take(first, mode="clip"), positions[last - 1]

    def clean(self) -> IntArray:
        after = self._order.searchsorted(self.fraud_times()[1] - self._delay, "right")
        return self._order.searchsorted(self.now - self._delay, "right") - after
