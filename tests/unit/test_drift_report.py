"""The report: which bounds live decisions pass, on whose decisions, and what has too few rows to be judged."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from deepseek_ray.config import DriftConfig
from deepseek_ray.data.events import DAY_US
from deepseek_ray.online.baseline import Baseline
from deepseek_ray.online.drift_report import DriftReport, judge_drift
from tests.unit.drift_rows import DIGEST, VERSION, FirstFeature, baseline, live, span, training_rows

CONFIG = DriftConfig(max_calibration_error=0.04)
NEWEST = 31 * DAY_US


def judged(rows: pl.DataFrame, matured: pl.DataFrame | None = None, config: DriftConfig = CONFIG) -> DriftReport:
    return judge_drift(baseline(), span(rows), span(live() if matured is None else matured), NEWEST, config)


def alarms(report: DriftReport) -> list[str]:
    return [check.name for check in report.alarms]


def test_days_like_those_of_the_training_pass_every_check() -> None:
    report = judged(live())
    names = ["feature_drift", "score_drift", "calibration", "average_precision", "error_change"]
    assert [check.name for check in report.checks] == names
    assert alarms(report) == []
    assert [stream.changes for stream in report.streams] == [0, 0, 0]


def test_a_feature_that_moved_is_named() -> None:
    report = judged(live(factor=4.0))
    assert alarms(report) == ["feature_drift"]
    assert report.checks[0].detail == report.features[0].name == "amount"
    assert report.features[0].js > report.features[1].js


def test_scores_that_moved_are_told() -> None:
    moved = live().with_columns(probability=pl.col("probability") * 0.3)
    assert "score_drift" in alarms(judged(moved))


def test_frauds_that_the_scores_do_not_see_fail_quality_calibration_and_error() -> None:
    frauds = live(tilt=1.0, seed=5)
    blind = frauds.with_columns(probability=pl.lit(0.01), is_fraud=(pl.col("seq") % 4 == 0).cast(pl.Int64))
    report = judged(live(), blind)
    assert alarms(report) == ["calibration", "average_precision", "error_change"]
    (error,) = [stream for stream in report.streams if stream.name == "error"]
    assert error.rose


def test_what_another_version_decided_is_shown_but_not_held_against_this_one() -> None:
    others = live(version="2").with_columns(probability=pl.lit(0.01), is_fraud=(pl.col("seq") % 4 == 0).cast(pl.Int64))
    report = judged(live(), others)
    assert report.quality is not None
    assert report.quality.decisions == 1_500
    assert report.own_quality is None
    assert [check.name for check in report.checks] == ["feature_drift", "score_drift"]


def test_scores_of_another_version_are_not_compared() -> None:
    report = judged(live(version="2"))
    assert report.score is None
    assert report.features


def test_too_few_decisions_are_not_judged() -> None:
    report = judged(live(499), live(499))
    assert (report.features, report.score, report.quality, report.checks) == ((), None, None, ())


def test_a_ranking_of_few_frauds_is_not_judged() -> None:
    report = judged(live(), config=DriftConfig(min_frauds=10_000))
    assert "average_precision" not in [check.name for check in report.checks]


def test_decisions_from_another_vector_are_left_out() -> None:
    assert judged(live().with_columns(feature_digest=pl.lit("other"))).decisions == 0


def test_values_are_compared_as_they_were_trained_on() -> None:
    """Whole hours lie on the edges of bins: a float64 beside the float32 of the training would be in another bin."""
    hours = np.sin(np.arange(1_500) % 24)
    train = training_rows(1_500)
    train.features[:, 1] = hours
    known = Baseline.measure(VERSION, DIGEST, FirstFeature(), train, None)
    vectors = [np.array([0.1, hour, 1.0]).tobytes() for hour in hours]
    rows = live().with_columns(feature_values=pl.Series(vectors))
    found = judge_drift(known, span(rows), span(live()), NEWEST, CONFIG)
    assert {one.name: one.psi for one in found.features}["amount"] == 0.0


def test_it_is_plain_data() -> None:
    plain = json.loads(json.dumps(judged(live(factor=4.0)).plain(), allow_nan=False))
    assert plain["alarms"] == ["feature_drift"]
    assert plain["held_out"]["rows"] == 2_000
    assert plain["quality"]["days"][0]["decisions"] == 1_500


@pytest.mark.parametrize("field", ["max_feature_psi", "adwin_delta"])
def test_bounds_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        DriftConfig(**{field: -1.0})
