"""Thresholds: a budget of alerts, or the least expected loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.config import ServingConfig
from deepseek_ray.errors import DataError
from deepseek_ray.online.threshold import LiveThreshold, budget_threshold, cost_threshold, policy_threshold

COSTS: dict[str, Any] = {"threshold_policy": "cost", "review_cost": 8.0, "missed_fraud_cost": 100.0}
SCORES = st.lists(st.floats(0, 0.999), min_size=1, max_size=200)


def test_budget_lets_exactly_its_share_through() -> None:
    scores = np.arange(1000) / 1000
    threshold = budget_threshold(scores, 0.01)
    assert threshold == 0.990
    assert np.count_nonzero(scores >= threshold) == 10


def test_ties_at_the_top_are_not_split() -> None:
    assert np.count_nonzero(np.array([0.9] * 5 + [0.1] * 95) >= budget_threshold([0.9] * 5 + [0.1] * 95, 0.02)) == 0


@settings(deadline=None)
@given(scores=SCORES, rate=st.floats(0.001, 0.999))
def test_the_budget_is_never_exceeded(scores: list[float], rate: float) -> None:
    threshold = budget_threshold(scores, rate)
    assert sum(score >= threshold for score in scores) <= rate * len(scores)


@settings(deadline=None)
@given(scores=SCORES, rate=st.floats(0.001, 0.5))
def test_a_larger_budget_never_raises_the_threshold(scores: list[float], rate: float) -> None:
    assert budget_threshold(scores, 2 * rate - 1e-9) <= budget_threshold(scores, rate)


@pytest.mark.parametrize("scores", [[], [float("nan")], [1.5], [-0.1]])
def test_scores_that_are_none_are_refused(scores: list[float]) -> None:
    with pytest.raises(DataError):
        budget_threshold(scores, 0.1)


@pytest.mark.parametrize("rate", [0.0, 1.0, float("nan")])
def test_rates_out_of_range_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="alert_rate"):
        budget_threshold([0.1], rate)


def test_the_window_follows_the_scores() -> None:
    budget = LiveThreshold(ServingConfig(alert_rate=0.05), 0.5, window=1000, min_scores=100, refresh_every=1)
    rng = np.random.default_rng(0)
    assert budget.observe(rng.uniform(0, 0.2, 50)) == 0.5  # too few scores to move
    low = budget.observe(rng.uniform(0, 0.2, 1000))
    assert low == pytest.approx(0.19, abs=0.01)
    high = budget.observe(rng.uniform(0.4, 0.6, 1000))
    assert high == pytest.approx(0.59, abs=0.01)


def test_the_threshold_moves_only_now_and_then() -> None:
    budget = LiveThreshold(ServingConfig(alert_rate=0.1), 0.5, window=100, min_scores=10, refresh_every=50)
    first = budget.observe(np.linspace(0, 0.2, 60))
    assert budget.observe(np.full(49, 0.9)) == first
    assert budget.observe([0.9]) > first


def test_reset_forgets_the_old_model() -> None:
    budget = LiveThreshold(ServingConfig(alert_rate=0.1), 0.5, window=100, min_scores=10, refresh_every=1)
    budget.observe(np.linspace(0, 0.2, 60))
    budget.reset(0.7)
    assert budget.value == 0.7
    assert budget.observe([0.1]) == 0.7
    assert budget.observe([]) == 0.7


@pytest.mark.parametrize("settings", [{"initial": 2.0}, {"min_scores": 0}, {"refresh_every": 0}, {"window": 5}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        LiveThreshold(ServingConfig(), **{"initial": 0.5, **settings})  # type: ignore[arg-type]


def test_a_review_pays_from_the_cost_threshold_on() -> None:
    rng = np.random.default_rng(1)
    scores = rng.uniform(0, 0.5, 50_000)
    labels = rng.uniform(size=len(scores)) < scores  # calibrated

    def loss(threshold: float) -> float:
        alert = scores >= threshold
        return 100.0 * np.count_nonzero(labels & ~alert) + 8.0 * np.count_nonzero(alert)

    chosen = cost_threshold(8.0, 100.0)
    assert chosen == 0.08
    assert loss(chosen) <= 1.01 * min(loss(threshold) for threshold in np.linspace(0, 0.5, 101))


def test_the_policy_chooses() -> None:
    scores = np.arange(1000) / 1000
    assert policy_threshold(scores, ServingConfig(alert_rate=0.01)) == 0.990
    assert policy_threshold([], ServingConfig(**COSTS)) == 0.08


@pytest.mark.parametrize("wrong", [{"review_cost": 0.0}, {"missed_fraud_cost": 8.0}, {"missed_fraud_cost": 0.0}])
def test_costs_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs 0 < review_cost"):
        ServingConfig(**COSTS | wrong)
