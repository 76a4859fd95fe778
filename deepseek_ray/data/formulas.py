"""What each feature is: one formula over exact integers, shared by the batch and the stream engine.

An engine supplies a :class:`Frame` — counts, sums and times as int64 — and the formulas turn it into
float64. Only +, -, *, / and sqrt are used after the integers, all of which IEEE 754 rounds correctly, so
both engines agree to the last bit whatever the array length.

    N  rows (batch) or windows (stream)     R  request features
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_ray.data.events import CHANNELS, SECOND_US
from deepseek_ray.data.windows import MERCHANT_BUCKETS, REQUEST_BLOCKS

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

CAPPED_CENTS = 1 << 27
"""Amounts are capped here inside variances: 512 events of a million currency units still fit int64."""
STD_FLOOR_CENTS = 100.0
LARGE_FACTOR = 3

_HOUR_US = 3_600 * SECOND_US


class Frame(ABC):
    """The events of one key in a window that ends with the current event; every array is int64 of N."""

    now: Any
    amount: Any

    @abstractmethod
    def count(self) -> IntArray:
        """Events, the current one included."""

    @abstractmethod
    def total(self) -> IntArray:
        """Sum of amounts in cents."""

    @abstractmethod
    def moments(self) -> tuple[IntArray, IntArray]:
        """Sum and sum of squares of the capped amounts."""

    @abstractmethod
    def largest(self) -> IntArray:
        """Largest amount in cents."""

    @abstractmethod
    def smaller(self) -> IntArray:
        """Earlier events with a smaller amount than the current one."""

    @abstractmethod
    def large(self) -> IntArray:
        """Events that were large when they came (see :func:`is_large`)."""

    @abstractmethod
    def distinct(self) -> IntArray:
        """Different terminals (of a card) or cards (of a terminal or device)."""

    @abstractmethod
    def first_order(self) -> IntArray:
        """Order of the first event."""

    @abstractmethod
    def previous_order(self) -> IntArray:
        """Order of the event before the current one; anything when the count is 1."""

    @abstractmethod
    def matured(self) -> tuple[IntArray, IntArray]:
        """Count and amount of the events in the window shifted back by the label delay."""

    @abstractmethod
    def frauds(self) -> tuple[IntArray, IntArray]:
        """Count and amount of the frauds whose label fell into the window."""

    @abstractmethod
    def fraud_times(self) -> tuple[IntArray, IntArray]:
        """Positions of the first and the last fraud label; anything when there is none."""

    @abstractmethod
    def clean(self) -> IntArray:
        """Matured events after the last fraud label; anything when there is none."""


def _mean(f: Frame) -> FloatArray:
    return f.total() / np.maximum(f.count(), 1)


def _std(f: Frame) -> FloatArray:
    return _spread(np.maximum(f.count(), 1), *f.moments())[1]


def _spread(count: IntArray, total: IntArray, squares: IntArray) -> tuple[FloatArray, FloatArray]:
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean * mean, 0.0))


def _ratio(f: Frame) -> FloatArray:
    earlier, rest = f.count() - 1, f.total() - f.amount
    return np.where((earlier > 0) & (rest > 0), f.amount / (np.maximum(rest, 1) / np.maximum(earlier, 1)), 1.0)


def _zscore(f: Frame) -> FloatArray:
    capped = np.minimum(f.amount, CAPPED_CENTS)
    earlier = f.count() - 1
    total, squares = f.moments()
    mean, std = _spread(np.maximum(earlier, 1), total - capped, squares - capped * capped)
    return np.where(earlier > 0, (capped - mean) / np.maximum(std, STD_FLOOR_CENTS), 0.0)


def _rank(f: Frame) -> FloatArray:
    return f.smaller() / np.maximum(f.count() - 1, 1)


def _seconds(f: Frame, order: IntArray, known: Any) -> FloatArray:
    return np.where(known, (f.now - order) / SECOND_US, -1.0)


def _fraud_share(f: Frame) -> FloatArray:
    return np.minimum(1.0, f.frauds()[0] / np.maximum(f.matured()[0], 1))


def _clean_ratio(f: Frame) -> FloatArray:
    (matured, amount), (frauds, stolen) = f.matured(), f.frauds()
    count, total = matured - frauds, amount - stolen
    return np.where((count > 0) & (total > 0), f.amount / (np.maximum(total, 1) / np.maximum(count, 1)), 1.0)


FORMULAS: dict[str, Callable[[Frame], NDArray[Any]]] = {
    "count": lambda f: f.count(),
    "sum": lambda f: f.total(),
    "mean": _mean,
    "std": _std,
    "max": lambda f: f.largest(),
    "rank": _rank,
    "ratio": _ratio,
    "zscore": _zscore,
    "large_count": lambda f: f.large(),
    "distinct_terminals": lambda f: f.distinct(),
    "distinct_cards": lambda f: f.distinct(),
    "since_last_s": lambda f: _seconds(f, f.previous_order(), f.count() > 1),
    "since_first_s": lambda f: _seconds(f, f.first_order(), f.count() > 1),
    "cold": lambda f: f.count() == 1,
    "delayed_count": lambda f: f.matured()[0],
    "fraud_count": lambda f: f.frauds()[0],
    "fraud_share": _fraud_share,
    "since_last_fraud_s": lambda f: _seconds(f, f.fraud_times()[1], f.frauds()[0] > 0),
    "since_first_fraud_s": lambda f: _seconds(f, f.fraud_times()[0], f.frauds()[0] > 0),
    "clean_since_fraud": lambda f: np.where(f.frauds()[0] > 0, f.clean(), -1),
    "clean_ratio": _clean_ratio,
}
"""Aggregation name -> formula; the result is cast to float64."""

WITHOUT_HISTORY: dict[str, float] = {
    "ratio": 1.0, "clean_ratio": 1.0, "since_last_s": -1.0, "since_first_s": -1.0,
    "since_last_fraud_s": -1.0, "since_first_fraud_s": -1.0, "clean_since_fraud": -1.0,
}  # fmt: skip
"""Value of an aggregation for the device "unknown", which has no history; 0 where not named."""


def is_large(amount: Any, count: Any, total: Any) -> Any:
    """Whether an amount is over three times the mean of the card's earlier events.

    Args:
        amount: current amount in cents, int64.
        count: events of the reference window, the current one included.
        total: their summed amount.
    """
    return amount * (count - 1) > LARGE_FACTOR * (total - amount)


def merchant_bucket(category: str) -> int:
    """Hash bucket of a merchant category; stable between processes and versions."""
    return zlib.crc32(category.encode()) % MERCHANT_BUCKETS


def _time_table() -> FloatArray:
    """[168, 11]: weekend, night, hour_sin, hour_cos, weekday one-hot by hour of a week that starts on Thursday."""
    table = np.zeros((168, 11))
    for hour in range(168):
        weekday, clock = (hour // 24 + 3) % 7, hour % 24  # day 0 of the epoch was a Thursday
        angle = 2 * math.pi * clock / 24
        table[hour, :4] = weekday >= 5, clock <= 6, math.sin(angle), math.cos(angle)
        table[hour, 4 + weekday] = 1.0
    return table


_TIME = _time_table()
_CHANNEL = np.eye(len(CHANNELS))
_BUCKET = np.eye(MERCHANT_BUCKETS)
_REQUEST_ORDER = [
    *("weekend", "night", "hour_sin", "hour_cos"), *REQUEST_BLOCKS["weekday"], *REQUEST_BLOCKS["channel"],
    *REQUEST_BLOCKS["merchant_bucket"], "amount_cents", "round_amount", "country_known", "device_known",
]  # fmt: skip


REQUEST_WIDTH = len(_REQUEST_ORDER)


def request_columns(names: tuple[str, ...]) -> NDArray[np.intp]:
    """Where each request feature stands in the output of :func:`request_values`."""
    return np.array([_REQUEST_ORDER.index(name) for name in names], np.intp)


def request_values(
    order: IntArray, amount: IntArray, channel: IntArray, bucket: IntArray, country_known: Any, device_known: Any
) -> FloatArray:
    """[N, R] features of the request alone, from int64 or bool arrays of N (channel: index in CHANNELS)."""
    tail = np.stack([amount, amount % 100 == 0, country_known, device_known], axis=1).astype(np.float64)
    return np.concatenate([_TIME[order // _HOUR_US % 168], _CHANNEL[channel], _BUCKET[bucket], tail], axis=1)
