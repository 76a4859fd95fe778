"""Feast as registry, offline store and online store of one run."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from feast import FeatureStore
from feast.protos.feast.types.Value_pb2 import Value

from deepseek_ray.data import batch_engine, feature_client, offline_store, windows
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.stream_engine import StreamEngine
from deepseek_ray.errors import FeatureError
from deepseek_ray.paths import RunPaths
from tests.unit.feature_worlds import world
from tests.unit.test_stream_engine import assert_equal, play

DECLARATION = windows.load()
SPEC = DECLARATION.vector("handbook")
_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"


@pytest.fixture
def client(tmp_path: Path) -> FeatureClient:
    client = FeatureClient(RunPaths(tmp_path / "run"))
    client.apply()
    return client


def test_every_vector_is_a_service_with_its_digest(client: FeatureClient) -> None:
    expected = {spec.service: {"vector": spec.name, "digest": spec.digest} for spec in DECLARATION.vectors.values()}
    assert client.services() == expected
    client.apply()
    assert client.services() == expected
    assert client.declaration().vector("default") == DECLARATION.vector("default")


def test_the_fast_join_equals_feasts_own(client: FeatureClient) -> None:
    history = world(120, seed=1)
    table = batch_engine.compute(history, SPEC, label_delay_days=7, sequence_len=3)
    client.write_offline(_rows(table, slice(0, 70)))
    with client.offline_part(SPEC) as files:  # a folder of files, as several processes write it
        for name, rows in (("a", slice(70, 90)), ("b", slice(90, None))):
            pq.write_table(offline_store.to_arrow(_rows(table, rows)), files / f"{name}.parquet")
    asked = history.select("card_id", order_us=pl.col("order_us") + pl.Series(np.arange(120) % 3 * 1_000_000)).sample(
        60, seed=2
    )
    ours = client.historical(asked, SPEC.service)
    frame = asked.select("card_id", event_timestamp=pl.col("order_us").cast(pl.Datetime("us", "UTC"))).to_pandas()
    frame["row"] = range(len(frame))
    features = ["handbook_vector:feature_values", "handbook_vector:sequence", "handbook_vector:order_us"]
    store = FeatureStore(repo_path=str(client.paths.feature_store))
    theirs = store.get_historical_features(frame, features).to_df().sort_values("row")
    np.testing.assert_array_equal(np.stack(list(theirs["feature_values"])), ours.values)
    np.testing.assert_array_equal(np.stack(list(theirs["sequence"])).reshape(ours.sequence.shape), ours.sequence)
    np.testing.assert_array_equal(theirs["order_us"], ours.order_us)


def test_asking_at_the_events_own_order_gives_its_vector(client: FeatureClient) -> None:
    history = world(80, seed=3)
    table = batch_engine.compute(history, SPEC, label_delay_days=7, sequence_len=2)
    client.write_offline(table)
    back = client.historical(history, SPEC.service)
    np.testing.assert_array_equal(back.transaction_id, table.transaction_id)
    np.testing.assert_array_equal(back.values, table.values)
    assert (back.names, back.service, back.digest) == (table.names, table.service, table.digest)


def test_rows_without_history_and_foreign_vectors_are_refused(client: FeatureClient) -> None:
    history = world(20, seed=4)
    with pytest.raises(FeatureError, match="No vectors"):
        client.historical(history, SPEC.service)
    table = batch_engine.compute(history, SPEC, label_delay_days=7, sequence_len=0)
    client.write_offline(table)
    with pytest.raises(FeatureError, match="first is card 'nobody'"):
        client.historical(history.with_columns(card_id=pl.lit("nobody")), SPEC.service)
    with pytest.raises(FeatureError, match="not registered"):
        client.write_offline(_rows(table, slice(None), digest="0" * 64))


def test_states_survive_in_the_online_store_with_exact_vectors(client: FeatureClient) -> None:
    history = world(150, seed=5, cards=5)
    spec = DECLARATION.vector("default")
    table = batch_engine.compute(history, spec, label_delay_days=7, sequence_len=6)
    engine = StreamEngine(DECLARATION, spec, client, label_delay_days=7, sequence_len=6)
    first = play(engine, history.head(100))
    client.close()
    again = copy.copy(client)  # by __reduce__, as Ray moves it between processes
    engine = StreamEngine(DECLARATION, spec, again, label_delay_days=7, sequence_len=6)
    second = play(engine, history.tail(50), also_labels_of=history.head(100))
    assert_equal(first + second, table)
    again.close()


def test_states_are_read_in_the_order_of_the_keys(client: FeatureClient) -> None:
    client.write_states([("s/card/b", b"two", 2), ("s/card/a", b"one", 1), ("s/card/b", b"new", 3)])
    assert client.read_states(["s/card/a", "s/card/none", "s/card/b", "s/card/a"]) == [b"one", None, b"new", b"one"]
    assert client.read_states([]) == []
    client.write_states([])


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
def test_states_are_written_as_feast_writes_them(
    client: FeatureClient, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        states = [(f"s/card/{n}", b"x" * n, 1_772_366_400_000_000 + 10**12 * n + 999_999) for n in range(70)]
        client.write_states(states)
        feast = FeatureStore(repo_path=str(client.paths.feature_store))
        view, online = feast.get_feature_view("entity_state"), feast._get_provider().online_store
        connection = online._get_conn(feast.config)
        (table,) = [name for (name,) in connection.execute(_TABLES) if name.endswith("_entity_state")]
        ours = connection.execute(f'SELECT * FROM "{table}" ORDER BY entity_key').fetchall()
        rows = [
            (feature_client._entity_key(key), {"state": Value(bytes_val=blob)}, feature_client._time(order), None)
            for key, blob, order in states
        ]
        connection.execute(f'DELETE FROM "{table}"')
        online.online_write_batch(feast.config, view, rows, None)
        assert connection.execute(f'SELECT * FROM "{table}" ORDER BY entity_key').fetchall() == ours
        assert len(ours) == 70
        connection.close()
    finally:
        monkeypatch.undo()
        time.tzset()
        feature_client._stamp.cache_clear()


def test_several_writers_append_offline_without_loss(client: FeatureClient) -> None:
    history = world(60, seed=6)
    table = batch_engine.compute(history, SPEC, label_delay_days=7, sequence_len=1)
    parts = [_rows(table, slice(first, first + 20)) for first in (0, 20, 40)]
    with ThreadPoolExecutor(3) as pool:  # each writer has its own client and its own lock file handle
        written = set(pool.map(lambda part: copy.copy(client).write_offline(part), parts))
    assert len(written) == 3
    np.testing.assert_array_equal(client.historical(history, SPEC.service).values, table.values)


def test_a_part_that_was_not_finished_does_not_appear(client: FeatureClient) -> None:
    table = batch_engine.compute(world(20, seed=6), SPEC, label_delay_days=7, sequence_len=1)
    folder = client.write_offline(table).parent

    def half() -> None:
        with client.offline_part(SPEC) as files:
            pq.write_table(offline_store.to_arrow(table), files / "a.parquet")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half()
    assert sorted(file.name for file in folder.iterdir()) == [".write.lock", "part-00000.parquet"]


def test_vectors_written_again_replace_the_former_ones(client: FeatureClient) -> None:
    history = world(60, seed=7)
    for delay, length in ((7, 1), (1, 3)):  # other settings for the same events
        table = batch_engine.compute(history, SPEC, label_delay_days=delay, sequence_len=length)
        client.write_offline(table)
    back = client.historical(history, SPEC.service)
    np.testing.assert_array_equal(back.values, table.values)
    np.testing.assert_array_equal(back.sequence, table.sequence)


def test_a_run_that_was_not_applied_says_so(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="apply"):
        FeatureClient(RunPaths(tmp_path)).services()


def test_the_shipped_store_settings_name_no_path_outside_the_run() -> None:
    settings = yaml.safe_load((windows.DECLARATION.parent / "feature_store.yaml").read_text())
    assert settings["registry"]["path"] == "registry.db"
    assert settings["online_store"] == {"type": "sqlite", "path": "online.db"}


def _rows(table: batch_engine.FeatureTable, rows: slice, digest: str = "") -> batch_engine.FeatureTable:
    return batch_engine.FeatureTable(
        table.order_us[rows],
        table.transaction_id[rows],
        table.card_id[rows],
        table.values[rows],
        table.sequence[rows],
        table.names,
        table.service,
        digest or table.digest,
    )


def test_feast_does_not_switch_the_metrics_of_the_process_to_shared_files() -> None:
    code = (
        "import os, deepseek_ray.data.feature_client, prometheus_client.values as values;"
        "print(values.ValueClass.__name__, [name for name in os.environ if 'MULTIPROC' in name])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "MutexValue []\n"
