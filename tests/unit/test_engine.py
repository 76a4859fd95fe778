"""Which engine computes a run's history, and why."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from deepseek_ray import cluster
from deepseek_ray.config import build_config
from deepseek_ray.data import batch_engine, engine, windows
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.errors import ConfigError, DataError
from deepseek_ray.paths import RunPaths
from tests.unit.feature_worlds import world

SPEC = windows.load().vector("handbook")


def test_auto_stays_local_while_the_history_fits_and_goes_to_ray_when_it_does_not() -> None:
    fits = engine.choose("auto", need=50, available=100, nodes=1)
    outgrown = engine.choose("auto", need=51, available=100, nodes=1)
    assert (fits.engine, outgrown.engine) == (engine.LOCAL, engine.RAY)
    assert "50%" in outgrown.reason


def test_auto_uses_the_machines_of_a_cluster() -> None:
    choice = engine.choose("auto", need=1, available=100, nodes=3)
    assert (choice.engine, "3 machines" in choice.reason) == (engine.RAY, True)


@pytest.mark.parametrize("setting", ["local", "ray"])
def test_a_named_engine_is_taken_whatever_the_size(setting: str) -> None:
    for need in (0, 10**15):
        assert engine.choose(setting, need=need, available=100, nodes=5).engine == setting


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"features\.engine"):
        build_config(overrides=["features.engine=spark"])


def test_a_longer_vector_needs_more_memory() -> None:
    handbook, wide = (windows.load().vector(name) for name in ("handbook", "wide"))
    assert engine.row_bytes(wide, 16) > engine.row_bytes(handbook, 16) > engine.row_bytes(handbook, 0) > 8 * 15


def test_memory_is_bounded_by_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_CGROUP", tmp_path)
    free = engine.available_bytes()
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert engine.available_bytes() == 700 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert engine.available_bytes() > 700


def test_rows_are_counted_in_a_file_and_in_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        world(30, seed=1).write_parquet(tmp_path / f"{name}.parquet")
    assert (engine.num_rows(tmp_path / "a.parquet"), engine.num_rows(tmp_path)) == (30, 60)
    (tmp_path / "a.parquet").write_text("no parquet")
    for wrong in ("a.parquet", "none.parquet"):
        with pytest.raises(DataError, match=wrong):
            engine.num_rows(tmp_path / wrong)


def test_the_local_engine_stores_the_rows_before_a_time_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "inside_cluster", lambda: False)
    monkeypatch.setattr(logging.getLogger("deepseek_ray"), "propagate", True)
    history, source = world(80, seed=3), tmp_path / "transactions.parquet"
    history.write_parquet(source)
    client = FeatureClient(RunPaths(tmp_path))
    client.apply()
    before = int(history["order_us"].sort()[50])
    with caplog.at_level("INFO"):
        choice = engine.store(source, SPEC, client, build_config(), before_us=before)
    known = history.filter(pl.col("order_us") < before)
    stored = client.historical(known, SPEC.service)
    table = batch_engine.compute(known, SPEC, label_delay_days=7, sequence_len=16)
    assert choice.engine == engine.LOCAL
    assert f"local engine: {choice.reason}" in caplog.text
    np.testing.assert_array_equal(stored.values, table.values)
    assert client.historical(history.tail(1), SPEC.service).transaction_id[0] != history["transaction_id"][-1]
