"""Proof of no skew: recompute every served vector from the log and the history, and list what differs.

The batch engine sees the events and labels of the log at their logged positions, after the history that the live
states were warmed with. Integers must be equal; quotients and roots within 1e-9.

    N  compared predictions     F  features
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from deepseek_ray.data import batch_engine
from deepseek_ray.data.batch_engine import SEQUENCE_CHANNELS, FeatureTable
from deepseek_ray.data.events import TRANSACTION_COLUMNS
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.prediction_archive import read_predictions, stack_sequences, stack_values
from deepseek_ray.data.windows import VectorSpec
from deepseek_ray.errors import FeatureError
from deepseek_ray.paths import RunPaths

TOLERANCE = 1e-9
_QUOTIENTS = {"mean", "std", "rank", "ratio", "zscore", "fraud_share", "clean_ratio", "hour_sin", "hour_cos"}
_COLUMNS = list(TRANSACTION_COLUMNS)


@dataclass(frozen=True)
class Difference:
    """One feature of one prediction that does not come out again."""

    prediction_id: str
    transaction_id: str
    order_us: int
    feature: str
    served: float
    recomputed: float

    def __str__(self) -> str:
        return f"{self.prediction_id} {self.feature}: served {self.served!r}, recomputed {self.recomputed!r}"


@dataclass(frozen=True)
class Verification:
    """Result of a comparison.

    Attributes:
        rows: predictions compared.
        other_vectors: predictions of another vector or declaration, not compared.
        features: numbers compared a prediction, vector and sequence together.
        num_differences: numbers that differ, over all predictions.
        max_difference: largest absolute difference.
        differences: the first ones.
    """

    rows: int
    other_vectors: int
    features: int
    num_differences: int
    max_difference: float
    differences: tuple[Difference, ...]


def verify_run(
    paths: RunPaths, vector: str, *, label_delay_days: float, sequence_len: int, limit: int = 20
) -> Verification:
    """Verify all predictions of a run's log that were served from a vector.

    Raises:
        FeatureError: the run has no feature store, or the log's positions contradict each other.
        DataError: the log's archive cannot be read.
    """
    client = FeatureClient(paths)
    spec = client.declaration().vector(vector)
    return verify_features(
        read_predictions(paths),
        client.warmed(spec.service),
        spec,
        label_delay_days=label_delay_days,
        sequence_len=sequence_len,
        limit=limit,
    )


def verify_features(
    predictions: pl.DataFrame,
    history: pl.DataFrame | None,
    spec: VectorSpec,
    *,
    label_delay_days: float,
    sequence_len: int,
    limit: int = 20,
) -> Verification:
    """Recompute served vectors and compare.

    Args:
        predictions: all rows of the log, as ``prediction_archive.read_predictions`` gives them.
        history: the transactions table that the live states were warmed with, or None.
        spec: the vector; predictions of other vectors count as events only.
        label_delay_days: as it was served.
        sequence_len: as it was served.
        limit: how many differences to return.
    """
    compared = predictions.filter((pl.col("feature_digest") == spec.digest) & pl.col("feature_values").is_not_null())
    events = _events(predictions)
    known = events if history is None else pl.concat([_without(history, events), events])
    table = batch_engine.compute(known, spec, label_delay_days=label_delay_days, sequence_len=sequence_len)
    served, again, names = _pairs(compared, known, table, sequence_len)
    delta = np.abs(served - again)
    differs = ~(delta <= _tolerances(spec, sequence_len) * np.maximum(1.0, np.abs(again)))
    found = _listed(compared, names, served, again, differs)
    first = tuple(difference for _, difference in zip(range(limit), found, strict=False))
    largest = float(delta.max(initial=0.0))
    others = len(predictions) - len(compared)
    return Verification(len(compared), others, len(names), int(differs.sum()), largest, first)


def _events(predictions: pl.DataFrame) -> pl.DataFrame:
    """The log as a transactions table: logged orders, labels at the moments they became usable."""
    return predictions.with_columns(
        event_time=pl.col("event_us").cast(pl.Datetime("us", "UTC")),
        is_fraud=pl.col("is_fraud").cast(pl.Int8),
        fraud_scenario=pl.lit(0, pl.Int8),
        label_us=pl.col("known_us").cast(pl.Int64),
    ).select(_COLUMNS)


def _without(history: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    twice = history.join(events, on="transaction_id", how="semi")
    if twice.height:
        problem = f"{twice.height} transactions are in the warmed history and in the log."
        raise FeatureError(problem, fix="warm the store only with what was not served")
    return history.select(_COLUMNS)


def _pairs(
    compared: pl.DataFrame, known: pl.DataFrame, table: FeatureTable, sequence_len: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    places = known.select("transaction_id").with_row_index("row")
    rows = compared.join(places, on="transaction_id", how="left", maintain_order="left")["row"].to_numpy()
    names = [*table.names, *(f"sequence[{lag}].{c}" for lag in range(sequence_len) for c in SEQUENCE_CHANNELS)]
    width = sequence_len * len(SEQUENCE_CHANNELS)
    again = np.concatenate([table.values[rows], table.sequence[rows].reshape(len(rows), width)], axis=1)
    if not len(rows):
        return again, again, names
    served = np.concatenate([stack_values(compared), stack_sequences(compared).reshape(len(rows), -1)], axis=1)
    if served.shape != again.shape:
        problem = f"Served rows hold {served.shape[1]} numbers, the vector {again.shape[1]}."
        raise FeatureError(problem, fix="give the sequence length that was served")
    return served, again, names


def _tolerances(spec: VectorSpec, sequence_len: int) -> NDArray[np.float64]:
    kinds = [*spec.request, *(feature.aggregation for feature in spec.features)]
    exact = [0.0 if kind not in _QUOTIENTS else TOLERANCE for kind in kinds]
    return np.array([*exact, *[0.0] * (sequence_len * len(SEQUENCE_CHANNELS))])


def _listed(
    compared: pl.DataFrame,
    names: list[str],
    served: NDArray[np.float64],
    again: NDArray[np.float64],
    differs: NDArray[np.bool_],
) -> Iterator[Difference]:
    for row, column in zip(*np.nonzero(differs), strict=True):
        ids = compared.row(int(row), named=True)
        values = float(served[row, column]), float(again[row, column])
        yield Difference(ids["prediction_id"], ids["transaction_id"], ids["order_us"], names[column], *values)
