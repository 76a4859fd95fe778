"""The batch engine: every feature of every historical transaction, point-in-time correct.

Windows are integer prefix sums and binary searches over rows sorted by key and order (data/history.py), so counts
and sums are exact and cost does not depend on how many events a window holds. The formulas are those of the stream
engine (data/formulas.py).

No feature reads the history of two owners: a card's, a terminal's or a device's column needs the rows of that one
alone. :func:`owner_columns` computes an owner's columns from all its rows and :func:`assemble` puts vectors together,
here over the whole table and in data/ray_engine.py over partitions of it.

    N  rows     F  features     S  sequence length     C  sequence channels
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from deepseek_ray.data.events import SECOND_US, delay_us
from deepseek_ray.data.formulas import (
    FORMULAS,
    WITHOUT_HISTORY,
    FloatArray,
    IntArray,
    merchant_bucket,
    request_columns,
    request_values,
)
from deepseek_ray.data.history import UNKNOWN_DEVICE, Group, History
from deepseek_ray.data.windows import OWNERS, VectorSpec

SEQUENCE_CHANNELS = ("amount_cents", "age_s", "same_terminal", "same_country", "channel", "known_fraud")


@dataclass(frozen=True)
class FeatureTable:
    """Feature vectors of transactions, in the row order they were asked for.

    Attributes:
        order_us: int64 [N], position of each event in time.
        transaction_id: [N] strings.
        card_id: [N] strings.
        values: float64 [N, F].
        sequence: float64 [N, S, C], newest earlier event first; ``age_s`` is -1 where there is none.
        names: the F columns of ``values``.
        service: Feast service of the vector.
        digest: digest of the declaration.
    """

    order_us: IntArray
    transaction_id: NDArray[np.str_]
    card_id: NDArray[np.str_]
    values: FloatArray
    sequence: FloatArray
    names: tuple[str, ...]
    service: str
    digest: str

    def take(self, rows: IntArray) -> FeatureTable:
        """The vectors of some rows, by number, in that order."""
        parts = {
            name: getattr(self, name)[rows] for name in ("order_us", "transaction_id", "card_id", "values", "sequence")
        }
        return replace(self, **parts)


def compute(
    transactions: pl.DataFrame, spec: VectorSpec, *, label_delay_days: float, sequence_len: int
) -> FeatureTable:
    """Compute a vector for every row of a transactions table (columns: events.TRANSACTION_COLUMNS).

    Args:
        transactions: all history that may matter; ``order_us`` strictly increases within a card, terminal and device.
        spec: the vector.
        label_delay_days: a label counts no earlier than this many days after its event.
        sequence_len: S, earlier events of the card a row gets.

    Raises:
        SchemaError: a column is missing.
        FeatureError: ``order_us`` is not strictly increasing.
    """
    delay = delay_us(label_delay_days)
    history = History(transactions, delay, spec.horizon_us("card", delay))
    return assemble(history, spec, sequence_len)


def assemble(
    history: History, spec: VectorSpec, sequence_len: int, known: Mapping[str, FloatArray] | None = None
) -> FeatureTable:
    """Whole vectors of all rows of a history.

    Args:
        history: whole cards, and whole histories of every owner that is not in ``known``.
        spec: the vector.
        sequence_len: S, earlier events of the card a row gets.
        known: owner -> its columns [N, columns of the owner], computed elsewhere by :func:`owner_columns`.
    """
    values = np.empty((len(history.order), len(spec.names)))
    _fill_request(history, values, spec.request)
    for owner in spec.owners:
        if known and owner in known:
            values[:, spec.positions(owner)] = known[owner]
        else:
            for position, column in owner_columns(history, spec, owner):
                values[:, position] = column
    names, frame = spec.names, history.frame
    ids, cards = frame["transaction_id"].to_numpy(), frame["card_id"].to_numpy()
    sequence = _sequence(history, sequence_len, spec.horizon_us("card", history.delay))
    return FeatureTable(history.order, ids, cards, values, sequence, names, spec.service, spec.digest)


def owner_columns(history: History, spec: VectorSpec, owner: str) -> Iterator[tuple[int, FloatArray]]:
    """Each column that comes from an owner's history: its position in the vector, and its values [N].

    Args:
        history: all rows of each of the owner's values in it.
        spec: the vector.
        owner: ``card``, ``terminal`` or ``device``.

    Raises:
        FeatureError: ``order_us`` is not strictly increasing.
    """
    for key, columns in spec.keys.items():
        if OWNERS[columns[0]] == owner:
            group = Group(history, columns)
            for position, feature in enumerate(spec.features, len(spec.request)):
                if feature.key == key:
                    column = np.full(len(history.order), WITHOUT_HISTORY.get(feature.aggregation, 0.0))
                    column[group.rows] = FORMULAS[feature.aggregation](group.window(feature.window_us))
                    yield position, column


def _fill_request(history: History, values: FloatArray, names: tuple[str, ...]) -> None:
    """Write the request features into the first columns of ``values``."""
    if not len(values):
        return
    categories = history.frame["merchant_category"].unique().to_list()
    bucket = history.frame["merchant_category"].replace_strict(
        categories, [merchant_bucket(c) for c in categories], return_dtype=pl.Int64
    )
    country_known = (history.frame["country"] != "unknown").to_numpy()
    device_known = (history.frame["device_id"] != UNKNOWN_DEVICE).to_numpy()
    request = request_values(
        history.order, history.amount, history.channel(), bucket.to_numpy(), country_known, device_known
    )
    values[:, : len(names)] = request[:, request_columns(names)]


def _sequence(history: History, length: int, horizon: int) -> FloatArray:
    """[N, S, C] earlier events of the card, no older than the horizon."""
    result = np.zeros((len(history.order), length, len(SEQUENCE_CHANNELS)))
    result[:, :, 1] = -1.0
    rows, start = history.cards.rows, history.cards.bounds(horizon)
    terminal, country, channel = history.codes("terminal_id"), history.codes("country"), history.channel()
    for lag in range(1, length + 1):
        now = np.flatnonzero(np.arange(len(rows)) - lag >= start)
        this, past = rows[now], rows[now - lag]
        age = (history.order[this] - history.order[past]) / SECOND_US
        same = terminal[this] == terminal[past], country[this] == country[past]
        known = (history.label[past] > 0) & (history.label[past] <= history.order[this])
        result[this, lag - 1] = np.stack([history.amount[past], age, *same, channel[past], known], axis=1)
    return result
