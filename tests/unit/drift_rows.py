"""Live decisions and training rows of a small problem: an amount, a count, a score that is calibrated unless told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_log import LoggedFeedback, PredictionLog
from deepseek_ray.data.prediction_span import Span
from deepseek_ray.online.baseline import Baseline
from deepseek_ray.paths import RunPaths
from tests.unit.serving_parts import event
from tests.unit.test_prediction_log import row

NAMES = ("score_given", "amount", "weekend")
VERSION, DIGEST = "3", "d"


class FirstFeature:
    """A model whose probability is its first feature."""

    def predict_proba(
        self, features: npt.NDArray[np.float32], sequence: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        return features[:, 0].astype(np.float64)


def scores(count: int, seed: int) -> npt.NDArray[np.float64]:
    """Probabilities with a mean of about one in eleven."""
    return np.random.default_rng(seed).beta(0.2, 2.0, count).astype(np.float32).astype(np.float64)


def training_rows(count: int = 2_000, *, first_day: int = 0, days: int = 10, seed: int = 0) -> RiskDataset:
    """Days on which a fraud is as likely as the first feature says."""
    rng, given = np.random.default_rng(seed), scores(count, seed)
    order_us = first_day * DAY_US + np.arange(count) * (days * DAY_US // count)
    features = np.stack([given, rng.lognormal(size=count), order_us // DAY_US % 7 > 4], axis=1)
    label = rng.random(count) < given
    return RiskDataset.build(
        features, np.zeros((count, 1, 6)), label, order_us, np.arange(count) % 97, feature_names=NAMES
    )


def baseline() -> Baseline:
    return Baseline.measure(VERSION, DIGEST, FirstFeature(), training_rows(), training_rows(first_day=10, seed=1))


def live(
    count: int = 1_500, *, factor: float = 1.0, version: str = VERSION, seed: int = 2, tilt: float = 1.0
) -> pl.DataFrame:
    """A day of decisions with vectors and labels.

    Args:
        factor: moves the amounts.
        tilt: a fraud is that many times as likely as its score says.
    """
    rng, given = np.random.default_rng(seed), scores(count, seed)
    vectors = np.stack([given, factor * rng.lognormal(size=count), np.ones(count)], axis=1)
    return pl.DataFrame(
        {
            "seq": np.arange(1, count + 1),
            "prediction_id": [f"p{number}" for number in range(count)],
            "order_us": 30 * DAY_US + np.arange(count) * (DAY_US // count),
            "card_id": [f"c{number % 97}" for number in range(count)],
            "probability": given,
            "threshold": [0.5] * count,
            "decision": np.where(given >= 0.5, "review", "approve"),
            "model_version": [version] * count,
            "feature_digest": [DIGEST] * count,
            "feature_values": [vector.tobytes() for vector in vectors],
            "is_fraud": (rng.random(count) < np.minimum(1.0, tilt * given)).astype(np.int64),
        }
    )


def span(rows: pl.DataFrame, step: int = 1) -> Span:
    return Span(rows, step)


def write_log(folder: Path, rows: pl.DataFrame) -> RunPaths:
    """The rows at the end of a prediction log, each with its label, known a millisecond after its decision."""
    paths = RunPaths(folder)
    log = PredictionLog(paths.prediction_log, synchronous="NORMAL")
    first = log.horizon()[1]
    decided, told = [], []
    for number, one in enumerate(rows.iter_rows(named=True), start=first):
        name = f"p{number}"
        made = row(number, prediction_id=name, transaction=event(number, card=one["card_id"]))
        fields = {key: one[key] for key in ("order_us", "probability", "decision", "model_version")}
        decided.append(replace(made, values=np.frombuffer(one["feature_values"]), **fields))
        told.append(LoggedFeedback(name, bool(one["is_fraud"]), 0, one["order_us"] + 1_000, first, 30))
    log.commit(decided, told)
    log.close()
    return paths
