"""Handbook-shaped parquet becomes the transactions table."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from deepseek_ray.config import DataConfig
from deepseek_ray.data import handbook, source, table
from deepseek_ray.errors import DataError, SchemaError


def day_of_payments(first_id: int, day: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "TRANSACTION_ID": pl.Series([first_id, first_id + 1], dtype=pl.Int32),
            "TX_DATETIME": pl.Series(
                [datetime(2018, 4, day, 9, 30), datetime(2018, 4, day, 9, 30)], dtype=pl.Datetime("ns")
            ),
            "CUSTOMER_ID": pl.Series([596, 596], dtype=pl.Int32),
            "TERMINAL_ID": pl.Series([3156, 7], dtype=pl.Int32),
            "TX_AMOUNT": [57.16, 0.29],
            "TX_TIME_SECONDS": pl.Series([31, 32], dtype=pl.Int32),
            "TX_FRAUD": pl.Series([0, 1], dtype=pl.Int8),
            "TX_FRAUD_SCENARIO": pl.Series([0, 2], dtype=pl.Int8),
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # The later day stands in the file that is read first.
    day_of_payments(8, 2).write_parquet(tmp_path / "a.parquet")
    day_of_payments(3, 1).write_parquet(tmp_path / "b.parquet")
    return tmp_path


def test_rows_are_named_in_cents_in_utc_and_in_order(folder: Path) -> None:
    read = handbook.read(folder, label_delay_days=7)
    assert read["transaction_id"].to_list() == ["tx000000003", "tx000000004", "tx000000008", "tx000000009"]
    assert read["card_id"].unique().to_list() == ["c596"]
    assert read["terminal_id"][:2].to_list() == ["t3156", "t7"]
    assert read["amount_cents"][:2].to_list() == [5716, 29]
    assert read["event_time"][0] == datetime(2018, 4, 1, 9, 30, tzinfo=UTC)
    assert read["order_us"][1] == read["order_us"][0] + 1
    assert read["is_fraud"].to_list() == [0, 1, 0, 1]
    assert read["label_us"][0] == read["order_us"][0] + table.delay_us(7)


def test_the_source_of_a_run_may_be_a_folder(folder: Path) -> None:
    assert source.load(DataConfig(source=str(folder)), seed=0).equals(handbook.read(folder))


def test_the_default_source_is_the_generator() -> None:
    config = DataConfig(num_customers=5, num_terminals=5, num_days=3, replay_days=1)
    assert source.load(config, seed=0).height > 0


@pytest.mark.parametrize("name", [".", "none"])
def test_a_folder_without_parquet_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"no \*\.parquet"):
        handbook.read(tmp_path / name)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    day_of_payments(0, 1).drop("TX_FRAUD").write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match=r"lacks the columns \['TX_FRAUD'\]"):
        handbook.read(tmp_path)
    day_of_payments(0, 1).with_columns(TERMINAL_ID=pl.lit("shop")).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match="wrong type"):
        handbook.read(tmp_path)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="not readable parquet"):
        handbook.read(tmp_path)
