"""Evidence that may be looked at after every trial."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from deepseek_ray.online.significance import always_valid_p, is_significant, log_bayes_factor


@pytest.mark.parametrize(("hits", "trials", "null"), [(0, 5, 0.1), (3, 5, 0.1), (40, 100, 0.25), (2, 2, 0.01)])
def test_it_is_the_integral_that_it_claims_to_be(hits: int, trials: int, null: float) -> None:
    def ratio(share: float) -> float:
        return (share / null) ** hits * ((1 - share) / (1 - null)) ** (trials - hits) / (1 - null)

    expected = integrate.quad(ratio, null, 1)[0]
    assert math.exp(log_bayes_factor(hits, trials, null)) == pytest.approx(expected, rel=1e-6)


def test_looking_after_every_trial_alarms_falsely_no_more_often_than_allowed() -> None:
    rng = np.random.default_rng(0)
    alpha, null, looks = 0.1, 0.2, 100
    alarms = 0
    for hits in np.cumsum(rng.random((100, looks)) < null, axis=1):
        factors = (log_bayes_factor(int(hits[n]), n + 1, null) for n in range(3, looks, 4))
        alarms += any(is_significant(factor, alpha) for factor in factors)
    assert 0 < alarms <= alpha * 100


def test_a_share_that_has_doubled_is_found() -> None:
    rng = np.random.default_rng(1)
    hits = int((rng.random(300) < 0.4).sum())
    factor = log_bayes_factor(hits, 300, 0.2)
    assert is_significant(factor, 0.001)
    assert always_valid_p(factor) < 0.001


def test_nothing_seen_or_nothing_to_test_says_nothing() -> None:
    assert [log_bayes_factor(*case) for case in ((0, 0, 0.5), (3, 3, 1.0), (3, 3, 0.0))] == [0.0, 0.0, 0.0]
    assert always_valid_p(-3.0) == 1.0
