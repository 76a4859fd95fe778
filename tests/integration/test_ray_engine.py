"""Features over partitions with Ray Data: the same bits as in one process, whatever the partitions and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import ray

from deepseek_ray.cluster import local_cluster
from deepseek_ray.config import DataConfig, build_config
from deepseek_ray.data import batch_engine, engine, ray_engine, transactions, windows
from deepseek_ray.data.batch_engine import FeatureTable
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.windows import VectorSpec
from deepseek_ray.errors import FeatureError, SchemaError
from deepseek_ray.paths import RunPaths
from tests.unit.feature_worlds import world

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray's own use of its old settings
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves log files and sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
DECLARATION = windows.load()
LENGTH = 5
SETTINGS = {"label_delay_days": 7, "sequence_len": LENGTH}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster(2):
        yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def generated() -> pl.DataFrame:
    return transactions.generate(DataConfig(num_customers=25, num_terminals=40, num_days=60), seed=0)


@pytest.fixture
def client(tmp_path: Path) -> FeatureClient:
    client = FeatureClient(RunPaths(tmp_path / "run"))
    client.apply()
    return client


def blocks(history: pl.DataFrame, folder: Path, count: int) -> Path:
    """The rows shuffled over several files, so that every card spans them."""
    folder.mkdir()
    mixed = history.sample(fraction=1.0, shuffle=True, seed=1)
    size = -(-len(mixed) // count)
    for number in range(count):
        mixed.slice(number * size, size).write_parquet(folder / f"{number}.parquet")
    return folder


def spread(
    source: Path, spec: VectorSpec, client: FeatureClient, parts: int, before_us: int | None = None
) -> FeatureTable:
    """What the Ray engine stored, asked for in the order of the transactions."""
    with client.offline_part(spec) as files:
        ray_engine.write(source, spec, files, num_partitions=parts, before_us=before_us, **SETTINGS)
    rows = pl.read_parquet(source).sort("order_us", "transaction_id")
    return client.historical(rows if before_us is None else rows.filter(pl.col("order_us") < before_us), spec.service)


def assert_same(ours: FeatureTable, expected: FeatureTable) -> None:
    for name in ("transaction_id", "card_id", "order_us", "values", "sequence"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name, strict=True)
    assert (ours.names, ours.service, ours.digest) == (expected.names, expected.service, expected.digest)


@pytest.mark.parametrize("vector", ["default", "wide", "handbook_history"])
def test_both_engines_give_the_same_bits(
    vector: str, generated: pl.DataFrame, client: FeatureClient, tmp_path: Path
) -> None:
    spec = DECLARATION.vector(vector)
    local = batch_engine.compute(generated.sort("order_us", "transaction_id"), spec, **SETTINGS)
    assert local.values[:, spec.positions("card")].any()
    assert_same(spread(blocks(generated, tmp_path / "in", 3), spec, client, parts=4), local)


def test_empty_partitions_one_card_and_ties_change_nothing(client: FeatureClient, tmp_path: Path) -> None:
    history = world(400, seed=5, cards=1, terminals=2).sort("order_us", "transaction_id")
    spec = DECLARATION.vector("default")
    local = batch_engine.compute(history, spec, **SETTINGS)
    assert_same(spread(blocks(history, tmp_path / "in", 4), spec, client, parts=9), local)
    stored = list((client.paths.feature_store / "offline" / spec.service).glob("part-*.parquet/*.parquet"))
    assert len(stored) == 1  # one card, one file; the other eight partitions wrote none


def test_rows_from_a_time_on_are_left_out(generated: pl.DataFrame, client: FeatureClient, tmp_path: Path) -> None:
    rows, spec = generated.sort("order_us", "transaction_id"), DECLARATION.vector("handbook")
    before = int(rows["order_us"][len(rows) // 2])
    local = batch_engine.compute(rows.filter(pl.col("order_us") < before), spec, **SETTINGS)
    rows.write_parquet(tmp_path / "one.parquet")
    assert_same(spread(tmp_path / "one.parquet", spec, client, parts=2, before_us=before), local)


def test_the_setting_brings_the_vectors_into_the_store(client: FeatureClient, tmp_path: Path) -> None:
    history, spec = world(300, seed=8), DECLARATION.vector("handbook")
    history.write_parquet(tmp_path / "in.parquet")
    config = build_config(overrides=["features.engine=ray", f"features.sequence_len={LENGTH}"])
    assert engine.store(tmp_path / "in.parquet", spec, client, config).engine == engine.RAY
    local = batch_engine.compute(history, spec, **SETTINGS)
    assert_same(client.historical(history, spec.service), local)


def test_errors_come_back_as_they_were_raised_and_leave_no_part(client: FeatureClient, tmp_path: Path) -> None:
    history, spec = world(100, seed=2), DECLARATION.vector("handbook")
    history.drop("country").write_parquet(tmp_path / "short.parquet")
    with pytest.raises(SchemaError, match="'country'"):
        spread(tmp_path / "short.parquet", spec, client, parts=2)
    history.with_columns(order_us=pl.lit(history["order_us"][0])).write_parquet(tmp_path / "flat.parquet")
    with pytest.raises(FeatureError, match="strictly increase"):
        spread(tmp_path / "flat.parquet", spec, client, parts=2)
    folder = client.paths.feature_store / "offline" / spec.service
    assert [file.name for file in folder.iterdir()] == [".write.lock"]
