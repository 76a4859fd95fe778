"""ADWIN finds a change of a stream's mean and says since when; an even stream has none."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_ray.online.streams import follow

RNG = np.random.default_rng(0)
TIMES = np.arange(4_000) * 1_000


def uniform(count: int, high: float = 1.0) -> np.ndarray:
    return RNG.uniform(0, high, count)


def test_an_even_stream_does_not_change() -> None:
    found = follow("score", uniform(2_000), uniform(4_000), TIMES, delta=0.002)
    assert (found.changes, found.since_us, found.rose) == (0, None, False)
    assert found.before == found.after == pytest.approx(0.5, abs=0.02)


def test_a_change_is_dated_with_the_means_on_both_sides() -> None:
    found = follow("error", uniform(2_000), np.concatenate([uniform(2_000), uniform(2_000, 0.4)]), TIMES, delta=0.002)
    assert found.changes >= 1
    assert found.since_us == pytest.approx(2_000_000, abs=500_000)  # ADWIN cuts between buckets of hundreds
    assert (found.before, found.after) == (pytest.approx(0.5, abs=0.03), pytest.approx(0.2, abs=0.08))
    assert not found.rose


def test_a_stream_that_is_other_than_before_from_its_first_value_on_has_changed() -> None:
    found = follow("error", uniform(2_000, 0.4), uniform(4_000), TIMES, delta=0.002)
    assert found.rose
    assert found.since_us == pytest.approx(0, abs=500_000)


def test_a_change_before_the_live_values_does_not_count() -> None:
    history = np.concatenate([uniform(2_000, 0.4), uniform(2_000)])
    assert follow("error", history, uniform(4_000), TIMES, delta=0.002).changes == 0
