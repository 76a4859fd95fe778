"""The handbook's evaluation protocol: train week, label delay, test week, known cards removed, ceiling.

Source: Le Borgne, Siblini, Lebichot, Bontempi, *Reproducible Machine Learning for Credit Card Fraud Detection*,
chapter 5 (validation methodologies). Days are UTC days of ``event_time``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import polars as pl
from numpy.typing import NDArray

from deepseek_ray.data import batch_engine, windows
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US, delay_us
from deepseek_ray.data.periods import to_dataset
from deepseek_ray.errors import DataError
from deepseek_ray.logs import get_logger

log = get_logger(__name__)

COMPROMISE_DAYS = 28
"""A compromised terminal of the published generator stays so for 28 days."""


@dataclass(frozen=True)
class Split:
    """Row numbers of one train/test split; ``test`` leaves out cards already known as compromised."""

    train: NDArray[np.int64]
    history: NDArray[np.int64]
    test: NDArray[np.int64]


def day_numbers(table: pl.DataFrame) -> NDArray[np.int64]:
    """Days since 1970-01-01 (UTC) of each row, int64 [n]."""
    return table["event_time"].dt.date().cast(pl.Int32).to_numpy().astype(np.int64)


def day_number(day: date) -> int:
    """Days since 1970-01-01."""
    return (day - date(1970, 1, 1)).days


def datasets(
    table: pl.DataFrame, vector: str, parts: Sequence[NDArray[np.int64]], *, delay_days: float, sequence_len: int
) -> list[RiskDataset]:
    """Features of some rows, computed once over the whole table.

    Args:
        table: transactions table; all history that may matter.
        vector: name in features/windows.yaml.
        parts: row numbers of each wanted dataset.
        delay_days: a label counts in no feature before so many days after its event.
        sequence_len: earlier events of the card a row gets.
    """
    spec = windows.load().vector(vector)
    log.info("computing %d features of %d transactions, label delay %g days", len(spec.names), len(table), delay_days)
    vectors = batch_engine.compute(table, spec, label_delay_days=delay_days, sequence_len=sequence_len)
    return [to_dataset(vectors.take(part), table) for part in parts]


def split(
    table: pl.DataFrame,
    *,
    train_start: date,
    train_days: int,
    delay_days: int,
    test_start: date,
    test_days: int,
    history_days: int,
) -> Split:
    """Rows to train on and to test on.

    Args:
        table: transactions table with labels.
        train_start: first day of the train period.
        train_days: its length; the published protocol uses 7.
        delay_days: days until a label is known.
        test_start: first test day.
        test_days: length of the test period.
        history_days: length of the long train period, which ends on the same day as the short one.

    A card is known on a test day when it had a fraud in the train period, or after it on a day whose labels, complete
    ``delay_days`` after its end, are known when the test day starts.

    Raises:
        DataError: a period holds no rows or the test period starts before the train labels are known.
    """
    day = day_numbers(table)
    first, test = day_number(train_start), day_number(test_start)
    last = first + train_days - 1
    if test <= last + delay_days:
        raise DataError(
            f"Test day {test_start} is not more than {delay_days} days after the last train day.",
            fix="move --test-start or lower --delay-days",
        )
    train = np.flatnonzero((day >= first) & (day <= last))
    history = np.flatnonzero((day > last - history_days) & (day <= last))
    rows = _without_known(table, day, first, last, range(test, test + test_days), delay_days)
    for name, part in (("train", train), ("history", history), ("test", rows)):
        if not len(part):
            raise DataError(f"The {name} period holds no transactions.", fix="choose days inside the data")
    return Split(train, history, rows)


def _without_known(
    table: pl.DataFrame, day: NDArray[np.int64], first: int, last: int, test_days: range, delay_days: int
) -> NDArray[np.int64]:
    card = (
        table["card_id"].to_physical() if table["card_id"].dtype == pl.Categorical else table["card_id"].rank("dense")
    )
    code, fraud = card.to_numpy().astype(np.int64), table["is_fraud"].fill_null(0).to_numpy() == 1
    known = np.zeros(code.max() + 1, bool)
    known[code[(day >= first) & (day <= last) & fraud]] = True
    kept = []
    for today in test_days:
        known[code[(day > last) & (day < today - delay_days) & fraud]] = True
        rows = np.flatnonzero(day == today)
        kept.append(rows[~known[code[rows]]])
    return np.concatenate(kept)


def knowable(table: pl.DataFrame, rows: NDArray[np.int64], *, delay_days: float) -> NDArray[np.float64]:
    """1 for each fraud of the published generator that anything known at its time can reveal, else 0; [len(rows)].

    Scenario 1 shows in the amount and scenario 3 in the card's amounts; scenario 2 (a compromised terminal) only
    after a fraud of the same 28 days has been labelled. Scoring with this vector gives the ceiling of any model: what
    is knowable stands first, and all other rows are tied.
    """
    scenario = table["fraud_scenario"].to_numpy()
    seen = (
        table.with_row_index("row")
        .filter(pl.col("fraud_scenario") == 2)
        .select("row", "terminal_id", pl.col("event_time").dt.epoch("us").alias("us"))
    )
    chosen = seen.filter(pl.col("row").is_in(rows.tolist()))
    pairs = chosen.join(seen.select("terminal_id", pl.col("us").alias("earlier")), on="terminal_id")
    known = pairs.filter(
        (pl.col("earlier") <= pl.col("us") - max(delay_us(delay_days), 1))  # never by its own label
        & (pl.col("earlier") > pl.col("us") - COMPROMISE_DAYS * DAY_US)
    )["row"].unique()
    terminal = np.isin(rows, known.to_numpy())
    return ((scenario[rows] == 1) | (scenario[rows] == 3) | terminal).astype(np.float64)
