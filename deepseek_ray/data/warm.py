"""What a transactions table leaves behind: the states of all its cards, terminals and devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import polars as pl

from deepseek_ray.data import state as st
from deepseek_ray.data.formulas import IntArray
from deepseek_ray.data.history import Group, History
from deepseek_ray.data.state import State, hashed
from deepseek_ray.data.windows import OWNERS

_CARD_EXTRA = ("device_id", "country", "merchant_category")


def states_of(transactions: pl.DataFrame, delay: int, horizons: Mapping[str, int]) -> Iterator[tuple[str, str, State]]:
    """Yield (owner, identifier, state) after the last row of the table.

    Args:
        transactions: columns of events.TRANSACTION_COLUMNS.
        delay: label delay in microseconds.
        horizons: how far back each owner's events are kept, in microseconds.
    """
    history = History(transactions, delay, horizons["card"])
    event_us = transactions["event_time"].dt.epoch("us").to_numpy()
    for column, owner in OWNERS.items():
        group = Group(history, (column,))
        columns = _columns(history, owner)
        identifiers = transactions[column].gather(group.rows).to_list()
        edges = np.flatnonzero(np.diff(group.code, prepend=-1, append=-1))
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            yield owner, identifiers[first], _state(columns, event_us, group.rows[first:last], horizons[owner])


def _columns(history: History, owner: str) -> IntArray:
    """[columns + 1, N] rows of State.events for every row of the table; the last one is the label position."""
    other = "terminal_id" if owner == "card" else "card_id"
    rows = [history.order, history.amount, _hashes(history, other)]
    if owner == "card":
        extra = [_hashes(history, column) for column in _CARD_EXTRA]
        rows += [*extra, history.channel(), history.large.astype(np.int64)]
    return np.stack([*rows, history.label])


def _hashes(history: History, column: str) -> IntArray:
    codes = history.codes(column)
    table = np.zeros(int(codes.max(initial=0)) + 1, np.int64)
    first = np.unique(codes, return_index=True)
    table[first[0]] = [hashed(name) for name in history.frame[column].gather(first[1]).to_list()]
    return table[codes]


def _state(columns: IntArray, event_us: IntArray, rows: IntArray, horizon: int) -> State:
    last_order = int(columns[st.ORDER, rows[-1]])
    label = columns[-1, rows]
    frauds = rows[(label > 0) & (label > last_order - horizon)]
    frauds = frauds[np.argsort(columns[-1, frauds], kind="stable")]
    kept = rows[columns[st.ORDER, rows] > last_order - horizon]
    events = columns[: st.CARD_COLUMNS if len(columns) == st.CARD_COLUMNS else st.OTHER_COLUMNS, kept]
    labels = columns[[-1, st.AMOUNT]][:, frauds]
    last_event_us = int(event_us[rows].max())
    return State(events.T.astype("<i8").tobytes(), len(events), labels, last_order, last_event_us, horizon)
