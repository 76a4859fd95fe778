"""Exact range queries over integer arrays in numpy: sums, maxima, and counts of smaller values.

All queries are vectorised over M half-open ranges [left, right) of an array of N values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def prefix(values: IntArray) -> IntArray:
    """[N + 1] running sums, starting with 0: the sum of [l, r) is ``p[r] - p[l]``."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


class RangeMax:
    """Largest value of a range by doubling tables (sparse table), O(N log longest range)."""

    def __init__(self, values: IntArray, longest: int) -> None:
        self._levels = [values]
        for step in range(max(longest, 1).bit_length() - 1):
            below = self._levels[-1]
            self._levels.append(np.maximum(below[: len(below) - (1 << step)], below[1 << step :]))

    def __call__(self, left: IntArray, right: IntArray) -> IntArray:
        """[M] maxima; every range holds at least one value."""
        level = np.frexp((right - left).astype(np.float64))[1] - 1
        result = np.empty(len(left), np.int64)
        for step in range(len(self._levels)):
            chosen = np.flatnonzero(level == step)
            table = self._levels[step]
            result[chosen] = np.maximum(table[left[chosen]], table[right[chosen] - (1 << step)])
        return result


class CountLess:
    """How many values of a range are below a limit, O(log bound) a query.

    A wavelet matrix: F. Claude, G. Navarro, A. Ordonez, Information Systems 47 (2015).
    """

    def __init__(self, values: IntArray, bound: int) -> None:
        """``values`` lie in [0, bound]; queries may ask for any limit in [0, bound]."""
        self._levels: list[tuple[int, IntArray]] = []
        rest = values
        for bit in range(max(bound, 1).bit_length() - 1, -1, -1):
            ones = (rest >> bit) & 1 == 1
            self._levels.append((bit, prefix((~ones).astype(np.int64))))
            rest = np.concatenate([rest[~ones], rest[ones]])

    def __call__(self, left: IntArray, right: IntArray, limit: IntArray) -> IntArray:
        """[M] counts of values < limit in [left, right)."""
        result = np.zeros(len(left), np.int64)
        for bit, zeros in self._levels:
            zeros_left, zeros_right = zeros[left], zeros[right]
            high = (limit >> bit) & 1 == 1
            result += np.where(high, zeros_right - zeros_left, 0)
            left = np.where(high, zeros[-1] + left - zeros_left, zeros_left)
            right = np.where(high, zeros[-1] + right - zeros_right, zeros_right)
        return result
