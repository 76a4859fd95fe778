"""The frames of the stream engine: one key of many current events, all its windows at once.

Each event brings the remembered events of its key, itself the last one. They stand end to end in one array, and one
search serves all events and windows: a position is the event's place times SPAN plus the time before its "now".

B  current events     W  windows     T  remembered events of all B, oldest first within each     L  their fraud labels
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from deepseek_ray.data.formulas import CAPPED_CENTS, Frame, IntArray
from deepseek_ray.data.ranges import prefix

MAX_SEGMENTS = 8_192
"""B, so that the positions fit int64."""
_SPAN = 1 << 49
_FAR = 1 << 48
"""Microseconds (9 years): what lies further away is in no window, or not yet known."""


class Segments:
    """Arrays of B events end to end.

    Args:
        parts: [columns, length] each; the first row is a time in microseconds and grows.
        now: [B] the time that each part is seen from.
    """

    def __init__(self, parts: list[IntArray], now: IntArray) -> None:
        lengths = np.array([part.shape[1] for part in parts])
        self._make(np.concatenate(parts, axis=1), lengths, now)

    def _make(self, rows: IntArray, lengths: IntArray, now: IntArray) -> None:
        self.rows, self.now = rows, now
        self.end = lengths.cumsum()
        self.owner = np.arange(len(lengths)).repeat(lengths)
        self._base = np.arange(len(lengths)) * _SPAN
        self._place = self._base[self.owner] + (rows[0] - now[self.owner]).clip(-_FAR, _FAR)

    @classmethod
    def of_rows(cls, parts: Sequence[bytes], columns: int, now: IntArray) -> Segments:
        """Of events as a state keeps them: little-endian int64 [length, columns] each."""
        lengths = np.array([len(part) for part in parts], np.int64) // (8 * columns)
        rows = np.frombuffer(b"".join(parts), "<i8").reshape(-1, columns)
        return cls._of(np.ascontiguousarray(rows.T), lengths, now)

    def within(self, columns: Sequence[int]) -> Segments:
        """For each column in turn, the rows that agree with their segment's last one in it; no segment may be empty."""
        last, count = self.end - 1, len(self.end)
        same = [self.rows[column] == self.rows[column][last][self.owner] for column in columns]
        lengths = [np.bincount(self.owner[chosen], minlength=count) for chosen in same]
        rows = [self.rows[:, chosen] for chosen in same]
        return self._of(np.concatenate(rows, axis=1), np.concatenate(lengths), np.tile(self.now, len(columns)))

    def times(self, count: int) -> Segments:
        """All segments again and again."""
        lengths = np.diff(self.end, prepend=0)
        return self._of(np.tile(self.rows, count), np.tile(lengths, count), np.tile(self.now, count))

    @classmethod
    def _of(cls, rows: IntArray, lengths: IntArray, now: IntArray) -> Segments:
        made = cls.__new__(cls)
        made._make(rows, lengths, now)
        return made

    def until(self, back_us: IntArray) -> IntArray:
        """[B, n] how many rows, from the first segment's start on, are no later than now - back_us; [n] or [B, n]."""
        return self._place.searchsorted(self._base[:, None] - np.minimum(back_us, _FAR), "right")


class StreamFrame(Frame):
    """Every array is int64 [B, W] or [B, 1].

    Args:
        windows: [W] window lengths in microseconds.
        delay: label delay in microseconds.
        events: time, amount and a hash for distinct counts.
        labels: time and amount of fraud labels.
        large: row of the events with flags of large ones, None for a key that has none.
    """

    def __init__(
        self, windows: IntArray, delay: int, events: Segments, labels: Segments, large: int | None = None
    ) -> None:
        self._windows, self._delay, self._events, self._labels = windows, delay, events, labels
        self._order, self._amount, self._other = events.rows[:3]
        self._large = None if large is None else events.rows[large]
        self._end = events.end[:, None]
        self._start = events.until(windows)
        self._count: IntArray = self._end - self._start
        self.now, self.amount = self._order[self._end - 1], self._amount[self._end - 1]

    def count(self) -> IntArray:
        return self._count

    def _sum(self, values: IntArray) -> IntArray:
        sums = prefix(values)  # may wrap over many events; the difference is exact all the same
        return sums[self._end] - sums[self._start]

    @cached_property
    def _totals(self) -> IntArray:
        return prefix(self._amount)

    @cached_property
    def _total(self) -> IntArray:
        return self._totals[self._end] - self._totals[self._start]

    def total(self) -> IntArray:
        return self._total

    @cached_property
    def _moments(self) -> tuple[IntArray, IntArray]:
        capped = np.minimum(self._amount, CAPPED_CENTS)
        return self._sum(capped), self._sum(capped * capped)

    def moments(self) -> tuple[IntArray, IntArray]:
        return self._moments

    def largest(self) -> IntArray:
        ranges = np.stack(np.broadcast_arrays(self._start, self._end), axis=2)
        values = np.append(self._amount, 0)  # a range may end where the array does
        return np.maximum.reduceat(values, ranges.ravel())[::2].reshape(self._start.shape)

    def smaller(self) -> IntArray:
        return self._sum((self._amount < self.amount[:, 0][self._events.owner]).astype(np.int64))

    def large(self) -> IntArray:
        assert self._large is not None
        return self._sum(self._large)

    def distinct(self) -> IntArray:
        owner, other = self._events.owner, self._other
        order = np.lexsort((other, owner))  # stable: the newest occurrence of a value stands last
        newest = np.ones(len(order), np.int64)
        sorted_owner, sorted_other = owner[order], other[order]
        newest[:-1] = (sorted_owner[1:] != sorted_owner[:-1]) | (sorted_other[1:] != sorted_other[:-1])
        flags = np.empty_like(newest)
        flags[order] = newest
        return self._sum(flags)

    def first_order(self) -> IntArray:
        return self._order[self._start]

    def previous_order(self) -> IntArray:
        return self._order[np.maximum(self._end - 2, 0)]

    @cached_property
    def _matured_until(self) -> IntArray:
        return self._events.until(np.array([self._delay]))

    @cached_property
    def _matured(self) -> tuple[IntArray, IntArray]:
        first, last = self._events.until(self._delay + self._windows), self._matured_until
        return last - first, self._totals[last] - self._totals[first]

    def matured(self) -> tuple[IntArray, IntArray]:
        return self._matured

    @cached_property
    def _label_range(self) -> tuple[IntArray, IntArray]:
        return self._labels.until(self._windows), self._labels.until(np.zeros(1, np.int64))

    @cached_property
    def _frauds(self) -> tuple[IntArray, IntArray]:
        first, last = self._label_range
        sums = prefix(self._labels.rows[1])
        return last - first, sums[last] - sums[first]

    def frauds(self) -> tuple[IntArray, IntArray]:
        return self._frauds

    def fraud_times(self) -> tuple[IntArray, IntArray]:
        positions, (first, last) = self._labels.rows[0], self._label_range
        if not len(positions):
            return first, last
        return positions.take(first, mode="clip"), positions.take(last - 1, mode="clip")

    def clean(self) -> IntArray:
        back = (self.now - self.fraud_times()[1]).clip(0, _FAR) + self._delay
        return self._matured_until - self._events.until(back)
