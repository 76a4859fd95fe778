"""A version's baseline: measured once, kept in a file, refused when the file is not one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepseek_ray.errors import DataError
from deepseek_ray.online.baseline import MAX_STREAM, Baseline
from deepseek_ray.online.drift import compare
from tests.unit.drift_rows import DIGEST, VERSION, FirstFeature, baseline, scores, training_rows


def test_features_of_the_calendar_and_those_that_never_vary_are_left_out() -> None:
    assert [one.name for one in baseline().features] == ["score_given", "amount"]


def test_held_out_days_are_measured_in_the_order_of_events() -> None:
    rows = training_rows(8_000, first_day=10, seed=1)
    found = Baseline.measure(VERSION, DIGEST, FirstFeature(), training_rows(), rows.select(np.arange(8_000)[::-1]))
    assert found.held_out is not None
    assert found.held_out.rows == 8_000
    assert len(found.held_out.scores) == MAX_STREAM
    assert found.held_out.scores[0] == rows.features[0, 0]
    assert found.held_out.calibration_error < 0.02


def test_it_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    made = baseline()
    found = Baseline.load(made.save(tmp_path / "deep" / "3.safetensors"))
    assert (found.version, found.feature_digest, found.feature_names) == (VERSION, DIGEST, made.feature_names)
    assert found.held_out is not None
    assert made.held_out is not None
    assert found.held_out.average_precision == made.held_out.average_precision
    assert found.score is not None
    assert made.score is not None
    values = scores(500, 7)
    assert compare(found.score, values) == compare(made.score, values)
    assert [one.name for one in found.features] == [one.name for one in made.features]


def test_without_held_out_days_there_is_no_score_to_compare_with(tmp_path: Path) -> None:
    made = Baseline.measure(VERSION, DIGEST, FirstFeature(), training_rows(), None)
    found = Baseline.load(made.save(tmp_path / "3.safetensors"))
    assert (found.score, found.held_out) == (None, None)
    assert len(found.features) == 2


def test_no_rows_are_no_baseline() -> None:
    empty = training_rows().select(np.zeros(2_000, dtype=bool))
    with pytest.raises(DataError, match="0 training rows"):
        Baseline.measure(VERSION, DIGEST, FirstFeature(), empty, None)


@pytest.mark.parametrize("words", [b"", b"not a baseline"])
def test_a_torn_file_is_named_with_the_fix(tmp_path: Path, words: bytes) -> None:
    file = tmp_path / "3.safetensors"
    file.write_bytes(words)
    with pytest.raises(DataError, match=r"3\.safetensors.*measured again"):
        Baseline.load(file)
