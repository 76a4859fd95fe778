"""The report on drift and quality as Prometheus gauges.

Each report replaces the last: what it could not judge is absent, not an old value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

Plain = Mapping[str, Any]
_MEASURES = ("psi", "js", "ks")


class DriftGauges:
    """All gauges of drift and quality in one registry; ``rows`` says which decisions a figure was taken from.

    ``matured``: live ones whose labels are due, whichever version made them; ``own``: those of the version that serves;
    ``held_out``: the days that it was judged on before it served.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"deepseek_ray_{name}", text, labels, registry=registry)

        self.feature = gauge(
            "feature_drift", "Distance of a live feature from the training days.", "feature", "measure"
        )
        self.score = gauge("score_drift", "Distance of live scores from those on the held-out days.", "measure")
        self.precision = gauge("average_precision", "Average precision.", "rows")
        self.cp100 = gauge("card_precision_at_100", "Compromised cards among the 100 with the highest score.", "rows")
        self.calibration = gauge("calibration_error", "Expected calibration error.", "rows")
        self.alert_precision = gauge("alert_precision", "Share of fraud among the alerts.", "rows")
        self.alert_recall = gauge("alert_recall", "Share of the frauds that were alerts.", "rows")
        self.rate = gauge("fraud_rate", "Share of fraud, predicted and observed.", "rows", "kind")
        self.matured = gauge("matured_decisions", "Decisions that quality was taken from.", "rows")
        self.frauds = gauge("matured_frauds", "Frauds among them.", "rows")
        self.changes = gauge("stream_changes", "Changes of the mean that ADWIN found.", "stream")
        self.mean = gauge("stream_mean", "Mean of a stream before and after its last change.", "stream", "side")
        self.alarm = gauge("drift_alarm", "1 where a check of the report did not pass, by check.", "check")
        self.decisions = gauge("drift_decisions", "Live decisions compared in the last report.")
        self.computed = gauge("drift_computed_timestamp_seconds", "When the last report was made.")
        self.failures = Counter("deepseek_ray_drift_failures", "Reports that could not be made.", registry=registry)

    def show(self, report: Plain, now_s: float) -> None:
        """Show a report, as ``DriftReport.plain`` gives it."""
        self._clear()
        for one in report["features"]:
            _set_all(self.feature, one, one["name"])
        if report["score"]:
            _set_all(self.score, report["score"])
        for rows, key in (("matured", "quality"), ("own", "own_quality")):
            if report[key]:
                self._quality(rows, report[key])
        self._figures("held_out", report["held_out"])
        for stream in report["streams"]:
            self.changes.labels(stream["name"]).set(stream["changes"])
            for side in ("before", "after"):
                self.mean.labels(stream["name"], side).set(stream[side])
        for check in report["checks"]:
            self.alarm.labels(check["name"]).set(not check["passed"])
        self.decisions.set(report["decisions"])
        self.computed.set(now_s)

    def _clear(self) -> None:
        labelled = (self.feature, self.score, self.precision, self.cp100, self.calibration, self.alert_precision)
        for gauge in (*labelled, self.alert_recall, self.rate, self.matured, self.frauds, self.changes, self.mean):
            gauge.clear()
        self.alarm.clear()

    def _quality(self, rows: str, quality: Plain) -> None:
        self._figures(rows, quality)
        self.matured.labels(rows).set(quality["decisions"])
        self.frauds.labels(rows).set(quality["frauds"])
        for gauge, name in ((self.alert_precision, "alert_precision"), (self.alert_recall, "alert_recall")):
            _set(gauge.labels(rows), quality[name])
        for kind in ("predicted", "observed"):
            self.rate.labels(rows, kind).set(quality[f"{kind}_rate"])

    def _figures(self, rows: str, figures: Plain) -> None:
        names = {"average_precision": self.precision, "cp100": self.cp100, "calibration_error": self.calibration}
        for name, gauge in names.items():
            _set(gauge.labels(rows), figures.get(name))


def _set_all(gauge: Gauge, distances: Plain, *labels: str) -> None:
    for measure in _MEASURES:
        gauge.labels(*labels, measure).set(distances[measure])


def _set(gauge: Gauge, value: float | None) -> None:
    gauge.set(float("nan") if value is None else value)
