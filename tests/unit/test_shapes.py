"""Padding changes the shape that a model sees, and nothing of what it says."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_ray.serving.shapes import padded


@pytest.mark.parametrize(("rows", "seen"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8), (9, 16), (20, 24)])
def test_the_model_sees_a_bucket_and_the_rows_come_back(rows: int, seen: int) -> None:
    shapes = []

    def compute(values: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        shapes.append((len(values), len(sequence)))
        return values.sum(axis=1) + sequence.sum(axis=(1, 2))

    rng = np.random.default_rng(0)
    values, sequence = rng.random((rows, 3)), rng.random((rows, 2, 6))
    assert np.array_equal(padded(compute, values, sequence, (1, 4, 8)), compute(values, sequence))
    assert shapes == [(seen, seen), (rows, rows)]


def test_without_buckets_nothing_is_copied() -> None:
    values, sequence = np.ones((3, 2)), np.ones((3, 1, 6))
    assert padded(lambda v, s: v, values, sequence, ()) is values
