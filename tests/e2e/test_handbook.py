"""The published protocol as one command, on a small folder of handbook-shaped parquet made here."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from deepseek_ray.config import DataConfig
from deepseek_ray.data.transactions import generate
from deepseek_ray.errors import ConfigError
from pipelines.risk import handbook

YARDSTICKS = ("", "logistic_", "lightgbm_", "lightgbm_history_", "lightgbm_default_", "ceiling_")
DAYS = ["--train-start", "2026-01-20", "--train-days", "5", "--delay-days", "3", "--test-start", "2026-01-28"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty days of a small world, under the handbook's column names."""
    rows = generate(DataConfig(num_customers=200, num_terminals=400, num_days=40), 0)
    number = pl.col("card_id", "terminal_id", "transaction_id").str.extract(r"(\d+)$").cast(pl.Int64)
    shaped = rows.with_columns(number).select(
        pl.col("transaction_id").alias("TRANSACTION_ID"),
        pl.col("event_time").dt.replace_time_zone(None).alias("TX_DATETIME"),
        pl.col("card_id").alias("CUSTOMER_ID"),
        pl.col("terminal_id").alias("TERMINAL_ID"),
        (pl.col("amount_cents") / 100).alias("TX_AMOUNT"),
        pl.col("is_fraud").alias("TX_FRAUD"),
        pl.col("fraud_scenario").alias("TX_FRAUD_SCENARIO"),
    )
    made = tmp_path_factory.mktemp("handbook")
    shaped.write_parquet(made / "days.parquet")
    return made


def test_the_protocol_runs_on_any_folder_and_any_dates(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "handbook.json"
    days = [*DAYS, "--test-days", "7", "--history-days", "15"]
    arguments = ["--data", str(folder), "--json", str(target), "--preset", "debug", "--seed", "3", *days]
    assert handbook.main(arguments) == 0
    found = json.loads(target.read_text(encoding="utf-8"))
    assert (found["seed"], found["test_start"], found["history_days"]) == (3, "2026-01-28", 15)
    assert found["rows_history"] > found["rows_train"] > 1_000
    for prefix in YARDSTICKS:
        assert 0 <= found[f"{prefix}average_precision"] <= found["ceiling_average_precision"]
        assert 0.5 < found[f"{prefix}auc"] <= 1


def test_without_a_folder_the_command_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_RAY_HANDBOOK", raising=False)
    with pytest.raises(ConfigError, match="give --data DIR"):
        handbook.main([])
