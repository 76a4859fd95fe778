"""Quality of matured decisions: what counts, over which days, and what is left out for want of rows."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score

from deepseek_ray.data.events import DAY_US
from deepseek_ray.online.quality import judge_quality, matured_span
from tests.unit.drift_rows import live, span


def test_only_whole_days_older_than_the_delay_are_matured() -> None:
    assert matured_span(round(40.7 * DAY_US), 7.0, 3) == (30 * DAY_US, 33 * DAY_US)
    assert matured_span(round(40.7 * DAY_US), 0.5, 3) == (37 * DAY_US, 40 * DAY_US)


def test_figures_are_those_of_the_libraries() -> None:
    rows = live()
    found = judge_quality(span(rows))
    fraud, given = rows["is_fraud"].to_numpy(), rows["probability"].to_numpy()
    assert found.average_precision == pytest.approx(average_precision_score(fraud, given))
    alert = given >= 0.5
    assert found.alert_precision == pytest.approx(fraud[alert].mean())
    assert found.alert_recall == pytest.approx(alert[fraud == 1].mean())
    assert (found.decisions, found.labels, found.frauds, found.alerts) == (1_500, 1_500, fraud.sum(), alert.sum())
    assert found.calibration_error < 0.03


def test_scores_that_promise_too_little_are_badly_calibrated() -> None:
    found = judge_quality(span(live(tilt=2.0)))
    assert found.observed_rate > 1.5 * found.predicted_rate
    assert found.calibration_error > 0.05


def test_a_decision_without_a_label_counts_as_genuine() -> None:
    rows = live().with_columns(is_fraud=pl.when(pl.col("is_fraud") == 1).then(1))
    found = judge_quality(span(rows))
    assert found.labels == found.frauds > 0
    assert found.observed_rate == pytest.approx(found.frauds / 1_500)


def test_each_day_has_its_own_figures() -> None:
    first, second = live(400), live(500, seed=9).with_columns(order_us=pl.col("order_us") + DAY_US)
    found = judge_quality(span(pl.concat([first, second])))
    assert [(day.day, day.decisions) for day in found.days] == [("1970-01-31", 400), ("1970-02-01", 500)]
    assert sum(day.frauds for day in found.days) == found.frauds
    assert found.cp100 == pytest.approx(np.mean([0.5, 0.5]), abs=0.5)


def test_thinned_decisions_have_no_card_precision() -> None:
    assert judge_quality(span(live(), step=2)).cp100 is None


def test_without_frauds_and_alerts_nothing_is_made_up() -> None:
    rows = live().with_columns(is_fraud=pl.lit(0), decision=pl.lit("approve"))
    found = judge_quality(span(rows))
    assert (found.average_precision, found.alert_precision, found.alert_recall) == (None, None, None)
