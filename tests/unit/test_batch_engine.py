"""The batch engine against a plain point-in-time self-join in SQL, and against the handbook's own formulas."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

from deepseek_ray.data import batch_engine, windows
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.windows import Feature
from deepseek_ray.errors import FeatureError, SchemaError
from tests.unit.feature_worlds import world

DELAY = 7
SPEC = windows.load().vector("wide")

EVENT_SQL = {
    "count": "count(*)",
    "sum": "sum(e.amount_cents)",
    "mean": "sum(e.amount_cents) / count(*)",
    "std": "stddev_pop(e.amount_cents)",
    "max": "max(e.amount_cents)",
    "rank": "count(*) filter (e.amount_cents < t.amount_cents) / greatest(count(*) - 1, 1)",
    "ratio": "t.amount_cents / nullif(avg(e.amount_cents) filter (e.order_us < t.order_us), 0)",
    "zscore": "(t.amount_cents - avg(e.amount_cents) filter (e.order_us < t.order_us))"
    " / greatest(stddev_pop(e.amount_cents) filter (e.order_us < t.order_us), 100)",
    "large_count": "count(*) filter (e.large)",
    "distinct_terminals": "count(distinct e.terminal_id)",
    "distinct_cards": "count(distinct e.card_id)",
    "since_last_s": "(t.order_us - max(e.order_us) filter (e.order_us < t.order_us)) / 1e6",
    "since_first_s": "case when count(*) > 1 then (t.order_us - min(e.order_us)) / 1e6 end",
    "cold": "(count(*) = 1)::int",
}
LABEL_SQL = {
    "fraud_count": "count(e.fraud_us)",
    "since_last_fraud_s": "(t.order_us - max(e.fraud_us)) / 1e6",
    "since_first_fraud_s": "(t.order_us - min(e.fraud_us)) / 1e6",
}


@pytest.fixture(scope="module")
def history() -> pl.DataFrame:
    return world(700, seed=1)


@pytest.fixture(scope="module")
def table(history: pl.DataFrame) -> batch_engine.FeatureTable:
    return batch_engine.compute(history, SPEC, label_delay_days=DELAY, sequence_len=5)


@pytest.fixture(scope="module")
def database(history: pl.DataFrame) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"threads": 1})
    connection.register("raw", history.to_arrow())
    connection.execute(
        f"""create table tx as select row_number() over () as n, raw.*, case when is_fraud = 1 then
        greatest(label_us, order_us + {DELAY * DAY_US}) end as fraud_us, false as large from raw"""
    )
    connection.execute(
        f"""update tx set large = s.large from (select t.n,
        t.amount_cents * count(e.n) > 3 * coalesce(sum(e.amount_cents), 0) as large
        from tx t left join tx e on e.card_id = t.card_id and e.order_us < t.order_us
        and e.order_us > t.order_us - {30 * DAY_US} group by t.n, t.amount_cents) s where s.n = tx.n"""
    )
    return connection


@pytest.mark.parametrize("aggregation", [*EVENT_SQL, *LABEL_SQL])
def test_features_equal_a_self_join(
    aggregation: str, table: batch_engine.FeatureTable, database: duckdb.DuckDBPyConnection
) -> None:
    features = [f for f in SPEC.features if f.aggregation == aggregation]
    for feature in (features[0], features[-1]):
        expected = _reference(database, feature)
        got = table.values[:, table.names.index(feature.name)]
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-6, err_msg=feature.name)


@pytest.mark.parametrize("key", ["card", "terminal", "device"])
def test_matured_features_equal_a_self_join(
    key: str, table: batch_engine.FeatureTable, database: duckdb.DuckDBPyConnection
) -> None:
    matured = _matured(database, key, 30, "count(e.n)")
    np.testing.assert_array_equal(_column(table, f"{key}_delayed_count_30d"), matured)
    frauds = _column(table, f"{key}_fraud_count_30d")
    np.testing.assert_array_equal(
        _column(table, f"{key}_fraud_share_30d"), np.minimum(1, frauds / np.maximum(matured, 1))
    )
    assert frauds.max() > 1


def test_clean_since_fraud_counts_matured_events_after_the_last_label(
    table: batch_engine.FeatureTable, database: duckdb.DuckDBPyConnection
) -> None:
    query = f"""with last as (select t.n, max(e.fraud_us) as at from tx t join tx e on e.terminal_id = t.terminal_id
        and e.fraud_us <= t.order_us and e.fraud_us > t.order_us - {30 * DAY_US} group by t.n)
        select case when any_value(last.at) is null then -1 else count(e.n) end from tx t left join last using (n)
        left join tx e on e.terminal_id = t.terminal_id and e.order_us > last.at - {DELAY * DAY_US}
        and e.order_us <= t.order_us - {DELAY * DAY_US} group by t.n order by t.n"""
    np.testing.assert_array_equal(_column(table, "terminal_clean_since_fraud_30d"), _numbers(database, query))


def test_clean_ratio_leaves_known_frauds_out(
    table: batch_engine.FeatureTable, database: duckdb.DuckDBPyConnection
) -> None:
    stolen = f"""select coalesce(sum(e.amount_cents), 0) from tx t left join tx e on e.card_id = t.card_id
        and e.fraud_us <= t.order_us and e.fraud_us > t.order_us - {60 * DAY_US} group by t.n order by t.n"""
    total = _matured(database, "card", 60, "coalesce(sum(e.amount_cents), 0)") - _numbers(database, stolen)
    count = _matured(database, "card", 60, "count(e.n)") - _column(table, "card_fraud_count_60d")
    mean = np.where((count > 0) & (total > 0), total / np.maximum(count, 1), np.nan)
    expected = np.where(np.isnan(mean), 1.0, _column(table, "amount_cents") / mean)
    np.testing.assert_allclose(_column(table, "card_clean_ratio_60d"), expected, rtol=1e-12)


def test_the_sequence_holds_the_earlier_events_newest_first(
    history: pl.DataFrame, table: batch_engine.FeatureTable
) -> None:
    row = history.height - 1
    card = history.with_row_index("n").filter(pl.col("card_id") == history["card_id"][row])
    for lag in range(1, 6):
        past = card.row(-1 - lag, named=True)
        amount, age, terminal, country, _, known = table.sequence[row, lag - 1]
        label = max(past["label_us"] or 0, past["order_us"] + DELAY * DAY_US)
        assert amount == past["amount_cents"]
        assert age == (table.order_us[row] - past["order_us"]) / 1e6
        assert terminal == (past["terminal_id"] == history["terminal_id"][row])
        assert country == (past["country"] == history["country"][row])
        assert known == (past["is_fraud"] == 1 and label <= table.order_us[row])
    assert (table.sequence[0, :, 1] == -1).all()


def test_row_order_does_not_matter(history: pl.DataFrame, table: batch_engine.FeatureTable) -> None:
    mixed = history.with_row_index("n").sample(fraction=1.0, shuffle=True, seed=3)
    again = batch_engine.compute(mixed, SPEC, label_delay_days=DELAY, sequence_len=5)
    np.testing.assert_array_equal(again.values, table.values[mixed["n"].to_numpy()])
    np.testing.assert_array_equal(again.sequence, table.sequence[mixed["n"].to_numpy()])


def test_the_future_does_not_change_the_past(history: pl.DataFrame, table: batch_engine.FeatureTable) -> None:
    early = batch_engine.compute(history.head(400), SPEC, label_delay_days=DELAY, sequence_len=5)
    np.testing.assert_array_equal(early.values, table.values[:400])


def test_request_features_and_an_unknown_device(history: pl.DataFrame, table: batch_engine.FeatureTable) -> None:
    times = history["order_us"].cast(pl.Datetime("us"))
    np.testing.assert_array_equal(_column(table, "weekend"), (times.dt.weekday() >= 6).to_numpy())
    np.testing.assert_array_equal(_column(table, "night"), (times.dt.hour() <= 6).to_numpy())
    unknown = (history["device_id"] == "unknown").to_numpy()
    assert (_column(table, "device_count_30d")[unknown] == 0).all()
    assert (_column(table, "device_since_last_s_30d")[unknown] == -1).all()


def test_an_empty_table_gives_an_empty_result(history: pl.DataFrame) -> None:
    table = batch_engine.compute(history.head(0), SPEC, label_delay_days=DELAY, sequence_len=4)
    assert table.values.shape == (0, len(SPEC.names))
    assert table.sequence.shape == (0, 4, 6)


def test_bad_tables_are_refused(history: pl.DataFrame) -> None:
    with pytest.raises(SchemaError, match="'country'"):
        batch_engine.compute(history.drop("country"), SPEC, label_delay_days=DELAY, sequence_len=1)
    flat = history.with_columns(order_us=pl.lit(5, pl.Int64))
    with pytest.raises(FeatureError, match="strictly increase"):
        batch_engine.compute(flat, SPEC, label_delay_days=DELAY, sequence_len=1)


@pytest.mark.skipif("DEEPSEEK_RAY_HANDBOOK" not in os.environ, reason="needs DEEPSEEK_RAY_HANDBOOK")
def test_the_handbook_vector_reproduces_the_published_features() -> None:
    raw = _handbook(Path(os.environ["DEEPSEEK_RAY_HANDBOOK"]))
    spec = windows.load().vector("handbook")
    table = batch_engine.compute(raw, spec, label_delay_days=7, sequence_len=0)
    for name, expected in _published(raw).items():
        np.testing.assert_allclose(_column(table, name), expected, rtol=1e-9, err_msg=name)


def _column(table: batch_engine.FeatureTable, name: str) -> np.ndarray:
    return table.values[:, table.names.index(name)]


def _numbers(database: duckdb.DuckDBPyConnection, query: str) -> np.ndarray:
    return np.array([row[0] for row in database.execute(query).fetchall()], np.float64)


def _reference(database: duckdb.DuckDBPyConnection, feature: Feature) -> np.ndarray:
    by_label = feature.aggregation in LABEL_SQL
    time = "fraud_us" if by_label else "order_us"
    same = " and ".join(f"e.{column} = t.{column}" for column in SPEC.keys[feature.key])
    known = "and t.device_id <> 'unknown'" if feature.key == "device" else ""
    missing = batch_engine.WITHOUT_HISTORY.get(feature.aggregation, 0.0)
    formula = LABEL_SQL[feature.aggregation] if by_label else EVENT_SQL[feature.aggregation]
    query = f"""select coalesce(v, {missing}) from tx left join (
        select t.n, {formula} as v from tx t join tx e on {same} {known} and e.{time} <= t.order_us
        and e.{time} > t.order_us - {feature.window_us} group by t.n, t.amount_cents, t.order_us
    ) using (n) order by n"""
    return _numbers(database, query)


def _matured(database: duckdb.DuckDBPyConnection, key: str, days: int, formula: str) -> np.ndarray:
    column = SPEC.keys[key][0]
    known = "and t.device_id <> 'unknown'" if key == "device" else ""
    return _numbers(
        database,
        f"""select {formula} from tx t left join tx e on e.{column} = t.{column} {known} and e.order_us <= t.order_us
        - {DELAY * DAY_US} and e.order_us > t.order_us - {(DELAY + days) * DAY_US} group by t.n order by t.n""",
    )


def _handbook(folder: Path) -> pl.DataFrame:
    """Terminals and customers below 300 of the published table, in the shape of a transactions table."""
    raw = pl.read_parquet(folder / "*.parquet").filter((pl.col("TERMINAL_ID") < 300) | (pl.col("CUSTOMER_ID") < 100))
    raw = raw.sort("TX_DATETIME", "TRANSACTION_ID").with_columns(n=pl.int_range(pl.len()))
    unknown = {name: pl.lit("unknown") for name in ("device_id", "channel", "country", "merchant_category")}
    return raw.select(
        transaction_id=pl.col("TRANSACTION_ID").cast(pl.String),
        order_us=pl.col("TX_DATETIME").cast(pl.Datetime("us")).cast(pl.Int64) + pl.col("n"),  # unique: no ties
        card_id=pl.col("CUSTOMER_ID").cast(pl.String),
        terminal_id=pl.col("TERMINAL_ID").cast(pl.String),
        amount_cents=(pl.col("TX_AMOUNT") * 100).round().cast(pl.Int64),
        is_fraud=pl.col("TX_FRAUD"),
        label_us=pl.lit(None, pl.Int64),
        **unknown,
    )


def _published(raw: pl.DataFrame) -> dict[str, np.ndarray]:
    """The handbook's recipe with time-based rolling sums, as its text describes it."""
    frame = raw.to_pandas()
    frame["when"] = frame["order_us"].astype("datetime64[us]")
    expected = {"weekend": frame["when"].dt.weekday >= 5, "night": frame["when"].dt.hour <= 6}
    cards, terminals = frame.set_index("when").groupby("card_id"), frame.set_index("when").groupby("terminal_id")
    for days in (1, 7, 30):
        amounts = _rolling(cards["amount_cents"], days, frame, "card_id")
        expected[f"card_count_{days}d"], expected[f"card_mean_{days}d"] = amounts[0], amounts[1] / amounts[0]
        recent, older = (_rolling(terminals["is_fraud"], span, frame, "terminal_id") for span in (7, 7 + days))
        count, fraud = older[0] - recent[0], older[1] - recent[1]
        expected[f"terminal_delayed_count_{days}d"] = count
        expected[f"terminal_fraud_share_{days}d"] = np.where(count > 0, fraud / np.maximum(count, 1), 0)
    return {name: np.asarray(values, np.float64) for name, values in expected.items()}


def _rolling(grouped: object, days: int, frame: object, key: str) -> tuple[np.ndarray, np.ndarray]:
    rolled = grouped.rolling(f"{days}D").agg(["count", "sum"]).reset_index()  # type: ignore[attr-defined]
    merged = frame[[key, "when"]].merge(rolled, on=[key, "when"], how="left")  # type: ignore[index]
    return merged["count"].to_numpy(), merged["sum"].round().to_numpy()
