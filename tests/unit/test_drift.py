"""Drift measures against what they must say on known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp

from deepseek_ray.errors import DataError
from deepseek_ray.online.drift import Reference, compare, compare_all, js_distance, psi

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=20_000)
VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100)


def test_the_same_distribution_is_stable() -> None:
    result = compare(Reference.fit("amount", NORMAL), RNG.normal(size=5_000))
    assert (result.level, result.num_rows) == ("stable", 5_000)
    assert result.psi < 0.01
    assert result.p_value > 0.001


def test_a_shift_raises_the_alarm() -> None:
    result = compare(Reference.fit("amount", NORMAL), RNG.normal(1.0, 1.0, size=5_000))
    assert result.level == "alarm"
    assert result.ks == pytest.approx(0.38, abs=0.03)
    assert result.p_value < 1e-6


def test_index_as_computed_by_hand() -> None:
    reference = Reference.fit("x", [0.0] * 50 + [1.0] * 50, num_bins=2)
    assert psi(reference, [0.0] * 25 + [1.0] * 75) == pytest.approx(0.25 * math.log(3.0))


def test_statistic_is_scipys_own_when_the_sample_is_whole() -> None:
    live = RNG.normal(0.2, 1.0, 500)
    expected = ks_2samp(NORMAL[:2000], live, method="asymp")
    assert compare(Reference.fit("x", NORMAL[:2000]), live).ks == pytest.approx(expected.statistic)


def test_a_value_that_most_rows_share_is_one_bin() -> None:
    reference = Reference.fit("fraud_count", [0.0] * 990 + [1.0] * 10)
    assert reference.shares.sum() == pytest.approx(1.0)
    assert psi(reference, [0.0] * 99 + [1.0]) == pytest.approx(0.0, abs=1e-9)
    assert psi(reference, [1.0] * 100) > 1.0


def test_a_constant_that_moves_is_seen_by_the_test_at_least() -> None:
    result = compare(Reference.fit("flag", [0.0] * 100), [1.0] * 100)
    assert result.ks == 1.0


@settings(deadline=None)
@given(reference=VALUES, live=VALUES)
def test_the_index_is_never_negative_and_zero_against_itself(reference: list[float], live: list[float]) -> None:
    fitted = Reference.fit("x", reference)
    assert psi(fitted, live) >= 0
    assert psi(fitted, reference) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_that_are_none_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError):
        Reference.fit("x", values)
    with pytest.raises(DataError):
        psi(Reference.fit("x", [1.0, 2.0]), values)


def test_columns_come_most_moved_first() -> None:
    references = [Reference.fit("still", NORMAL), Reference.fit("moved", NORMAL)]
    results = compare_all(references, {"still": NORMAL[:2000], "moved": NORMAL[:2000] + 2})
    assert [result.name for result in results] == ["moved", "still"]


def test_the_distance_is_none_against_itself_and_one_where_nothing_is_shared() -> None:
    fitted = Reference.fit("x", [0.0] * 50 + [1.0] * 50, num_bins=2)
    assert js_distance(fitted, [0.0, 1.0]) == 0.0
    assert js_distance(fitted, [0.0]) == pytest.approx(jensenshannon([0.5, 0.5], [1.0, 0.0], base=2))
    assert js_distance(Reference.fit("flag", [0.0] * 100), [1.0] * 100) == 1.0


@given(VALUES, VALUES)
@settings(max_examples=30, deadline=None)
def test_the_distance_stays_in_its_range(reference: list[float], values: list[float]) -> None:
    assert 0.0 <= js_distance(Reference.fit("x", reference), values) <= 1.0
