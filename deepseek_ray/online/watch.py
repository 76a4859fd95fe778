"""Follows a live service day by day: drift of features and scores, quality on matured labels, the threshold.

Each decision was made before its label was known: test, then train (Gama et al. 2013, "On evaluating stream learning
algorithms").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import polars as pl

from deepseek_ray.config import ServingConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_archive import stack_values
from deepseek_ray.metrics import average_precision
from deepseek_ray.online.drift import DriftResult, Reference, compare_all
from deepseek_ray.online.threshold import LiveThreshold

CALENDAR = ("weekday_", "weekend")
"""Features that are constant within a day: against many days they would always seem to have moved."""


def varying(rows: RiskDataset) -> dict[str, int]:
    """Features worth comparing, by name with their place: they vary over the rows and are not of the calendar."""
    spread = rows.features.std(axis=0) if len(rows) else ()
    named = zip(rows.feature_names, spread, strict=False)
    return {name: place for place, (name, width) in enumerate(named) if width > 0 and not name.startswith(CALENDAR)}


@dataclass(frozen=True)
class DayReport:
    """One served day.

    Attributes:
        day: ISO date.
        average_precision: prequential, over the decisions whose labels came in the newest days; None without a fraud.
        threshold: for the next day.
        psi_max: largest population stability index over the features that vary in the reference.
    """

    day: str
    transactions: int
    frauds: int
    alerts: int
    average_precision: float | None
    threshold: float
    psi_max: float
    ks_max: float
    model_version: str


class Watch:
    """State of the watch between days.

    Args:
        reference: rows of the training days; drift is measured against them.
        config: the policy that sets the threshold.
        threshold: decision threshold at the start.
        window_days: days of newest labels that quality is measured on: long enough for some frauds, short enough that
            another version soon speaks for itself.
    """

    def __init__(
        self, reference: RiskDataset, config: ServingConfig, *, threshold: float, window_days: float = 3.0
    ) -> None:
        self._columns = varying(reference)
        self._references = [Reference.fit(name, reference.features[:, i]) for name, i in self._columns.items()]
        self._live = LiveThreshold(config, threshold)
        self._window_us = round(window_days * DAY_US)
        self.results: list[DriftResult] = []
        self.days: list[DayReport] = []

    def close_day(self, day: str, served: pl.DataFrame, matured: pl.DataFrame, frauds: int) -> DayReport:
        """Take stock of a day.

        Args:
            day: ISO date.
            served: the day's rows of ``prediction_archive.read_predictions``.
            matured: rows with ``probability``, ``is_fraud`` and ``known_us``; labels came in by the end of the day.
            frauds: true frauds of the day, which only a replay can know today.
        """
        values = stack_values(served)
        self.results = compare_all(self._references, {name: values[:, i] for name, i in self._columns.items()})
        known = matured.filter(pl.col("is_fraud").is_not_null())
        known = known.filter(pl.col("known_us") > pl.col("known_us").max() - self._window_us)
        has_fraud = int(known["is_fraud"].sum()) > 0
        report = DayReport(
            day=day,
            transactions=served.height,
            frauds=frauds,
            alerts=int((served["decision"] == "review").sum()),
            average_precision=average_precision(known["is_fraud"], known["probability"]) if has_fraud else None,
            threshold=self._threshold(served),
            psi_max=max(result.psi for result in self.results),
            ks_max=max(result.ks for result in self.results),
            model_version=str(served["model_version"][-1]),
        )
        self.days.append(report)
        return report

    def _threshold(self, served: pl.DataFrame) -> float:
        """For the next day, from the scores of the version that answered last: another model scores otherwise."""
        version = served["model_version"][-1]
        own = served.filter(pl.col("model_version") == version)
        if self.days and self.days[-1].model_version != str(version):
            self._live.reset(float(own["threshold"][-1]))
        return self._live.observe(own["probability"].to_numpy())

    @property
    def swaps(self) -> Iterator[dict[str, str]]:
        """Days on which another version answered at the end than on the day before."""
        for before, after in zip(self.days, self.days[1:], strict=False):
            if before.model_version != after.model_version:
                yield {"at_day": after.day, "from_version": before.model_version, "to_version": after.model_version}

    def plain(self) -> dict[str, object]:
        """Everything for the run's results."""
        return {
            "days": [asdict(report) for report in self.days],
            "drift_features": [{"feature": r.name, "psi": r.psi, "ks": r.ks} for r in self.results],
            "swaps": list(self.swaps),
        }
