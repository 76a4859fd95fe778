"""Metrics on cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deepseek_ray import metrics


def test_average_precision_by_hand() -> None:
    assert metrics.average_precision([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1]) == pytest.approx((1 + 2 / 3) / 2)


def test_figures_without_a_class_are_nan() -> None:
    assert math.isnan(metrics.average_precision([0, 0], [0.1, 0.2]))
    assert math.isnan(metrics.auc([1, 1], [0.1, 0.2]))
    assert math.isnan(metrics.recall_at_fpr([0, 0], [0.1, 0.2]))
    assert math.isnan(metrics.cp100([], [], [], []))


def test_recall_at_a_false_alarm_rate() -> None:
    label = [1, 1, 1, 1, *[0] * 100]
    score = [0.99, 0.98, 0.97, 0.1, 0.975, *np.linspace(0, 0.5, 99)]
    assert metrics.recall_at_fpr(label, score, fpr=0.01) == 0.75
    assert metrics.recall_at_fpr(label, score, fpr=0.0) == 0.5


def test_false_positives_at_a_recall_by_hand() -> None:
    label = [1, 0, 1, 0, 0, 1]
    score = [0.9, 0.8, 0.7, 0.6, 0.5, 0.1]
    assert [metrics.false_positives_at_recall(label, score, part / 3) for part in (1, 2, 3)] == [0, 1, 3]
    assert metrics.false_positives_at_recall(label, score, 0.4) == 1  # two frauds are needed for it
    assert metrics.false_positives_at_recall([1] * 10 + [0], [0.5] * 10 + [0.4], 0.7) == 0
    assert metrics.false_positives_at_recall([1, 0], [0.5, 0.5], 1.0) == 1  # a tie is no better than a false alarm


@pytest.mark.parametrize(("label", "recall"), [([1, 1], 0.5), ([0, 0], 0.5), ([0, 1], 0.0), ([0, 1], 1.1)])
def test_false_positives_need_both_classes_and_a_recall_that_exists(label: list[int], recall: float) -> None:
    with pytest.raises(ValueError, match="recall="):
        metrics.false_positives_at_recall(label, [0.1, 0.2], recall)


def test_card_precision_takes_the_best_score_of_a_card_and_removes_what_was_found() -> None:
    #        day 0              day 1
    card = ["a", "a", "b", "c", "a", "b", "c"]
    day = [0, 0, 0, 0, 1, 1, 1]
    score = [0.1, 0.9, 0.5, 0.2, 0.9, 0.8, 0.1]
    label = [0, 1, 0, 0, 1, 1, 0]
    # day 0: a and b are looked at, a is compromised; day 1: a is gone, b and c are looked at, b is compromised
    assert metrics.cp100(score, card, day, label, k=2) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_a_compromised_card_is_left_out_from_the_day_after_it_was_found() -> None:
    card, day, score, label = [1, 2, 1, 2], [0, 0, 1, 1], [0.9, 0.1, 0.9, 0.1], [1, 0, 1, 0]
    assert metrics.cp100(score, card, day, label, k=1) == 0.5  # found on day 0, gone on day 1


def test_calibration_error_by_hand() -> None:
    assert metrics.calibration_error([0, 1, 0, 1], [0.5] * 4) == 0.0
    assert metrics.calibration_error([0, 0, 1, 1], [0.1, 0.1, 0.9, 0.9]) == pytest.approx(0.1)
    assert metrics.calibration_error([1, 1], [1.0, 0.0]) == pytest.approx(0.5)


def test_recall_by_kind_of_fraud() -> None:
    label = np.array([1, 1, 1, *[0] * 100])
    kind = np.array([1, 1, 2, *[0] * 100])
    score = np.concatenate([[0.9, 0.2, 0.8], np.linspace(0, 0.5, 100)])
    assert metrics.by_scenario(label, score, kind) == {1: 0.5, 2: 1.0}


def test_curves_start_and_end_where_they_must() -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(5_000) < 0.05).astype(int)
    drawn = metrics.curves(label, np.clip(0.3 * label + rng.random(5_000) * 0.7, 0, 1))
    assert len(drawn["pr"]) <= 202
    assert drawn["roc"][0] == [0.0, 0.0]
    assert drawn["roc"][-1] == [1.0, 1.0]
    assert sum(point[2] for point in drawn["calibration"]) == 5_000


def test_evaluate_names_every_figure() -> None:
    label, score = np.array([1, 0, 0, 1]), np.array([0.9, 0.2, 0.1, 0.8])
    named = metrics.evaluate(label, score, card=np.arange(4), day=np.zeros(4))
    assert named["average_precision"] == named["auc"] == named["recall_at_1pct_fpr"] == 1.0
    assert named["cp100"] == 0.02
    assert "calibration_error" in named
