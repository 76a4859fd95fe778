"""Quality of live decisions, on those old enough for their label: ranking, card precision, alerts, calibration.

Prequential: each decision was made before its label was known (Gama et al. 2013, "On evaluating stream learning
algorithms"). A decision counts once the label delay has passed: with its label, or as genuine where none came. To count
labels as they come would judge on the frauds alone, which are told first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_span import Span
from deepseek_ray.data.served import mature_before
from deepseek_ray.metrics import average_precision, calibration_curve, calibration_error, cp100


@dataclass(frozen=True)
class DayQuality:
    """One matured day; None where a figure has nothing to be taken from."""

    day: str
    decisions: int
    frauds: int
    alerts: int
    average_precision: float | None
    alert_precision: float | None


@dataclass(frozen=True)
class Quality:
    """Matured decisions together.

    Args:
        decisions: counted.
        labels: decisions whose label was sent; the others count as genuine.
        alerts: decisions for a review.
        average_precision: None without a fraud.
        cp100: card precision at 100, mean over days; None where decisions were thinned out: best scores are lost.
        alert_precision: share of fraud among the alerts; None without one.
        alert_recall: share of the frauds that were alerts; None without a fraud.
        calibration_error: expected calibration error.
        predicted_rate: mean probability.
        observed_rate: share of fraud.
        reliability: (predicted, observed, decisions) of each bin of probability.
        days: oldest first.
    """

    decisions: int
    labels: int
    frauds: int
    alerts: int
    average_precision: float | None
    cp100: float | None
    alert_precision: float | None
    alert_recall: float | None
    calibration_error: float
    predicted_rate: float
    observed_rate: float
    reliability: tuple[tuple[float, float, int], ...]
    days: tuple[DayQuality, ...]


def matured_span(newest_us: int, label_delay_days: float, num_days: int) -> tuple[int, int]:
    """The newest whole days that are old enough for their labels, ``[start, end)`` in microseconds."""
    end_us = mature_before(newest_us, label_delay_days)
    return end_us - num_days * DAY_US, end_us


def judge_quality(matured: Span) -> Quality:
    """Judge the decisions of a span.

    Args:
        matured: n >= 1 rows of ``prediction_span.read_labelled``; where ``is_fraud`` is null, no label came.
    """
    rows = matured.rows.with_columns(
        fraud=pl.col("is_fraud").fill_null(0),
        alert=pl.col("decision") == "review",
        day=pl.col("order_us") // DAY_US,
    )
    fraud, probability = rows["fraud"].to_numpy(), rows["probability"].to_numpy()
    alert = rows["alert"].to_numpy()
    bins = calibration_curve(fraud, probability)
    reliability = zip(bins.predicted.tolist(), bins.observed.tolist(), bins.count.tolist(), strict=True)
    return Quality(
        decisions=rows.height,
        labels=int(rows["is_fraud"].is_not_null().sum()),
        frauds=int(fraud.sum()),
        alerts=int(alert.sum()),
        average_precision=_precision(fraud, probability),
        cp100=cp100(probability, rows["card_id"].to_numpy(), rows["day"], fraud) if matured.step == 1 else None,
        alert_precision=_share(fraud[alert]),
        alert_recall=_share(alert[fraud == 1]),
        calibration_error=calibration_error(fraud, probability),
        predicted_rate=float(probability.mean()),
        observed_rate=float(fraud.mean()),
        reliability=tuple(reliability),
        days=tuple(_of_day(int(name[0]), day) for name, day in rows.group_by("day", maintain_order=True)),
    )


def _of_day(day: int, rows: pl.DataFrame) -> DayQuality:
    fraud, alert = rows["fraud"].to_numpy(), rows["alert"].to_numpy()
    return DayQuality(
        day=str(np.datetime64(day, "D")),
        decisions=rows.height,
        frauds=int(fraud.sum()),
        alerts=int(alert.sum()),
        average_precision=_precision(fraud, rows["probability"].to_numpy()),
        alert_precision=_share(fraud[alert]),
    )


def _precision(fraud: npt.NDArray[np.int64], probability: npt.NDArray[np.float64]) -> float | None:
    return average_precision(fraud, probability) if fraud.any() else None


def _share(hits: npt.NDArray[np.generic]) -> float | None:
    return float(hits.mean()) if hits.size else None
