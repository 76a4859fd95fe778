"""Which days of a run train, judge and replay, and the rows of each with their features.

From the end of the data backwards: replay days, held-out days, then a gap of the label delay, then the training days.
The gap keeps the rule of the live service: on the first held-out day no younger label is known.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
from numpy.typing import NDArray

from deepseek_ray.config import DataConfig
from deepseek_ray.data.batch_engine import FeatureTable
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.errors import DataError


@dataclass(frozen=True)
class Period:
    """Whole UTC days, ``first`` to ``last``, both included; numbers are days since 1970-01-01."""

    first: int
    last: int

    def mask(self, order_us: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Rows of the period."""
        day = order_us // DAY_US
        return (day >= self.first) & (day <= self.last)

    def filter(self, transactions: pl.DataFrame) -> pl.DataFrame:
        """Transactions of the period."""
        return transactions.filter(pl.Series(self.mask(transactions["order_us"].to_numpy())))

    @property
    def start(self) -> date:
        """First day."""
        return _date(self.first)

    @property
    def end(self) -> date:
        """Last day."""
        return _date(self.last)

    @property
    def start_us(self) -> int:
        """First microsecond."""
        return self.first * DAY_US


@dataclass(frozen=True)
class Periods:
    """The three periods of a run. ``replay`` is empty (last < first) when no days are kept for it."""

    train: Period
    holdout: Period
    replay: Period


def periods(transactions: pl.DataFrame, config: DataConfig) -> Periods:
    """Lay the config's days over the table, from its last day backwards; training takes its length or what is there.

    Raises:
        DataError: the table is too short for two training days.
    """
    if not len(transactions):
        raise DataError("The transactions table is empty.", fix="ingest transactions first")
    days = transactions["order_us"].to_numpy() // DAY_US
    end = int(days.max()) + 1
    replay = end - config.replay_days
    holdout = replay - config.holdout_days
    train_end = holdout - math.ceil(config.label_delay_days)
    train = max(train_end - config.train_days, int(days.min()))
    if train_end - train < 2:
        raise DataError(
            f"{end - int(days.min())} days of data leave {max(0, train_end - train)} to train on, after "
            f"data.replay_days={config.replay_days}, data.holdout_days={config.holdout_days} and "
            f"data.label_delay_days={config.label_delay_days:g}.",
            fix="bring more days or lower these settings",
        )
    return Periods(Period(train, train_end - 1), Period(holdout, replay - 1), Period(replay, end - 1))


def to_dataset(table: FeatureTable, transactions: pl.DataFrame) -> RiskDataset:
    """Join vectors with the labels and amounts of their transactions, in the order of the vectors.

    Cards are numbered by a stable hash of their name, so that datasets of one run can be joined.

    Raises:
        DataError: a transaction of the vectors is not in the table, or a feature is not finite.
    """
    keys = pl.DataFrame({"transaction_id": pl.Series(table.transaction_id, dtype=pl.String)})
    columns = ["transaction_id", "card_id", "amount_cents", "is_fraud", "fraud_scenario"]
    rows = keys.join(transactions.select(columns), on="transaction_id", how="left", maintain_order="left")
    if lost := rows["card_id"].null_count():
        raise DataError(f"{lost} vectors belong to no transaction of the table.", fix="compute the features again")
    return RiskDataset.build(
        table.values,
        table.sequence,
        rows["is_fraud"].fill_null(-1).to_numpy(),
        table.order_us,
        card_numbers(rows["card_id"]),
        feature_names=table.names,
        amount_cents=rows["amount_cents"].to_numpy(),
        scenario=rows["fraud_scenario"].fill_null(0).to_numpy(),
    )


def card_numbers(cards: pl.Series) -> NDArray[np.int64]:
    """A number a card name, the same in every table and process."""
    names = cards.unique()
    numbers = [_number(name) for name in names.to_list()]
    return cards.replace_strict(names, numbers, return_dtype=pl.Int64).to_numpy()


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")


def _date(day: int) -> date:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)).date()
