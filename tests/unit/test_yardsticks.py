"""Yardsticks: they learn, they are deterministic, they name what matters."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_ray import metrics
from deepseek_ray.errors import DataError
from deepseek_ray.train.yardsticks import fit_lightgbm, fit_logistic
from tests.unit.risk_rows import make_rows

ROWS, FRESH = make_rows(3_000, seed=0), make_rows(3_000, seed=1)


@pytest.mark.parametrize("fit", [fit_logistic, fit_lightgbm])
def test_a_yardstick_learns_and_names_the_feature(fit: object) -> None:
    yardstick = fit(ROWS)  # type: ignore[operator]
    score = yardstick.predict_proba(FRESH.features)
    assert metrics.average_precision(FRESH.label, score) > 1.3 * FRESH.label.mean()
    assert score.min() >= 0
    assert score.max() <= 1
    assert yardstick.importance(ROWS.feature_names)[0][0] == "f0"


def test_lightgbm_is_the_same_for_a_seed() -> None:
    first, again = (fit_lightgbm(ROWS, seed=3).predict_proba(FRESH.features) for _ in range(2))
    assert np.array_equal(first, again)


def test_lightgbm_needs_two_days_to_choose() -> None:
    with pytest.raises(DataError):
        fit_lightgbm(ROWS.select(ROWS.day == 0))
