"""Vectors of many events at once, from what is remembered about their cards, terminals and devices.

B  events     F  features     S  sequence length     C  sequence channels     W  windows of a key
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_ray.data import state as st
from deepseek_ray.data.batch_engine import SEQUENCE_CHANNELS
from deepseek_ray.data.events import CHANNELS, Transaction
from deepseek_ray.data.formulas import (
    FORMULAS,
    REQUEST_WIDTH,
    WITHOUT_HISTORY,
    FloatArray,
    IntArray,
    merchant_bucket,
    request_columns,
    request_values,
)
from deepseek_ray.data.history import UNKNOWN_DEVICE
from deepseek_ray.data.state import State
from deepseek_ray.data.stream_frame import MAX_EVENTS, Segments, StreamFrame
from deepseek_ray.data.windows import OWNERS, SECOND_US, VectorSpec

CHANNEL_CODE = {name: code for code, name in enumerate(CHANNELS)}
_CARD_ROW = {
    "terminal_id": st.OTHER,
    "device_id": st.DEVICE,
    "country": st.COUNTRY,
    "merchant_category": st.CATEGORY,
    "channel": st.CHANNEL,
}


@dataclass(frozen=True)
class Moment:
    """One event and the states that remember it as their last one."""

    tx: Transaction
    states: dict[str, State]
    cold: list[str]

    @property
    def order_us(self) -> int:
        """Position of the event in time."""
        return self.states["card"].last_order


@dataclass(frozen=True)
class _Key:
    """One key of the vector: where its events are and what to compute on them."""

    owner: str
    column: int | None  # row of the card's events that must equal the current event's
    windows: IntArray
    aggregations: tuple[str, ...]
    without_history: FloatArray


class Vectors:
    """Computes the values and the sequence of each event.

    Args:
        spec: the vector.
        delay: label delay in microseconds.
        sequence_len: S.
    """

    def __init__(self, spec: VectorSpec, delay: int, sequence_len: int) -> None:
        self._delay, self._length = delay, sequence_len
        self._keys = [_plan(spec, key) for key in spec.keys]
        self._take = self._positions(spec)

    def __call__(self, moments: Sequence[Moment]) -> tuple[FloatArray, FloatArray]:
        """Values float64 [B, F] and sequences float64 [B, S, C], newest earlier event first."""
        if len(moments) > MAX_EVENTS:
            parts = [self(moments[first : first + MAX_EVENTS]) for first in range(0, len(moments), MAX_EVENTS)]
            return np.concatenate([values for values, _ in parts]), np.concatenate([rows for _, rows in parts])
        now = np.array([moment.order_us for moment in moments])
        owned = {owner: self._owned(owner, moments, now) for owner in dict.fromkeys(key.owner for key in self._keys)}
        card = owned["card"].events if "card" in owned else _segments("card", moments, now)
        columns = [_requests(moments, now), *(self._columns(key, owned[key.owner], len(now)) for key in self._keys)]
        return np.concatenate(columns, axis=1)[:, self._take], self._sequences(card)

    def _owned(self, owner: str, moments: Sequence[Moment], now: IntArray) -> _Owned:
        rows = np.array([row for row, moment in enumerate(moments) if owner in moment.states], np.int64)
        chosen = [moments[row] for row in rows]
        events = _segments(owner, chosen, now[rows])
        return _Owned(rows, events, Segments([m.states[owner].labels for m in chosen] or [_NONE], now[rows]))

    def _columns(self, key: _Key, owned: _Owned, num_events: int) -> FloatArray:
        result = np.empty((num_events, len(key.without_history)))
        if len(owned.rows) < num_events:
            result[:] = key.without_history
        if len(owned.rows):
            events = owned.events if key.column is None else owned.events.where(key.column)
            large = st.LARGE if key.owner == "card" else None
            frame = StreamFrame(key.windows, self._delay, events, owned.labels, large)
            result[owned.rows] = np.concatenate([FORMULAS[name](frame) for name in key.aggregations], axis=1)
        return result

    def _sequences(self, card: Segments) -> FloatArray:
        result = np.zeros((len(card.end), self._length, len(SEQUENCE_CHANNELS)))
        result[:, :, 1] = -1.0
        last = card.end - 1
        first = np.append(0, card.end[:-1])
        event, back = np.nonzero(np.arange(1, self._length + 1) <= (last - first)[:, None])
        now, past = card.rows[:, last[event]], card.rows[:, last[event] - 1 - back]
        label = past[st.LABEL]
        channels = (
            past[st.AMOUNT],
            (now[st.ORDER] - past[st.ORDER]) / SECOND_US,
            past[st.OTHER] == now[st.OTHER],
            past[st.COUNTRY] == now[st.COUNTRY],
            past[st.CHANNEL],
            (label > 0) & (label <= now[st.ORDER]),
        )
        for channel, values in enumerate(channels):
            result[event, back, channel] = values
        return result

    def _positions(self, spec: VectorSpec) -> IntArray:
        """Where each feature of the vector stands in the concatenated parts."""
        offset, place = REQUEST_WIDTH, {}
        for name, key in zip(spec.keys, self._keys, strict=True):
            for aggregation in key.aggregations:
                for window in key.windows.tolist():
                    place[name, aggregation, window] = offset
                    offset += 1
        windowed = [place[f.key, f.aggregation, f.window_us] for f in spec.features]
        return np.array([*request_columns(spec.request), *windowed], np.int64)


@dataclass(frozen=True)
class _Owned:
    """The events that have an owner (a device may be unknown), with what the owner remembers."""

    rows: IntArray
    events: Segments
    labels: Segments


_NONE = np.empty((2, 0), np.int64)


def _segments(owner: str, moments: Sequence[Moment], now: IntArray) -> Segments:
    columns = st.CARD_COLUMNS if owner == "card" else st.OTHER_COLUMNS
    return Segments([m.states[owner].events for m in moments] or [np.empty((columns, 0), np.int64)], now)


def _plan(spec: VectorSpec, name: str) -> _Key:
    columns = spec.keys[name]
    windows = np.array(spec.windows_us[name], np.int64)
    aggregations = tuple(dict.fromkeys(f.aggregation for f in spec.features if f.key == name))
    missing = np.repeat([WITHOUT_HISTORY.get(aggregation, 0.0) for aggregation in aggregations], len(windows))
    return _Key(OWNERS[columns[0]], _CARD_ROW[columns[1]] if len(columns) > 1 else None, windows, aggregations, missing)


def _requests(moments: Sequence[Moment], now: IntArray) -> FloatArray:
    txs = [moment.tx for moment in moments]
    amount, channel = np.array([tx.amount_cents for tx in txs]), np.array([CHANNEL_CODE[tx.channel] for tx in txs])
    bucket = np.array([merchant_bucket(tx.merchant_category) for tx in txs])
    known = [tx.country != "unknown" for tx in txs], [tx.device_id != UNKNOWN_DEVICE for tx in txs]
    return request_values(now, amount, channel, bucket, *known)
