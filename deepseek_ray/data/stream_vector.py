"""Vectors of many events at once, from what is remembered about their cards, terminals and devices.

B  events     F  features     S  sequence length     C  sequence channels     W  windows of a key
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from deepseek_ray.data import state as st
from deepseek_ray.data.batch_engine import SEQUENCE_CHANNELS
from deepseek_ray.data.events import CHANNELS, SECOND_US, Transaction
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
from deepseek_ray.data.stream_frame import MAX_SEGMENTS, Segments, StreamFrame
from deepseek_ray.data.windows import OWNERS, VectorSpec

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
class _Group:
    """Keys of one owner that are computed together: where their events are and what to compute on them.

    Attributes:
        names: of the keys.
        columns: for each key the row of the card's events that must equal the current event's, or none for all events.
        windows: of any of the keys.
        aggregations: of any of the keys.
        without_history: values of one key when there is no owner.
    """

    owner: str
    names: tuple[str, ...]
    columns: tuple[int, ...]
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
        self._groups = _groups(spec)
        self._most = MAX_SEGMENTS // max(len(group.names) for group in self._groups)
        self._take = self._positions(spec)

    def __call__(self, moments: Sequence[Moment]) -> tuple[FloatArray, FloatArray]:
        """Values float64 [B, F] and sequences float64 [B, S, C], newest earlier event first."""
        if len(moments) > self._most:
            some = [self(moments[first : first + self._most]) for first in range(0, len(moments), self._most)]
            return np.concatenate([values for values, _ in some]), np.concatenate([rows for _, rows in some])
        now = np.array([moment.order_us for moment in moments])
        owned = {
            owner: self._owned(owner, moments, now) for owner in dict.fromkeys(group.owner for group in self._groups)
        }
        card = owned["card"].events if "card" in owned else _segments("card", moments, now)
        parts = [self._columns(group, owned[group.owner], len(now)) for group in self._groups]
        columns = [_requests(moments, now), *parts]
        return np.concatenate(columns, axis=1)[:, self._take], self._sequences(card)

    def _owned(self, owner: str, moments: Sequence[Moment], now: IntArray) -> _Owned:
        rows = np.array([row for row, moment in enumerate(moments) if owner in moment.states], np.int64)
        chosen = [moments[row] for row in rows]
        events = _segments(owner, chosen, now[rows])
        return _Owned(rows, events, Segments([m.states[owner].labels for m in chosen] or [_NONE], now[rows]))

    def _columns(self, group: _Group, owned: _Owned, num_events: int) -> FloatArray:
        """[B, keys * aggregations * W], in this order."""
        if not len(owned.rows):
            return np.tile(group.without_history, (num_events, len(group.names)))
        events, labels = owned.events, owned.labels
        if group.columns:
            events, labels = events.within(group.columns), labels.times(len(group.columns))
        large = st.LARGE if group.owner == "card" else None
        frame = StreamFrame(group.windows, self._delay, events, labels, large)
        values = np.concatenate([FORMULAS[name](frame) for name in group.aggregations], axis=1)
        values = values.reshape(len(group.names), len(owned.rows), -1).swapaxes(0, 1).reshape(len(owned.rows), -1)
        if len(owned.rows) == num_events:
            return values
        result = np.tile(group.without_history, (num_events, len(group.names)))
        result[owned.rows] = values
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
        for group in self._groups:
            for part in product(group.names, group.aggregations, group.windows.tolist()):
                place[part] = offset
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
    return Segments.of_rows([moment.states[owner].rows for moment in moments], columns, now)


def _groups(spec: VectorSpec) -> list[_Group]:
    """Keys within a card's events are few events each: together they cost what one of them costs."""
    within = [name for name, columns in spec.keys.items() if len(columns) > 1]
    names = [(name,) for name in spec.keys if name not in within]
    return [_group(spec, group) for group in [*names, tuple(within)] if group]


def _group(spec: VectorSpec, names: tuple[str, ...]) -> _Group:
    owner, *_ = (OWNERS[spec.keys[name][0]] for name in names)
    columns = tuple(_CARD_ROW[spec.keys[name][1]] for name in names if len(spec.keys[name]) > 1)
    windows = np.array(sorted({window for name in names for window in spec.windows_us[name]}), np.int64)
    aggregations = tuple(dict.fromkeys(f.aggregation for f in spec.features if f.key in names))
    missing = np.repeat([WITHOUT_HISTORY.get(aggregation, 0.0) for aggregation in aggregations], len(windows))
    return _Group(owner, names, columns, windows, aggregations, missing)


def _requests(moments: Sequence[Moment], now: IntArray) -> FloatArray:
    txs = [moment.tx for moment in moments]
    amount, channel = np.array([tx.amount_cents for tx in txs]), np.array([CHANNEL_CODE[tx.channel] for tx in txs])
    bucket = np.array([merchant_bucket(tx.merchant_category) for tx in txs])
    known = [tx.country != "unknown" for tx in txs], [tx.device_id != UNKNOWN_DEVICE for tx in txs]
    return request_values(now, amount, channel, bucket, *known)
