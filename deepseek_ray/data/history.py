"""A transactions table as integers: events and fraud labels by key, and the exact frames of every window.

Rows of one key are sorted by key value and order. Times are replaced by their rank in the whole table, so that
(key value, time) fits one int64 and a window's first event is one binary search.

    N  rows of the table     K  events of one key (sorted)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from deepseek_ray.data.events import CHANNELS
from deepseek_ray.data.formulas import CAPPED_CENTS, Frame, IntArray, is_large
from deepseek_ray.data.ranges import CountLess, RangeMax, prefix
from deepseek_ray.data.windows import LARGE_WINDOW_US
from deepseek_ray.errors import FeatureError, SchemaError

UNKNOWN_DEVICE = "unknown"
NEEDED = (
    "transaction_id", "order_us", "card_id", "terminal_id", "amount_cents", "device_id", "channel", "country",
    "merchant_category", "is_fraud", "label_us",
)  # fmt: skip


def label_positions(transactions: pl.DataFrame, delay: int, patience: int) -> IntArray:
    """[N] where each fraud label counts: max(order + delay, when it became known); 0 for all other rows.

    Never at the event itself: with no delay an event would see its own label.

    Args:
        transactions: columns ``order_us``, ``is_fraud``, ``label_us``.
        delay: label delay in microseconds.
        patience: a label that comes later than this after its event is not counted, in microseconds.
    """
    order = transactions["order_us"].to_numpy()
    known = transactions["label_us"].cast(pl.Int64).fill_null(0).to_numpy()
    position = np.maximum(order + max(delay, 1), known)
    fraud = transactions["is_fraud"].fill_null(0).to_numpy() == 1
    return np.where(fraud & (position - order <= patience), position, 0)


class History:
    """The columns of a transactions table as integers, in the given row order."""

    def __init__(self, frame: pl.DataFrame, delay: int, patience: int) -> None:
        missing = [column for column in NEEDED if column not in frame.columns]
        if missing:
            raise SchemaError(
                f"The transactions table has no column {missing[0]!r}.", fix="build it with deepseek_ray.data.table"
            )
        self.frame, self.delay = frame, delay
        self.order: IntArray = frame["order_us"].cast(pl.Int64).to_numpy()
        self.amount: IntArray = frame["amount_cents"].cast(pl.Int64).to_numpy()
        self.label = label_positions(frame, delay, patience)
        self._sorted_order = np.sort(self.order)
        self._codes: dict[str, IntArray] = {}
        self._ranks: dict[int, IntArray] = {}

    def codes(self, column: str) -> IntArray:
        """[N] dense integers, equal where the column is equal."""
        if column not in self._codes:
            self._codes[column] = self.frame[column].cast(pl.String).rank("dense").cast(pl.Int64).to_numpy()
        return self._codes[column]

    def rank(self, times: IntArray) -> IntArray:
        """Events of the whole table at or before each time: times as small integers that keep their order."""
        return np.searchsorted(self._sorted_order, times, "right")

    def rank_before(self, shift: int) -> IntArray:
        """[N] rank of each event's own time minus a shift."""
        if shift not in self._ranks:
            self._ranks[shift] = self.rank(self.order - shift)
        return self._ranks[shift]

    @cached_property
    def cards(self) -> Group:
        return Group(self, ("card_id",))

    @cached_property
    def large(self) -> NDArray[np.bool_]:
        window = self.cards.window(LARGE_WINDOW_US)
        flags = np.zeros(len(self.order), np.bool_)
        flags[self.cards.rows] = is_large(window.amount, window.count(), window.total())
        return flags

    def channel(self) -> IntArray:
        mapped = self.frame["channel"].replace_strict(list(CHANNELS), list(range(len(CHANNELS))), return_dtype=pl.Int64)
        return mapped.to_numpy()


class Group:
    """All events of one key, sorted by key value and order."""

    def __init__(self, table: History, columns: Sequence[str]) -> None:
        self.table = table
        self.value_column = "terminal_id" if columns[0] == "card_id" else "card_id"
        code = _combined(table, columns)
        rows = np.flatnonzero(_has_history(table, columns))
        self.rows = rows[np.lexsort((table.order[rows], code[rows]))]
        self.code, self.order, self.amount = code[self.rows], table.order[self.rows], table.amount[self.rows]
        if np.any((np.diff(self.order) <= 0) & (np.diff(self.code) == 0)):
            problem = f"order_us does not strictly increase within {columns[0]!r}."
            raise FeatureError(problem, fix="assign it with deepseek_ray.data.table")
        self._scale = len(table.order) + 1
        self._place = self.code * self._scale + table.rank_before(0)[self.rows]
        self._bounds: dict[int, IntArray] = {}
        self._windows: dict[int, Window] = {}

    def window(self, window_us: int) -> Window:
        """The frame of one window; frames share their sums."""
        if window_us not in self._windows:
            self._windows[window_us] = Window(self, window_us)
        return self._windows[window_us]

    def bounds(self, shift: int) -> IntArray:
        """[K] number of sorted events up to (and including) each event's time minus the shift, within its key."""
        if shift not in self._bounds:
            self._bounds[shift] = self.find(self.table.rank_before(shift)[self.rows])
        return self._bounds[shift]

    def find(self, rank: IntArray) -> IntArray:
        """[K] first sorted position of the same key whose time rank is greater."""
        return np.searchsorted(self._place, self.code * self._scale + rank, "right")

    @cached_property
    def totals(self) -> IntArray:
        return prefix(self.amount)

    @cached_property
    def capped_sums(self) -> tuple[IntArray, IntArray]:
        capped = np.minimum(self.amount, CAPPED_CENTS)
        return prefix(capped), prefix(capped * capped)

    @cached_property
    def large_sums(self) -> IntArray:
        return prefix(self.table.large[self.rows].astype(np.int64))

    @cached_property
    def maxima(self) -> RangeMax:
        sizes = np.diff(np.flatnonzero(np.diff(self.code, prepend=-1, append=-1)))
        return RangeMax(self.amount, int(sizes.max(initial=1)))

    @cached_property
    def amount_ranks(self) -> tuple[IntArray, CountLess]:
        ranks = np.unique(self.amount, return_inverse=True)[1].astype(np.int64)
        return ranks, CountLess(ranks, int(ranks.max(initial=0)))

    @cached_property
    def repeats(self) -> CountLess:
        """Counts events whose previous event with the same value lies before a position: the new values of a range."""
        values = self.table.codes(self.value_column)[self.rows]
        places = np.lexsort((np.arange(len(values)), values, self.code))
        same = (np.diff(values[places]) == 0) & (np.diff(self.code[places]) == 0)
        previous = np.zeros(len(values), np.int64)  # position + 1, 0 for none
        previous[places[1:]] = np.where(same, places[:-1] + 1, 0)
        return CountLess(previous, len(values))

    @cached_property
    def labels(self) -> Labels:
        return Labels(self)


class Labels:
    """Fraud labels of one key, sorted by key value and label position."""

    def __init__(self, group: Group) -> None:
        label = group.table.label[group.rows]
        fraud = np.flatnonzero(label)
        fraud = fraud[np.lexsort((label[fraud], group.code[fraud]))]
        self.position, self.totals = label[fraud], prefix(group.amount[fraud])
        self._group, self._sorted = group, np.sort(self.position)
        self._scale = len(fraud) + 1
        self._place = group.code[fraud] * self._scale + np.searchsorted(self._sorted, self.position, "right")

    def bounds(self, shift: int) -> IntArray:
        """[K] number of sorted labels up to each event's time minus the shift, within its key."""
        rank = np.searchsorted(self._sorted, self._group.order - shift, "right")
        return np.searchsorted(self._place, self._group.code * self._scale + rank, "right")


class Window(Frame):
    """One key and window over all its events; arrays are [K]."""

    def __init__(self, group: Group, window_us: int) -> None:
        self._group, self._window_us, self._delay = group, window_us, group.table.delay
        self.now, self.amount = group.order, group.amount
        self._here = np.arange(len(group.order))

    @cached_property
    def _start(self) -> IntArray:
        return self._group.bounds(self._window_us)

    def _sum(self, sums: IntArray) -> IntArray:
        return sums[1:] - sums[self._start]

    def count(self) -> IntArray:
        return self._here + 1 - self._start

    def total(self) -> IntArray:
        return self._sum(self._group.totals)

    def moments(self) -> tuple[IntArray, IntArray]:
        first, second = self._group.capped_sums
        return self._sum(first), self._sum(second)

    def largest(self) -> IntArray:
        return self._group.maxima(self._start, self._here + 1)

    def smaller(self) -> IntArray:
        ranks, counter = self._group.amount_ranks
        return counter(self._start, self._here, ranks)

    def large(self) -> IntArray:
        return self._sum(self._group.large_sums)

    def distinct(self) -> IntArray:
        return self._group.repeats(self._start, self._here + 1, self._start + 1)

    def first_order(self) -> IntArray:
        return self._group.order[self._start]

    def previous_order(self) -> IntArray:
        return self._group.order[self._here - 1]

    @cached_property
    def _matured(self) -> tuple[IntArray, IntArray]:
        first, last = self._group.bounds(self._delay + self._window_us), self._group.bounds(self._delay)
        return last - first, self._group.totals[last] - self._group.totals[first]

    def matured(self) -> tuple[IntArray, IntArray]:
        return self._matured

    @cached_property
    def _label_range(self) -> tuple[IntArray, IntArray]:
        labels = self._group.labels
        return labels.bounds(self._window_us), labels.bounds(0)

    def frauds(self) -> tuple[IntArray, IntArray]:
        (first, last), totals = self._label_range, self._group.labels.totals
        return last - first, totals[last] - totals[first]

    def fraud_times(self) -> tuple[IntArray, IntArray]:
        first, last = self._label_range
        padded = np.append(self._group.labels.position, 0)
        return padded[first], padded[last - 1]

    def clean(self) -> IntArray:
        after = self._group.find(self._group.table.rank(self.fraud_times()[1] - self._delay))
        return self._group.bounds(self._delay) - after


def _combined(table: History, columns: Sequence[str]) -> IntArray:
    code = table.codes(columns[0])
    for column in columns[1:]:
        other = table.codes(column)
        code = np.unique(code * (int(other.max(initial=0)) + 1) + other, return_inverse=True)[1].astype(np.int64)
    return code


def _has_history(table: History, columns: Sequence[str]) -> NDArray[np.bool_]:
    if columns[0] != "device_id":
        return np.ones(len(table.order), np.bool_)
    return (table.frame["device_id"] != UNKNOWN_DEVICE).to_numpy()
