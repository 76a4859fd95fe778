"""The published protocol as one command, on a small folder of handbook-shaped parquet made here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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


def run(folder: Path, target: Path, experiment: str, *options: str) -> dict[str, Any]:
    """The figures of one experiment in the small world, two weeks from 26 January."""
    small = ["--preset", "debug", "--set", "train.epochs=2", "--set", "update.min_labels=5", "--history-days", "12"]
    small += ["--set", "update.epochs=1", "--set", "update.replay_fraction=0.5"]
    dates = ["--train-start", "2026-01-16", "--test-start", "2026-01-26", "--weeks", "2", "--json", str(target)]
    assert handbook.main(["--experiment", experiment, "--data", str(folder), *small, *dates, *options]) == 0
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return found


def test_daily_increments_are_set_beside_weekly_training_and_both_beside_their_ceilings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(folder, tmp_path / "delay.json", "delay")
    weeks = found["weeks"]
    assert [week["test_start"] for week in weeks] == ["2026-01-26", "2026-02-02"]
    for side in ("7d", "1d"):
        assert 0.3 < found[f"recall_{side}"] <= found[f"ceiling_{side}"] + 0.05 < 1.05
        assert found[f"recall_{side}"] == pytest.approx(sum(week[f"recall_{side}"] for week in weeks) / 2)
    assert found["ceiling_1d"] > found["ceiling_7d"]
    late, early = (sum(week[f"false_positives_{side}"] for week in weeks) for side in ("7d", "1d"))
    assert found["false_positive_change"] == pytest.approx((early - late) / late)
    assert "of the ceiling" in capsys.readouterr().out
    assert (tmp_path / "delay.svg").is_file()


def test_folds_are_weeks_apart_and_their_means_are_reported(folder: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path / "folds.json", "folds", "--delay-days", "2", "--test-days", "5")
    assert [fold["test_start"] for fold in found["folds"]] == ["2026-01-26", "2026-02-02"]
    for prefix in ("", "lightgbm_", "ceiling_"):
        values = [fold[f"{prefix}average_precision"] for fold in found["folds"]]
        assert found[f"{prefix}average_precision"] == pytest.approx(sum(values) / 2)
        assert 0.5 < found[f"{prefix}auc"] <= 1


def test_a_new_pattern_is_learnt_by_those_who_learn(folder: Path, tmp_path: Path) -> None:
    settings = ["--set", "update.epochs=2", "--set", "update.lr=5e-3"]
    found = run(folder, tmp_path / "pattern.json", "new-pattern", *settings)
    first, second = found["weeks"]
    sides = ("incremental", "full_retrain", "naive", "frozen")
    assert (found["delay_days"], found["pattern"]) == (1, "terminal-night")
    assert len({first[f"{side}_average_precision"] for side in sides}) == 1  # nobody knows anything yet
    assert second["incremental_new_pattern"] > 2 * second["frozen_new_pattern"]
    assert second["full_retrain_new_pattern"] > 2 * second["frozen_new_pattern"]
    assert found["frozen_forgetting"] == 0 == found["frozen_samples"]
    assert found["compute_share"] == found["incremental_samples"] / found["full_retrain_samples"]
    assert (tmp_path / "pattern.svg").is_file()


def test_one_week_is_too_short_for_a_new_pattern(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--weeks 1 leaves no week"):
        handbook.main(["--experiment", "new-pattern", "--data", str(folder), "--weeks", "1"])


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_a_number_of_weeks_is_a_whole_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        handbook.main([f"--weeks={text}"])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_without_a_folder_the_command_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_RAY_HANDBOOK", raising=False)
    with pytest.raises(ConfigError, match="give --data DIR"):
        handbook.main([])


needs_handbook = pytest.mark.skipif(
    "DEEPSEEK_RAY_HANDBOOK" not in os.environ, reason="DEEPSEEK_RAY_HANDBOOK names no folder"
)


def published_days(experiment: str, folder: Path) -> dict[str, Any]:
    """The figures of an experiment on the published days, as documented."""
    target = folder / "figures.json"
    assert handbook.main(["--experiment", experiment, "--json", str(target)]) == 0
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return found


@needs_handbook
@pytest.mark.slow
@pytest.mark.timeout(5_400)
def test_both_sides_of_the_published_days_come_near_their_ceilings(tmp_path: Path) -> None:
    found = published_days("delay", tmp_path)
    assert found["recall_7d"] >= 0.95 * found["ceiling_7d"]
    assert found["recall_1d"] >= 0.95 * found["ceiling_1d"]
    assert found["false_positive_change"] <= -0.40


@needs_handbook
@pytest.mark.slow
@pytest.mark.timeout(5_400)
def test_the_published_folds_are_beaten(tmp_path: Path) -> None:
    found = published_days("folds", tmp_path)
    ceilings = [fold["ceiling_recall_at_1pct_fpr"] for fold in found["folds"]]
    assert ceilings == pytest.approx([0.784, 0.760, 0.799, 0.746], abs=0.001)
    assert found["average_precision"] > 0.687
    assert found["cp100"] > 0.303


@needs_handbook
@pytest.mark.slow
@pytest.mark.timeout(5_400)
def test_an_increment_on_the_published_days_is_as_good_as_a_full_retrain(tmp_path: Path) -> None:
    found = published_days("new-pattern", tmp_path)
    assert found["of_full_retrain"] >= 0.99
    assert max(found["compute_share"], found["seconds_share"]) <= 0.10
    assert found["forgetting"] <= 0.02
    assert found["incremental_average_precision"] > found["frozen_average_precision"]
