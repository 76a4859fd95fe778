"""Datasets and the periods of a run."""

from __future__ import annotations

import dataclasses
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from deepseek_ray.config import DataConfig
from deepseek_ray.data.batch_engine import FeatureTable
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.periods import card_numbers, periods, to_dataset
from deepseek_ray.errors import DataError
from tests.unit.risk_rows import NUM_DAYS, make_rows


def table(num_days: int = 40) -> pl.DataFrame:
    """One transaction a day."""
    return pl.DataFrame(
        {
            "transaction_id": [f"t{day}" for day in range(num_days)],
            "order_us": [day * DAY_US + 5 for day in range(num_days)],
            "card_id": [f"c{day % 3}" for day in range(num_days)],
            "amount_cents": range(num_days),
            "is_fraud": [None if day == 7 else day % 2 for day in range(num_days)],
            "fraud_scenario": [day % 2 for day in range(num_days)],
        }
    )


def test_a_saved_dataset_comes_back_the_same(tmp_path: Path) -> None:
    rows = make_rows(100)
    again = RiskDataset.load(rows.save(tmp_path / "rows.safetensors"))
    assert again.digest == rows.digest
    assert again.feature_names == rows.feature_names
    assert np.array_equal(again.sequence, rows.sequence)


def test_the_digest_sees_one_changed_label() -> None:
    rows = make_rows(100)
    other = dataclasses.replace(rows, label=np.where(np.arange(100) == 3, 1 - rows.label, rows.label).astype(np.int8))
    assert other.digest != rows.digest


def test_the_tail_is_made_of_whole_days_and_comes_last() -> None:
    early, late = make_rows(1_000).split_tail(0.15)
    assert set(early.day) & set(late.day) == set()
    assert len(np.unique(late.day)) == round(0.15 * NUM_DAYS)
    assert early.order_us.max() < late.order_us.min()


def test_select_labelled_and_concat() -> None:
    rows = make_rows(100)
    day_two = rows.select(rows.day == 1)
    assert set(day_two.day) == {1}
    unknown = dataclasses.replace(day_two, label=np.full(len(day_two), -1, dtype=np.int8))
    assert len(unknown.labelled()) == 0
    assert len(rows.concat(unknown).labelled()) == 100


def test_a_number_that_is_none_is_refused() -> None:
    rows = make_rows(100)
    broken = np.where(np.arange(6) == 2, np.nan, rows.features)
    with pytest.raises(DataError, match="NaN"):
        RiskDataset.build(broken, rows.sequence, rows.label, rows.order_us, rows.card, feature_names=rows.feature_names)


def test_columns_of_different_length_are_refused() -> None:
    rows = make_rows(100)
    with pytest.raises(DataError, match="'day' holds 5 rows"):
        dataclasses.replace(rows, day=rows.day[:5])


def test_rows_of_two_vectors_are_not_joined() -> None:
    rows = make_rows(100)
    with pytest.raises(DataError, match="different features"):
        rows.concat(dataclasses.replace(rows, feature_names=tuple("abcdef")))


def test_a_file_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        RiskDataset.load(tmp_path / "x")
    with pytest.raises(DataError, match="cannot be read"):
        RiskDataset.load(tmp_path / "absent")


def test_one_day_has_no_tail() -> None:
    rows = make_rows(100)
    with pytest.raises(DataError, match="cannot be split"):
        rows.select(rows.day == 0).split_tail(0.5)


def test_periods_keep_the_label_delay_between_training_and_judging() -> None:
    found = periods(table(40), DataConfig(train_days=10, holdout_days=5, replay_days=4, label_delay_days=6.5))
    assert (found.replay.first, found.replay.last) == (36, 39)
    assert (found.holdout.first, found.holdout.last) == (31, 35)
    assert (found.train.first, found.train.last) == (14, 23)
    assert found.train.start == date(1970, 1, 15)
    assert found.holdout.filter(table(40))["transaction_id"].to_list() == ["t31", "t32", "t33", "t34", "t35"]


def test_training_takes_what_days_there_are() -> None:
    found = periods(table(30), DataConfig(train_days=60, holdout_days=5, replay_days=4, label_delay_days=7))
    assert (found.train.first, found.train.last) == (0, 13)


def test_too_few_days_are_refused_with_the_settings_named() -> None:
    with pytest.raises(DataError, match=r"data\.holdout_days=5"):
        periods(table(12), DataConfig(train_days=5, holdout_days=5, replay_days=0, label_delay_days=7))
    with pytest.raises(DataError, match="empty"):
        periods(table(0), DataConfig())


def test_vectors_find_the_labels_of_their_transactions() -> None:
    ids = np.array(["t9", "t7", "t2"])
    values = np.arange(6, dtype=float).reshape(3, 2)
    vectors = FeatureTable(
        np.array([9, 7, 2]) * DAY_US,
        ids,
        np.array(["c0", "c1", "c2"]),
        values,
        np.zeros((3, 1, 6)),
        ("a", "b"),
        "s",
        "d",
    )
    rows = to_dataset(vectors, table())
    assert rows.label.tolist() == [1, -1, 0]
    assert rows.amount_cents.tolist() == [9, 7, 2]
    assert rows.day.tolist() == [9, 7, 2]
    with pytest.raises(DataError, match="no transaction"):
        to_dataset(vectors, table(5))


def test_a_card_has_the_same_number_everywhere() -> None:
    assert card_numbers(pl.Series(["b", "a", "b"])).tolist() == card_numbers(pl.Series(["a", "b"]))[[1, 0, 1]].tolist()
