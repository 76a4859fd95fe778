"""Training rows out of the prediction log: the vectors as they were served, with the labels that came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US, delay_us
from deepseek_ray.data.periods import card_numbers
from deepseek_ray.data.prediction_archive import read_predictions, stack_sequences, stack_values
from deepseek_ray.errors import DataError
from deepseek_ray.paths import RunPaths


@dataclass(frozen=True)
class Matured:
    """Decisions old enough for their label.

    Args:
        rows: n of them, labelled, in the order of events.
        prediction_ids: n of them.
        told: (n,) True where the label was sent, False where the decision counts as genuine because none came.
    """

    rows: RiskDataset
    prediction_ids: NDArray[np.str_]
    told: NDArray[np.bool_]

    def select(self, mask: NDArray[Any]) -> Matured:
        """Those where a boolean mask holds."""
        return Matured(self.rows.select(mask), self.prediction_ids[mask], self.told[mask])


def matured_rows(
    paths: RunPaths, columns: tuple[str, ...], feature_digest: str, label_delay_days: float
) -> RiskDataset:
    """Decisions of whole days old enough for their label: with it, or as genuine where none came within the delay.

    Args:
        paths: the run with the log.
        columns: feature names of the vector, F of them.
        feature_digest: only decisions served from this vector are taken.
        label_delay_days: days after which a decision without a label counts as genuine.

    Raises:
        DataError: no decision is old enough.
    """
    return matured(paths, columns, feature_digest, label_delay_days).rows


def matured(paths: RunPaths, columns: tuple[str, ...], feature_digest: str, label_delay_days: float) -> Matured:
    """Like :func:`matured_rows`, with the ids of the decisions."""
    logged = read_predictions(paths).filter(pl.col("feature_digest") == feature_digest)
    told = logged.filter(pl.col("is_fraud").is_not_null())["prediction_id"].implode()
    rows = _matured(logged, label_delay_days)
    if not rows.height:
        raise DataError(
            f"None of {logged.height} logged decisions is {label_delay_days:g} days old.", fix="wait for their labels"
        )
    ids = rows["prediction_id"]
    dataset = to_rows(rows, columns, rows["is_fraud"].to_numpy())
    return Matured(dataset, ids.to_numpy().astype(np.str_), ids.is_in(told).to_numpy())


def mature_before(newest_us: int, label_delay_days: float) -> int:
    """Events before this time are old enough for their label, when the newest is at ``newest_us``: whole days only.

    A day cut short would judge on a few rows.
    """
    return (newest_us - delay_us(label_delay_days)) // DAY_US * DAY_US


def newest_rows(
    paths: RunPaths,
    columns: tuple[str, ...],
    feature_digest: str,
    label_delay_days: float,
    *,
    after: str,
    num_days: int,
) -> RiskDataset | None:
    """The newest matured days, to judge versions that have not trained on them; None where they hold no fraud.

    Args:
        after: the last day that one of the versions trained on, ISO 8601; only later days are taken.
        num_days: days taken at most. For the other arguments see ``matured_rows``; the run need not have a log.
    """
    logged = read_predictions(paths).filter(pl.col("feature_digest") == feature_digest)
    rows = _matured(logged, label_delay_days).with_columns(day=pl.col("order_us") // DAY_US)
    rows = rows.filter(pl.col("day") > int(np.datetime64(after, "D").astype(np.int64)))
    rows = rows.filter(pl.col("day") > pl.col("day").max() - num_days)
    if not rows["is_fraud"].sum():
        return None
    return to_rows(rows, columns, rows["is_fraud"].to_numpy())


def _matured(logged: pl.DataFrame, label_delay_days: float) -> pl.DataFrame:
    end_us = mature_before(int(logged["order_us"].max() or 0), label_delay_days)  # type: ignore[arg-type]
    return logged.filter(pl.col("order_us") < end_us).sort("order_us").with_columns(pl.col("is_fraud").fill_null(0))


def to_rows(
    logged: pl.DataFrame, columns: tuple[str, ...], label: np.ndarray, scenario: np.ndarray | None = None
) -> RiskDataset:
    """Rows of ``read_predictions`` as a dataset; float64 vectors become the float32 that training reads."""
    return RiskDataset.build(
        stack_values(logged),
        stack_sequences(logged),
        label,
        logged["order_us"].to_numpy(),
        card_numbers(logged["card_id"]),
        feature_names=columns,
        amount_cents=logged["amount_cents"].to_numpy(),
        scenario=scenario,
    )
